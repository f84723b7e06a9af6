"""The attention kernels of the Triton backend: one new token per row, the sum of a row's parts, and many new tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_kernels.triton_flash import (
    LEAST,
    Refs,
    cache_slots,
    nothing,
    power,
    read,
    store,
    store_strips,
    summed,
    sweep,
    unweave,
)
from ferrum_kernels.triton_heads import Heads, Place, new_heads, place, queries, query_heads, write
from ferrum_kernels.triton_statics import LOG2_E, Statics

TURN = 2  # parts of a row that are added up at a time, for each warp


@dataclasses.dataclass(frozen=True)
class Share:
    """What a program takes of one row's cache.

    Attributes:
      row: of the batch.
      tiles: the first tile, and the one after the last.
      fresh: whether it also takes the row's new token.
      holders: the first program that takes something of the row, and the last.
    """

    row: Any
    tiles: tuple[Any, Any]
    fresh: Any
    holders: tuple[Any, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How programs share the rows of a key head.

    A row is cut into units: each tile of the cache that it sees is one, and what it costs besides is some, which come
    first. Programs take even runs of the units of all rows, which lie one row behind the other; where a run would
    begin within a short row, or close to a row's border, it begins at that border.

    Attributes:
      units: of all rows.
      programs: that share them; others have nothing.
    """

    units: Any
    programs: Any

    def begin(self, program: Any) -> Any:
        """The unit where a program's run begins, borders aside."""
        return lax.div(program * self.units, self.programs)

    def holders(self, s: Statics, before: Any, size: Any) -> tuple[Any, Any]:
        """The first program that takes something of a row, and the last.

        Args:
          s: statics.
          before: units of the rows before it; int32, of one row or many.
          size: its own.
        """
        half = lax.div(size + 1, jnp.full_like(size, 2))
        near = lax.min(jnp.full_like(size, s.cut.least + s.cut.fresh - 1), size - half)
        # With fewer tiles than that a run might begin within what the row costs besides, and take no tile.
        short = size <= max(s.cut.whole, s.cut.fresh - 1) + s.cut.fresh
        # Runs that would begin before `low` begin with the row; those from `high` on, with the next. Of a row in parts
        # the first and the last are `near` units at least.
        low = before + jnp.where(short, half, near)
        high = before + jnp.where(short, half, size - near + 1)
        units = jnp.broadcast_to(self.units, jnp.shape(size))
        first, last = (lax.div(border * self.programs - 1, units) for border in (low, high))
        return first, last


def _seen(s: Statics, start: Any, count: Any, window: Any) -> tuple[Any, Any]:
    """The first tile of what a new token sees in the cache, and the one after the last."""
    end = jnp.where(count > 0, lax.max(lax.min(start, s.capacity), 0), 0)
    first = lax.div(lax.max(start + 1 - window, 0), s.cut.tile)
    end = lax.div(end + (s.cut.tile - 1), s.cut.tile)
    return lax.min(first, end), end


def _plan(s: Statics, units: Any, most: Any, programs: int) -> Plan:
    """Share some units, `most` of them of one row, among at most so many programs."""
    parts = s.cut.most_parts(most)
    parts = parts if units is most else lax.div(units * parts, most)
    return Plan(units, lax.max(lax.min(lax.min(lax.div(units, s.cut.least), parts), programs), 1))


def _share(s: Statics, plan: Plan, me: Any, row: Any, before: Any, seen: tuple[Any, Any]) -> Share:
    """A program's share of a row, where it has one; see `Plan.holders` for `before` and `_seen` for `seen`."""
    low, high = seen
    past = before + s.cut.fresh + high - low
    first, last = plan.holders(s, before, past - before)
    begin = jnp.where(first < me, plan.begin(me), before)
    end = jnp.where(me < last, plan.begin(me + 1), past)
    tiles = (low + lax.max(begin - before - s.cut.fresh, 0), low + lax.max(end - before - s.cut.fresh, 0))
    return Share(row, tiles, begin == before, (first, last))


