"""The blocks every family is built from: RMSNorm, linear, grouped-query attention and the dense MLP."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from ferrum_jax.config import ModelConfig
from ferrum_jax.kernels import default_implementation, gptq_matmul, is_weight
from ferrum_kernels import cpu, mosaic, triton, triton_norm, triton_parts
from ferrum_kernels.contract import einsum
from ferrum_kernels.derivatives import differentiable
from ferrum_kernels.pairs import Pairs


def rms_norm(x: Float[Array, "*lead D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "*lead D"]:
    """Root-mean-square normalisation over the last axis, computed in float32.

    Args:
      x: [..., D].
      weight: [D], multiplied after normalising.
      eps: added to the mean square.

    Returns:
      [..., D] in x.dtype.

    Source: arXiv 1910.07467.

    >>> rms_norm(jnp.array([[3.0, -3.0]]), jnp.array([1.0, 2.0]), eps=0.0).tolist()
    [[1.0, -2.0]]
    """
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * weight.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def add_norm(
    x: jax.Array, y: jax.Array | Pairs, weight: jax.Array, cfg: ModelConfig, layer: jax.Array | int | None = None
) -> tuple[jax.Array, jax.Array]:
    """x + y, and the RMS norm of that.

    Args:
      x: the residual stream [..., D].
      y: what a branch adds to it, parts of that from `linear_parts`, or pairs from `moe.moe_layer`.
      weight: [D]; a stack [L, D] of them when `layer` is given.
      cfg: its rms_norm_eps; its `implementation` chooses the kernel.
      layer: index into the stack.

    Returns:
      (sum, norm), both [..., D] in x.dtype.
    """
    return add_norm_next(x, y, weight, cfg, layer)[:2]


def add_norm_next(
    x: jax.Array, y: jax.Array | Pairs, weight: jax.Array, cfg: ModelConfig, layer: jax.Array | int | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`add_norm`, and int32 the number of the layer after this one, which kernels count up by the way."""

    def specified(activations: tuple, layer: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        x, y, weight = activations
        total = added(x, y)
        after = jnp.int32(1) + (0 if layer is None else layer)
        return total, rms_norm(total, at_layer(weight, layer), cfg.rms_norm_eps), after

    def kernel(activations: tuple, layer: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        x, y, weight = activations
        given = *folded(x, y), weight, layer, cfg.rms_norm_eps
        total, norm, after = triton_norm.add_norm(*given, triton.is_interpreted())
        return total.reshape(x.shape), norm.reshape(x.shape), after.reshape(())

    index = None if layer is None else jnp.asarray(layer, jnp.int32)
    if isinstance(y, Pairs):  # come of kernels that take the same dtypes, in steps that nobody differentiates
        return kernel((x, y, weight), index)
    if uses_triton(cfg) and triton_norm.takes(x, weight) and (y.ndim > x.ndim or y.dtype == x.dtype):
        return differentiable(kernel, specified)((x, y, weight), index)
    return specified((x, y, weight), index)


def added(x: jax.Array, y: jax.Array) -> jax.Array:
    """x + y in x.dtype, where y [parts, *x.shape] may be parts of a sum.

    >>> added(jnp.ones((1, 2)), jnp.array([[[1.0, 2.0]], [[3.0, 4.0]]])).tolist()
    [[5.0, 7.0]]
    """
    return x + y if y.ndim == x.ndim else (x.astype(jnp.float32) + jnp.sum(y, axis=0)).astype(x.dtype)


def folded(x: jax.Array, y: Any) -> tuple[jax.Array, Any]:
    """A residual stream [..., D] and what is added to it as rows: [T, D], and [T, D], [parts, T, D] or pairs."""
    if isinstance(y, Pairs):
        return x.reshape(-1, x.shape[-1]), y
    lead = y.shape[: y.ndim - x.ndim]
    return x.reshape(-1, x.shape[-1]), y.reshape(*lead, -1, y.shape[-1])


def at_layer(stack: jax.Array, layer: Any) -> jax.Array:
    """One layer's array of a stack; the array itself where `layer` is None."""
    return stack if layer is None else lax.dynamic_index_in_dim(stack, layer, 0, keepdims=False)


# Up to this many rows a plain product is bound by reading the weight, and widening 16-bit weights first costs more.
FEW_ROWS = 16


def linear(
    x: jax.Array,
    weight: Any,
    cfg: ModelConfig,
    bias: jax.Array | None = None,
    out_dtype: Any = None,
    layer: jax.Array | int | None = None,
) -> jax.Array:
    """x @ weight + bias for a packed or a plain weight.

    Args:
      x: [..., K].
      weight: a packed weight of shape (K, N), or an array [K, N]; a stack [L] of them when `layer` is given.
      cfg: its `implementation` chooses the kernel.
      bias: [N] or None.
      out_dtype: of the result; None means x.dtype. Sums are float32 in any case.
      layer: index into the stack, so that a scan over layers copies no weight.

    Returns:
      [..., N].
    """
    if is_weight(weight):
        wide = out_dtype if bias is None else jnp.float32
        y = gptq_matmul(x, weight, layer=layer, implementation=cfg.implementation, out_dtype=wide)
    else:
        y = _plain_product(x, weight, cfg, layer)
    if bias is not None:
        y = y + bias.astype(jnp.float32).reshape((1,) * (y.ndim - 1) + (-1,))
    return y.astype(out_dtype or x.dtype)


def linear_parts(
    x: jax.Array, weight: Any, cfg: ModelConfig, bias: jax.Array | None = None, layer: jax.Array | int | None = None
) -> jax.Array:
    """`linear` for `add_norm` to read: where kernels are faster so, float32 parts [parts, ..., N] of the product.

    Args:
      x, weight, cfg, bias, layer: as in `linear`.

    Returns:
      [..., N], or parts of it to be added up.
    """
    if bias is None and uses_triton(cfg) and triton_parts.count(x, weight) > 1:
        return triton_parts.product(x, weight, layer)
    return linear(x, weight, cfg, bias, layer=layer)


def _plain_product(x: jax.Array, weight: jax.Array, cfg: ModelConfig, layer: Any) -> jax.Array:
    rows = math.prod(x.shape[:-1])
    if 0 < rows <= FEW_ROWS and uses_cpu_kernels(cfg):
        y = cpu.dense_product(x.reshape(rows, -1), weight, layer)
        return y.reshape(*x.shape[:-1], weight.shape[-1])
    return einsum("...k,kn->...n", x, at_layer(weight, layer).astype(x.dtype))


def uses_cpu_kernels(cfg: ModelConfig) -> bool:
    """Whether what is not a packed product runs on the CPU kernels too."""
    return implementation_of(cfg) in cpu.NAMES


def uses_triton(cfg: ModelConfig) -> bool:
    """Whether what is not a packed product runs on the Triton kernels too, under either GPU backend's name."""
    return implementation_of(cfg) in mosaic.NAMES


def implementation_of(cfg: ModelConfig) -> str:
    """The name that `cfg.implementation` stands for on the default device."""
    return default_implementation() if cfg.implementation is None else cfg.implementation


def attention(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S Kv h"],
    v: Float[Array, "B S Kv h"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T H h"]:
    """Grouped-query attention with a given mask; scores and softmax in float32.

    Args:
      q: queries [B, T, H, h].
      k: keys [B, S, Kv, h]; query heads share keys in runs of H // Kv.
      v: values [B, S, Kv, h].
      mask: [B, T, S], True where a query sees a key; at least one per query.

    Returns:
      [B, T, H, h] in q.dtype.

    Source: arXiv 2305.13245.
    """
    batch, tokens, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, tokens, kv_heads, heads // kv_heads, head_dim)
    scores = einsum("btkgh,bskh->bkgts", grouped, k) / jnp.float32(head_dim**0.5)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    out = einsum("bkgts,bskh->btkgh", weights, v)
    return out.reshape(q.shape).astype(q.dtype)


def mlp(params: dict[str, Any], x: jax.Array, cfg: ModelConfig, layer: jax.Array | int | None = None) -> jax.Array:
    """Gated dense MLP: down(silu(gate(x)) * up(x)).

    Args:
      params: {"gate", "up", "down"}, packed or plain weights.
      x: [..., D].
      cfg: see `linear`.
      layer: index into weights that have a layer axis.

    Returns:
      [..., D].

    Source: SwiGLU, arXiv 2002.05202.
    """
    gate, up = (linear(x, params[name], cfg, layer=layer) for name in ("gate", "up"))
    return linear(silu_mul(gate, up), params["down"], cfg, layer=layer)


def silu_mul(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, computed in float32, in gate.dtype."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)
