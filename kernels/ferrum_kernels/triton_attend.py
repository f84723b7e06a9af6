"""The attention kernels of the Triton backend: one new token per row, the sum of a row's parts, and many new tokens."""

from __future__ import annotations

import dataclasses
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
    summed,
    sweep,
    write,
)


def _begin(s: Statics, r: Refs, start: Any) -> Any:
    """The position of the first tile that holds something a token at `start` sees."""
    return lax.max(start + 1 - r["window"][0], 0) // s.cut.tile * s.cut.tile


@dataclasses.dataclass(frozen=True)
class _Shares:
    """Who takes what: rows are cut into pieces, and each program takes the same number of them, one behind the other.

    Attributes:
      row, begin, end: int32 [B'], rows; where what each one sees begins; the piece, counted over all rows, after its
        last.
      pieces: int32 [B'], how many it has; at least one.
      total: of all rows.
      programs: how many programs share them, each at least one.
    """

    row: jax.Array
    begin: jax.Array
    end: jax.Array
    pieces: jax.Array
    total: jax.Array
    programs: jax.Array

    def of(self, values: jax.Array, row: Any) -> Any:
        """A row's value."""
        return jnp.sum(jnp.where(self.row == row, values, 0), axis=0)

    def first(self, program: Any) -> Any:
        """The first piece of a program."""
        return program * self.total // self.programs

    def program(self, piece: Any) -> Any:
        """The program of a piece."""
        return ((piece + 1) * self.programs - 1) // self.total

    def row_of(self, piece: Any) -> Any:
        """The row of a piece."""
        return jnp.sum(jnp.where((self.end <= piece) & (self.pieces > 0), 1, 0), axis=0)


