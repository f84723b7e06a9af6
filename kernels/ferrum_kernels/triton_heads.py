"""Heads of the Triton backend's attention: read as projected, normed, rotated, and as they enter the cache."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_kernels.code_words import packed
from ferrum_kernels.triton_flash import Refs, Slots, read, store, store_strips
from ferrum_kernels.triton_statics import Statics


class Heads(NamedTuple):
    """Heads as projected, and what their norm and rotation take: read together, long before they are needed.

    Attributes:
      strips: float32 [n, h / 2] each, or [n, h / 4] where the cache holds codes.
      weights: of the norm, float32 [1, ...] for each strip, or None.
      cosine, sine: float32 of the first half's strips.
    """

    strips: tuple[jax.Array, ...]
    weights: tuple[jax.Array, ...] | None
    cosine: tuple[jax.Array, ...]
    sine: tuple[jax.Array, ...]


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
    count = max(2, s.strips)
    lanes = [i * (s.head_dim // count) + s.lanes(s.head_dim // count) for i in range(count)]
    token, mask = tokens[:, None], alive[:, None]
    start = columns[:, None] if jnp.ndim(columns) else columns
    strips = tuple(read(r[name], (row, token, start + lane[None, :]), mask).astype(jnp.float32) for lane in lanes)
    weights = None
    if f"{name}_norm" in r:
        norm = r[f"{name}_norm"]
        at = (r["norm_layer"][0],) if "norm_layer" in r else ()
        weights = tuple(read(norm, (*at, lane)).astype(jnp.float32)[None, :] for lane in lanes)
    cosine, sine = (
        tuple(read(r[table], (row, token, lane[None, :]), mask) for lane in lanes[: count // 2])
        for table in ("cosine", "sine")
    )
    return Heads(strips, weights, cosine, sine)


def rotated(s: Statics, x: Heads) -> tuple[jax.Array, ...]:
    """Strips of heads after norm and rotation, float32."""
    strips = x.strips
    if x.weights is not None:
        square = jnp.sum(functools.reduce(jnp.add, [strip * strip for strip in strips]), axis=1) / s.head_dim
        scale = lax.rsqrt(square + jnp.float32(s.eps))[:, None]
        strips = tuple(strip * scale * weight for strip, weight in zip(strips, x.weights, strict=True))
    half = len(strips) // 2
    turns = list(zip(strips[:half], strips[half:], x.cosine, x.sine, strict=True))
    return (*(a * c - b * d for a, b, c, d in turns), *(b * c + a * d for a, b, c, d in turns))


class Place(NamedTuple):
    """What the queries [M] of a tile are: tokens of the row and heads, both int32, and who is there."""

    token: jax.Array
    head: jax.Array
    alive: jax.Array


def place(s: Statics, r: Refs, head: Any, first: Any) -> Place:
    """Tokens from `first` on, and the query heads of a key head."""
    place = s.lanes(s.width)
    token, member = first + lax.div(place, s.padded_group), lax.rem(place, s.padded_group)
    alive = (member < s.group) & (place < s.padded_group * s.cut.queries) & (token < r["q"].shape[1])
    return Place(token, head * s.group + member, alive)


def query_heads(s: Statics, r: Refs, row: Any, at: Place) -> Heads:
    """Read the queries of a tile."""
    return heads(s, r, "q", row, at.token, s.columns[0] + at.head * s.head_dim, at.alive)


def queries(s: Statics, x: Heads) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """The queries [M, h] of a tile, by the cache's strips, and by those of the rotation."""
    unit = s.unit if s.codes else 1.0
    strips = tuple((strip * unit).astype(s.dtype) for strip in rotated(s, x))
    if s.codes:
        return strips, strips
    whole = jnp.transpose(jnp.stack(strips, -1), (0, 2, 1)).reshape(s.width, s.head_dim)
    return (whole,), strips


def new_heads(s: Statics, r: Refs, row: Any, head: Any, tokens: jax.Array) -> tuple[Heads, tuple[jax.Array, ...]]:
    """Read the keys, and the values [n, h] by strips, of some new tokens int32 [n] of a row."""
    there = tokens < r["k"].shape[1]
    k = heads(s, r, "k", row, tokens, s.columns[1] + head * s.head_dim, there)
    lane = s.lanes(s.strip)[None, :]
    columns = [s.columns[2] + head * s.head_dim + i * s.strip + lane for i in range(s.strips)]
    return k, tuple(read(r["v"], (row, tokens[:, None], at), there[:, None]).astype(jnp.float32) for at in columns)


def write(
    s: Statics, r: Refs, out: Refs, head: Any, new: tuple[Heads, tuple[jax.Array, ...]], slots: Slots, alive: jax.Array
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Put keys and values of some tokens into the cache; gives them back as the cache holds them.

    Args:
      s: statics.
      r: the kernel's arrays.
      out: those that it writes.
      head: key head.
      new: keys and values of n tokens.
      slots: of the cache.
      alive: bool [n], which of them to write.

    Returns:
      Strips float32 of the keys [n, h], and of the values.
    """
    layer = r["layer"][0]
    block, slot = jnp.where(alive, slots[0], out["keys"].shape[1]), slots[1]

    def put(name: str, strips: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Write one of the two."""
        scale, held = None, strips
        if s.codes:
            scale = _scale(functools.reduce(lax.max, [jnp.max(jnp.abs(x), axis=1) for x in strips]))
            store(out[f"{name}_scales"], (layer, block, slot, head), scale, alive)
            strips = tuple(_rounded(x, scale) for x in strips)
            held = (packed(strips),)
        else:
            held = strips = tuple(x.astype(out[f"{name}s"].dtype) for x in strips)
        store_strips(s, out[f"{name}s"], (layer, block[:, None], slot[:, None], head), held, alive[:, None])
        return tuple(x.astype(jnp.float32) * (1.0 if scale is None else scale[:, None]) for x in strips)

    return put("key", rotated(s, new[0])), put("value", new[1])


def _scale(most: jax.Array) -> jax.Array:
    """Of heads whose largest magnitude is `most`: NaN where that is not finite, so that whoever sees such a head is."""
    scale = most / 127.0
    return jnp.where(most < jnp.inf, jnp.where(scale == 0.0, 1.0, scale), jnp.nan)


def _rounded(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x / scale to the nearest whole number, halves up; a scale of few bits may be too small for the largest."""
    return jnp.clip(jnp.floor(x / scale[:, None] + 0.5), -127.0, 127.0)
