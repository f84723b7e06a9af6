"""The product kernel of the Mosaic GPU backend, for Hopper: products of experts, or of many rows with one matrix.

A program stays on its multiprocessor and takes one tile after another: some outputs of a block's expert. Its last
warpgroup copies weights and activations into a ring in shared memory; the others decode weights in registers, where
they are wgmma's left operand, so that tokens are its columns. A block is multiplied in as few columns as hold its rows.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_kernels import mosaic_registers as pieces
from ferrum_kernels.mosaic_registers import GROUP, RUN
from ferrum_kernels.tiles import PLANE, TiledLinear
from ferrum_kernels.triton_matmul import Rows

# Registers of a thread that multiplies and of one that copies, by how many warpgroups multiply and whether rows are
# gathered: those that all threads of a program get, 168 each of 384 threads and 96 of 640, are shared out anew. With
# fewer for two warpgroups, ptxas has every single wgmma waited for (it says so: C7512).
REGISTERS = {(2, True): (224, 56), (2, False): (240, 24), (4, True): (104, 56), (4, False): (112, 32)}


@dataclasses.dataclass(frozen=True)
class Ring:
    """How a product is cut up.

    Attributes:
      columns: how many rows of a block may be multiplied at once, ascending multiples of 8; the last is the block.
      parts: tiles of 64 outputs, gate and up both counted, of each warpgroup that multiplies: 1 or 2.
      stages: groups of inputs in shared memory.
      lag: groups whose gathered rows are under way at a time, fewer than stages.
      warpgroups: that multiply: 2, or 4 of one part each, for which up to 32 columns leave registers enough.
    """

    columns: tuple[int, ...] = (32, 64, 96, 128)
    parts: int = 2
    stages: int = 4
    lag: int = 2
    warpgroups: int = 2

    @property
    def block(self) -> int:
        """Most rows of a block."""
        return self.columns[-1]

    @property
    def outputs(self) -> int:
        """Of a program's tile, gate and up both counted."""
        return 2 * RUN * self.parts * self.warpgroups


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
      ring: how to cut.
      gated: the outputs are gate and up columns; write silu(gate) * up.
      pairs_per_row: 0 where x is in blocks.
      by_pair: write to the pair's row, else row r of block b to row b * ring.block + r.

    Returns:
      bfloat16 [out_rows, N] or [out_rows, N / 2]; rows that no block has are not written.
    """
    n, programs = w.words.shape[-2], multiprocessors()
    out_columns = n // 2 if gated else n
    statics = _Statics(ring, pairs_per_row, by_pair, gated, w.num_experts, w.num_blocks, out_columns, programs)
    index = jnp.reshape(jnp.asarray(0 if layer is None else layer, jnp.int32), (1,))
    words, scales = w.words.reshape(-1, n // 2, 2 * PLANE), w.scales.reshape(-1, n)
    tables = rows.experts, rows.starts, rows.counts, rows.order
    return _run(statics, out_rows, x, words, scales, *tables, index)


# A program of many layers traces and lowers the kernel once.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(
    s: _Statics, out_rows: int, x: jax.Array, words: jax.Array, scales: jax.Array, *tables: jax.Array
) -> jax.Array:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    ring, shared, stages = s.ring, plgpu.SMEM, s.ring.stages
    copies = 2 * (2 if s.gated else 1)  # of words and scales
    call = plgpu.kernel(
        functools.partial(_body, s),
        out_type=jax.ShapeDtypeStruct((out_rows, s.out_columns), jnp.bfloat16),
        grid=(s.programs,),
        grid_names=("program",),
        num_threads=ring.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        kernel_name=s.name,
        scratch_types={
            "x_ring": shared((stages, ring.block, GROUP), jnp.bfloat16, transforms=pieces.transforms(64)),
            "words_ring": shared((stages, ring.outputs // 2, 2 * PLANE), jnp.uint16, transforms=pieces.transforms(64)),
            "scales_ring": shared((stages, ring.outputs), scales.dtype),
            "staging": shared(
                (ring.warpgroups, ring.block, s.size), jnp.bfloat16, transforms=pieces.transforms(s.size)
            ),
            "full": plgpu.Barrier(num_arrivals=copies + 1, num_barriers=stages),
            "empty": plgpu.Barrier(num_arrivals=ring.warpgroups, num_barriers=stages),
        },
    )
    return call(x, words, scales, *tables)


def multiprocessors() -> int:
    """Of the GPU, each of which runs one program."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return getattr(device, "num_cores", None) or jax.devices()[0].core_count