def _begun(s: Statics, r: Refs, me: Any, programs: int) -> tuple[Plan, tuple[Any, Any], Any]:
    """The plan, the first row that a program takes something of and the one after the last, and units before it."""
    batch, window = r["start"].shape[0], r["window"][0]
    row = s.lanes(1 << (batch - 1).bit_length())
    there = row < batch
    start, count = (read(r[name], (row,), there) for name in ("start", "count"))
    first, end = _seen(s, start, count, window)
    size = jnp.where(there, s.cut.fresh + end - first, 0)
    plan = _plan(s, jnp.sum(size, axis=0), jnp.max(size, axis=0), programs)
    holders = plan.holders(s, jnp.cumsum(size) - size, size)
    gone, begun = (holders[1] < me) & there, (holders[0] <= me) & there
    rows = [jnp.sum(jnp.where(some, 1, 0), axis=0) for some in (gone, begun)]
    return plan, (rows[0], rows[1]), jnp.sum(jnp.where(gone, size, 0), axis=0)


def walk(s: Statics, r: Refs, me: Any, programs: int, take: Callable[[Share], None]) -> None:
    """Take a program's share of each row that it has one of, row by row."""

    def seen(row: Any) -> tuple[Any, Any]:
        return _seen(s, r["start"][row], r["count"][row], r["window"][0])

    if r["start"].shape[0] == 1:
        # The same with less to compute. A loop all the same: what is read before a branch for use in it alone, the
        # compiler reads in it.
        low, high = seen(0)
        size, none = s.cut.fresh + high - low, jnp.int32(0)
        only = _share(s, _plan(s, size, size, programs), me, none, none, (low, high))
        first, last = only.holders
        lax.fori_loop((last < me).astype(jnp.int32), (first <= me).astype(jnp.int32), lambda *_: take(only), None)
        return
    plan, rows, before = _begun(s, r, me, programs)

    def turn(row: Any, before: Any) -> Any:
        low, high = seen(row)
        take(_share(s, plan, me, row, before, (low, high)))
        return before + s.cut.fresh + high - low

    lax.fori_loop(rows[0], rows[1], turn, before)


