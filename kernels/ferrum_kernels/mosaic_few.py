"""The Mosaic GPU kernel for few rows: each warp decodes, multiplies and writes its outputs alone.

A warpgroup's products by wgmma are waited for by all its warps, and so is what they write; alone, with `mma.sync`, a
warp waits only for the ring, and ptxas may put the products between what decodes. It takes fewer instructions as well,
which bound the kernel where the memory is fast. But each warp loads all activations, so that rows must be few. Where
few tiles are left, as with all tokens at a few experts, programs take halves of them, and each warpgroup every other
group of inputs.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax

from ferrum_kernels import mosaic_registers as pieces
from ferrum_kernels import mosaic_warps as warps
from ferrum_kernels.mosaic_cut import (
    Refs,
    Statics,
    Work,
    by_columns,
    column_of,
    each_tile,
    first_group,
    row_of,
    share_of,
    slot_of,
    when,
)
from ferrum_kernels.mosaic_loop import sums as add_up
from ferrum_kernels.mosaic_loop import turns_of
from ferrum_kernels.mosaic_registers import GROUP, THREADS


def body(s: Statics, registers: tuple[int, int], refs: Refs) -> None:
    """Of the kernel; `registers` are those of a thread that multiplies and of one that copies."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    # Told to be full by the thread that starts the copies, and by each thread that gathers when its pieces are there.
    _init(s.ring.stages, 1 + (THREADS if s.gathers else 0))(refs.full)
    _init(s.ring.stages, s.ring.warpgroups * THREADS // 32)(refs.empty)
    warpgroup = lax.axis_index("warpgroup")

    def copy() -> None:
        plgpu.set_max_registers(registers[1], action="decrease")
        _copy(s, refs)

    def multiply() -> None:
        plgpu.set_max_registers(registers[0], action="increase")
        _multiply(s, refs, warpgroup)

    when(warpgroup == s.ring.warpgroups, copy, multiply)


def _at(s: Statics, step: Any) -> tuple[Any, Any]:
    """A step's slot, and whether the ring has gone round an odd number of times."""
    return slot_of(s, step), lax.div(step, jnp.int32(s.ring.stages)) & 1


def _after(s: Statics, slot: Any, odd: Any) -> tuple[Any, Any]:
    """`_at` one step on: slots come back to the first."""
    last = slot == s.ring.stages - 1
    return jnp.where(last, 0, slot + 1), jnp.where(last, odd ^ 1, odd)


def _copy(s: Statics, refs: Refs) -> None:
    from jax.experimental import pallas as pl

    block, size = s.ring.block, s.ring.outputs // s.copied

    def run(work: Work, _: Work) -> None:
        where, first, column = None, first_group(s, refs, work), column_of(s, work)
        if s.gathers:
            sources = pieces.sources(block, s.pairs_per_row, 2 * refs.x.shape[-1])
            where = sources(refs.order, work.start, work.count)

        def start(columns: int, parts: int, slot: Any, k: Any) -> None:
            words = [refs.words_ring.at[slot, pl.ds(i * size // 2, size // 2 // parts)] for i in range(s.copied)]
            scales = [refs.scales_ring.at[slot, pl.ds(i * size, size // parts)] for i in range(s.copied)]
            to = words, scales, refs.x_ring.at[slot, pl.ds(0, columns)]
            numbers = slot, first + k, column, work.block * block, k * GROUP
            _start(s, columns, parts)(refs.words, refs.scales, refs.x, *to, refs.full, *numbers)

        def copy_group(columns: int, k: Any, at: Any) -> Any:
            slot, odd, used = at
            when(used, lambda: _wait(refs.empty, slot, odd ^ 1))
            if work.shared is None:
                start(columns, 1, slot, k)
            else:
                when(work.shared, lambda: start(columns, 2, slot, k), lambda: start(columns, 1, slot, k))
            if s.gathers:
                pieces.gather(block, columns)(refs.x, where, refs.x_ring.at[slot], k, work.count)
                _tell_when_gathered(refs.full, slot)
            slot, odd = _after(s, slot, odd)
            return slot, odd, used | (slot == 0)

        def copy_groups(columns: int) -> None:
            step = work.turn * s.groups
            at = *_at(s, step), step >= s.ring.stages
            lax.fori_loop(0, s.groups, functools.partial(copy_group, columns), at)

        by_columns(s, work.count, copy_groups)

    each_tile(s, refs, run)


def _multiply(s: Statics, refs: Refs, warpgroup: Any) -> None:

    def multiply_block(work: Work, columns: int) -> None:
        write = warps.write(s, columns)
        begin, every, *outputs = share_of(work, warpgroup)
        rows = warps.targets(columns, s.by_pair)(refs.order, row_of(s, work), work.count)
        turns, more = turns_of(s.groups, columns), ()
        if work.shared is not None:
            turns, more = jnp.where(work.shared, turns_of(s.groups // 2, columns), turns), (every, *outputs)
        rings = refs.words_ring, refs.x_ring, refs.scales_ring, refs.full, refs.empty
        at = _at(s, work.turn * s.groups + begin)
        sums = add_up(s, columns)(*rings, *at, jnp.int32(turns), *more)

        def write_all() -> None:
            for part, total in enumerate(sums):
                column = work.tile * s.width + (warpgroup * s.ring.parts + part) * s.size
                write(total, rows, refs.out, work.count, column)

        def write_one() -> None:
            total = warps.trade(s, columns)(sums, refs.sums, warpgroup)
            write(total, rows, refs.out, work.count, column_of(s, work) + warpgroup * s.size)

        if work.shared is None:
            write_all()
        else:
            when(work.shared, write_one, write_all)

    each_tile(s, refs, lambda work, _: by_columns(s, work.count, functools.partial(multiply_block, work)))


def _address(barriers: Any, slot: Any) -> Any:
    """Of a slot's barrier of 64 bits in shared memory."""
    import jax.experimental.mosaic.gpu as mgpu
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir.dialects import arith, llvm

    i32 = pieces.types()[0]
    return arith.addi(llvm.ptrtoint(i32, utils.memref_ptr(barriers)), arith.muli(slot, mgpu.c(8, i32)))


def _run(text: str, constraints: str, *args: Any) -> None:
    from jaxlib.mlir import ir

    pieces.asm(ir.Type.parse("!llvm.void"), text, constraints, *args, effects=True)


def _init(count: int, arrivals: int) -> Any:
    """A function of a ref of so many barriers: make them ready, seen by all threads."""
    import jax.experimental.mosaic.gpu as mgpu
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def body(_: Any, barriers: Any) -> None:
        text = f"{{ .reg .pred p; setp.eq.s32 p, $1, 0; @p mbarrier.init.shared.b64 [$0], {arrivals}; }}"
        for slot in range(count):
            _run(text, "r,r", _address(barriers, mgpu.c(slot, pieces.types()[0])), mgpu.thread_idx())
        _run("fence.mbarrier_init.release.cluster; bar.sync 0;", "")

    return plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(body)


def _at_barrier(text: str, barriers: Any, slot: Any, *numbers: Any) -> None:
    """Run instructions with the address of a slot's barrier as $0 and the numbers as $1 and on."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def body(_: Any, barriers: Any, *numbers: Any) -> None:
        slot, *more = map(pieces.number, numbers)
        _run(text, ",".join("r" * len(numbers)), _address(barriers, slot), *more)

    scalars = [plgpu.Layout.WG_SPLAT(())] * (1 + len(numbers))
    plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *scalars))(body)(barriers, slot, *numbers)


def _wait(barriers: Any, slot: Any, odd: Any) -> None:
    """Until the phase of that parity is over."""
    text = "{ .reg .pred p; W${:uid}: mbarrier.try_wait.parity.shared.b64 p, [$0], $1, 10000000; @!p bra W${:uid}; }"
    _at_barrier(text, barriers, slot, odd)


def _tell_when_gathered(barriers: Any, slot: Any) -> None:
    """Of each thread once, when all that it gathers so far is there."""
    _at_barrier("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];", barriers, slot)


def _start(s: Statics, columns: int, parts: int) -> Any:
    """A function that starts all copies of a group but gathered rows, and says how many bytes they are.

    Of the tile's outputs it copies the first of so many parts.

    Its arguments are words, scales and x; where they go, words and scales run by run; the barriers of full slots; the
    slot; and where the group, the tile's columns of the result, the block's rows and the group's inputs begin.
    """
    import jax.experimental.mosaic.gpu as mgpu
    from jax.experimental.mosaic.gpu import utils
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, nvvm

    size = s.ring.outputs // s.copied // parts
    count = s.copied * size * (64 + 2) + (0 if s.gathers else columns * 2 * GROUP)

    def body(launch: Any, words: Any, scales: Any, x: Any, *given: Any) -> None:
        to_words, to_scales, to_x, barriers, *numbers = given
        slot, group, column, row, k = map(pieces.number, numbers)
        i32, index = pieces.types()[0], ir.IndexType.get()

        def some(first: Any, length: int) -> Any:
            return mgpu.ds(arith.index_cast(index, first), length)

        def c(n: int) -> Any:
            return mgpu.c(n, i32)

        # The other warps branch over all of it; what is predicated they would have to issue.
        warp = arith.andi(utils.warp_idx(sync=True), c(3))
        with mgpu.when(arith.cmpi(arith.CmpIPredicate.eq, warp, c(0))):
            elected = nvvm.elect_sync()
            text = f"@$1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {count};"
            _run(text, "r,b", _address(barriers, slot), elected)
            # Its phases are not counted here but by the steps.
            barrier = mgpu.BarrierRef(utils.memref_ptr(barriers), c(0), c(0), s.ring.stages)[slot]
            how: dict[str, Any] = {"barrier": barrier, "arrive": False, "predicate": elected}
            tiled: dict[str, Any] = {"swizzle": 128, "gmem_transform": (mgpu.TileTransform((8, 64)),)}
            where = arith.index_cast(index, group)
            for i in range(s.copied):
                first = arith.addi(column, c(i * s.out_columns))
                rows = some(arith.shrui(first, c(1)), size // 2)
                launch.async_copy(src_ref=words, dst_ref=to_words[i], gmem_slice=(where, rows), **tiled, **how)
                launch.async_copy(src_ref=scales, dst_ref=to_scales[i], gmem_slice=(where, some(first, size)), **how)
            if not s.gathers:
                part = some(row, columns), some(k, GROUP)
                launch.async_copy(src_ref=x, dst_ref=to_x, gmem_slice=part, **tiled, **how)

    ref, tiled, scalar = plgpu.RefType(), plgpu.RefType(pieces.transforms(64)), plgpu.Layout.WG_SPLAT(())
    to = [tiled] * s.copied, [ref] * s.copied, tiled
    return plgpu.inline_mgpu(arg_types=(ref, ref, ref, *to, ref, *[scalar] * 5))(body)
