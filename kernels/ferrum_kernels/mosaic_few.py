"""The Mosaic GPU kernel for few rows: both products of a layer, each warp decoding, multiplying and writing alone.

A warpgroup's products by wgmma are waited for by all its warps, and so is what they write; alone, with `mma.sync`, a
warp waits only for the ring, and ptxas may put the products between what decodes. It takes fewer instructions as well,
which bound the kernel where the memory is fast. But each warp loads all activations, so that rows must be few. Where
few tiles are left, as with all tokens at a few experts, programs take halves of them, and each warpgroup every other
group of inputs.

Down's weights are asked for while gate and up still come, in one ring. A warp of the copying warpgroup counts for each
block which tiles of gate and up are written, and another waits for that count before it asks for the block's rows. So
all programs have to run at once: there are as many as multiprocessors, and another such kernel must not run beside this
one. XLA queues one kernel after the other unless it is told otherwise, which `mosaic.unavailable` looks for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import custom_batching, lax

from ferrum_kernels import mosaic_registers as pieces
from ferrum_kernels import mosaic_signals as signals
from ferrum_kernels import mosaic_warps as warps
from ferrum_kernels.mosaic_cut import (
    Refs,
    Ring,
    Statics,
    Work,
    by_columns,
    column_of,
    first_group,
    row_of,
    share_of,
    slot_of,
    when,
)
from ferrum_kernels.mosaic_loop import sums as add_up
from ferrum_kernels.mosaic_loop import turns_of
from ferrum_kernels.mosaic_matmul import REGISTERS, launch, multiprocessors
from ferrum_kernels.mosaic_registers import GROUP, RUN, THREADS
from ferrum_kernels.mosaic_turns import each_tile
from ferrum_kernels.tiles import PLANE, TiledLinear

NAME = "gptq_experts"
WHOLE = 2  # what a tile of gate and up counts; a half of one counts 1


def experts(
    x: jax.Array,
    gate_up: TiledLinear,
    down: TiledLinear,
    layer: jax.Array | None,
    places: tuple[jax.Array, ...],
    top_k: int,
    pairs: int,
    ring: Ring,
) -> jax.Array:
    """What experts give for each pair: silu(gate) * up, times down.

    Args:
      x: bfloat16 [T, D].
      gate_up: a stack [E], or [L, E] with `layer`: 4 bits, symmetric, groups of 128 inputs, scales of 16 bits.
      down: alike.
      layer: int32 scalar or None.
      places: of `triton_place.place`, cut by the ring's columns.
      top_k: pairs of a token.
      pairs: T * top_k.
      ring: how to cut both products, of warps that are alone.

    Returns:
      bfloat16 [pairs, D]; rows of nobody's pairs are not written.
    """
    order, *tables, written = places
    features, programs = down.k, multiprocessors()
    up = Statics(ring, top_k, False, True, gate_up.num_experts, gate_up.num_blocks, features, programs)
    of_down = Statics(ring, 0, True, False, down.num_experts, down.num_blocks, down.n_per_expert, programs)
    index = jnp.reshape(jnp.asarray(0 if layer is None else layer, jnp.int32), (1,))
    weights = [
        array
        for w, n in ((gate_up, 2 * features), (down, down.n_per_expert))
        for array in (w.words.reshape(-1, n // 2, 2 * PLANE), w.scales.reshape(-1, n))
    ]
    # Its copies are of the kernel's own arguments, which under vmap would be several calls' arrays in one.
    run = custom_batching.sequential_vmap(functools.partial(_run, up, of_down, pairs))
    return run(x, *weights, *tables, order, index, written)


# A program of many layers traces and lowers the kernel once.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(up: Statics, down: Statics, pairs: int, x: jax.Array, *given: jax.Array) -> jax.Array:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    ring, blocks = up.ring, given[-1].shape[0]
    scratch = {"barriers": plgpu.SMEM((2 * (2 * ring.stages + 1),), jnp.int32)}
    if up.shares:
        scratch["sums"] = plgpu.SMEM((2, ring.block, 2 * RUN), jnp.float32)
    shapes = (blocks * ring.block, up.out_columns), (pairs, down.out_columns)
    out = tuple(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    return launch(functools.partial(_body, up, down), out, up, NAME, given[1].dtype, scratch)(x, *given)[1]


def _body(up: Statics, down: Statics, *given: Any, **scratch: Any) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    pieces.name_module(NAME)
    x, *weights, experts, starts, counts, order, layer, written, h, y = given
    ring, barriers, size = up.ring, scratch.pop("barriers"), 2 * up.ring.stages
    full, empty, done = (barriers.at[pl.ds(i * size, size if i < 2 else 2)] for i in range(3))
    tables = {"experts": experts, "starts": starts, "counts": counts, "order": order, "layer": layer}
    shared = {**tables, **scratch, "full": full, "empty": empty}
    up_refs = Refs(x=x, words=weights[0], scales=weights[1], out=h, **shared)
    down_refs = Refs(x=h, words=weights[2], scales=weights[3], out=y, **shared)
    # Told to be full by the thread that starts the copies, and by each thread that gathers when its pieces are there;
    # of down's rows, which are copied at once, the thread that asks for them stands for all of those.
    signals.init(ring.stages, 1 + THREADS)(full)
    signals.init(ring.stages, ring.warpgroups * THREADS // 32)(empty)
    signals.init(1, ring.warpgroups * THREADS // 32)(done)
    warpgroup, registers = lax.axis_index("warpgroup"), REGISTERS[ring.warpgroups, True]

    def copy() -> None:
        plgpu.set_max_registers(registers[1], action="decrease")

        def tell(work: Work) -> None:
            share = WHOLE if work.shared is None else jnp.where(work.shared, 1, WHOLE)
            when(work.turn >= 0, lambda: signals.count(done, written, work.turn & 1, work.block, jnp.int32(share)))

        def copy_up(work: Work, before: Work) -> None:
            _copy(up, up_refs, work, lambda: tell(before))

        def copy_down(work: Work) -> None:
            signals.wait_for_rows(WHOLE * up.tiles)(written, work.block)
            _copy(down, down_refs, work)
            signals.leave_rows(WHOLE * up.tiles + down.tiles)(written, work.block)

        each_tile(up, down, up_refs, copy_up, tell, copy_down)

    def multiply() -> None:
        plgpu.set_max_registers(registers[0], action="increase")

        def multiply_up(work: Work, _: Work) -> None:
            _multiply(up, up_refs, warpgroup, work)
            signals.tell_written(done)

        each_tile(
            up, down, up_refs, multiply_up, lambda _: None, lambda work: _multiply(down, down_refs, warpgroup, work)
        )

    when(warpgroup == ring.warpgroups, copy, multiply)


def _at(s: Statics, step: Any) -> tuple[Any, Any]:
    """A step's slot, and whether the ring has gone round an odd number of times."""
    return slot_of(s, step), lax.div(step, jnp.int32(s.ring.stages)) & 1


