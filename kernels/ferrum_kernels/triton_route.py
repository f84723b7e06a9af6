"""Routing and dispatch of the Triton backend: the best K experts of each token, and the places of pairs by expert.

Two kernels. The first picks experts and counts them per chunk of tokens; the second adds the counts up, so that each
pair finds its place without a sort. Places are sorted by expert and, within one, by pair: results are deterministic.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

PROGRAMS = 128  # chunks that are enough to keep a GPU busy
SUB = 64  # pairs that one step of a loop looks at
DESCRIBED = 16  # blocks that one program describes: with more, it would end after those that place pairs


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


def route(
    logits: jax.Array, mask: jax.Array | None, top_k: int, norm: bool, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Softmax, the best K, and how many pairs of a chunk each expert has.

    Args:
      logits: float [T, E].
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

    tokens, experts = logits.shape
    lanes = max(16, power(experts))
    pair = jax.ShapeDtypeStruct((tokens, top_k), jnp.int32)
    given = (logits,) if mask is None else (logits, mask.astype(jnp.int32))
    rows = chunk(tokens)
    return pl.pallas_call(
        functools.partial(_route_kernel, experts, lanes, top_k, norm, rows, mask is not None),
        out_shape=(
            pair,
            jax.ShapeDtypeStruct((tokens, top_k), jnp.float32),
            pair,
            jax.ShapeDtypeStruct((chunks(tokens), lanes), jnp.int32),
        ),
        grid=(chunks(tokens),),
        compiler_params=plgpu.CompilerParams(num_warps=8 if rows > 8 else 4, num_stages=1),
        interpret=interpret,
        name="route",
    )(*given)


def _route_kernel(experts: int, lanes: int, top_k: int, norm: bool, rows: int, masked: bool, *refs: Any) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    logits, chosen, weights, live, counts = refs[0], *refs[-4:]
    tokens = logits.shape[0]
    token = pl.program_id(0) * rows + jnp.arange(rows, dtype=jnp.int32)
    lane = jnp.arange(lanes, dtype=jnp.int32)
    at = jnp.broadcast_arrays(token[:, None], lane[None, :])
    here = token < tokens
    real = here[:, None] & (lane < experts)[None, :]
    x = plgpu.load(logits.at[at[0], at[1]], mask=real, other=0).astype(jnp.float32)
    x = jnp.where(real, x, -jnp.inf)
    x = jnp.where(here[:, None], x, 0.0)
    e = jnp.exp(x - jnp.max(x, axis=1)[:, None])
    total = jnp.sum(e, axis=1)
    probs = e / total[:, None]
    bad = total != total  # NaN, or inf - inf: every weight is NaN and the first experts are chosen
    left = jnp.where(lane[None, :] < experts, jnp.where(bad[:, None], 0.0, probs), -2.0)
    seen = here
    if masked:
        seen = here & (plgpu.load(refs[1].at[token], mask=here, other=0) != 0)
    count = jnp.zeros((rows, lanes), jnp.int32)
    kept, norms = [], jnp.zeros((rows,), jnp.float32)
    # Rows that are not there point past the end, where the interpreter drops what is written.
    row = jnp.where(here, token, tokens)
    for k in range(top_k):
        expert = jnp.argmax(left, axis=1).astype(jnp.int32)  # the first of equals
        hit = lane[None, :] == expert[:, None]
        # The weight is read apart, so that the next expert does not wait for it.
        weight = jnp.where(bad, jnp.nan, jnp.sum(jnp.where(hit, probs, 0.0), axis=1))
        left = jnp.where(hit, -1.0, left)
        count = count + jnp.where(hit & seen[:, None], 1, 0)
        kept.append(weight)
        norms = norms + weight
        column = jnp.full((rows,), k, jnp.int32)
        plgpu.store(chosen.at[row, column], expert, mask=here)
        plgpu.store(live.at[row, column], jnp.where(seen, expert, experts), mask=here)
    for k, weight in enumerate(kept):
        column = jnp.full((rows,), k, jnp.int32)
        plgpu.store(weights.at[row, column], weight / norms if norm else weight, mask=here)
    counts[pl.program_id(0), :] = jnp.sum(count, axis=0)


def count(live: jax.Array, experts: int) -> jax.Array:
    """Counts as `route` gives them, of experts chosen elsewhere: int32 [T, K], E and beyond or negative for nobody."""
    lanes = max(16, power(experts))
    tokens, top_k = live.shape
    padded = jnp.pad(live, ((0, -tokens % chunk(tokens)), (0, 0)), constant_values=-1)
    padded = padded.reshape(chunks(tokens), chunk(tokens) * top_k)
    lane = jnp.arange(lanes, dtype=jnp.int32)
    hit = padded[:, :, None] == jnp.where(lane < experts, lane, -2)[None, None, :]
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
        grid=(parts + -(-blocks // DESCRIBED),),  # chunks of pairs, then pieces of the tables of blocks
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="place",
    )(live.reshape(-1), counts)


def _place_kernel(
    experts: int, mine: int, sizes: tuple[int, ...], blocks: int, parts: int, live: Any, counts: Any, *out: Any
) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    order, block_expert, block_start, block_count = out
    me, lanes, pairs = pl.program_id(0), counts.shape[1], live.shape[0]
    lane = jnp.arange(lanes, dtype=jnp.int32)
    step = min(32, power(parts))

    def add(i: Any, sums: Any) -> Any:
        chunk = i * step + jnp.arange(step, dtype=jnp.int32)
        at = jnp.broadcast_arrays(chunk[:, None], lane[None, :])
        n = plgpu.load(counts.at[at[0], at[1]], mask=at[0] < parts, other=0)
        return sums[0] + jnp.sum(n, axis=0), sums[1] + jnp.sum(jnp.where(at[0] < me, n, 0), axis=0)

    none = jnp.zeros((lanes,), jnp.int32)
    total, before = lax.fori_loop(0, -(-parts // step), add, (none, none))
    first = jnp.cumsum(total) - total

    size = min(SUB, power(mine))

    # Each pair's place: its expert's first, the pairs of earlier chunks and steps, and those before it in this step.
    def pairs_of(i: Any, base: jax.Array) -> jax.Array:
        offset = i * size + jnp.arange(size, dtype=jnp.int32)
        pair = me * mine + offset
        here = (offset < mine) & (pair < pairs)
        expert = plgpu.load(live.at[pair], mask=here, other=-1)
        hit = (expert[:, None] == lane[None, :]) & (lane < experts)[None, :]
        real = here & (expert >= 0) & (expert < experts)
        hit = hit & real[:, None]
        rank = jnp.cumsum(jnp.where(hit, 1, 0), axis=0)
        to = jnp.sum(jnp.where(hit, base[None, :] + rank - 1, 0), axis=1)
        plgpu.store(order.at[jnp.where(real, to, pairs)], pair, mask=real)
        return base + jnp.sum(jnp.where(hit, 1, 0), axis=0)

    def piece_of_blocks() -> None:
        b = ((me - parts) * DESCRIBED + jnp.arange(DESCRIBED, dtype=jnp.int32))[:, None]
        block = sizes[-1]
        full = total // block
        left = total - full * block
        hit, inside, ends = False, 0, 0  # which expert's block each is, and which of that expert's
        for low, high in zip((*sizes[-2::-1], 0), reversed(sizes), strict=True):
            last = jnp.where((left > low) & (left <= high), 1, 0)
            of_class = full + last if high == block else last
            ends = ends + jnp.cumsum(of_class)
            at = b - (ends - of_class)[None, :]
            mine = (at >= 0) & (at < of_class[None, :])
            inside = at if high == block else jnp.where(mine, full[None, :], inside)
            hit, ends = mine | hit, jnp.max(ends)
        at, found = jnp.minimum(b[:, 0], blocks), jnp.sum(jnp.where(hit, 1, 0), axis=1)
        start = jnp.sum(jnp.where(hit, first[None, :] + inside * block, 0), axis=1)
        rows = jnp.sum(jnp.where(hit, jnp.minimum(total[None, :] - inside * block, block), 0), axis=1)
        expert = jnp.sum(jnp.where(hit, lane[None, :], 0), axis=1)
        here = at < blocks
        plgpu.store(block_expert.at[at], jnp.where(found > 0, expert, experts), mask=here)
        plgpu.store(block_start.at[at], start, mask=here)
        plgpu.store(block_count.at[at], rows, mask=here)

    def piece_of_pairs() -> None:
        lax.fori_loop(0, -(-mine // size), pairs_of, first + before)

    pl.when(me < parts)(piece_of_pairs)
    pl.when(me >= parts)(piece_of_blocks)
