"""How a product of the Mosaic GPU kernels is cut up, and which tiles of one a program takes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from ferrum_kernels.mosaic_registers import RUN


@dataclasses.dataclass(frozen=True)
class Ring:
    """How a product is cut up.

    Attributes:
      columns: how many rows of a block may be multiplied at once, ascending multiples of 8; the last is the block.
      parts: tiles of 64 outputs, gate and up both counted, of each warpgroup that multiplies: 1 or 2.
      stages: groups of inputs in shared memory.
      lag: groups whose gathered rows are under way at a time, fewer than stages; where warps are alone, all of them.
      warpgroups: that multiply: 2, or 4 of one part each, for which up to 32 columns leave registers enough.
      alone: each warp multiplies up to 32 columns on its own, not with its warpgroup; one kernel has both products.
      shared: where few tiles of gate and up are left programs take halves of them, and warpgroups every other group of
        inputs. Only where warps are alone, in two warpgroups of two parts, and for a number of groups that 4 divides.
    """

    columns: tuple[int, ...] = (32, 64, 96, 128)
    parts: int = 2
    stages: int = 4
    lag: int = 2
    warpgroups: int = 2
    alone: bool = False
    shared: bool = False

    @property
    def block(self) -> int:
        """Most rows of a block."""
        return self.columns[-1]

    @property
    def outputs(self) -> int:
        """Of a program's tile, gate and up both counted."""
        return 2 * RUN * self.parts * self.warpgroups


@dataclasses.dataclass(frozen=True)
class Statics:
    """What a kernel is compiled for."""

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
        """The kernel's."""
        return "gptq_gated" if self.gated else "gptq_product"

    @property
    def gathers(self) -> bool:
        """Whether x is in tokens, whose rows are gathered."""
        return self.pairs_per_row > 0

    @property
    def lag(self) -> int:
        """The ring's, but no more groups than a tile has, which may be a program's only one."""
        return min(self.ring.lag, self.groups)

    @property
    def shares(self) -> bool:
        """Whether the last turn of gate and up may be shared: down, with few groups, wins less than it takes."""
        ring = self.ring
        whole = ring.parts == ring.warpgroups == 2 and self.groups % 4 == 0
        return self.gated and ring.shared and ring.alone and whole

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

    @property
    def other(self) -> int:
        """Outputs of a tile from a part's first run to its second."""
        return self.width if self.gated else RUN

    @property
    def copied(self) -> int:
        """Runs of outputs of a tile that lie beside each other: gate and up lie apart."""
        return 2 if self.gated else 1


@dataclasses.dataclass(frozen=True)
class Refs:
    """The arrays of a kernel and its shared memory."""

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
    full: Any
    empty: Any
    staging: Any = None
    sums: Any = None


class Work(NamedTuple):
    """A tile: how many came before it in this program, and how many groups; which of the outputs, and the block.

    Of a shared turn a program takes a half, 0 or 1. Where turns are never shared, `shared` and `half` are None.
    """

    turn: Any
    step: Any
    tile: Any
    block: Any
    expert: Any
    start: Any
    count: Any
    shared: Any = None
    half: Any = None


def each_tile(s: Statics, refs: Refs, run: Any) -> None:
    """Call run with each Work of this program, and with the tile that would come after it."""
    program = lax.axis_index("program")

    def work_at(turn: Any) -> Work:
        # The first tiles have the most rows, and a program that had one of those comes last in later turns.
        place = jnp.where(turn > 0, s.programs - 1 - program, program)
        return work_of(s, refs, turn, turn * s.groups, turn * s.programs + place)

    # Whether there is more is read a turn ahead.
    def body(work: Work) -> Work:
        after = work_at(work.turn + 1)
        run(work, after)
        return after

    lax.while_loop(functools.partial(is_work, s), body, work_at(jnp.int32(0)))


def work_of(s: Statics, refs: Refs, turn: Any, step: Any, tile: Any, shared: Any = None, half: Any = None) -> Work:
    """Of the tile with that number among those of all blocks."""
    last = jnp.int32(refs.experts.shape[0] - 1)
    block = lax.min(lax.div(tile, jnp.int32(s.tiles)), last)
    numbers = refs.experts[block], refs.starts[block], refs.counts[block]
    return Work(turn, step, tile - block * s.tiles, block, *numbers, shared, half)


def is_work(s: Statics, work: Work) -> Any:
    """False behind the last tile and from the first block on that has no rows."""
    return (work.tile < s.tiles) & (work.expert >= 0) & (work.expert < s.experts) & (work.count > 0)


def share_of(work: Work, warpgroup: Any) -> tuple[Any, ...]:
    """A warpgroup's first group of inputs, every how many it takes, and where turns are shared, whose outputs it has.

    Of a shared tile both have the first warpgroup's.
    """
    if work.shared is None:
        return 0, 1
    return jnp.where(work.shared, warpgroup, 0), jnp.where(work.shared, 2, 1), jnp.where(work.shared, 0, warpgroup)


def when(condition: Any, run: Callable[[], None], otherwise: Callable[[], None] | None = None) -> None:
    """Call run if a condition holds, else the other.

    `pl.when` converts its condition to a number, and for each such conversion JAX runs ptxas to ask for its version:
    the 34 of a layer were some 30 % of the time that a decode step of 16 took to lower.
    """
    which = lax.select(condition, jnp.int32(1), jnp.int32(2 if otherwise else 0))
    # JAX lowers the first of them twice.
    lax.switch(which, [lambda: None, *filter(None, (run, otherwise))])


def by_columns(s: Statics, count: Any, run: Callable[[int], None]) -> None:
    """Call run with the fewest columns that hold so many rows, of which there is one at least."""
    least = 0  # a switch would have ptxas make warps meet again behind it
    for columns in s.ring.columns:
        when((count > least) & (count <= columns), functools.partial(run, columns))
        least = columns


def slot_of(s: Statics, step: Any) -> Any:
    """Of a step that counts a program's groups."""
    return lax.rem(step, jnp.int32(s.ring.stages))


def first_group(s: Statics, refs: Refs, work: Work) -> Any:
    """Of the tile's expert in the stack."""
    # The layer's first expert is found here: outside, that product would be a launch of its own.
    return (refs.layer[0] * s.experts + work.expert) * s.groups


def column_of(s: Statics, work: Work) -> Any:
    """The first of the work's columns of the result."""
    column = work.tile * s.width
    return column if work.half is None else column + work.half * (s.width // 2)


def row_of(s: Statics, work: Work) -> Any:
    """Where the block's rows begin: in order where they are written by pair, else in the result."""
    return work.start if s.by_pair else work.block * s.ring.block
