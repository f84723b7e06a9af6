"""Which tiles of a layer's two products a program of the Mosaic GPU kernel for few rows takes, and when.

Turn by turn all programs take a tile of gate and up, then of down. Those that have none in the last turn of gate and up
take as many of down's first tiles as another takes time for one: their rows were written turns ago.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_kernels.mosaic_cut import Refs, Statics, Work, work_of


class Turns(NamedTuple):
    """A program's, all int32 or bool.

    Attributes:
      program: its number.
      full: turns of gate and up in which every program has a tile.
      busy: programs that have one, or half of one, in the turn after those.
      shared: whether they have halves; None: never.
      place: the program's in that turn.
      total: tiles of down.
    """

    program: Any
    full: Any
    busy: Any
    shared: Any
    place: Any
    total: Any

    @property
    def idle(self) -> Any:
        """Whether the program has nothing in the last turn of gate and up."""
        return self.place >= self.busy

    @property
    def count(self) -> Any:
        """Of the program's tiles of gate and up."""
        return self.full + jnp.where(self.idle, 0, 1)


def turns_of(up: Statics, down: Statics, used: Any, program: Any) -> Turns:
    """Of a layer with so many blocks that have rows."""
    tiles, programs = used * up.tiles, up.programs
    full = lax.div(tiles, jnp.full_like(tiles, programs))
    rest = tiles - full * programs
    shared = 2 * rest <= programs if up.shares else None
    busy = rest if shared is None else jnp.where(shared, 2 * rest, rest)
    return Turns(program, full, busy, shared, _place(up, full, program), used * down.tiles)


def _place(up: Statics, turn: Any, program: Any) -> Any:
    # The first tiles have the most rows, and a program that had one of those comes last in later turns.
    return jnp.where(turn > 0, up.programs - 1 - program, program)


def up_tile(up: Statics, turns: Turns, turn: Any) -> tuple[Any, Any, Any]:
    """The number of a turn's tile of gate and up, whether it is shared, and which half: None where none is."""
    place, first = _place(up, turn, turns.program), turn * up.programs
    if turns.shared is None:
        return first + place, None, None
    shared = turns.shared & (turn == turns.full)
    return first + jnp.where(shared, place >> 1, place), shared, jnp.where(shared, place & 1, 0)


def down_tile(up: Statics, down: Statics, turns: Turns, nth: Any) -> Any:
    """The number of the program's nth tile of down; it has no more from the first on that is not below the total."""
    more = jnp.int32(up.groups // down.groups)
    if turns.shared is not None:
        more = jnp.where(turns.shared, up.groups // 2 // down.groups, more)
    more = jnp.where(turns.full > 0, more, 0)  # in the first turn nothing is written that they could take
    none, later = up.programs - turns.busy, nth - jnp.where(turns.idle, more, 0)
    among_all = more * none + later * up.programs + up.programs - 1 - turns.place
    return jnp.where(later < 0, nth * none + turns.place - turns.busy, among_all)


def each_tile(
    up: Statics,
    down: Statics,
    refs: Refs,
    run_up: Callable[[Work, Work], None],
    between: Callable[[Work], None],
    run_down: Callable[[Work], None],
) -> None:
    """Call functions with each Work of this program.

    Args:
      up, down: statics.
      refs: of either product.
      run_up: called with each tile of gate and up, and with the one before, which for the first is anything.
      between: called with the last of those where there is one, which else has the turn -1.
      run_down: called with each tile of down.
    """
    last, program, zero = refs.experts.shape[0] - 1, lax.axis_index("program"), jnp.int32(0)
    used = jnp.where(refs.counts[last] > 0, last + 1, refs.starts[last])
    turns = turns_of(up, down, used, program)

    def up_at(turn: Any) -> Work:
        tile, shared, half = up_tile(up, turns, turn)
        return work_of(up, refs, turn, turn * up.groups, tile, shared, half)

    def down_at(nth: Any) -> Work:
        step = turns.count * up.groups + nth * down.groups
        return work_of(down, refs, nth, step, down_tile(up, down, turns, nth))

    first = up_at(zero)
    if turns.shared is not None:
        # Both that it may be are read beside `used`: no read waits for another.
        either = work_of(up, refs, zero, zero, program >> 1), work_of(up, refs, zero, zero, program)
        chosen = jax.tree.map(lambda a, b: jnp.where(first.shared, a, b), *either)
        first = chosen._replace(shared=first.shared, half=first.half)
    down_first = down_at(zero)  # its numbers are read meanwhile

    # A tile's numbers are read a turn ahead.
    def up_body(carry: tuple[Work, Work]) -> tuple[Work, Work]:
        work, before = carry
        after = up_at(work.turn + 1)
        run_up(work, before)
        return after, work

    def down_body(work: Work) -> Work:
        after = down_at(work.turn + 1)
        run_down(work)
        return after

    none = first._replace(turn=jnp.int32(-1))
    _, before = lax.while_loop(lambda carry: carry[0].turn < turns.count, up_body, (first, none))
    between(before)
    lax.while_loop(lambda work: down_tile(up, down, turns, work.turn) < turns.total, down_body, down_first)