@dataclasses.dataclass(frozen=True)
class _Statics:
    ring: Ring
    pairs_per_row: int
    by_pair: bool
    gated: bool
    experts: int
    groups: int
    out_columns: int
    programs: int

    @property
    def name(self) -> str:
        return "gptq_gated" if self.gated else "gptq_product"

    @property
    def gathers(self) -> bool:
        return self.pairs_per_row > 0

    @property
    def lag(self) -> int:
        """The ring's, but no more groups than a tile has, which may be a program's only one."""
        return min(self.ring.lag, self.groups)

    @property
    def size(self) -> int:
        """Columns of the result of 64 outputs."""
        return RUN if self.gated else 2 * RUN

    @property
    def width(self) -> int:
        """Columns of the result of a tile."""
        return self.ring.warpgroups * self.ring.parts * self.size

    @property
    def tiles(self) -> int:
        """Of the outputs."""
        return self.out_columns // self.width


@dataclasses.dataclass(frozen=True)
class _Refs:
    x: Any
    words: Any
    scales: Any
    experts: Any
    starts: Any
    counts: Any
    order: Any
    layer: Any
    out: Any
    x_ring: Any
    words_ring: Any
    scales_ring: Any
    staging: Any
    full: Any
    empty: Any


def _body(s: _Statics, *given: Any, **scratch: Any) -> None:
    from jax.experimental import pallas as pl

    refs = _Refs(*given, **scratch)
    pieces.name_module(s.name)
    warpgroup = lax.axis_index("warpgroup")
    pl.when(warpgroup == s.ring.warpgroups)(lambda: _copy(s, refs))
    pl.when(warpgroup < s.ring.warpgroups)(lambda: _multiply(s, refs, warpgroup))


class _Work(NamedTuple):
    """A tile: how many came before it in this program, which of the outputs, and the block."""

    turn: Any
    tile: Any
    block: Any
    expert: Any
    start: Any
    count: Any


def _each_tile(s: _Statics, refs: _Refs, run: Any) -> None:
    """Call run with each _Work of this program, and with the tile that would come after it."""
    blocks = refs.experts.shape[0]

    def work_at(turn: Any) -> _Work:
        tile = turn * s.programs + lax.axis_index("program")
        block = lax.min(lax.div(tile, jnp.int32(s.tiles)), jnp.int32(blocks - 1))
        numbers = refs.experts[block], refs.starts[block], refs.counts[block]
        return _Work(turn, tile - block * s.tiles, block, *numbers)

    def body(work: _Work) -> _Work:
        after = work_at(work.turn + 1)
        run(work, after)
        return after

    lax.while_loop(functools.partial(_is_work, s), body, work_at(jnp.int32(0)))


def _is_work(s: _Statics, work: _Work) -> Any:
    """False behind the last tile and from the first block on that has no rows."""
    return (work.tile < s.tiles) & (work.expert >= 0) & (work.expert < s.experts) & (work.count > 0)


def _by_columns(s: _Statics, count: Any, run: Any) -> None:
    """Call run with the fewest columns that hold so many rows."""
    from jax.experimental import pallas as pl

    least = 0
    for columns in s.ring.columns:
        pl.when((count > least) & (count <= columns))(functools.partial(run, columns))
        least = columns


def _slot(s: _Statics, step: Any) -> Any:
    return lax.rem(step, jnp.int32(s.ring.stages))


