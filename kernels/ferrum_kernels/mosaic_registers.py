"""Pieces of the Mosaic GPU kernel that speak of single threads: decoding, scaling, gathering rows and writing them.

A warpgroup's 64 outputs are two runs of 32: of a warp's 16 rows of the matrix units the first 8 are of run 0, the rest
of run 1. So a thread that holds a gate value holds its up value as well, and the shared memory keeps gate and up apart.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

GROUP = 128  # inputs of a step of the kernel
RUN = 32  # outputs of a run
THREADS = 128  # of a warpgroup
UNIT = 4  # decoded weights are (code - 8) / UNIT


def layouts() -> Any:
    """Which thread holds what: a run's outputs as they are written, its scales, both runs' sums, their 64 outputs."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    tiled = plgpu.Layout.TILED
    pairs = ((8, 8), (2,))
    run = tiled(plgpu.Tiling(((RUN, 8), *pairs)), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
    scales = tiled(
        plgpu.Tiling(((RUN,), (8,), (1,))), warp_dims=(-3,), lane_dims=(-2, plgpu.Replicated(4)), vector_dim=-1
    )
    both = tiled(plgpu.Tiling(((2 * RUN, 8), (RUN, 8), *pairs)), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
    return run, scales, plgpu.Layout._WGMMA_ACC_32BIT, both


def transforms(columns: int) -> Any:
    """How rows of 32 or 64 numbers of 16 bits lie in shared memory, so that 8 rows meet no bank twice."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns)


def asm(result: Any, text: str, constraints: str, *args: Any, effects: bool = False) -> Any:
    """The result of PTX instructions; `effects`: they keep their order among others that have effects."""
    from jaxlib.mlir.dialects import llvm

    return llvm.inline_asm(result, list(args), text, constraints, asm_dialect=0, has_side_effects=effects)


def types() -> Any:
    """int32, int64, float32, a register of a float32 array, two of bfloat16 in a register."""
    from jaxlib.mlir import ir

    i32, f32, bf16 = ir.IntegerType.get_signless(32), ir.F32Type.get(), ir.BF16Type.get()
    return i32, ir.IntegerType.get_signless(64), f32, ir.VectorType.get((1,), f32), ir.VectorType.get((2,), bf16)


def single(register: Any) -> Any:
    """The number in a register of an array."""
    from jaxlib.mlir.dialects import vector

    return vector.extract(register, dynamic_position=[], static_position=[0])


def decode_text(plane: int, into: str, pair: str) -> str:
    """PTX for a plane's codes of two containers in a register as two of bfloat16: (code - 8) / UNIT."""
    shifted = f"shr.b32 t, {pair}, 8;" if plane >= 2 else f"mov.b32 t, {pair};"
    # With these bits around it the code of an even plane is 32 + code / 4. That of an odd plane is, where it lies, the
    # subnormal number code / 2^129, which 2^127 makes code / 4: no shift for it.
    masked = "and.b32 t, t, 0x00f000f0;" if plane % 2 else "lop3.b32 t, t, 0x000f000f, 0x42004200, 0xea;"
    factor, term = ("0x7f007f00", "0xc000c000") if plane % 2 else ("0x3f803f80", "0xc208c208")
    constants = f".reg .b32 t, m, u; mov.b32 u, {factor}; mov.b32 m, {term};"
    return f"{{ {constants} {shifted} {masked} fma.rn.bf16x2 {into}, t, u, m; }}"


def decode() -> Any:
    """A function of two refs [16, 64] of containers, two outputs to a row: bfloat16 [64, 128] for wgmma."""
    import jax.experimental.mosaic.gpu as mgpu
    from jax.experimental.mosaic.gpu import fragmented_array as fa
    from jax.experimental.mosaic.gpu import utils
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir.dialects import arith, llvm

    def body(_: Any, *runs: Any) -> Any:
        i32, _, _, _, pair = types()

        inside = containers_of_lane(arith.shrui(thread_of_warpgroup(), mgpu.c(5, i32)))
        words = [load_matrices(arith.addi(llvm.ptrtoint(i32, utils.memref_ptr(run)), inside)) for run in runs]
        registers = np.empty(fa.WGMMA_LAYOUT.registers_shape((2 * RUN, GROUP)), dtype=object)
        flat = registers.reshape(GROUP // RUN, RUN // 8, 2)
        for plane, column, run in np.ndindex(flat.shape):
            decoded = asm(i32, decode_text(plane, "$0", "$1"), "=r,r", words[run][column])
            flat[plane, column, run] = llvm.bitcast(pair, decoded)
        return fa.FragmentedArray(_registers=registers, _layout=fa.WGMMA_LAYOUT, _is_signed=None)

    ref = plgpu.RefType(transforms(64))
    result = plgpu.ShapeDtypeStruct((2 * RUN, GROUP), jnp.bfloat16, layout=plgpu.Layout.WGMMA)
    return plgpu.inline_mgpu(arg_types=(ref, ref), return_type=result)(body)


def containers_of_lane(warp: Any) -> Any:
    """The 16 bytes of a run's containers that a lane names for `load_matrices`: of output lane % 8 piece lane / 8."""
    import jax.experimental.mosaic.gpu as mgpu
    from jaxlib.mlir.dialects import arith

    def c(n: int) -> Any:
        return mgpu.c(n, types()[0])

    lane = lane_of_warp()
    output, piece = arith.andi(lane, c(7)), arith.shrui(lane, c(3))
    row = arith.addi(arith.muli(warp, c(4)), arith.shrui(output, c(1)))
    piece = arith.addi(arith.shli(arith.andi(output, c(1)), c(2)), piece)
    return arith.addi(arith.muli(row, c(128)), arith.muli(arith.xori(piece, arith.andi(row, c(7))), c(16)))


def load_matrices(at: Any) -> list[Any]:
    """Four matrices [8, 8] of 16 bits from shared memory, whose 32 rows the lanes name."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    i32 = types()[0]
    four = ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>")
    text = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];"
    loaded = asm(four, text, "=r,=r,=r,=r,r", at, effects=True)
    return [llvm.extractvalue(i32, loaded, [i]) for i in range(4)]


def rescale(columns: int) -> Any:
    """A function of sums [64, columns] and the two runs' scales [32], old and new: sums * old / new in float32."""
    from jax.experimental.mosaic.gpu import fragmented_array as fa
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir.dialects import arith, vector

    _, row, sums, _ = layouts()

    def body(_: Any, total: Any, *scales: Any) -> Any:
        _, _, f32, one, _ = types()
        a, b, c, d = map(_scale, scales)
        text = "{ .reg .f32 t; rcp.approx.ftz.f32 t, $2; mul.f32 $0, t, $1; }"
        ratios = [asm(f32, text, "=f,f,f", *pair) for pair in ((a, c), (b, d))]
        registers = np.empty_like(total.registers)
        old, result = total.registers.reshape(-1, 2, 2), registers.reshape(-1, 2, 2)
        ratios = [vector.broadcast(one, ratio) for ratio in ratios]
        for at in np.ndindex(old.shape):
            result[at] = arith.mulf(old[at], ratios[at[1]])
        return fa.FragmentedArray(_registers=registers, _layout=total.layout, _is_signed=None)

    result = plgpu.ShapeDtypeStruct((2 * RUN, columns), jnp.float32, layout=sums)
    return plgpu.inline_mgpu(arg_types=(sums, row, row, row, row), return_type=result)(body)


def _scale(array: Any) -> Any:
    """A thread's scale in float32; for zero a number so small that its group adds nothing that a float32 sum keeps."""
    f32 = types()[2]
    text = "{ .reg .pred p; .reg .f32 t; mov.f32 t, 0f21800000; setp.eq.f32 p, $1, 0f00000000; selp.f32 $0, t, $1, p; }"
    return asm(f32, text, "=f,f", single(array.registers.flat[0]))


def place() -> tuple[Any, Any, Any]:
    """This thread's warpgroup, warp of it and lane, int32."""
    import jax.experimental.mosaic.gpu as mgpu
    from jaxlib.mlir.dialects import arith

    i32 = types()[0]
    thread = mgpu.thread_idx()
    warp = arith.andi(arith.shrui(thread, mgpu.c(5, i32)), mgpu.c(3, i32))
    return arith.shrui(thread, mgpu.c(7, i32)), warp, lane_of_warp()


def thread_of_warpgroup() -> Any:
    """This thread's number in its warpgroup, int32."""
    import jax.experimental.mosaic.gpu as mgpu
    from jaxlib.mlir.dialects import arith

    return arith.remui(mgpu.thread_idx(), mgpu.c(THREADS, types()[0]))


def lane_of_warp() -> Any:
    """This thread's number in its warp, int32."""
    import jax.experimental.mosaic.gpu as mgpu
    from jaxlib.mlir.dialects import arith

    return arith.andi(mgpu.thread_idx(), mgpu.c(31, types()[0]))


def number(x: Any) -> Any:
    """A scalar's value."""
    return x.registers.flat[0]


def address(ref: Any, byte_offset: Any) -> Any:
    """A pointer so many bytes (int64) behind the start of a ref."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir

    return utils.getelementptr(utils.memref_ptr(ref), [byte_offset], ir.IntegerType.get_signless(8))


def pair_at(order: Any, start: Any, row: Any, count: Any) -> Any:
    """order[start + row], the last row's for rows that are not there."""
    import jax.experimental.mosaic.gpu as mgpu
    from jaxlib.mlir.dialects import arith, llvm

    i32, i64 = types()[:2]
    place = arith.addi(start, arith.minsi(row, arith.subi(count, mgpu.c(1, i32))))
    return llvm.load(i32, address(order, arith.muli(arith.extui(i64, place), mgpu.c(4, i64))))


def sources(block: int, pairs_per_row: int, row_bytes: int) -> Any:
    """A function of order, start and count: where in x, in bytes, each row of a block begins that a thread copies.

    Eight rows are copied at once, 16 threads to a row.
    """
    import jax.experimental.mosaic.gpu as mgpu
    from jax.experimental.mosaic.gpu import fragmented_array as fa
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, vector

    layout = plgpu.Layout.WG_STRIDED((block // 8 * THREADS,), vec_size=1)

    def body(_: Any, order: Any, start: Any, count: Any) -> Any:
        i32 = types()[0]
        first = arith.shrui(thread_of_warpgroup(), mgpu.c(4, i32))
        registers = np.empty((block // 8,), dtype=object)
        for i in range(block // 8):
            pair = pair_at(order, number(start), arith.addi(first, mgpu.c(8 * i, i32)), number(count))
            row = arith.divui(pair, mgpu.c(pairs_per_row, i32))
            offset = arith.muli(row, mgpu.c(row_bytes, i32))
            registers[i] = vector.broadcast(ir.VectorType.get((1,), i32), offset)
        return fa.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=False)

    scalar = plgpu.Layout.WG_SPLAT(())
    result = plgpu.ShapeDtypeStruct((block // 8 * THREADS,), jnp.uint32, layout=layout)
    return plgpu.inline_mgpu(arg_types=(plgpu.RefType(), scalar, scalar), return_type=result)(body)


def gather(block: int, rows: int) -> Any:
    """A function of x, `sources`, a ref [block, 128] in shared memory, a step and a count of rows: starts copying them.

    There are at most `rows`. Rows behind them keep what they held: a column of a product is its row's alone.
    """
    import jax.experimental.mosaic.gpu as mgpu
    from jax.experimental.mosaic.gpu import utils
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    layout = plgpu.Layout.WG_STRIDED((block // 8 * THREADS,), vec_size=1)

    def body(_: Any, x: Any, offsets: Any, to: Any, step: Any, count: Any) -> None:
        i32, i64 = types()[:2]
        thread = thread_of_warpgroup()

        def c(n: int) -> Any:
            return mgpu.c(n, i32)

        row, chunk = arith.shrui(thread, c(4)), arith.andi(thread, c(15))
        along = arith.addi(arith.muli(number(step), c(2 * GROUP)), arith.muli(chunk, c(16)))
        # A tile of 8 rows of 128 bytes; the 16-byte pieces of a row are swapped by its number.
        piece = arith.xori(arith.andi(chunk, c(7)), row)
        inside = arith.addi(arith.muli(arith.shrui(chunk, c(3)), c(1024)), arith.muli(row, c(128)))
        inside = arith.addi(inside, arith.muli(piece, c(16)))
        base = arith.addi(llvm.ptrtoint(i32, utils.memref_ptr(to)), inside)
        left = arith.subi(number(count), row)
        for i in range(rows // 8):
            offset = arith.addi(arith.extui(i64, single(offsets.registers.flat[i])), arith.extui(i64, along))
            text = f"setp.gt.s32 p, $2, {8 * i}; @p cp.async.cg.shared.global [$0+{i * 2048}], [$1], 16;"
            asm(
                ir.Type.parse("!llvm.void"),
                f"{{ .reg .pred p; {text} }}",
                "r,l,r",
                base,
                address(x, offset),
                left,
                effects=True,
            )

    shared = plgpu.RefType(transforms(64))
    scalar = plgpu.Layout.WG_SPLAT(())
    return plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, shared, scalar, scalar))(body)


def name_module(name: str) -> None:
    """Name the kernel's module for dumps, where JAX would number the modules of a process.

    The number would be part of what is compiled: equal kernels would be compiled once each, and the compile cache would
    not know them again when they are lowered in another order.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir

    def body(launch: Any) -> None:
        launch.module.operation.attributes["mosaic_gpu.dump_basename"] = ir.StringAttr.get(name)

    plgpu.inline_mgpu()(body)()


def instruction(text: str) -> None:
    """Run an instruction without operands."""
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir

    plgpu.inline_mgpu()(lambda _: (asm(ir.Type.parse("!llvm.void"), text, "", effects=True), None)[1])()


def packed(sums: Any, gated: bool) -> list[Any]:
    """Two columns' float32 sums of one output of each run, [run, column], as pairs of bfloat16: silu(gate) * up is one.

    Returns:
      int32 registers, the first column low.
    """
    i32, _, f32 = types()[:3]

    def silu_times(gate: Any, up: Any) -> Any:
        text = "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000; "
        text += "rcp.approx.ftz.f32 t, t; mul.f32 t, t, $1; mul.f32 $0, t, $2; }"
        return asm(f32, text, "=f,f,f", gate, up)

    runs = [[silu_times(sums[0][i], sums[1][i]) for i in range(2)]] if gated else sums
    return [asm(i32, "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", high, low) for low, high in runs]


def write(rows: int, gated: bool, by_pair: bool, out_columns: int) -> Any:
    """A function that writes a warpgroup's sums [64, rows] to its columns of `count` rows of the result.

    Its arguments are the sums, the two runs' scales, a ref [rows, 32 or 64] in shared memory, the result, order, start,
    count and the first column. Gated sums become silu(gate) * up, half as many.
    """
    import jax.experimental.mosaic.gpu as mgpu
    from jax.experimental.mosaic.gpu import fragmented_array as fa
    from jax.experimental.mosaic.gpu import utils
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    one_run, row, sums_layout, both = layouts()
    columns = RUN if gated else 2 * RUN
    layout = (one_run if gated else both).to_mgpu()
    pieces = columns // 8  # of 16 bytes in a row
    turns = -(-rows * pieces // THREADS)

    def body(
        _: Any, total: Any, a: Any, b: Any, shared: Any, out: Any, order: Any, start: Any, count: Any, column: Any
    ) -> None:
        i32, i64, f32 = types()[:3]
        start, count, column = (number(s) for s in (start, count, column))

        def c(n: int) -> Any:
            return mgpu.c(n, i32)

        thread = thread_of_warpgroup()
        piece, first = arith.andi(thread, c(pieces - 1)), arith.shrui(thread, c(int(math.log2(pieces))))
        there = [arith.addi(first, c(i * THREADS // pieces)) for i in range(turns)]
        targets = [pair_at(order, start, r, count) if by_pair else arith.addi(start, r) for r in there]

        registers = np.empty(layout.registers_shape((columns, rows)), dtype=object)
        sums = total.registers.reshape(rows // 8, 2, 2)
        unit = arith.constant(f32, ir.FloatAttr.get(f32, UNIT))
        scales = [arith.mulf(_scale(array), unit) for array in (a, b)]
        flat = registers.reshape(rows // 8, 1 if gated else 2)
        for at in range(rows // 8):
            runs = [[arith.mulf(single(sums[at, run, i]), scales[run]) for i in range(2)] for run in range(2)]
            flat[at] = [llvm.bitcast(types()[-1], register) for register in packed(runs, gated)]
        utils.warpgroup_barrier()  # the last block's rows have left
        values = fa.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)
        values.store_tiled(mgpu.memref_transpose(shared, (1, 0, 3, 2)), 2 * columns)
        utils.warpgroup_barrier()
        vector = ir.VectorType.get((4,), i32)
        for at, (place, target) in enumerate(zip(there, targets, strict=True)):
            if turns * THREADS > rows * pieces:  # some threads have no row
                place = arith.minsi(place, c(rows - 1))
            swap = arith.andi(place if columns == 64 else arith.shrui(place, c(1)), c(pieces - 1))
            inside = arith.addi(arith.muli(place, c(2 * columns)), arith.muli(arith.xori(piece, swap), c(16)))
            value = llvm.load(vector, address(shared, arith.extui(i64, inside)))
            parts = [llvm.extractelement(value, c(i)) for i in range(4)]
            along = arith.muli(arith.addi(column, arith.muli(piece, c(8))), c(2))
            offset = arith.muli(arith.extui(i64, target), mgpu.c(2 * out_columns, i64))
            asm(
                ir.Type.parse("!llvm.void"),
                "{ .reg .pred p; setp.lt.s32 p, $0, $1; @p st.global.v4.b32 [$2], {$3, $4, $5, $6}; }",
                "r,r,l,r,r,r,r",
                there[at],
                count,
                address(out, arith.addi(offset, arith.extui(i64, along))),
                *parts,
                effects=True,
            )

    scalar = plgpu.Layout.WG_SPLAT(())
    refs = plgpu.RefType(transforms(columns)), plgpu.RefType(), plgpu.RefType()
    return plgpu.inline_mgpu(arg_types=(sums_layout, row, row, *refs, scalar, scalar, scalar))(body)