def decode_kernel(s: Statics, r: Refs, out: Refs) -> None:
    """Write and see the one new token of each row; a program takes a row, or a run of all rows, for one key head."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    head, me = pl.program_id(0), pl.program_id(1)

    def asked(s: Statics, row: Any) -> Heads:
        return query_heads(s, r, row, place(s, r, head, 0))

    def put(s: Statics, y: tuple[jax.Array, ...], row: Any) -> None:
        member = s.lanes(y[0].shape[0])
        alive = member < s.group
        query_head = jnp.where(alive, head * s.group + member, s.heads)
        store_strips(s, out["y"], (row, 0, query_head[:, None]), y, alive[:, None])

    def see(
        s: Statics, row: Any, tiles: tuple[Any, Any], fresh: Any, heads: Heads | None
    ) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
        """What queries see in some tiles, and of the new token where `fresh`: values, maxima and sums.

        The queries are `heads`, where they have been read. Nothing branches on how much the row has: heads are read
        while that number is still on its way.
        """
        start, live = r["start"][row], r["count"][row] > 0
        until = jnp.where(live, lax.min(start, s.capacity), 0)
        q, strips = queries(s, heads or asked(s, row))
        low = start - r["window"][0]

        def taken() -> tuple[jax.Array, tuple[jax.Array, ...]]:
            one = jnp.zeros((1,), jnp.int32)
            new = new_heads(s, r, row, head, one)
            real = (one + start < s.capacity) & (one + start >= 0) & live
            k, v = write(s, r, out, head, new, cache_slots(s, r, row, one + start, real), real)
            parts = [strip.astype(jnp.float32) * x for strip, x in zip(strips, k, strict=True)]
            score = jnp.sum(functools.reduce(jnp.add, parts), axis=1)
            score = jnp.where(live, score * (1.0 if s.codes else s.unit), LEAST)
            return score, tuple(jnp.where(live, jnp.broadcast_to(x, (s.width, s.strip)), 0.0) for x in v)

        def left() -> tuple[jax.Array, tuple[jax.Array, ...]]:
            zeros = jnp.zeros((s.width, s.strip), jnp.float32)
            return jnp.full((s.width,), LEAST), (zeros,) * s.strips

        score, seen = taken() if fresh is True else lax.cond(fresh, taken, left)
        fresh &= live
        state = (score, nothing(s)[1], seen)
        most, total, seen = sweep(
            s, r, q, row, head, tiles, lambda i: i, lambda positions: positions > low, until, state
        )
        total = summed(s, total) + jnp.where(fresh, power(score - most, s.interpret), 0.0)
        return tuple(jnp.where(live, x * (1.0 / total)[:, None], 0.0) for x in seen), most, total

    if not s.cut.programs:
        y, _, _ = see(s, me, _seen(s, r["start"][me], r["count"][me], r["window"][0]), True, None)
        put(s, y, me)
        return

    # Queries of a row alone are read before a program knows what it takes of it; of several rows, which are its own
    # comes first.
    only = asked(s, 0) if r["start"].shape[0] == 1 else None

    def take(mine: Share) -> None:
        # Rows are no less than zero, which the compiler does not know: it would compute all that depends on a thread's
        # place once, and hold it in registers from row to row.
        turn = dataclasses.replace(s, origin=lax.shift_right_arithmetic(jnp.int32(mine.row), 31) * s.head_dim)
        y, most, total = see(turn, mine.row, mine.tiles, mine.fresh, only)
        first, last = mine.holders

        def keep() -> None:
            member = turn.lanes(s.width)
            alive = member < s.group
            at = jnp.where(alive, head * s.group + member, s.heads)
            # From one part to the next either the row or the program is one more: their sum numbers all parts.
            store_strips(turn, out["parts"], (mine.row + me, at[:, None]), y, alive[:, None])
            store(out["sums"], (mine.row + me, at), most + jnp.log(total) * LOG2_E, alive)
            if not s.interpret:
                plgpu.debug_barrier()  # what all threads have stored comes before this program's arrival
            counter = mine.row * s.kv_heads + head
            arrived = plgpu.atomic_add(out["arrived"], (counter,), jnp.int32(1))

            def add() -> None:
                out["arrived"][counter] = jnp.int32(0)  # for the next layer: nobody else comes
                put(turn, (_added(turn, out, head, mine.row + first, last - first + 1),), mine.row)

            pl.when(arrived == last - first)(add)

        pl.when(first == last)(lambda: put(turn, y, mine.row))
        pl.when(first < last)(keep)

    walk(s, r, me, out["parts"].shape[0] - r["start"].shape[0], take)


def _added(s: Statics, out: Refs, head: Any, first: Any, count: Any) -> jax.Array:
    """The sum [M, h] of some parts of one row, whose queries are M; some at a time, always in the same order."""
    from jax.experimental.pallas import triton as plgpu

    member = s.lanes(s.padded_group)
    lane = s.lanes(s.head_dim)[None, :]
    at = jnp.where(member < s.group, head * s.group + member, s.heads)
    until = jnp.where(member < s.group, count, 0)  # parts of a query
    columns = jnp.broadcast_arrays(at[:, None], lane)
    wide = jnp.broadcast_to(until[:, None], columns[0].shape)

    turn = TURN * s.cut.warps

    def body(i: Any, state: Any) -> Any:
        most, total, values = state
        parts, sums = [], []
        begin = jnp.int32(i * turn)  # of one type with what it is compared with and added to
        for nth in (begin + k for k in range(turn)):
            part = jnp.broadcast_to(first + nth, at.shape)
            parts.append(read(out["parts"], (first + nth, *columns), nth < wide))
            sums.append(plgpu.load(out["sums"].at[part, at], mask=nth < until, other=LEAST))
        now = functools.reduce(lax.max, sums, most)
        fade = power(most - now, s.interpret)
        total, values = total * fade, values * fade[:, None]
        for one, part in zip(sums, parts, strict=True):
            weight = power(one - now, s.interpret)
            total, values = total + weight, values + weight[:, None] * part
        return now, total, values

    zeros = jnp.zeros((s.padded_group,), jnp.float32)
    state = (zeros + LEAST, zeros, jnp.zeros((s.padded_group, s.head_dim), jnp.float32))
    _, total, values = lax.fori_loop(0, lax.div(count + (turn - 1), turn), body, state)
    return values / total[:, None]


def write_kernel(block: int, s: Statics, r: Refs, out: Refs) -> None:
    """Put some tokens' keys and values of one head into the cache."""
    from jax.experimental import pallas as pl

    first, head, row = pl.program_id(0) * block, pl.program_id(1), pl.program_id(2)
    start, count = r["start"][row], r["count"][row]

    def put() -> None:
        tokens = first + s.lanes(block)
        positions = start + tokens
        alive = (tokens < count) & (tokens < r["q"].shape[1]) & (positions >= 0) & (positions < s.capacity)
        slots = cache_slots(s, r, row, positions, alive)
        write(s, r, out, head, new_heads(s, r, row, head, tokens), slots, alive)

    pl.when(first < count)(put)