def _shares(s: Statics, r: Refs, programs: int) -> _Shares:
    batch = r["start"].shape[0]
    row = jnp.arange(max(2, 1 << (batch - 1).bit_length()), dtype=jnp.int32)
    start, count = (read(r[name], (row,), row < batch) for name in ("start", "count"))
    start = lax.max(jnp.where(count > 0, start, 0), 0)
    begin = _begin(s, r, start)
    pieces = lax.max((lax.min(start, s.capacity) - begin + (s.cut.piece - 1)) // s.cut.piece, 1)
    pieces = jnp.where(row < batch, pieces, 0)
    total = jnp.sum(pieces, axis=0)
    return _Shares(row, begin, jnp.cumsum(pieces), pieces, total, lax.min(total, programs))


def decode_kernel(programs: int, s: Statics, r: Refs, out: Refs) -> None:
    """Write and see the one new token of each row; a program takes pieces of rows for one key head."""
    from jax.experimental import pallas as pl

    head, me = pl.program_id(0), pl.program_id(1)
    lane = jnp.arange(s.head_dim, dtype=jnp.int32)[None, :]

    def put(y: jax.Array, row: Any) -> None:
        member = jnp.arange(s.width, dtype=jnp.int32)
        alive = member < s.group
        query_head = jnp.where(alive, head * s.group + member, s.heads)
        store(out["y"], (row, 0, query_head[:, None], lane), y, alive[:, None])

    def take(row: Any, start: Any, begin: Any, until: Any, fresh: Any, part: Any) -> None:
        """Positions from `begin` to `until` of a row, and the new token where `fresh`; a part of it, or None: all."""
        # Nothing branches on what the row has: its heads are read while that number is still on its way.
        live = r["count"][row] > 0
        fresh, until = fresh & live, jnp.where(live, until, begin)
        q, first, second, _, query_head, alive = queries(s, r, row, head, 0)
        one = jnp.zeros((1,), jnp.int32)
        real = (one + start < s.capacity) & (one + start >= 0) & fresh
        k1, k2, v = write(s, r, out, row, head, one, cache_rows(s, r, row, one + start, real), real)
        score = jnp.sum(first.astype(jnp.float32) * k1 + second.astype(jnp.float32) * k2, axis=1)
        score = jnp.where(fresh, score * (LOG2_E / s.head_dim**0.5), LEAST)
        seen = jnp.where(fresh, jnp.broadcast_to(v, (s.width, s.head_dim)), 0.0)
        low = start - r["window"][0]
        tiles = (begin // s.cut.tile, (until + s.cut.tile - 1) // s.cut.tile)
        state = (score, *nothing(s)[1:2], seen.T if s.cut.swap else seen)
        most, total, values = sweep(
            s, r, q, row, head, tiles, lambda i: i, lambda positions: positions > low, until, state
        )
        total = summed(s, total) + jnp.where(fresh, power(score - most, s.interpret), 0.0)
        y = jnp.where(live, (values.T if s.cut.swap else values) * (1.0 / total)[:, None], 0.0)
        if part is None:
            put(y, row)
            return

        def keep() -> None:
            at = jnp.where(alive, query_head, s.heads)
            store(out["parts"], (part, at[:, None], lane), y, alive[:, None])
            store(out["sums"], (part, at), most + jnp.log(total) * LOG2_E, alive)

        pl.when(part < 0)(lambda: put(y, row))
        pl.when(part >= 0)(keep)

    if "parts" not in out:  # every row is one piece, and a program's
        start = r["start"][me]
        take(me, start, _begin(s, r, start), lax.min(start, s.capacity), True, None)
        return

    shares = _shares(s, r, programs)
    lower = shares.first(me)
    upper = shares.first(me + 1)

    def some(row: Any, carry: Any) -> Any:
        start = r["start"][row]
        end, pieces, begin = (shares.of(x, row) for x in (shares.end, shares.pieces, shares.begin))
        first, last = lax.max(lower, end - pieces), lax.min(upper, end)
        # Parts of a program are that of the row where it begins and that of the row where it ends.
        part = jnp.where(last - first == pieces, -1, jnp.where(first == lower, 2 * me, 2 * me + 1))
        until = lax.min(lax.min(start, s.capacity), begin + (last - end + pieces) * s.cut.piece)
        take(row, start, begin + (first - end + pieces) * s.cut.piece, until, first == end - pieces, part)
        return carry

    def mine() -> None:
        lax.fori_loop(shares.row_of(lower), shares.row_of(upper - 1) + 1, some, 0)

    pl.when(me < shares.programs)(mine)


def add_kernel(programs: int, turn: int, s: Statics, r: Refs, out: Refs) -> None:
    """Add up the parts of one row and query head, where there is more than one; `turn` parts at a time."""
    from jax.experimental import pallas as pl

    head, me = pl.program_id(0), pl.program_id(1)
    shares = _shares(s, r, programs)
    end = shares.of(shares.end, me)
    begin = end - shares.of(shares.pieces, me)
    first = shares.program(begin)
    count = shares.program(end - 1) - first + 1
    late = shares.first(first) < begin  # in the first program another row came before
    lane = jnp.arange(s.head_dim, dtype=jnp.int32)

    def add() -> None:
        def body(i: Any, state: Any) -> Any:
            most, total, values = state
            place = i * turn + jnp.arange(turn, dtype=jnp.int32)
            alive = place < count
            part = 2 * (first + place)
            part = jnp.where((place == 0) & late, part + 1, part)
            sums = jnp.where(alive, read(r["sums"], (part, head), alive), LEAST)
            parts = read(r["parts"], (part[:, None], head, lane[None, :]), alive[:, None])
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
        _, total, values = lax.fori_loop(0, (count + (turn - 1)) // turn, body, state)
        out["y"][me, 0, head, :] = (values / total).astype(out["y"].dtype)

    pl.when((count > 1) & (r["count"][me] > 0))(add)


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
        y = jnp.where((token < count)[:, None], values * (1.0 / summed(s, total))[:, None], 0.0)
        put(y, token, query_head, alive)

    def nobody() -> None:
        place = jnp.arange(s.width, dtype=jnp.int32)
        token, member = first + place // s.padded_group, place % s.padded_group
        alive = (member < s.group) & (place < s.padded_group * s.cut.queries) & (token < out["y"].shape[1])
        put(jnp.zeros((s.width, s.head_dim), jnp.float32), token, head * s.group + member, alive)

    pl.when(first < count)(compute)
    pl.when(first >= count)(nobody)
