"""Routing and dispatch of the Triton backend: the best K experts of each token, and the places of pairs by expert.

Two kernels. The first picks experts and counts them per chunk of tokens; the second adds the counts up, so that each
pair finds its place without a sort. Places are sorted by expert and, within one, by pair: results are deterministic.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

PROGRAMS = 128  # chunks that are enough to keep a GPU busy
SUB = 64  # pairs that a program looks at together


def power(n: int) -> int:
    """The power of two from n on.

    >>> [power(n) for n in (1, 2, 3, 60)]
    [1, 2, 4, 64]
    """
    return 1 << max(0, n - 1).bit_length()


def chunk(tokens: int) -> int:
    """Tokens of a chunk, which one program handles.

    >>> [chunk(t) for t in (1, 64, 4096)]
    [4, 4, 32]
    """
    return min(32, max(4, power(-(-tokens // PROGRAMS))))


def chunks(tokens: int) -> int:
    """Chunks of tokens."""
    return -(-tokens // chunk(tokens))


@dataclasses.dataclass(frozen=True)
class _Statics:
    experts: int
    lanes: int
    top_k: int
    norm: bool
    rows: int  # tokens of a program
    masked: bool


def route(
    logits: jax.Array, mask: jax.Array | None, top_k: int, norm: bool, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Softmax, the best K, and how many pairs of a chunk each expert has.

    Args:
      logits: float [T, E], or parts [parts, T, E] to be added up.
      mask: bool [T], False for tokens that go nowhere; None: none.
      top_k: K.
      norm: rescale the K weights to sum to one.
      interpret: run without a GPU.

    Returns:
      experts int32 [T, K] best first with ties to the smaller index; float32 weights [T, K], NaN where a logit is NaN
      or +inf; int32 [T, K], the same experts but E where a token is masked; int32 [chunks, E'] counts of those.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    tokens, experts = logits.shape[-2:]
    s = _Statics(experts, max(16, power(experts)), top_k, norm, chunk(tokens), mask is not None)
    pair = jax.ShapeDtypeStruct((tokens, top_k), jnp.int32)
    given = (logits,) if mask is None else (logits, mask.astype(jnp.int32))
    return pl.pallas_call(
        functools.partial(_route_kernel, s),
        out_shape=(
            pair,
            jax.ShapeDtypeStruct((tokens, top_k), jnp.float32),
            pair,
            jax.ShapeDtypeStruct((chunks(tokens), s.lanes), jnp.int32),
        ),
        grid=(chunks(tokens),),
        compiler_params=plgpu.CompilerParams(num_warps=8 if s.rows > 8 else 4, num_stages=1),
        interpret=interpret,
        name="route",
    )(*given)


def _route_kernel(s: _Statics, *refs: Any) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    logits, chosen, weights, live, counts = refs[0], *refs[-4:]
    tokens = chosen.shape[0]
    token = pl.program_id(0) * s.rows + jnp.arange(s.rows, dtype=jnp.int32)
    lane = jnp.arange(s.lanes, dtype=jnp.int32)[None, :]
    here = token < tokens
    real = here[:, None] & (lane < s.experts)
    at = jnp.broadcast_arrays(token[:, None], lane)
    x = load_logits(logits, at[0], at[1], real)
    seen = here
    if s.masked:
        seen = here & (plgpu.load(refs[1].at[token], mask=here, other=0) != 0)
    x = jnp.where(here[:, None], jnp.where(real, x, -jnp.inf), 0.0)
    best, kept, left = find_best(x, s.experts, s.top_k)
    if s.norm:
        total = functools.reduce(jnp.add, kept)
        kept = [weight / total for weight in kept]
    experts = _columns(best)
    slot = jnp.arange(experts.shape[1], dtype=jnp.int32)[None, :]
    # Rows that are not there point past the end, where the interpreter drops what is written.
    at = tuple(jnp.broadcast_arrays(jnp.where(here, token, tokens)[:, None], slot))
    real = here[:, None] & (slot < s.top_k)
    plgpu.store(chosen.at[at], experts, mask=real)
    plgpu.store(weights.at[at], _columns(kept), mask=real)
    plgpu.store(live.at[at], jnp.where(seen[:, None], experts, s.experts), mask=real)
    counts[pl.program_id(0), :] = jnp.sum(jnp.where((left == -1) & seen[:, None], 1, 0), axis=0)


def _columns(values: list[jax.Array]) -> jax.Array:
    """[rows, slots], a power of two of them, of an array [rows] per slot."""
    slot = jnp.arange(power(len(values)), dtype=jnp.int32)[None, :]
    none = jnp.zeros((values[0].shape[0], slot.shape[1]), values[0].dtype)
    return functools.reduce(lambda out, k: jnp.where(slot == k, values[k][:, None], out), range(len(values)), none)


def find_best(x: jax.Array, experts: int, top_k: int) -> tuple[list[jax.Array], list[jax.Array], jax.Array]:
    """The best experts of some tokens.

    Args:
      x: float32 logits [rows, lanes], -inf beyond the experts.
      experts: E.
      top_k: K.

    Returns:
      For each of the K best first, ties to the smaller index, int32 [rows] the expert and float32 [rows] its
      probability, NaN where a logit is NaN or +inf; int32 [rows, lanes], -1 where an expert was chosen.
    """
    lanes = x.shape[1]
    lane = jnp.arange(lanes, dtype=jnp.int32)[None, :]
    e = jnp.exp(x - jnp.max(x, axis=1)[:, None])
    total = jnp.sum(e, axis=1)
    bad = total != total  # NaN, or inf - inf: every weight is NaN and the first experts are chosen
    # Probabilities have no sign, so integers of the same bits are in the same order: one instruction finds the largest.
    left = lax.bitcast_convert_type(jnp.where(bad[:, None], 0.0, e / total[:, None]), jnp.int32)
    left = jnp.where(lane < experts, left, -2)
    best, kept = [], []
    for _ in range(top_k):
        most = jnp.max(left, axis=1)
        expert = jnp.min(jnp.where(left == most[:, None], lane, lanes), axis=1)  # the first of equals
        left = jnp.where(lane == expert[:, None], -1, left)
        best.append(expert)
        kept.append(jnp.where(bad, jnp.nan, lax.bitcast_convert_type(most, jnp.float32)))
    return best, kept, left


def load_logits(logits: Any, token: jax.Array, expert: jax.Array, mask: jax.Array) -> jax.Array:
    """float32 logits of a ref [T, E], or sums of its parts [parts, T, E], added up in order."""
    from jax.experimental.pallas import triton as plgpu

    def load(*lead: jax.Array) -> jax.Array:
        return plgpu.load(logits.at[(*lead, token, expert)], mask=mask, other=0).astype(jnp.float32)

    if len(logits.shape) == 2:
        return load()
    return functools.reduce(jnp.add, [load(jnp.full_like(token, part)) for part in range(logits.shape[0])])


def count(live: jax.Array, experts: int) -> jax.Array:
    """Counts as `route` gives them, of experts chosen elsewhere: int32 [T, K], E and beyond or negative for nobody."""
    lanes = max(16, power(experts))
    tokens, top_k = live.shape
    padded = jnp.pad(live, ((0, -tokens % chunk(tokens)), (0, 0)), constant_values=-1)
    padded = padded.reshape(chunks(tokens), chunk(tokens) * top_k)
    lane = jnp.arange(lanes, dtype=jnp.int32)[None, None, :]
    hit = (padded[:, :, None] == lane) & (lane < experts)
    return hit.sum(1, dtype=jnp.int32)


def place(
    live: jax.Array, counts: jax.Array, experts: int, sizes: tuple[int, ...], blocks: int, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Sort pairs by expert and cut each expert's into blocks.

    Blocks come by size class, the largest first, so that programs that take one after the other end at about the same
    time; within a class they come by expert.

    Args:
      live: int32 [T, K], the expert of each pair; outside [0, E) nobody's.
      counts: of `route`.
      experts: E.
      sizes: most rows of a block of each class, ascending; all of an expert's blocks but its last have the last's.
      blocks: how many blocks to describe; those that are not needed have expert E and no rows.
      interpret: run without a GPU.

    Returns:
      int32 [P] pairs in order of place (those of nobody's pairs are not written); int32 [blocks] expert, first place
      and number of places of each block.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    tokens, top_k = live.shape
    parts = chunks(tokens)
    table = jax.ShapeDtypeStruct((blocks,), jnp.int32)
    return pl.pallas_call(
        functools.partial(_place_kernel, experts, chunk(tokens) * top_k, sizes, blocks, parts),
        out_shape=(jax.ShapeDtypeStruct((tokens * top_k,), jnp.int32), table, table, table),
        grid=(parts,),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="place",
    )(live.reshape(-1), counts)


def _place_kernel(
    experts: int, mine: int, sizes: tuple[int, ...], blocks: int, parts: int, live: Any, counts: Any, *out: Any
) -> None:
    """Places of a chunk's pairs, and the blocks that begin with one of them; no sum over experts waits for another."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    order, *tables = out
    me, lanes, pairs = pl.program_id(0), counts.shape[1], live.shape[0]
    lane = jnp.arange(lanes, dtype=jnp.int32)
    step, size = min(32, power(parts)), min(SUB, power(mine))
    inside = jnp.arange(size, dtype=jnp.int32)

    def load(first: int) -> tuple[jax.Array, jax.Array]:
        pair = me * mine + first + inside
        here = (first + inside < mine) & (pair < pairs)
        return pair, plgpu.load(live.at[pair], mask=here, other=-1)

    def add(i: Any, sums: Any) -> Any:
        chunk = i * step + jnp.arange(step, dtype=jnp.int32)
        at = jnp.broadcast_arrays(chunk[:, None], lane[None, :])
        n = plgpu.load(counts.at[at[0], at[1]], mask=at[0] < parts, other=0)
        return sums[0] + jnp.sum(n, axis=0), sums[1] + jnp.sum(jnp.where(at[0] < me, n, 0), axis=0)

    some = [load(first) for first in range(0, mine, size)]
    none = jnp.zeros((lanes,), jnp.int32)
    total, before = lax.fori_loop(0, -(-parts // step), add, (none, none))
    block = sizes[-1]
    full = lax.div(total, jnp.full_like(total, block))
    left = total - full * block
    needed = full + jnp.where(left > 0, 1, 0)
    classes, ahead = [], 0  # rows above and up to which, blocks that each expert has, and all blocks of larger classes
    for low, high in zip((*sizes[-2::-1], 0), reversed(sizes), strict=True):
        have = (full if high == block else 0) + jnp.where((left > low) & (left <= high), 1, 0)
        classes.append((low, high, have, ahead))
        ahead = ahead + jnp.sum(have)

    for pair, expert in some:
        real = (expert >= 0) & (expert < experts)
        own, less = expert[:, None] == lane[None, :], lane[None, :] < expert[:, None]

        def of(hit: jax.Array, values: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(hit, values[None, :], 0), axis=1)

        earlier = (expert[:, None] == expert[None, :]) & (inside[None, :] < inside[:, None])
        rank = of(own, before) + jnp.sum(jnp.where(earlier, 1, 0), axis=1)
        to = of(less, total) + rank
        plgpu.store(order.at[jnp.where(real, to, pairs)], pair, mask=real)
        nth = lax.div(rank, jnp.full_like(rank, block))
        begins = real & (nth * block == rank)
        rows, at = jnp.minimum(of(own, total) - rank, block), jnp.full_like(rank, blocks)
        for low, high, have, larger in classes:
            index = larger + of(less, have) + (nth if high == block else 0)
            at = jnp.where(begins & (rows > low) & (rows <= high), index, at)
        for table, value in zip(tables, (expert, to, rows), strict=True):
            plgpu.store(table.at[at], value, mask=begins)
        before = before + jnp.sum(jnp.where(own & real[:, None], 1, 0), axis=0)

    # Blocks that nobody needs, of which each program writes some.
    share = -(-blocks // parts)
    b = jnp.arange(power(share), dtype=jnp.int32)
    unused = (b < share) & (me * share + b < blocks) & (me * share + b >= jnp.sum(needed))
    at = jnp.where(unused, me * share + b, blocks)
    for table, value in zip(tables, (experts, 0, 0), strict=True):
        plgpu.store(table.at[at], jnp.full_like(at, value), mask=unused)
