"""Routing on the Triton backend: the best K experts of each token, and how many pairs of a chunk each expert has."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_kernels.triton_call import call

PROGRAMS = 128  # chunks that are enough to keep a GPU busy


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


def warps(rows: int) -> int:
    """Of a program that routes so many tokens."""
    return 8 if rows > 8 else 4


@dataclasses.dataclass(frozen=True)
class Statics:
    """Of a routing kernel; lanes are the experts and some more, rows the tokens of a program."""

    experts: int
    lanes: int
    top_k: int
    norm: bool
    rows: int
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

    tokens, experts = logits.shape[-2:]
    s = Statics(experts, max(16, power(experts)), top_k, norm, chunk(tokens), mask is not None)
    pair = jax.ShapeDtypeStruct((tokens, top_k), jnp.int32)
    given = (logits,) if mask is None else (logits, mask.astype(jnp.int32))
    weights = jax.ShapeDtypeStruct((tokens, top_k), jnp.float32)
    counts = jax.ShapeDtypeStruct((chunks(tokens), s.lanes), jnp.int32)
    return call(
        functools.partial(_route_kernel, s),
        given,
        (pair, weights, pair, counts),
        (chunks(tokens),),
        "route",
        warps=warps(s.rows),
        interpret=interpret,
    )


def _route_kernel(s: Statics, *refs: Any) -> None:
    from jax.experimental import pallas as pl

    me = pl.program_id(0)
    slots = choose(s, me, refs[0], refs[1] if s.masked else None, *refs[-4:-1])
    refs[-1][me, :] = jnp.sum(jnp.where(slots > 0, 1, 0), axis=0)


def choose(s: Statics, me: Any, logits: Any, mask: Any, chosen: Any, weights: Any, live: Any) -> jax.Array:
    """Route the tokens of chunk `me` and write where they go; int32 [rows, lanes], 1 + k where an expert is their k-th.

    What is masked or not there goes to no expert.
    """
    from jax.experimental.pallas import triton as plgpu

    tokens = chosen.shape[0]
    token = me * s.rows + jnp.arange(s.rows, dtype=jnp.int32)
    lane = jnp.arange(s.lanes, dtype=jnp.int32)[None, :]
    here = token < tokens
    real = here[:, None] & (lane < s.experts)
    at = jnp.broadcast_arrays(token[:, None], lane)
    x = load_logits(logits, at[0], at[1], real)
    seen = here
    if s.masked:
        seen = here & (plgpu.load(mask.at[token], mask=here, other=0) != 0)
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
    return jnp.where(seen[:, None], jnp.maximum(-1 - left, 0), 0)


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
      probability, NaN where a logit is NaN or +inf; int32 [rows, lanes], -2 - k where the k-th was chosen, else more.
    """
    lanes = x.shape[1]
    lane = jnp.arange(lanes, dtype=jnp.int32)[None, :]
    e = jnp.exp(x - jnp.max(x, axis=1)[:, None])
    total = jnp.sum(e, axis=1)
    bad = total != total  # NaN, or inf - inf: every weight is NaN and the first experts are chosen
    # Probabilities have no sign, so integers of the same bits are in the same order: one instruction finds the largest.
    left = lax.bitcast_convert_type(jnp.where(bad[:, None], 0.0, e / total[:, None]), jnp.int32)
    left = jnp.where(lane < experts, left, -1)
    best, kept = [], []
    for k in range(top_k):
        most = jnp.max(left, axis=1)
        expert = jnp.min(jnp.where(left == most[:, None], lane, lanes), axis=1)  # the first of equals
        left = jnp.where(lane == expert[:, None], -2 - k, left)
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
