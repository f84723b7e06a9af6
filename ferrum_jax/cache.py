"""The key/value cache: contiguous slots per sequence, written in place when its buffers are donated.

`ferrum_jax.paged` has the other kind, slots in pages. Either holds keys and values as floats, or as int8 with one
float32 scale per token and head, four codes to a word as `ferrum_kernels.code_words` lays them out.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_jax.config import ModelConfig
from ferrum_jax.errors import CapacityError, ConfigError
from ferrum_kernels.code_words import WORD, from_words, to_words

DTYPES = ("bfloat16", "float16", "float32", "int8")


@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer.

    Attributes:
      k: [L, B, S, Kv, h] keys, rotated; int32 [L, B, S, Kv, h / 4] where they are int8 codes, in words.
      v: the same of the values.
      lengths: int32 [B], tokens each row holds.
      k_scale: float32 [L, B, S, Kv] where keys are codes, else None.
      v_scale: the same of the values.
    """

    k: Any
    v: Any
    lengths: Any
    k_scale: Any = None
    v_scale: Any = None

    @property
    def capacity(self) -> int:
        """S, tokens a row can hold."""
        return self.k.shape[2]

    @property
    def dtype(self) -> jnp.dtype:
        """Of keys and values: int8 where they are codes."""
        return dtype_of(self)


jax.tree_util.register_dataclass(KVCache, data_fields=["k", "v", "lengths", "k_scale", "v_scale"], meta_fields=[])


def dtype_of(cache: Any) -> jnp.dtype:
    """The dtype that a cache of either kind was made with."""
    return jnp.dtype(cache.k.dtype if cache.k_scale is None else jnp.int8)


def init_cache(cfg: ModelConfig, batch: int, length: int, dtype: Any = None) -> KVCache:
    """An empty cache.

    Args:
      cfg: the model.
      batch: B, rows.
      length: S, tokens per row, at most cfg.max_position.
      dtype: of keys and values, a float or "int8"; None means cfg.dtype.

    Returns:
      KVCache of 2 * L * B * S * Kv * h values.

    Raises:
      CapacityError: batch or length is not positive, or length exceeds the model's context.
      ConfigError: a cache has no such dtype, or not for such heads.

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
    k, v, k_scale, v_scale = empty_buffers(cfg, (batch, length), dtype)
    return KVCache(k, v, jnp.zeros(batch, jnp.int32), k_scale, v_scale)


def cache_dtype(cfg: ModelConfig, dtype: Any) -> jnp.dtype:
    """The dtype that a cache's `dtype` argument stands for.

    Raises:
      ConfigError: a cache has no such dtype.
    """
    try:
        found = jnp.dtype(cfg.dtype if dtype is None else dtype)
    except TypeError:
        found = None
    if found is None or found.name not in DTYPES:
        raise ConfigError(f"a cache of dtype={dtype!r} is unknown; accepted are {', '.join(DTYPES)} and None.")
    return found


def empty_buffers(cfg: ModelConfig, slots: tuple[int, int], dtype: Any) -> tuple[Any, Any, Any, Any]:
    """Zeros for keys and values [L, *slots, Kv, h] or, of codes, [L, *slots, Kv, h / 4] and scales [L, *slots, Kv]."""
    dtype = cache_dtype(cfg, dtype)
    shape = (cfg.num_layers, *slots, cfg.num_kv_heads, cfg.head_dim)
    if dtype != jnp.int8:
        k, v = (jnp.zeros(shape, dtype) for _ in range(2))
        return k, v, None, None
    if cfg.head_dim % WORD:
        raise ConfigError(
            f'a cache of dtype="int8" takes heads of a multiple of {WORD} channels; this model has heads of '
            f"{cfg.head_dim}. Use a float dtype."
        )
    k, v = (jnp.zeros((*shape[:-1], cfg.head_dim // WORD), jnp.int32) for _ in range(2))
    k_scale, v_scale = (jnp.zeros(shape[:-1], jnp.float32) for _ in range(2))
    return k, v, k_scale, v_scale


def quantise(heads: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys or values as words of int8 codes, and one scale per head: the largest magnitude of a head becomes 127.

    Args:
      heads: float [..., h].

    Returns:
      (int32 [..., h / 4], float32 [...]). A value that is not finite makes its scale so, and the head reads as NaN.

    >>> words, scale = quantise(jnp.array([0.5, -1.27, 0.0, 1.0]))
    >>> from_words(words).tolist(), round(float(scale), 4)
    ([50, -127, 0, 100], 0.01)
    """
    wide = heads.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1) / 127
    codes = jnp.round(wide / jnp.where(scale > 0, scale, 1)[..., None])
    # Not every device says what a NaN is as an integer.
    codes = jnp.where(jnp.isfinite(codes), jnp.clip(codes, -127, 127), 0)
    return to_words(codes.astype(jnp.int32)), _or_nan(scale)


def _or_nan(scale: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(scale), scale, jnp.nan)


def dequantise(words: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    """The heads [..., h] that words of codes int32 [..., h / 4] and scales float32 [...] stand for, by float32."""
    return (from_words(words).astype(jnp.float32) * scale[..., None]).astype(dtype)


def write(
    buffer: jax.Array, new: jax.Array, layer: jax.Array, start: jax.Array, count: jax.Array, scatter: bool
) -> jax.Array:
    """Put new keys or values behind what each row holds.

    Args:
      buffer: [L, B, S, ...].
      new: [B, T, ...]; the first count[b] entries of row b are real.
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
    inner = (1,) * (new.ndim - 2)
    offsets = jnp.arange(slots, dtype=jnp.int32)[None] - start[:, None]
    real = (offsets >= 0) & (offsets < count[:, None])
    moved = jnp.take_along_axis(new, jnp.clip(offsets, 0, tokens - 1).reshape(batch, slots, *inner), axis=1)
    old = lax.dynamic_index_in_dim(buffer, layer, 0, keepdims=False)
    written = jnp.where(real.reshape(batch, slots, *inner), moved, old)
    return lax.dynamic_update_index_in_dim(buffer, written, layer, 0)
