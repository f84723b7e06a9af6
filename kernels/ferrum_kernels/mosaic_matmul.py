"""The product kernel of the Mosaic GPU backend, for Hopper: products of experts, or of many rows with one matrix.

A program stays on its multiprocessor and takes one tile after another: some outputs of a block's expert. Its last
warpgroup copies weights and activations into a ring in shared memory; the others decode weights in registers, where
they are wgmma's left operand, so that tokens are its columns. A block is multiplied in as few columns as hold its rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_kernels import mosaic_registers as pieces
from ferrum_kernels.mosaic_cut import (
    Refs,
    Statics,
    Work,
    by_columns,
    each_tile,
    first_group,
    is_work,
    row_of,
    slot_of,
    when,
)
from ferrum_kernels.mosaic_cut import Ring as Ring
from ferrum_kernels.mosaic_registers import GROUP, RUN
from ferrum_kernels.tiles import PLANE, TiledLinear
from ferrum_kernels.triton_matmul import Rows

# Registers of a thread that multiplies and of one that copies, by how many warpgroups multiply and whether rows are
# gathered: those that all threads of a program get, 168 each of 384 threads and 96 of 640, are shared out anew. With
# fewer for two warpgroups, ptxas has every single wgmma waited for (it says so: C7512).
REGISTERS = {(2, True): (224, 56), (2, False): (232, 40), (4, True): (104, 56), (4, False): (112, 32)}


def product(
    x: jax.Array,
    w: TiledLinear,
    layer: jax.Array | None,
    rows: Rows,
    out_rows: int,
    ring: Ring,
    *,
    gated: bool = False,
    pairs_per_row: int = 0,
    by_pair: bool = False,
) -> jax.Array:
    """Rows times their experts' weights.

    Args:
      x: bfloat16 [X, K]: tokens of `pairs_per_row` pairs each, or rows in blocks of ring.block.
      w: a stack [E], or [L, E] with `layer`: 4 bits, symmetric, groups of 128 inputs, scales of 16 bits.
      layer: int32 scalar or None.
      rows: experts, starts and counts of each block, and order; blocks without rows come last.
      out_rows: rows of the result.
      ring: how to cut, of warps that are not alone.
      gated: the outputs are gate and up columns; write silu(gate) * up.
      pairs_per_row: 0 where x is in blocks.
      by_pair: write to the pair's row, else row r of block b to row b * ring.block + r.

    Returns:
      bfloat16 [out_rows, N] or [out_rows, N / 2]; rows that no block has are not written.
    """
    n, programs = w.words.shape[-2], multiprocessors()
    out_columns = n // 2 if gated else n
    statics = Statics(ring, pairs_per_row, by_pair, gated, w.num_experts, w.num_blocks, out_columns, programs)
    index = jnp.reshape(jnp.asarray(0 if layer is None else layer, jnp.int32), (1,))
    words, scales = w.words.reshape(-1, n // 2, 2 * PLANE), w.scales.reshape(-1, n)
    tables = rows.experts, rows.starts, rows.counts, rows.order
    return _run(statics, out_rows, x, words, scales, *tables, index)


# A program of many layers traces and lowers the kernel once.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(s: Statics, out_rows: int, x: jax.Array, words: jax.Array, scales: jax.Array, *tables: jax.Array) -> jax.Array:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    ring = s.ring
    staging = (ring.warpgroups, ring.block, s.size)
    copies = 2 * s.copied  # of words and scales
    scratch = {
        "staging": plgpu.SMEM(staging, jnp.bfloat16, transforms=pieces.transforms(s.size)),
        "full": plgpu.Barrier(num_arrivals=copies + 1, num_barriers=ring.stages),
        "empty": plgpu.Barrier(num_arrivals=ring.warpgroups, num_barriers=ring.stages),
    }
    out = jax.ShapeDtypeStruct((out_rows, s.out_columns), jnp.bfloat16)
    return launch(functools.partial(_body, s), out, s, s.name, scales.dtype, scratch)(x, words, scales, *tables)


def launch(body: Callable[..., None], out: Any, s: Statics, name: str, scales: Any, scratch: dict[str, Any]) -> Any:
    """A kernel of so many programs, with a ring in shared memory for containers, scales of a type and activations."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    ring, shared, stages = s.ring, plgpu.SMEM, s.ring.stages
    return plgpu.kernel(
        body,
        out_type=out,
        grid=(s.programs,),
        grid_names=("program",),
        num_threads=ring.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        kernel_name=name,
        scratch_types={
            "x_ring": shared((stages, ring.block, GROUP), jnp.bfloat16, transforms=pieces.transforms(64)),
            "words_ring": shared((stages, ring.outputs // 2, 2 * PLANE), jnp.uint16, transforms=pieces.transforms(64)),
            "scales_ring": shared((stages, ring.outputs), scales),
            **scratch,
        },
    )


def multiprocessors() -> int:
    """Of the GPU, each of which runs one program."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return getattr(device, "num_cores", None) or jax.devices()[0].core_count


def _body(s: Statics, *given: Any, **scratch: Any) -> None:
    pieces.name_module(s.name)
    refs = Refs(*given, **scratch)
    warpgroup = lax.axis_index("warpgroup")
    when(warpgroup == s.ring.warpgroups, lambda: _copy(s, refs), lambda: _multiply(s, refs, warpgroup))


def _copy(s: Statics, refs: Refs) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    lag, block = s.lag, s.ring.block
    plgpu.set_max_registers(REGISTERS[s.ring.warpgroups, s.gathers][1], action="decrease")

    def arrived(step: Any, under_way: int) -> None:
        """Say that a step's gathered rows are there, when only those of so many later steps are not."""
        pieces.instruction(f"cp.async.wait_group {under_way};")
        pieces.instruction("fence.proxy.async.shared::cta;")
        plgpu.barrier_arrive(refs.full.at[slot_of(s, step)])

    def run(work: Work, after: Work) -> None:
        where, first = None, first_group(s, refs, work)
        if s.gathers:
            sources = pieces.sources(block, s.pairs_per_row, 2 * refs.x.shape[-1])
            where = sources(refs.order, work.start, work.count)

        def copy_group(columns: int, k: Any, _: None) -> None:
            step = work.step + k
            slot = slot_of(s, step)
            full = refs.full.at[slot]
            when(step >= s.ring.stages, lambda: plgpu.barrier_wait(refs.empty.at[slot]))
            group = first + k
            size = s.ring.outputs // s.copied
            for i in range(s.copied):
                column, row = (
                    pl.multiple_of(i * s.out_columns // per + work.tile * (s.width // per), 32) for per in (1, 2)
                )
                to, from_ = (slot, pl.ds(i * size // 2, size // 2)), (group, pl.ds(row, size // 2))
                plgpu.copy_gmem_to_smem(refs.words.at[from_], refs.words_ring.at[to], full)
                to, from_ = (slot, pl.ds(i * size, size)), (group, pl.ds(column, size))
                plgpu.copy_gmem_to_smem(refs.scales.at[from_], refs.scales_ring.at[to], full)
            if s.gathers:
                pieces.gather(block, columns)(refs.x, where, refs.x_ring.at[slot], k, work.count)
                pieces.instruction("cp.async.commit_group;")
                when(step >= lag, lambda: arrived(step - lag, lag))
            else:
                row = pl.multiple_of(work.block * block, block)
                from_ = pl.ds(row, columns), pl.ds(pl.multiple_of(k * GROUP, GROUP), GROUP)
                plgpu.copy_gmem_to_smem(refs.x.at[from_], refs.x_ring.at[slot, pl.ds(0, columns)], full)

        by_columns(
            s, work.count, lambda columns: lax.fori_loop(0, s.groups, functools.partial(copy_group, columns), None)
        )

        def rest() -> None:
            for left in range(lag, 0, -1):
                arrived(work.step + s.groups - left, left - 1)

        if s.gathers:
            when(~is_work(s, after), rest)

    each_tile(s, refs, run)


def _multiply(s: Statics, refs: Refs, warpgroup: Any) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    plgpu.set_max_registers(REGISTERS[s.ring.warpgroups, s.gathers][0], action="increase")
    _, row_layout, sums_layout, _ = pieces.layouts()
    first = [(warpgroup * s.ring.parts + part) * s.size for part in range(s.ring.parts)]
    runs = [[pl.ds(pl.multiple_of(at + more, RUN), RUN) for more in (0, s.other)] for at in first]
    # The words of two outputs are one row of 128 bytes: rows of 64 were copied more slowly.
    half = [(warpgroup * s.ring.parts + part) * (s.size // 2) for part in range(s.ring.parts)]
    words = [[pl.ds(pl.multiple_of(at + more, RUN // 2), RUN // 2) for more in (0, s.other // 2)] for at in half]
    decode = pieces.decode()

    def load_scale(ref: Any) -> Any:
        # jax 0.10's load, which these kernels do not run with, takes its index apart from the ref.
        scale = plgpu.load(ref, layout=row_layout, optimized=False)  # pyright: ignore[reportCallIssue]
        return scale.astype(jnp.float32)

    def multiply_group(work: Work, columns: int, k: Any, carry: Any) -> Any:
        slot = slot_of(s, work.step + k)
        plgpu.barrier_wait(refs.full.at[slot])
        new = [[load_scale(refs.scales_ring.at[slot, run]) for run in part] for part in runs]
        rescale = pieces.rescale(columns)

        def scope(*totals: Any) -> list[Any]:
            for total, (old, before), after in zip(totals, carry, new, strict=True):
                total[...] = rescale(old, *before, *after)
            # A part is decoded while the one before is multiplied. Sums are not touched meanwhile: ptxas would wait for
            # the products first.
            for total, part in zip(totals, words, strict=True):
                weights = decode(*(refs.words_ring.at[slot, run] for run in part))
                plgpu.wgmma(total, weights, refs.x_ring.at[slot, pl.ds(0, columns)].T)
            return [plgpu.layout_cast(total[...], sums_layout) for total in totals]

        sums = pl.run_scoped(scope, *(plgpu.WGMMAAccumulatorRef((2 * RUN, columns), jnp.float32) for _ in first))
        plgpu.barrier_arrive(refs.empty.at[slot])
        return list(zip(sums, new, strict=True))

    def multiply_block(work: Work, columns: int) -> None:
        zero = plgpu.layout_cast(jnp.zeros((2 * RUN, columns), jnp.float32), sums_layout)
        one = plgpu.layout_cast(jnp.ones((RUN,), jnp.float32), row_layout)
        # Sums are kept in units of the last group's scales, so that the next group is added to them by wgmma itself.
        carry = [(zero, [one, one]) for _ in first]
        carry = lax.fori_loop(0, s.groups, functools.partial(multiply_group, work, columns), carry)
        write = pieces.write(columns, s.gated, s.by_pair, s.out_columns)
        staging = refs.staging.at[warpgroup, pl.ds(0, columns)]
        row = row_of(s, work)
        for at, (sums, scales) in zip(first, carry, strict=True):
            write(sums, *scales, staging, refs.out, refs.order, row, work.count, work.tile * s.width + at)

    def run(work: Work, _: Work) -> None:
        by_columns(s, work.count, functools.partial(multiply_block, work))

    each_tile(s, refs, run)
