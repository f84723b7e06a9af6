"""Pieces of the Mosaic GPU kernel in which warps multiply alone: loading, multiplying and writing 16 outputs of a part.

A warp's sums by `mma.sync` lie as those of a warp by `wgmma` do, so that layouts are a warpgroup's.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from ferrum_kernels import mosaic_registers as pieces
from ferrum_kernels.mosaic_cut import Statics
from ferrum_kernels.mosaic_registers import GROUP, RUN, THREADS, asm, types

PLANES = 4  # codes of a container
TRADE = 7  # the barrier at which warpgroups have each other's sums
WORDS, RIGHT = 2 * 4, PLANES * 4  # registers of a part's containers, and of eight columns' activations


def _layout(count: int) -> Any:
    """Of an array of so many registers of each thread."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.Layout.WG_STRIDED((count * THREADS,), vec_size=1)


def _array(values: list[Any]) -> Any:
    """A thread's registers, int32, as an array."""
    from jax.experimental.mosaic.gpu import fragmented_array as fa
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import vector

    registers = np.empty((len(values),), dtype=object)
    registers[:] = [vector.broadcast(ir.VectorType.get((1,), types()[0]), value) for value in values]
    layout = _layout(len(values)).to_mgpu()
    return fa.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)


def _place() -> tuple[Any, Any, Any]:
    """A thread's warpgroup, warp of it and lane."""
    import jax.experimental.mosaic.gpu as mgpu
    from jaxlib.mlir.dialects import arith

    i32 = types()[0]
    thread = mgpu.thread_idx()
    warp = arith.andi(arith.shrui(thread, mgpu.c(5, i32)), mgpu.c(3, i32))
    return arith.shrui(thread, mgpu.c(7, i32)), warp, pieces.lane_of_warp()


def _loaded(s: Statics, columns: int) -> int:
    """Registers of a thread: containers, activations and scales."""
    return s.ring.parts * (WORDS + 2) + columns // 8 * RIGHT


