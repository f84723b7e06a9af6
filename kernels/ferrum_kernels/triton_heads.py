"""Heads of the Triton backend's attention: read as projected, normed, rotated, and as they enter the cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_kernels.triton_flash import Refs, Statics, read, store


class Heads(NamedTuple):
    """Heads as projected, and what their norm and rotation take: read together, long before they are needed.

    Attributes:
      halves: float32 [n, h / 2] each.
      weights: of the norm, float32 [1, h / 2] for each half, or None.
      cosine, sine: float32 [n, h / 2].
    """

    halves: tuple[jax.Array, ...]
    weights: tuple[jax.Array, ...] | None
    cosine: jax.Array
    sine: jax.Array


def heads(s: Statics, r: Refs, name: str, row: Any, tokens: jax.Array, columns: Any, alive: jax.Array) -> Heads:
    """Read some heads.

    Args:
      s: statics.
      r: the kernel's arrays.
      name: "q" or "k".
      row: row of the batch.
      tokens: int32 [n], of the row.
      columns: where the heads begin; int32 [n] or a scalar.
      alive: bool [n]; zero elsewhere.
    """
    half = s.head_dim // 2
    lanes = jnp.arange(half, dtype=jnp.int32)
    lane, token = lanes[None, :], tokens[:, None]
    start = (columns[:, None] if jnp.ndim(columns) else columns) + lane
    mask = alive[:, None]
    halves = tuple(read(r[name], (row, token, start + shift), mask).astype(jnp.float32) for shift in (0, half))
    weights = None
    if f"{name}_norm" in r:
        norm = r[f"{name}_norm"]
        at = (r["norm_layer"][0],) if "norm_layer" in r else ()
        weights = tuple(read(norm, (*at, lanes + shift)).astype(jnp.float32)[None, :] for shift in (0, half))
    cosine, sine = (read(r[table], (row, token, lane), mask) for table in ("cosine", "sine"))
    return Heads(halves, weights, cosine, sine)


def rotated(s: Statics, x: Heads) -> tuple[jax.Array, jax.Array]:
    """Both halves float32 [n, h / 2] of heads after norm and rotation."""
    first, second = x.halves
    if x.weights is not None:
        square = jnp.sum(first * first + second * second, axis=1) / s.head_dim
        scale = lax.rsqrt(square + jnp.float32(s.eps))[:, None]
        first, second = (half * scale * weight for half, weight in zip(x.halves, x.weights, strict=True))
    return first * x.cosine - second * x.sine, second * x.cosine + first * x.sine


class Place(NamedTuple):
    """What the queries [M] of a tile are: tokens of the row and heads, both int32, and who is there."""

    token: jax.Array
    head: jax.Array
    alive: jax.Array


def place(s: Statics, r: Refs, head: Any, first: Any) -> Place:
    """Tokens from `first` on, and the query heads of a key head."""
    place = jnp.arange(s.width, dtype=jnp.int32)
    token, member = first + lax.div(place, s.padded_group), lax.rem(place, s.padded_group)
    alive = (member < s.group) & (place < s.padded_group * s.cut.queries) & (token < r["q"].shape[1])
    return Place(token, head * s.group + member, alive)


def query_heads(s: Statics, r: Refs, row: Any, at: Place) -> Heads:
    """Read the queries of a tile."""
    return heads(s, r, "q", row, at.token, s.columns[0] + at.head * s.head_dim, at.alive)


def queries(s: Statics, x: Heads) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The queries [M, h] of a tile, and their halves."""
    first, second = (half.astype(s.dtype) for half in rotated(s, x))
    whole = jnp.transpose(jnp.stack((first, second), -1), (0, 2, 1)).reshape(s.width, s.head_dim)
    return whole, first, second


def new_heads(s: Statics, r: Refs, row: Any, head: Any, tokens: jax.Array) -> tuple[Heads, jax.Array]:
    """Read the keys and values [n, h] of some new tokens int32 [n] of a row."""
    there = tokens < r["k"].shape[1]
    k = heads(s, r, "k", row, tokens, s.columns[1] + head * s.head_dim, there)
    lane = jnp.arange(s.head_dim, dtype=jnp.int32)[None, :]
    column = s.columns[2] + head * s.head_dim + lane
    return k, read(r["v"], (row, tokens[:, None], column), there[:, None]).astype(jnp.float32)


def write(
    s: Statics, r: Refs, out: Refs, head: Any, new: tuple[Heads, jax.Array], rows: jax.Array, alive: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Put keys and values of some tokens into the cache, at cache rows `rows`; gives them back as the cache holds them.

    Args:
      s: statics.
      r: the kernel's arrays.
      out: those that it writes.
      head: key head.
      new: keys and values of n tokens.
      rows: int32 [n], of the cache.
      alive: bool [n], which of them to write.

    Returns:
      Both halves of the keys float32 [n, h / 2], values float32 [n, h].
    """
    layer, half = r["layer"][0], s.head_dim // 2
    k, v = rotated(s, new[0]), new[1]
    lane = jnp.arange(s.head_dim, dtype=jnp.int32)[None, :]
    at = jnp.where(alive, rows, out["keys"].shape[1])
    if s.codes:
        k_scale = _scale(lax.max(jnp.max(jnp.abs(k[0]), axis=1), jnp.max(jnp.abs(k[1]), axis=1)))
        v_scale = _scale(jnp.max(jnp.abs(v), axis=1))
        store(out["key_scales"], (layer, at, head), k_scale, alive)
        store(out["value_scales"], (layer, at, head), v_scale, alive)
        k = tuple(_rounded(x, k_scale) for x in k)
        v = _rounded(v, v_scale)
    dtype = out["keys"].dtype
    k, v = tuple(x.astype(dtype) for x in k), v.astype(dtype)
    for i, x in enumerate(k):
        part = jnp.arange(half, dtype=jnp.int32)[None, :] + i * half
        store(out["keys"], (layer, at[:, None], head, part), x, alive[:, None])
    store(out["values"], (layer, at[:, None], head, lane), v, alive[:, None])
    first, second, v = (x.astype(jnp.float32) for x in (*k, v))
    if s.codes:
        first, second, v = first * k_scale[:, None], second * k_scale[:, None], v * v_scale[:, None]
    return first, second, v


def _scale(most: jax.Array) -> jax.Array:
    return jnp.where(most == 0.0, 1.0, most / 127.0)


def _rounded(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x / scale to the nearest whole number, halves up."""
    return jnp.floor(x / scale[:, None] + 0.5)
