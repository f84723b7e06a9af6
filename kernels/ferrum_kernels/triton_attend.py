"""The attention kernels of the Triton backend: one new token per row, the sum of a row's parts, and many new tokens."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_kernels.triton_flash import (
    LEAST,
    LOG2_E,
    Refs,
    Statics,
    cache_rows,
    nothing,
    power,
    queries,
    read,
    store,
    sweep,
    write,
)

PARTS = 16  # parts of a row that one turn of the adding kernel takes


def _pieces(s: Statics, r: Refs) -> tuple[jax.Array, ...]:
    """Rows int32 [B'], where what each one sees begins (a multiple of the tile), and how many pieces that has."""
    batch = r["start"].shape[0]
    row = jnp.arange(max(2, 1 << (batch - 1).bit_length()), dtype=jnp.int32)
    start = lax.max(read(r["start"], (row,), row < batch), 0)
    begin = lax.max(start + 1 - r["window"][0], 0) // s.cut.tile * s.cut.tile
    length = lax.min(start, s.capacity) - begin
    pieces = lax.max((length + (s.cut.piece - 1)) // s.cut.piece, 1)
    return row, begin, jnp.where(row < batch, pieces, 0)


def _pick(values: jax.Array, here: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(here, values, 0), axis=0)


def decode_kernel(programs: int, most: int, s: Statics, r: Refs, out: Refs) -> None:
    """Write and see the one new token of each row; a program takes pieces of rows for one key head."""
    from jax.experimental import pallas as pl

    head, me = pl.program_id(0), pl.program_id(1)
    rows, begins, counts = _pieces(s, r)
    ends = jnp.cumsum(counts)
    total = _pick(counts, rows >= 0)

    def piece(w: Any) -> None:
        row = _pick(jnp.where(ends <= w, 1, 0), rows >= 0)
        mine = rows == row
        share, alone = w - _pick(ends - counts, mine), _pick(counts, mine) == 1
        begin = _pick(begins, mine) + share * s.cut.piece
        start, real = r["start"][row], r["count"][row] > 0
        pl.when(real)(lambda: compute(w, row, share, alone, begin, start))
        pl.when(~real & (share == 0))(lambda: put(jnp.zeros((s.width, s.head_dim), jnp.float32), row))

    def put(y: jax.Array, row: Any) -> None:
        member = jnp.arange(s.width, dtype=jnp.int32)
        alive = member < s.group
        query_head = jnp.where(alive, head * s.group + member, s.heads)
        lane = jnp.arange(s.head_dim, dtype=jnp.int32)[None, :]
        store(out["y"], (row, 0, query_head[:, None], lane), y, alive[:, None])

    def compute(w: Any, row: Any, share: Any, alone: Any, begin: Any, start: Any) -> None:
        q, first, second, _, query_head, alive = queries(s, r, row, head, 0)
        # The new token is seen by the piece that comes first, which also writes it.
        one = jnp.zeros((1,), jnp.int32)
        fresh = (one == share) & (one + start < s.capacity) & (one + start >= 0)
        place = cache_rows(s, r, row, one + start, fresh)
        k1, k2, v = write(s, r, out, row, head, one, place, fresh)
        score = jnp.sum(first.astype(jnp.float32) * k1 + second.astype(jnp.float32) * k2, axis=1)
        score = score * (LOG2_E / s.head_dim**0.5)
        mine = jnp.full((s.width,), share, jnp.int32) == 0
        state = (
            jnp.where(mine, score, LEAST),
            jnp.where(mine, 1.0, 0.0),
            jnp.where(mine[:, None], jnp.broadcast_to(v, (s.width, s.head_dim)), 0.0),
        )
        low = start - r["window"][0]
        end = lax.min(lax.min(start, s.capacity), begin + s.cut.piece)
        turns = (begin // s.cut.tile, (end + s.cut.tile - 1) // s.cut.tile)
        most, total, values = sweep(
            s, r, q, row, head, turns, lambda i: i, lambda positions: positions > low, end, state
        )
        y = values / total[:, None]
        if "parts" not in out:
            put(y, row)
            return
        pl.when(alone)(lambda: put(y, row))

        def part() -> None:
            lane = jnp.arange(s.head_dim, dtype=jnp.int32)[None, :]
            at = jnp.where(alive, query_head, s.heads)
            store(out["parts"], (w, at[:, None], lane), y, alive[:, None])
            store(out["sums"], (w, at), most + jnp.log(total) * LOG2_E, alive)

        pl.when(~alone)(part)

    if programs == most:
        pl.when(me < total)(lambda: piece(me))
        return

    def turn(i: Any, carry: Any) -> Any:
        piece(me + i * programs)
        return carry

    lax.fori_loop(0, (total - me + (programs - 1)) // programs, turn, 0)


def add_kernel(s: Statics, r: Refs, out: Refs) -> None:
    """Add up the parts of one row and query head, where there is more than one."""
    from jax.experimental import pallas as pl

    head, me = pl.program_id(0), pl.program_id(1)
    rows, _, counts = _pieces(s, r)
    before, count = _pick(counts, rows < me), _pick(counts, rows == me)
    lane = jnp.arange(s.head_dim, dtype=jnp.int32)

    def add() -> None:
        def body(i: Any, state: Any) -> Any:
            most, total, values = state
            place = i * PARTS + jnp.arange(PARTS, dtype=jnp.int32)
            alive = place < count
            sums = jnp.where(alive, read(r["sums"], (before + place, head), alive), LEAST)
            parts = read(r["parts"], ((before + place)[:, None], head, lane[None, :]), alive[:, None])
            now = lax.max(most, jnp.max(sums, axis=0))
            weights = jnp.where(alive, power(sums - now, s.interpret), 0.0)
            fade = power(jnp.broadcast_to(most - now, lane.shape), s.interpret)
            return (
                now,
                total * fade + jnp.sum(weights, axis=0),
                values * fade + jnp.sum(weights[:, None] * parts, axis=0),
            )

        zeros = jnp.zeros(lane.shape, jnp.float32)
        state = (jnp.float32(LEAST), zeros, zeros)
        _, total, values = lax.fori_loop(0, (count + (PARTS - 1)) // PARTS, body, state)
        out["y"][me, 0, head, :] = (values / total).astype(s.dtype)

    pl.when(count > 1)(add)


def write_kernel(block: int, s: Statics, r: Refs, out: Refs) -> None:
    """Put some tokens' keys and values of one head into the cache."""
    from jax.experimental import pallas as pl

    first, head, row = pl.program_id(0) * block, pl.program_id(1), pl.program_id(2)
    start, count = r["start"][row], r["count"][row]

    def put() -> None:
        tokens = first + jnp.arange(block, dtype=jnp.int32)
        positions = start + tokens
        alive = (tokens < count) & (tokens < r["q"].shape[1]) & (positions >= 0) & (positions < s.capacity)
        rows = cache_rows(s, r, row, positions, alive)
        write(s, r, out, row, head, tokens, rows, alive)

    pl.when(first < count)(put)


def prefill_kernel(tiles: int, s: Statics, r: Refs, out: Refs) -> None:
    """See the cache by some tokens of a row and the query heads of one key head."""
    from jax.experimental import pallas as pl

    # Programs of the last tokens read the most, so they come first.
    head, row = pl.program_id(0) % s.kv_heads, pl.program_id(1)
    first = (tiles - 1 - pl.program_id(0) // s.kv_heads) * s.cut.queries
    start, count, window = r["start"][row], r["count"][row], r["window"][0]
    tile = s.cut.tile
    lane = jnp.arange(s.head_dim, dtype=jnp.int32)[None, :]

    def put(y: jax.Array, token: jax.Array, query_head: jax.Array, alive: jax.Array) -> None:
        at = jnp.where(alive, query_head, s.heads)
        store(out["y"], (row, token[:, None], at[:, None], lane), y, alive[:, None])

    def compute() -> None:
        q, _, _, token, query_head, alive = queries(s, r, row, head, first)
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
        state = sweep(
            s,
            r,
            q,
            row,
            head,
            edges,
            lambda i: jnp.where(i < inner - low, low + i, outer + i - (inner - low)),
            visible,
            end,
            nothing(s),
        )
        _, total, values = sweep(s, r, q, row, head, (inner, outer), lambda i: i, None, end, state)
        y = jnp.where((token < count)[:, None], values / total[:, None], 0.0)
        put(y, token, query_head, alive)

    def nobody() -> None:
        place = jnp.arange(s.width, dtype=jnp.int32)
        token, member = first + place // s.padded_group, place % s.padded_group
        alive = (member < s.group) & (place < s.padded_group * s.cut.queries) & (token < out["y"].shape[1])
        put(jnp.zeros((s.width, s.head_dim), jnp.float32), token, head * s.group + member, alive)

    pl.when(first < count)(compute)
    pl.when(first >= count)(nobody)