def load(s: Statics, columns: int) -> Any:
    """A function of the rings of containers, activations and scales, and a slot: a thread's registers of its group.

    Where turns are shared, the last argument says whose outputs of the slot they are, else they are its warpgroup's.
    """
    import jax.experimental.mosaic.gpu as mgpu
    from jax.experimental.mosaic.gpu import utils
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    parts, count = s.ring.parts, _loaded(s, columns)

    def body(_: Any, words_ring: Any, x_ring: Any, scales_ring: Any, slot: Any, *outputs: Any) -> Any:
        i32, _, f32, _, _ = types()
        slot, (own, warp, lane) = pieces.number(slot), _place()
        warpgroup = pieces.number(outputs[0]) if outputs else own

        def c(n: int) -> Any:
            return mgpu.c(n, i32)

        def bytes_of(ref: Any, *terms: tuple[Any, int]) -> Any:
            at = llvm.ptrtoint(i32, utils.memref_ptr(ref))
            for number, size in terms:
                at = arith.addi(at, arith.muli(number, c(size)))
            return at

        first = [run * s.other + part * s.size for part in range(parts) for run in range(2)]  # output of each run
        at = bytes_of(words_ring, (slot, s.ring.outputs * 64), (warpgroup, parts * s.size * 64))
        at = arith.addi(at, pieces.containers_of_lane(warp))
        values = [value for output in first for value in pieces.load_matrices(at, output * 64)]

        # Of eight rows a lane names row lane % 8, and of 64 inputs piece lane / 8 of eight, or that and 4: `gather` has
        # swapped the pieces by their row.
        row, piece = arith.andi(lane, c(7)), arith.shrui(lane, c(3))
        at = bytes_of(x_ring, (slot, s.ring.block * 2 * GROUP), (row, 128))
        halves = [arith.addi(at, arith.shli(arith.xori(arith.addi(piece, c(n)), row), c(4))) for n in (0, 4)]
        for plane, eight in np.ndindex(PLANES, columns // 8):
            values += pieces.load_matrices(halves[plane % 2], plane // 2 * 1024 + eight * 2048)

        output = arith.addi(arith.muli(warp, c(RUN // 4)), arith.shrui(lane, c(2)))
        at = bytes_of(scales_ring, (slot, s.ring.outputs * 2), (warpgroup, parts * s.size * 2), (output, 2))
        i16, dtype = ir.IntegerType.get_signless(16), ir.MemRefType(scales_ring.type).element_type
        for output in first:
            scale = asm(i16, f"ld.shared.b16 $0, [$1+{output * 2}];", "=h,r", at, effects=True)
            values.append(arith.bitcast(i32, arith.extf(f32, arith.bitcast(dtype, scale))))
        return _array(values)

    ring, scalar = plgpu.RefType(pieces.transforms(64)), plgpu.Layout.WG_SPLAT(())
    result = plgpu.ShapeDtypeStruct((count * THREADS,), jnp.int32, layout=_layout(count))
    scalars = [scalar] * (2 if s.shares else 1)
    return plgpu.inline_mgpu(arg_types=(ring, ring, plgpu.RefType(), *scalars), return_type=result)(body)


def multiply(s: Statics, columns: int) -> Any:
    """A function of each part's sums [64, columns] and what `load` gave: the sums with the group's products."""
    from jax.experimental.mosaic.gpu import fragmented_array as fa
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    parts, count = s.ring.parts, _loaded(s, columns)

    def body(_: Any, totals: list[Any], given: Any) -> list[Any]:
        _, _, f32, one, _ = types()
        given = np.array([pieces.single(register) for register in given.registers.flat], dtype=object)
        words, right, scales = np.split(given, [parts * WORDS, count - 2 * parts])
        words, scales = words.reshape(parts, 2, 2, 2), scales.reshape(parts, 2)
        right = right.reshape(PLANES, columns // 8, 2, 2)
        four = ir.Type.parse("!llvm.struct<(f32, f32, f32, f32)>")
        text = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        text += "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"

        zero = arith.constant(f32, ir.FloatAttr.get(f32, 0.0))
        sums = np.full((parts, columns // 8, 4), zero, dtype=object)
        for plane, half, part in np.ndindex(PLANES, 2, parts):
            # Eight inputs after eight, of each both runs' outputs; decoded here, between products.
            left = [pieces.decode_plane(pair, plane) for pair in words[part, :, half].T.flat]
            for eight in range(columns // 8):
                operands = *left, *right[plane, eight, half], *sums[part, eight]
                result = asm(four, text, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", *operands)
                sums[part, eight] = [llvm.extractvalue(f32, result, [i]) for i in range(4)]

        results = []
        for part, total in enumerate(totals):
            registers = np.empty_like(total.registers)
            old, new = total.registers.reshape(-1, 2, 2), registers.reshape(-1, 2, 2)
            for eight, run, i in np.ndindex(old.shape):
                operands = sums[part, eight, 2 * run + i], scales[part, run], pieces.single(old[eight, run, i])
                value = asm(f32, "{ .reg .f32 s; mov.b32 s, $2; fma.rn.f32 $0, $1, s, $3; }", "=f,f,r,f", *operands)
                new[eight, run, i] = vector.broadcast(one, value)
            results.append(fa.FragmentedArray(_registers=registers, _layout=total.layout, _is_signed=None))
        return results

    sums = pieces.layouts()[2]
    result = plgpu.ShapeDtypeStruct((2 * RUN, columns), jnp.float32, layout=sums)
    return plgpu.inline_mgpu(arg_types=([sums] * parts, _layout(count)), return_type=[result] * parts)(body)


def trade(s: Statics, columns: int) -> Any:
    """A function of both parts' sums, shared memory and the warpgroup: all of the part that has the warpgroup's number.

    Each warpgroup has a sum over half of the inputs. It gives the other part's to the other warpgroup.
    """
    import jax.experimental.mosaic.gpu as mgpu
    from jax.experimental.mosaic.gpu import fragmented_array as fa
    from jax.experimental.mosaic.gpu import utils
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    def body(_: Any, totals: list[Any], memory: Any, warpgroup: Any) -> Any:
        i32, _, f32, one, _ = types()
        warpgroup, count = pieces.number(warpgroup), totals[0].registers.size

        def c(n: int) -> Any:
            return mgpu.c(n, i32)

        first = arith.cmpi(arith.CmpIPredicate.eq, warpgroup, c(0))
        base = arith.addi(llvm.ptrtoint(i32, utils.memref_ptr(memory)), arith.muli(pieces.thread_of_warpgroup(), c(4)))
        here, there = (
            arith.addi(base, arith.muli(at, c(count * 4 * THREADS))) for at in (warpgroup, arith.xori(warpgroup, c(1)))
        )
        mine, other = [], []
        for pair in zip(*(total.registers.flat for total in totals), strict=True):
            a, b = map(pieces.single, pair)
            mine.append(arith.select(first, a, b))
            other.append(arith.select(first, b, a))
        void = ir.Type.parse("!llvm.void")
        for i, value in enumerate(other):
            asm(void, f"st.shared.f32 [$0+{i * 4 * THREADS}], $1;", "r,f", here, value, effects=True)
        asm(void, f"bar.sync {TRADE}, {2 * THREADS};", "", effects=True)
        registers = np.empty_like(totals[0].registers)
        for i, value in enumerate(mine):
            received = asm(f32, f"ld.shared.f32 $0, [$1+{i * 4 * THREADS}];", "=f,r", there, effects=True)
            registers.flat[i] = vector.broadcast(one, arith.addf(value, received))
        return fa.FragmentedArray(_registers=registers, _layout=totals[0].layout, _is_signed=None)

    sums = pieces.layouts()[2]
    result = plgpu.ShapeDtypeStruct((2 * RUN, columns), jnp.float32, layout=sums)
    arguments = [sums] * s.ring.parts, plgpu.RefType(), plgpu.Layout.WG_SPLAT(())
    return plgpu.inline_mgpu(arg_types=arguments, return_type=result)(body)


def targets(columns: int, by_pair: bool) -> Any:
    """A function of order, start and count: the result's row of each row of the block that a thread writes."""
    import jax.experimental.mosaic.gpu as mgpu
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir.dialects import arith

    def body(_: Any, order: Any, start: Any, count: Any) -> Any:
        i32 = types()[0]
        start, count, first = (
            pieces.number(start),
            pieces.number(count),
            arith.shrui(pieces.lane_of_warp(), mgpu.c(2, i32)),
        )
        rows = [arith.addi(first, mgpu.c(eight, i32)) for eight in range(0, columns, 8)]
        return _array([pieces.pair_at(order, start, r, count) if by_pair else arith.addi(start, r) for r in rows])

    scalar, layout = plgpu.Layout.WG_SPLAT(()), _layout(columns // 8)
    result = plgpu.ShapeDtypeStruct((columns // 8 * THREADS,), jnp.int32, layout=layout)
    return plgpu.inline_mgpu(arg_types=(plgpu.RefType(), scalar, scalar), return_type=result)(body)


def write(s: Statics, columns: int) -> Any:
    """A function that writes a part's sums to its columns of `count` rows of the result.

    Its arguments are the sums, the rows' `targets`, the result, count and the first column of the warpgroup's part.
    """
    import jax.experimental.mosaic.gpu as mgpu
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    def body(_: Any, total: Any, rows: Any, out: Any, count: Any, column: Any) -> None:
        i32, i64, f32 = types()[:3]
        count, (_, warp, lane) = pieces.number(count), _place()

        def c(n: int) -> Any:
            return mgpu.c(n, i32)

        # After a matrix of eight outputs by eight rows is turned, a lane has two outputs of row lane / 4.
        row, two = arith.shrui(lane, c(2)), arith.shli(arith.andi(lane, c(3)), c(1))
        along = arith.addi(pieces.number(column), arith.addi(arith.shli(warp, c(3)), two))
        unit = arith.constant(f32, ir.FloatAttr.get(f32, pieces.UNIT))
        sums = total.registers.reshape(columns // 8, 2, 2)
        for eight in range(columns // 8):
            runs = [[arith.mulf(pieces.single(sums[eight, run, i]), unit) for i in range(2)] for run in range(2)]
            offset = arith.muli(arith.extui(i64, pieces.single(rows.registers.flat[eight])), mgpu.c(s.out_columns, i64))
            offset = arith.muli(arith.addi(offset, arith.extui(i64, along)), mgpu.c(2, i64))
            for run, value in enumerate(pieces.packed(runs, s.gated)):
                text = "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;"
                turned = asm(i32, text, "=r,r", value, effects=True)
                text = f"{{ .reg .pred p; setp.lt.s32 p, $0, $1; @p st.global.b32 [$2+{run * 2 * RUN}], $3; }}"
                there = arith.addi(row, c(8 * eight)), count, pieces.address(out, offset), turned
                asm(ir.Type.parse("!llvm.void"), text, "r,r,l,r", *there, effects=True)

    scalar = plgpu.Layout.WG_SPLAT(())
    arguments = pieces.layouts()[2], _layout(columns // 8), plgpu.RefType(), scalar, scalar
    return plgpu.inline_mgpu(arg_types=arguments)(body)
