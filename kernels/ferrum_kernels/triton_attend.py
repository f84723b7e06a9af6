"""The attention kernels of the Triton backend: one new token per row, the sum of a row's parts, and many new tokens."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_kernels.triton_flash import (
    LEAST,
    LOG2_E,
    Refs,
    Statics,
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
from ferrum_kernels.triton_heads import Place, new_heads, place, queries, query_heads, write

TURN = 8  # parts of a row that are added up at a time


@dataclasses.dataclass(frozen=True)
class Share:
    """What a program takes of one row's cache.

    Attributes:
      some: whether it takes anything.
      row: of the batch.
      tiles: the first tile, and the one after the last.
      part: which of the row's pieces this is.
      parts: how many it has.
    """

    some: Any
    row: Any
    tiles: tuple[Any, Any]
    part: Any
    parts: Any


def _seen(s: Statics, start: Any, count: Any, window: Any) -> tuple[Any, Any]:
    """The first tile of what a new token sees in the cache, and the one after the last."""
    end = jnp.where(count > 0, lax.max(lax.min(start, s.capacity), 0), 0)
    first = lax.div(lax.max(start + 1 - window, 0), s.cut.tile)
    end = lax.div(end + (s.cut.tile - 1), s.cut.tile)
    return lax.min(first, end), end


def share(s: Statics, r: Refs, me: Any) -> Share:
    """What one program takes: rows are cut by what they hold now, and each piece is a program's."""
    batch, window = r["start"].shape[0], r["window"][0]
    if batch == 1:
        first, end = _seen(s, r["start"][0], r["count"][0], window)
        parts = _pieces(s, end - first, end - first)
        return Share(me < parts, 0, _piece(first, end, me, parts), me, parts)
    row = jnp.arange(1 << (batch - 1).bit_length(), dtype=jnp.int32)
    start, count = (read(r[name], (row,), row < batch) for name in ("start", "count"))
    first, end = _seen(s, start, count, window)
    total = jnp.sum(end - first, axis=0)
    after = jnp.cumsum(jnp.where(row < batch, _pieces(s, end - first, total), 0))
    mine = jnp.sum(jnp.where((after <= me) & (row < batch), 1, 0), axis=0)
    part = me - jnp.max(jnp.where(after <= me, after, 0), axis=0)
    some, mine = mine < batch, lax.min(mine, batch - 1)
    first, end = _seen(s, r["start"][mine], r["count"][mine], window)
    parts = _pieces(s, end - first, total)
    return Share(some, mine, _piece(first, end, part, parts), part, parts)


def _pieces(s: Statics, tiles: Any, total: Any) -> Any:
    """How many pieces rows of so many tiles have; at least one."""
    size = lax.max(lax.div(total + (s.cut.pieces - 1), s.cut.pieces), s.cut.least)
    parts = lax.max(lax.div(2 * tiles + size, jnp.broadcast_to(2 * size, jnp.shape(tiles))), 1)
    return jnp.where(tiles <= s.cut.whole, 1, lax.min(parts, s.cut.most_parts(tiles)))


def _piece(first: Any, end: Any, part: Any, parts: Any) -> tuple[Any, Any]:
    """The tiles of a piece: all of a row's are alike, but for one tile."""
    parts = lax.max(parts, 1)
    begin, past = (first + lax.div(nth * (end - first), parts) for nth in (part, part + 1))
    return begin, past


