"""Places of pairs by expert on the Triton backend: a sort by expert without a sort, and blocks of an expert's pairs.

Routing counts the pairs of a chunk of tokens by expert; added up they say where each expert's pairs begin, and a
chunk's among them. Places are sorted by expert and, within one, by pair: results are deterministic. Of few tokens one
kernel does it all: its programs route, and the last of them to be done makes the places.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_kernels.errors import ShapeError
from ferrum_kernels.triton_call import call
from ferrum_kernels.triton_route import Statics, choose, chunk, chunks, power, route

FEW = 64  # tokens up to which one kernel routes and places
ROWS = 4  # of them that a program routes, each in a warp of its own


def place(
    live: jax.Array, counts: jax.Array, experts: int, sizes: tuple[int, ...], blocks: int, interpret: bool
) -> tuple[jax.Array, ...]:
    """Sort pairs by expert and cut each expert's into blocks.

    Blocks come by size class, the largest first, so that programs that take one after the other end at about the same
    time; within a class they come by expert.

    Args:
      live: int32 [T, K], the expert of each pair; outside [0, E) nobody's.
      counts: of `triton_route.route`.
      experts: E.
      sizes: most rows of a block of each class, ascending; all of an expert's blocks but its last have the last's.
      blocks: how many blocks to describe; those that are not needed have expert E, no rows, and for their first place
        the number of those that are.
      interpret: run without a GPU.

    Returns:
      int32 [P] pairs in order of place (those of nobody's pairs are not written); int32 [blocks] expert, first place
      and number of places of each block, and zeros, for a kernel to count what is done of each.
    """

    tokens = live.shape[0]
    return call(
        functools.partial(_place_kernel, experts, sizes),
        (live, counts),
        _shapes(live.size, blocks),
        (chunks(tokens) + 1,),
        "place",
        warps=_warps(tokens),
        interpret=interpret,
    )


def _warps(tokens: int) -> int:
    return 4 if chunks(tokens) <= 64 else 8


def _shapes(pairs: int, blocks: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct((size,), jnp.int32) for size in (pairs, blocks, blocks, blocks, blocks))


def _place_kernel(experts: int, sizes: tuple[int, ...], live: Any, counts: Any, order: Any, *tables: Any) -> None:
    """Places of a chunk's pairs; the last program writes the tables of blocks."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    me, (parts, lanes), (tokens, top_k) = pl.program_id(0), counts.shape, live.shape
    lane = jnp.arange(lanes, dtype=jnp.int32)
    step = min(128, power(parts), max(1, 16384 // lanes))  # of many experts a thread would have too many numbers
    token = me * chunk(tokens) + jnp.arange(chunk(tokens), dtype=jnp.int32)
    here = token < tokens
    # Asked for before the counts are waited for.
    chosen = [plgpu.load(live.at[token, jnp.full_like(token, k)], mask=here, other=-1) for k in range(top_k)]

    def add(i: Any, sums: Any) -> Any:
        part = i * step + jnp.arange(step, dtype=jnp.int32)
        at = jnp.broadcast_arrays(part[:, None], lane[None, :])
        n = plgpu.load(counts.at[at[0], at[1]], mask=at[0] < parts, other=0)
        return sums[0] + jnp.sum(n, axis=0), sums[1] + jnp.sum(jnp.where(at[0] < me, n, 0), axis=0)

    none = jnp.zeros((lanes,), jnp.int32)
    total, before = lax.fori_loop(0, -(-parts // step), add, (none, none))

    def put() -> None:
        hits = [(one[:, None] == lane[None, :]) & (lane < experts)[None, :] for one in chosen]
        n = functools.reduce(jnp.add, [jnp.where(hit, 1, 0) for hit in hits])
        # The place of a token's next pair with each expert.
        to = (_before(total) + before)[None, :] + _before(n)
        for k, hit in enumerate(hits):
            real = (chosen[k] >= 0) & (chosen[k] < experts)
            at = jnp.where(real, jnp.sum(jnp.where(hit, to, 0), axis=1), order.shape[0])
            plgpu.store(order.at[at], token * top_k + k, mask=real)
            to = to + jnp.where(hit, 1, 0)

    pl.when(me < parts)(put)

    def describe() -> None:
        most = jnp.max(lax.div(total + (sizes[-1] - 1), jnp.full_like(total, sizes[-1])))
        _describe(_cut(total, tokens * top_k, sizes, tables[0].shape[0]), most, experts, tables)

    pl.when(me == parts)(describe)


def _before(values: jax.Array) -> jax.Array:
    """Sums of what comes before, along the first axis."""
    return jnp.cumsum(values, axis=0) - values


def _running(fields: list[tuple[jax.Array, int]]) -> list[tuple[jax.Array, jax.Array]]:
    """Sums of what comes before and of all, for each of some arrays [lanes] whose sum is at most so much.

    As many as fit share a number, so that they take one sum over lanes together: that waits for other warps.
    """
    out, left = [], fields
    while left:
        shifts, width = [], 0
        for _, most in left:
            if width + most.bit_length() > 31:
                break
            shifts.append((width, most.bit_length()))
            width += most.bit_length()
        packed = functools.reduce(jnp.add, [x << at for (x, _), (at, _) in zip(left, shifts, strict=False)])
        before, total = _before(packed), jnp.sum(packed)
        out += [tuple(x >> at & ((1 << bits) - 1) for x in (before, total)) for at, bits in shifts]
        left = left[len(shifts) :]
    return out


@dataclasses.dataclass(frozen=True)
class _Cut:
    """How experts' pairs are cut into blocks.

    Attributes:
      total: int32 [lanes], pairs of each expert.
      start: the place of its first.
      classes: for each size, the largest first, above and up to how many rows, and an expert's first block of it.
      used: all blocks.
    """

    total: jax.Array
    start: jax.Array
    classes: list[tuple[int, int, jax.Array]]
    used: jax.Array


def _cut(total: jax.Array, pairs: int, sizes: tuple[int, ...], blocks: int) -> _Cut:
    """Cut experts that have so many pairs, `pairs` together, into at most `blocks` blocks."""
    block = sizes[-1]
    full = lax.div(total, jnp.full_like(total, block))
    left = total - full * block
    bounds = list(zip((*sizes[-2::-1], 0), reversed(sizes), strict=True))
    have = [(full if high == block else 0) + jnp.where((left > low) & (left <= high), 1, 0) for low, high in bounds]
    (start, _), *sums = _running([(total, pairs), *((n, blocks) for n in have)])
    classes, used = [], jnp.int32(0)
    for (low, high), (before, n) in zip(bounds, sums, strict=True):
        classes.append((low, high, used + before))
        used = used + n
    return _Cut(total, start, classes, used)


def _describe(cut: _Cut, turns: Any, experts: int, tables: Any) -> None:
    """Write the tables of blocks, of which an expert has at most `turns`."""
    from jax.experimental.pallas import triton as plgpu

    block, blocks = cut.classes[0][1], tables[0].shape[0]
    lane = jnp.arange(cut.total.shape[0], dtype=jnp.int32)

    def write(nth: Any, _: None) -> None:
        rows = jnp.minimum(cut.total - nth * block, block)
        at = jnp.full_like(rows, blocks)
        for low, high, first in cut.classes:
            at = jnp.where((rows > low) & (rows <= high), first + (nth if high == block else 0), at)
        for table, value in zip(tables[:3], (lane, cut.start + nth * block, rows), strict=True):
            plgpu.store(table.at[at], value, mask=rows > 0)

    lax.fori_loop(0, turns, write, None)
    b = jnp.arange(power(blocks), dtype=jnp.int32)
    unused = (b >= cut.used) & (b < blocks)
    for table, value in zip(tables[:3], (experts, cut.used, 0), strict=True):
        plgpu.store(table.at[jnp.where(unused, b, blocks)], jnp.full_like(b, value), mask=unused)
    plgpu.store(tables[3].at[jnp.where(b < blocks, b, blocks)], jnp.zeros_like(b), mask=b < blocks)


def route_and_place(
    logits: jax.Array,
    mask: jax.Array | None,
    arrived: jax.Array | None,
    top_k: int,
    norm: bool,
    sizes: tuple[int, ...],
    blocks: int,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, tuple[jax.Array, ...], jax.Array | None]:
    """`triton_route.route` and `place`: of up to FEW tokens in one kernel, where there is a counter.

    Args:
      logits, mask, top_k, norm, interpret: as of `route`.
      arrived: int32 [1], zero, where programs count who is done; None: two kernels.
      sizes, blocks: as of `place`.

    Returns:
      experts, weights and live of `route`; what `place` returns; and arrived, which is zero again.

    Raises:
      ShapeError: arrived is no int32 [1].
    """
    if arrived is not None and (arrived.shape, arrived.dtype) != ((1,), jnp.int32):
        raise ShapeError(
            f"arrived is {arrived.dtype}{list(arrived.shape)}; it is int32[1], the zero that add_norm_route of the "
            f"same layer gives, or None."
        )
    if arrived is not None and logits.shape[-2] <= FEW:
        chosen, weights, live, *places, arrived = _in_one(logits, mask, arrived, top_k, norm, sizes, blocks, interpret)
        return chosen, weights, live, tuple(places), arrived
    chosen, weights, live, counts = route(logits, mask, top_k, norm, interpret)
    return chosen, weights, live, place(live, counts, logits.shape[-1], sizes, blocks, interpret), arrived


def _in_one(
    logits: jax.Array,
    mask: jax.Array | None,
    arrived: jax.Array,
    top_k: int,
    norm: bool,
    sizes: tuple[int, ...],
    blocks: int,
    interpret: bool,
) -> tuple[jax.Array, ...]:

    tokens, experts = logits.shape[-2:]
    s = Statics(experts, max(16, power(experts)), top_k, norm, ROWS, mask is not None)
    programs = -(-tokens // s.rows)
    pair = jax.ShapeDtypeStruct((tokens, top_k), jnp.int32)
    given = (logits, arrived) if mask is None else (logits, mask.astype(jnp.int32), arrived)
    out = (
        *(pair, jax.ShapeDtypeStruct((tokens, top_k), jnp.float32), pair),
        *_shapes(tokens * top_k, blocks),
        jax.ShapeDtypeStruct(arrived.shape, jnp.int32),
        # Which of a program's tokens go to an expert, as bits; where that expert's pairs of theirs begin.
        *(jax.ShapeDtypeStruct((programs, s.lanes), jnp.int32) for _ in range(2)),
    )
    found = call(
        functools.partial(_both_kernel, s, sizes, interpret),
        given,
        out,
        (programs,),
        "route_place",
        warps=ROWS,
        aliases={len(given) - 1: len(out) - 3},
        interpret=interpret,
    )
    return tuple(found[:-2])


def _both_kernel(s: Statics, sizes: tuple[int, ...], interpret: bool, *refs: Any) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    chosen, weights, live, order, *tables, arrived, who, first = refs[-11:]
    me = pl.program_id(0)
    slots = choose(s, me, refs[0], refs[1] if s.masked else None, chosen, weights, live)
    bit = 1 << jnp.arange(s.rows, dtype=jnp.int32)[:, None]
    who[me, :] = jnp.sum(jnp.where(slots > 0, bit, 0), axis=0)
    if not interpret:
        plgpu.debug_barrier()  # what all threads have stored comes before this program's arrival
    before = plgpu.atomic_add(arrived, (jnp.int32(0),), jnp.int32(1))

    def last() -> None:
        arrived[0] = jnp.int32(0)  # for the next layer: nobody else comes
        (tokens, top_k), parts = chosen.shape, who.shape[0]
        # Tokens by expert first, a thread's own, so that nothing but the sum over experts waits for other threads.
        bits = [who[part, :] for part in range(parts)]
        pair = jnp.arange(power(tokens * top_k), dtype=jnp.int32)
        token, here = lax.div(pair, jnp.full_like(pair, top_k)), pair < tokens * top_k
        at = jnp.where(here, token, tokens), lax.rem(pair, jnp.full_like(pair, top_k))
        expert = plgpu.load(live.at[at], mask=here, other=s.experts)
        n = [lax.population_count(one) for one in bits]
        cut = _cut(functools.reduce(jnp.add, n), tokens * top_k, sizes, tables[0].shape[0])
        to = cut.start
        for part in range(parts):
            first[part, :] = (to << s.rows) | bits[part]
            to = to + n[part]
        if not interpret:
            plgpu.debug_barrier()
        # Then a thread has some pairs.
        real = here & (expert < s.experts)
        row, part = lax.rem(token, jnp.full_like(token, s.rows)), lax.div(token, jnp.full_like(token, s.rows))
        found = plgpu.load(first.at[jnp.where(real, part, 0), jnp.where(real, expert, 0)], mask=real, other=0)
        _describe(cut, -(-tokens // sizes[-1]), s.experts, tables)
        place = (found >> s.rows) + lax.population_count(found & ((1 << row) - 1))
        plgpu.store(order.at[jnp.where(real, place, order.shape[0])], pair, mask=real)

    pl.when(before == who.shape[0] - 1)(last)