def prefill_kernel(tiles: int, s: Statics, r: Refs, out: Refs) -> None:
    """See the cache by some tokens of a row and the query heads of one key head."""
    from jax.experimental import pallas as pl

    # Programs of the last tokens read the most, so they come first.
    head, row = pl.program_id(0) % s.kv_heads, pl.program_id(1)
    first = (tiles - 1 - pl.program_id(0) // s.kv_heads) * s.cut.queries
    start, count, window = r["start"][row], r["count"][row], r["window"][0]
    tile = s.cut.tile

    def put(y: tuple[jax.Array, ...], token: jax.Array, query_head: jax.Array, alive: jax.Array) -> None:
        at = jnp.where(alive, query_head, s.heads)
        store_strips(s, out["y"], (row, token[:, None], at[:, None]), y, alive[:, None])

    def compute() -> None:
        token, query_head, alive = place(s, r, head, first)
        q, _ = queries(s, query_heads(s, r, row, Place(token, query_head, alive)))
        position = (start + token)[:, None]
        begin = start + first  # position of the first query
        end = lax.min(start + lax.min(first + s.cut.queries, count), s.capacity)
        last = (end + tile - 1) // tile
        low = lax.min(lax.max(begin + 1 - window, 0) // tile, last)
        # Tiles that every query sees whole lie between: they need no mask.
        whole = lax.max(begin + s.cut.queries - window, 0)
        inner = lax.clamp(low, (whole + tile - 1) // tile, last)
        outer = lax.clamp(inner, lax.min(begin + 1, s.capacity) // tile, last)

        def visible(positions: jax.Array) -> jax.Array:
            return (positions <= position) & (positions > position - window)

        edges = (0, inner - low + last - outer)

        def edge(i: Any) -> Any:
            return jnp.where(i < inner - low, low + i, outer + i - (inner - low))

        state = sweep(s, r, q, row, head, edges, edge, visible, end, nothing(s))
        _, total, values = sweep(s, r, q, row, head, (inner, outer), lambda i: i, None, end, state)
        seen = (token < count)[:, None]
        y = tuple(jnp.where(seen, x * (1.0 / summed(s, total))[:, None], 0.0) for x in values)
        y = unweave(s, tuple(x.astype(out["y"].dtype) for x in y))
        put(y, token, query_head, alive)

    def nobody() -> None:
        place = s.lanes(s.width)
        token, member = first + place // s.padded_group, place % s.padded_group
        alive = (member < s.group) & (place < s.padded_group * s.cut.queries) & (token < out["y"].shape[1])
        put((jnp.zeros((s.width, s.head_dim), jnp.float32),), token, head * s.group + member, alive)

    pl.when(first < count)(compute)
    pl.when(first >= count)(nobody)
