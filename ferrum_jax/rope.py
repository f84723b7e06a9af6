"""Rotary position embeddings: a frequency per pair of dimensions, and the rotation itself."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from ferrum_jax.config import RopeConfig
from ferrum_jax.errors import ShapeError


def rope_frequencies(
    rope: RopeConfig, head_dim: int, max_position: int, seq_len: jax.Array | int | None = None
) -> tuple[jax.Array, float]:
    """Angle per position of each pair of dimensions, and the factor on cos and sin.

    The tables are computed on the host in float64 and rounded once to float32.

    Args:
      rope: the rotary embedding.
      head_dim: h, size of a head; even.
      max_position: trained context in tokens, where `rope` does not give one.
      seq_len: only for type dynamic, int32 [B] or a scalar: tokens each row holds so far. The base grows with the
        row's own length, so a row gets the same frequencies in a batch as alone. None means within the context.

    Returns:
      float32 [h/2], or [B, h/2] where the type is dynamic and `seq_len` has rows; and the factor, 1.0 but for yarn.

    Example:
      >>> inv_freq, scale = rope_frequencies(RopeConfig(theta=10_000.0), 64, 2048)
      >>> inv_freq.shape, scale
      ((32,), 1.0)

    Source: RoFormer (arXiv 2104.09864); YaRN (2309.00071), which also describes linear and dynamic NTK; llama3 as
    in Llama 3.1. Values agree with transformers 5.
    """
    inv_freq = rope.theta ** -(np.arange(0, head_dim, 2) / head_dim)
    original = rope.original_max_position or max_position
    scale = 1.0
    if rope.rope_type == "linear":
        inv_freq = inv_freq / rope.factor
    elif rope.rope_type == "llama3":
        inv_freq = _llama3(rope, inv_freq, original)
    elif rope.rope_type == "yarn":
        inv_freq, scale = _yarn(rope, inv_freq, head_dim, original), _yarn_scale(rope)
    table = jnp.asarray(inv_freq, jnp.float32)
    if rope.rope_type == "dynamic" and seq_len is not None:
        table = _dynamic(rope, table, original, jnp.asarray(seq_len, jnp.int32))
    return table, scale


def apply_rope(x: jax.Array, positions: jax.Array, inv_freq: jax.Array, scale: float = 1.0) -> jax.Array:
    """Rotate each head's first half against its second half by position times frequency.

    Args:
      x: queries or keys [..., T, heads, h], any float dtype; the rotation is computed in float32.
      positions: int32 [..., T].
      inv_freq: float32 [h/2], or [..., h/2] with x's leading dimensions for frequencies per row.
      scale: factor on cos and sin.

    Returns:
      The rotated x, in x's shape and dtype.

    Raises:
      ShapeError: the shapes do not belong together.

    Example:
      >>> x = jnp.ones((5, 2, 8))
      >>> inv_freq, scale = rope_frequencies(RopeConfig(), 8, 128)
      >>> apply_rope(x, jnp.arange(5), inv_freq, scale).shape
      (5, 2, 8)

    Source: RoFormer (arXiv 2104.09864), in the half-split layout of GPT-NeoX.
    """
    _check_shapes(x, positions, inv_freq)
    cosine, sine = (table[..., None, :] for table in rope_tables(positions, inv_freq, scale))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return rotated.astype(x.dtype)


def rope_tables(positions: jax.Array, inv_freq: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of each position's angles, times the factor: float32 [..., T, h/2]; arguments as apply_rope."""
    if inv_freq.ndim == 1:
        inv_freq = inv_freq.reshape((1,) * (positions.ndim - 1) + inv_freq.shape)
    angle = positions.astype(jnp.float32)[..., None] * inv_freq[..., None, :]
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def _check_shapes(x: jax.Array, positions: jax.Array, inv_freq: jax.Array) -> None:
    if x.ndim < 3 or positions.shape != x.shape[:-2]:
        raise ShapeError(
            f"x is {x.shape} and positions is {positions.shape}; x [..., T, heads, head_dim] with positions [..., T] "
            "is accepted; give one position per token of x."
        )
    if x.shape[-1] != 2 * inv_freq.shape[-1] or inv_freq.shape[:-1] not in ((), x.shape[:-3]):
        raise ShapeError(
            f"inv_freq is {inv_freq.shape} for x {x.shape}; [head_dim / 2] or x's leading dimensions and head_dim / 2 "
            "is accepted; build it with rope_frequencies for this head_dim."
        )


def _dynamic(rope: RopeConfig, table: jax.Array, original: int, seq_len: jax.Array) -> jax.Array:
    # NTK raises the base to theta * stretch**(h / (h - 2)). Multiplying the exact table by the ratio instead keeps
    # float32 error small, and rows within the context keep the table bit for bit.
    half = table.shape[-1]
    excess = jnp.maximum(seq_len - original, 0).astype(jnp.float32)
    stretch = 1.0 + excess * (rope.factor / original)
    exponent = jnp.asarray(np.arange(half) / max(half - 1, 1), jnp.float32)
    row = (1,) * seq_len.ndim + (half,)
    return table.reshape(row) * jnp.exp(-jnp.log(stretch)[..., None] * exponent.reshape(row))


def _llama3(rope: RopeConfig, inv_freq: np.ndarray, original: int) -> np.ndarray:
    low, high = rope.low_freq_factor, rope.high_freq_factor
    assert low is not None and high is not None, "RopeConfig checks this"
    rotations = original * inv_freq / (2 * math.pi)
    keep = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    return inv_freq * (keep + (1 - keep) / rope.factor)


def _yarn(rope: RopeConfig, inv_freq: np.ndarray, head_dim: int, original: int) -> np.ndarray:
    def dimension(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    stretch = np.clip((np.arange(len(inv_freq)) - low) / width, 0.0, 1.0)
    return inv_freq * ((1 - stretch) + stretch / rope.factor)


def _yarn_scale(rope: RopeConfig) -> float:
    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return float(rope.attention_factor)
    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)
