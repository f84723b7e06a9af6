"""Pieces of the Mosaic GPU kernel in which warps multiply alone: trading sums and writing 16 outputs of a part."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from ferrum_kernels import mosaic_registers as pieces
from ferrum_kernels.mosaic_cut import Statics
from ferrum_kernels.mosaic_registers import RUN, THREADS, asm, types

TRADE = 7  # the barrier at which warpgroups have each other's sums


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
        count, (_, warp, lane) = pieces.number(count), pieces.place()

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