def _copy(s: _Statics, refs: _Refs) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    lag, block = s.lag, s.ring.block
    plgpu.set_max_registers(REGISTERS[s.ring.warpgroups, s.gathers][1], action="decrease")

    def arrived(step: Any, under_way: int) -> None:
        """Say that a step's gathered rows are there, when only those of so many later steps are not."""
        pieces.instruction(f"cp.async.wait_group {under_way};")
        pieces.instruction("fence.proxy.async.shared::cta;")
        plgpu.barrier_arrive(refs.full.at[_slot(s, step)])

    def run(work: _Work, after: _Work) -> None:
        # The layer's first expert is found here: outside, that product would be a launch of its own.
        where, first_group = None, (refs.layer[0] * s.experts + work.expert) * s.groups
        if s.gathers:
            sources = pieces.sources(block, s.pairs_per_row, 2 * refs.x.shape[-1])
            where = sources(refs.order, work.start, work.count)

        def copy_group(columns: int, k: Any, _: None) -> None:
            step = work.turn * s.groups + k
            slot = _slot(s, step)
            full = refs.full.at[slot]
            pl.when(step >= s.ring.stages)(lambda: plgpu.barrier_wait(refs.empty.at[slot]))
            group = first_group + k
            size = s.ring.outputs // (2 if s.gated else 1)
            for i in range(2 if s.gated else 1):
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
                pl.when(step >= lag)(lambda: arrived(step - lag, lag))
            else:
                first = pl.multiple_of(work.block * block, block)
                from_ = pl.ds(first, columns), pl.ds(pl.multiple_of(k * GROUP, GROUP), GROUP)
                plgpu.copy_gmem_to_smem(refs.x.at[from_], refs.x_ring.at[slot, pl.ds(0, columns)], full)

        _by_columns(
            s, work.count, lambda columns: lax.fori_loop(0, s.groups, functools.partial(copy_group, columns), None)
        )
        if s.gathers:

            @pl.when(~_is_work(s, after))
            def _() -> None:
                for left in range(lag, 0, -1):
                    arrived((work.turn + 1) * s.groups - left, left - 1)

    _each_tile(s, refs, run)


def _multiply(s: _Statics, refs: _Refs, warpgroup: Any) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    plgpu.set_max_registers(REGISTERS[s.ring.warpgroups, s.gathers][0], action="increase")
    _, row_layout, sums_layout, _ = pieces.layouts()
    first = [(warpgroup * s.ring.parts + part) * s.size for part in range(s.ring.parts)]
    other = s.width if s.gated else RUN  # from a part's first run to its second
    runs = [[pl.ds(pl.multiple_of(at + more, RUN), RUN) for more in (0, other)] for at in first]
    # The words of two outputs are one row of 128 bytes: rows of 64 were copied more slowly.
    half = [(warpgroup * s.ring.parts + part) * (s.size // 2) for part in range(s.ring.parts)]
    words = [[pl.ds(pl.multiple_of(at + more, RUN // 2), RUN // 2) for more in (0, other // 2)] for at in half]
    decode = pieces.decode()

    def load_scale(ref: Any) -> Any:
        # jax 0.10's load, which these kernels do not run with, takes its index apart from the ref.
        scale = plgpu.load(ref, layout=row_layout, optimized=False)  # pyright: ignore[reportCallIssue]
        return scale.astype(jnp.float32)

    def multiply_group(work: _Work, columns: int, k: Any, carry: Any) -> Any:
        slot = _slot(s, work.turn * s.groups + k)
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

    def multiply_block(work: _Work, columns: int) -> None:
        zero = plgpu.layout_cast(jnp.zeros((2 * RUN, columns), jnp.float32), sums_layout)
        one = plgpu.layout_cast(jnp.ones((RUN,), jnp.float32), row_layout)
        # Sums are kept in units of the last group's scales, so that the next group is added to them by wgmma itself.
        carry = [(zero, [one, one]) for _ in first]
        carry = lax.fori_loop(0, s.groups, functools.partial(multiply_group, work, columns), carry)
        write = pieces.write(columns, s.gated, s.by_pair, s.out_columns)
        staging = refs.staging.at[warpgroup, pl.ds(0, columns)]
        row = work.start if s.by_pair else work.block * s.ring.block
        for at, (sums, scales) in zip(first, carry, strict=True):
            write(sums, *scales, staging, refs.out, refs.order, row, work.count, work.tile * s.width + at)

    def run(work: _Work, _: _Work) -> None:
        _by_columns(s, work.count, functools.partial(multiply_block, work))

    _each_tile(s, refs, run)
