"""The key/value cache: contiguous slots per sequence, written in place when its buffers are donated."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_jax.config import ModelConfig
from ferrum_jax.errors import CapacityError


@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer.

    Attributes:
      k: [L, B, S, Kv, h] keys, rotated.
      v: [L, B, S, Kv, h] values.
      lengths: int32 [B], tokens each row holds.
    """

    k: Any
    v: Any
    lengths: Any

    @property
    def capacity(self) -> int:
        """S, tokens a row can hold."""
        return self.k.shape[2]


jax.tree_util.register_dataclass(KVCache, data_fields=["k", "v", "lengths"], meta_fields=[])


def init_cache(cfg: ModelConfig, batch: int, length: int, dtype: Any = None) -> KVCache:
    """An empty cache.

    Args:
      cfg: the model.
      batch: B, rows.
      length: S, tokens per row, at most cfg.max_position.
      dtype: of keys and values; None means cfg.dtype.

    Returns:
      KVCache of 2 * L * B * S * Kv * h values.

    Raises:
      CapacityError: batch or length is not positive, or length exceeds the model's context.

    >>> import ferrum_jax as fj
    >>> fj.init_cache(fj.load("demo").cfg, batch=4, length=128).k.shape
    (6, 4, 128, 4, 64)
    """
    if batch < 1 or length < 1:
        raise CapacityError(f"a cache of batch={batch} and length={length} holds nothing; both must be at least 1.")
    if length > cfg.max_position:
        raise CapacityError(
            f"length={length} exceeds this model's context of {cfg.max_position} positions; ask for less."
        )
    shape = (cfg.num_layers, batch, length, cfg.num_kv_heads, cfg.head_dim)
    dtype = jnp.dtype(dtype or cfg.dtype)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch, jnp.int32))


def write(
    buffer: jax.Array, new: jax.Array, layer: jax.Array, start: jax.Array, count: jax.Array, scatter: bool
) -> jax.Array:
    """Put new keys or values behind what each row holds.

    Args:
      buffer: [L, B, S, Kv, h].
      new: [B, T, Kv, h]; the first count[b] entries of row b are real.
      layer: int32 scalar.
      start: int32 [B], where row b begins to write.
      count: int32 [B]; entries past it, and positions past S, are dropped.
      scatter: write by scatter, in place; False rewrites one layer by gather and select, for plugins without scatter.

    Returns:
      The buffer with the entries written.
    """
    batch, tokens = new.shape[:2]
    slots = buffer.shape[2]
    new = new.astype(buffer.dtype)
    if scatter:
        offsets = jnp.arange(tokens, dtype=jnp.int32)[None]
        positions = jnp.where(offsets < count[:, None], start[:, None] + offsets, slots)
        rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
        return buffer.at[layer, rows, positions].set(new, mode="drop")
    offsets = jnp.arange(slots, dtype=jnp.int32)[None] - start[:, None]
    real = (offsets >= 0) & (offsets < count[:, None])
    moved = jnp.take_along_axis(new, jnp.clip(offsets, 0, tokens - 1)[..., None, None], axis=1)
    old = lax.dynamic_index_in_dim(buffer, layer, 0, keepdims=False)
    return lax.dynamic_update_index_in_dim(buffer, jnp.where(real[..., None, None], moved, old), layer, 0)
