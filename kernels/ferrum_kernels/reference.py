"""The specification: GPTQ matmuls in the plainest arithmetic, which every other implementation is held against."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ferrum_kernels.blocks import Dispatch
from ferrum_kernels.packed import PackedLinear


def dequantize(w: PackedLinear) -> jax.Array:
    """float32 [K, N] of one packed matrix, code by code from the bit stream."""
    (k, n), bits = w.shape, w.bits

    def code(words: jax.Array, i: jax.Array) -> jax.Array:  # field i of the stream that runs along axis 0
        places = i[:, None] * bits + jnp.arange(bits)[None]
        stream = (words[places // 32] >> (places % 32)[..., None].astype(jnp.uint32)) & jnp.uint32(1)
        return (stream.astype(jnp.int32) << jnp.arange(bits)[None, :, None]).sum(1)

    group = jnp.arange(k) // w.group_size
    zeros = 2 ** (bits - 1) if w.qzeros is None else code(w.qzeros.T, jnp.arange(n)).T[group]
    rows = (code(w.qweight, jnp.arange(k)) - zeros).astype(jnp.float32) * w.scales.astype(jnp.float32)[group]
    return rows if w.perm is None else jnp.zeros_like(rows).at[w.perm].set(rows)


def gptq_matmul(x: jax.Array, w: PackedLinear) -> jax.Array:
    """x [M, K] @ W [K, N] (+ bias) in float32."""
    y = jnp.matmul(x.astype(jnp.float32), dequantize(w), precision="highest")
    return y if w.bias is None else y + w.bias.astype(jnp.float32)[None]


def expert_weights(parts: list, tables: tuple | None, num_experts: int) -> jax.Array:
    """float32 [E, K, N] of every expert, wherever its part holds it."""
    weights: list[jax.Array] = [jnp.zeros(())] * num_experts
    for i, part in enumerate(parts):
        table = range(num_experts) if tables is None else tables[i][:-1]
        for e, place in enumerate(table):
            if place >= 0:
                one = part[place]
                weights[e] = dequantize(one) if isinstance(one, PackedLinear) else one.astype(jnp.float32)
    return jnp.stack(weights)


def grouped_matmul(x: jax.Array, weights: jax.Array, dispatch: Dispatch) -> jax.Array:
    """x [R, K] in the block layout of `dispatch` times weights [E, K, N] -> float32 [R, N]; dead blocks give zero."""
    y = jnp.zeros((x.shape[0], weights.shape[-1]), jnp.float32)
    for b, e in enumerate(dispatch.block_expert):
        rows = slice(b * dispatch.block, (b + 1) * dispatch.block)
        live = weights.at[e].get(mode="fill", fill_value=0)
        y = y.at[rows].set(jnp.matmul(x[rows].astype(jnp.float32), live, precision="highest"))
    return y