def decode_kernel(s: Statics, r: Refs, out: Refs) -> None:
    """Write and see the one new token of each row; a program takes a row, or a piece of it, for one key head."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    head, me = pl.program_id(0), pl.program_id(1)

    def put(y: tuple[jax.Array, ...], row: Any) -> None:
        member = jnp.arange(y[0].shape[0], dtype=jnp.int32)
        alive = member < s.group
        query_head = jnp.where(alive, head * s.group + member, s.heads)
        store_strips(out["y"], (row, 0, query_head[:, None]), y, alive[:, None])

    def see(row: Any, tiles: tuple[Any, Any], fresh: Any) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
        """What queries see in some tiles, and of the new token where `fresh`: values, maxima and sums."""
        # Nothing branches on what the row has: its heads are read while that number is still on its way.
        start, live = r["start"][row], r["count"][row] > 0
        fresh &= live
        until = jnp.where(live, lax.min(start, s.capacity), 0)
        at, one = place(s, r, head, 0), jnp.zeros((1,), jnp.int32)
        heads, new = query_heads(s, r, row, at), new_heads(s, r, row, head, one)
        real = (one + start < s.capacity) & (one + start >= 0) & fresh
        where = cache_slots(s, r, row, one + start, real)
        low = start - r["window"][0]
        q, strips = queries(s, heads)
        k, v = write(s, r, out, head, new, where, real)
        parts = [strip.astype(jnp.float32) * x for strip, x in zip(strips, k, strict=True)]
        score = jnp.sum(functools.reduce(jnp.add, parts), axis=1)
        score = jnp.where(fresh, score * (1.0 if s.codes else s.unit), LEAST)
        seen = tuple(jnp.where(fresh, jnp.broadcast_to(x, (s.width, s.strip)), 0.0) for x in v)
        state = (score, nothing(s)[1], seen)
        most, total, seen = sweep(
            s, r, q, row, head, tiles, lambda i: i, lambda positions: positions > low, until, state
        )
        total = summed(s, total) + jnp.where(fresh, power(score - most, s.interpret), 0.0)
        return tuple(jnp.where(live, x * (1.0 / total)[:, None], 0.0) for x in seen), most, total

    if not s.cut.pieces:
        y, _, _ = see(me, _seen(s, r["start"][me], r["count"][me], r["window"][0]), True)
        put(y, me)
        return

    mine = share(s, r, me)

    def add() -> None:
        put((_added(s, out, head, me - mine.part, mine.parts),), mine.row)

    def take() -> None:
        y, most, total = see(mine.row, mine.tiles, mine.part == 0)

        def keep() -> None:
            member = jnp.arange(s.width, dtype=jnp.int32)
            alive = member < s.group
            at = jnp.where(alive, head * s.group + member, s.heads)
            store_strips(out["parts"], (me, at[:, None]), y, alive[:, None])
            store(out["sums"], (me, at), most + jnp.log(total) * LOG2_E, alive)
            if not s.interpret:
                plgpu.debug_barrier()  # what all threads have stored comes before this program's arrival
            counter = mine.row * s.kv_heads + head
            arrived = plgpu.atomic_add(out["arrived"], (counter,), jnp.int32(1))

            def last() -> None:
                out["arrived"][counter] = jnp.int32(0)  # for the next layer: nobody else comes
                add()

            pl.when(arrived == mine.parts - 1)(last)

        pl.when(mine.parts == 1)(lambda: put(y, mine.row))
        pl.when(mine.parts > 1)(keep)

    pl.when(mine.some)(take)


def _added(s: Statics, out: Refs, head: Any, first: Any, count: Any) -> jax.Array:
    """The sum [M, h] of some parts of one row, whose queries are M; some at a time, always in the same order."""
    from jax.experimental.pallas import triton as plgpu

    member = jnp.arange(s.padded_group, dtype=jnp.int32)
    lane = jnp.arange(s.head_dim, dtype=jnp.int32)[None, :]
    at = jnp.where(member < s.group, head * s.group + member, s.heads)
    until = jnp.where(member < s.group, count, 0)  # parts of a query
    columns = jnp.broadcast_arrays(at[:, None], lane)
    wide = jnp.broadcast_to(until[:, None], columns[0].shape)

    def body(i: Any, state: Any) -> Any:
        most, total, values = state
        parts, sums = [], []
        turn = jnp.int32(i * TURN)  # of one type with what it is compared with and added to
        for nth in (turn + k for k in range(TURN)):
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
    _, total, values = lax.fori_loop(0, lax.div(count + (TURN - 1), TURN), body, state)
    return values / total[:, None]


def write_kernel(block: int, s: Statics, r: Refs, out: Refs) -> None:
    """Put some tokens' keys and values of one head into the cache."""
    from jax.experimental import pallas as pl

    first, head, row = pl.program_id(0) * block, pl.program_id(1), pl.program_id(2)
    start, count = r["start"][row], r["count"][row]

    def put() -> None:
        tokens = first + jnp.arange(block, dtype=jnp.int32)
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
        store_strips(out["y"], (row, token[:, None], at[:, None]), y, alive[:, None])

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
        place = jnp.arange(s.width, dtype=jnp.int32)
        token, member = first + place // s.padded_group, place % s.padded_group
        alive = (member < s.group) & (place < s.padded_group * s.cut.queries) & (token < out["y"].shape[1])
        put((jnp.zeros((s.width, s.head_dim), jnp.float32),), token, head * s.group + member, alive)

    pl.when(first < count)(compute)
    pl.when(first >= count)(nobody)