def _after(s: Statics, slot: Any, odd: Any) -> tuple[Any, Any]:
    """`_at` one step on: slots come back to the first."""
    last = slot == s.ring.stages - 1
    return jnp.where(last, 0, slot + 1), jnp.where(last, odd ^ 1, odd)


def _copy(s: Statics, refs: Refs, work: Work, meanwhile: Callable[[], None] | None = None) -> None:
    """Copy a tile's groups into the ring.

    `meanwhile` is called where the tile before is all multiplied, so that to wait for what it wrote takes no time.
    """
    from jax.experimental import pallas as pl

    size = s.ring.outputs // s.copied
    where, first, column = None, first_group(s, refs, work), column_of(s, work)
    if s.gathers:
        sources = pieces.sources(s.ring.block, s.pairs_per_row, 2 * refs.x.shape[-1])
        where = sources(refs.order, work.start, work.count)

    def start(parts: int, slot: Any, k: Any) -> None:
        words = [refs.words_ring.at[slot, pl.ds(i * size // 2, size // 2 // parts)] for i in range(s.copied)]
        scales = [refs.scales_ring.at[slot, pl.ds(i * size, size // parts)] for i in range(s.copied)]
        _start(s, parts)(refs.words, refs.scales, words, scales, refs.full, slot, first + k, column)

    def copy_group(columns: int, k: Any, at: Any) -> Any:
        slot, odd, used = at
        # Of down two warps copy. One that had fallen behind by two rounds would take the last for the next.
        when(used, lambda: signals.wait(refs.empty, slot, odd ^ 1, 4 if s.gathers else 2))
        if work.shared is None:
            start(1, slot, k)
        else:
            when(work.shared, lambda: start(2, slot, k), lambda: start(1, slot, k))
        if s.gathers:
            pieces.gather(s.ring.block, columns)(refs.x, where, refs.x_ring.at[slot], k, work.count)
            signals.tell_when_gathered(refs.full, slot)
        else:
            to = refs.x_ring.at[slot, pl.ds(0, columns)]
            _start_rows(s, columns)(refs.x, to, refs.full, slot, work.block * s.ring.block, k * GROUP)
        if meanwhile:
            when(k == min(s.ring.stages, s.groups - 1), meanwhile)
        slot, odd = _after(s, slot, odd)
        return slot, odd, used | (slot == 0)

    def copy_groups(columns: int) -> None:
        at = *_at(s, work.step), work.step >= s.ring.stages
        lax.fori_loop(0, s.groups, functools.partial(copy_group, columns), at)

    by_columns(s, work.count, copy_groups)


def _multiply(s: Statics, refs: Refs, warpgroup: Any, work: Work) -> None:
    def multiply_block(columns: int) -> None:
        write = warps.write(s, columns)
        begin, every, *outputs = share_of(work, warpgroup)
        rows = warps.targets(columns, s.by_pair)(refs.order, row_of(s, work), work.count)
        turns, more = turns_of(s.groups, columns), ()
        if work.shared is not None:
            turns, more = jnp.where(work.shared, turns_of(s.groups // 2, columns), turns), (every, *outputs)
        rings = refs.words_ring, refs.x_ring, refs.scales_ring, refs.full, refs.empty
        at = _at(s, work.step + begin)
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

    by_columns(s, work.count, multiply_block)


def _some(first: Any, length: int) -> Any:
    import jax.experimental.mosaic.gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    return mgpu.ds(arith.index_cast(ir.IndexType.get(), first), length)


def _how(s: Statics, barriers: Any, slot: Any, text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of copies by one thread, which first tells a slot's barrier by a text; and of those whose pieces are swapped."""
    import jax.experimental.mosaic.gpu as mgpu
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir.dialects import nvvm

    elected, zero = nvvm.elect_sync(), mgpu.c(0, pieces.types()[0])
    signals.run_text(text, "r,b", signals.address(barriers, slot), elected)
    # Its phases are not counted here but by the steps.
    barrier = mgpu.BarrierRef(utils.memref_ptr(barriers), zero, zero, s.ring.stages)[slot]
    how = {"barrier": barrier, "arrive": False, "predicate": elected}
    return how, {**how, "swizzle": 128, "gmem_transform": (mgpu.TileTransform((8, 64)),)}


def _start(s: Statics, parts: int) -> Any:
    """A function that starts all copies of a group's weights, and says how many bytes they are.

    Of the tile's outputs it copies the first of so many parts.

    Its arguments are words and scales; where they go, run by run; the barriers of full slots; the slot; and where the
    group and the tile's columns of the result begin.
    """
    import jax.experimental.mosaic.gpu as mgpu
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    size = s.ring.outputs // s.copied // parts

    def body(launch: Any, words: Any, scales: Any, to_words: Any, to_scales: Any, barriers: Any, *numbers: Any) -> None:
        slot, group, column = map(pieces.number, numbers)
        i32, where = pieces.types()[0], arith.index_cast(ir.IndexType.get(), group)
        with signals.of_warps(signals.WEIGHTS):
            text = f"@$1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {s.copied * size * (64 + 2)};"
            how, swapped = _how(s, barriers, slot, text)
            for i in range(s.copied):
                first = arith.addi(column, mgpu.c(i * s.out_columns, i32))
                rows = _some(arith.shrui(first, mgpu.c(1, i32)), size // 2)
                launch.async_copy(src_ref=words, dst_ref=to_words[i], gmem_slice=(where, rows), **swapped)
                launch.async_copy(src_ref=scales, dst_ref=to_scales[i], gmem_slice=(where, _some(first, size)), **how)

    ref, tiled, scalar = plgpu.RefType(), plgpu.RefType(pieces.transforms(64)), plgpu.Layout.WG_SPLAT(())
    return plgpu.inline_mgpu(arg_types=(ref, ref, [tiled] * s.copied, [ref] * s.copied, ref, *[scalar] * 3))(body)


def _start_rows(s: Statics, columns: int) -> Any:
    """A function that starts the copy of a group of a block's rows.

    Its arguments are rows, where they go, the barriers of full slots, the slot, and where rows and inputs begin.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def body(launch: Any, x: Any, to: Any, barriers: Any, *numbers: Any) -> None:
        slot, row, k = map(pieces.number, numbers)
        with signals.of_warps(signals.ROWS):
            text = f"@$1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {columns * 2 * GROUP};"
            text += f" @$1 mbarrier.arrive.shared::cta.b64 _, [$0], {THREADS - 1};"
            _, swapped = _how(s, barriers, slot, text)
            launch.async_copy(src_ref=x, dst_ref=to, gmem_slice=(_some(row, columns), _some(k, GROUP)), **swapped)

    ref, tiled, scalar = plgpu.RefType(), plgpu.RefType(pieces.transforms(64)), plgpu.Layout.WG_SPLAT(())
    return plgpu.inline_mgpu(arg_types=(ref, tiled, ref, *[scalar] * 3))(body)
