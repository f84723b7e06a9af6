"""The portable implementation: plain XLA ops, one live expert dequantised at a time.

Nothing here touches a dead expert or converts a whole stack: slices come first, arithmetic after, so that XLA has
no loop-invariant conversion to hoist. Temporary memory is one expert's weight, whatever the number of experts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_kernels.bits import unpack
from ferrum_kernels.contract import compute_dtype, einsum
from ferrum_kernels.packed import PackedLinear, zero_points
from ferrum_kernels.tiles import TiledLinear, untile

Stack = PackedLinear | TiledLinear | jax.Array


def dequantize_rows(w: PackedLinear | TiledLinear, dtype: jnp.dtype) -> jax.Array:
    """[..., K, N] in packed row order (sorted by group), as `dtype`; the arithmetic runs in float32."""
    w = untile(w) if isinstance(w, TiledLinear) else w
    k, n = w.shape
    rows = w.num_groups * w.group_size
    codes = unpack(w.qweight, w.bits, k, axis=-2).astype(jnp.int32)
    if rows != k:
        codes = jnp.pad(codes, [(0, 0)] * len(w.lead) + [(0, rows - k), (0, 0)])
    codes = codes.reshape(*w.lead, w.num_groups, w.group_size, n)
    zeros = zero_points(w)
    zeros = zeros if isinstance(zeros, int) else zeros[..., None, :]
    values = (codes - zeros).astype(jnp.float32) * w.scales[..., None, :].astype(jnp.float32)
    return values.astype(dtype).reshape(*w.lead, rows, n)[..., :k, :]


def dequantize(w: PackedLinear | TiledLinear, dtype: jnp.dtype) -> jax.Array:
    """[..., K, N] in input order, as `dtype`."""
    values = dequantize_rows(w, dtype)
    if w.perm is None:
        return values
    return jnp.take_along_axis(values, jnp.argsort(w.perm, axis=-1)[..., None], axis=-2)


def gptq_matmul(x: jax.Array, w: PackedLinear | TiledLinear) -> jax.Array:
    """x [M, K] @ W [K, N] as float32, without the bias."""
    if w.perm is not None:
        x = jnp.take(x, w.perm, axis=-1)
    return einsum("mk,kn->mn", x, dequantize_rows(w, compute_dtype(x.dtype)))


def expert(stack: Stack, layer: jax.Array | None, index: jax.Array) -> Stack:
    """One matrix of a stack [E, ...] or [L, E, ...] by traced indices: a dynamic slice, which fuses into its reader."""
    place = (index,) if layer is None else (layer, index)

    # One slice of all axes: folding [L, E] into one axis first made XLA copy the stack where a group axis was 1 long.
    def take(leaf: jax.Array) -> jax.Array:
        rest = leaf.shape[len(place) :]
        return lax.dynamic_slice(leaf, (*place, *(0 for _ in rest)), (*(1 for _ in place), *rest)).reshape(rest)

    return jax.tree.map(take, stack)


def expert_weight(
    stack: Stack, layer: jax.Array | None, index: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array | None]:
    """(weight [K, N] as dtype, permutation of its input rows or None) of one expert."""
    one = expert(stack, layer, index)
    if isinstance(one, PackedLinear | TiledLinear):
        return dequantize_rows(one, dtype), one.perm
    return one.astype(dtype), None


def block_product(x: jax.Array, weight: jax.Array, perm: jax.Array | None, transpose: bool) -> jax.Array:
    """One block [block, K] @ [K, N] -> float32, or its transpose [block, N] @ [N, K] for the gradient."""
    if transpose:
        y = einsum("mn,kn->mk", x, weight)
        return y if perm is None else jnp.take(y, jnp.argsort(perm), axis=-1)
    return einsum("mk,kn->mn", x if perm is None else jnp.take(x, perm, axis=-1), weight)


def grouped_matmul(
    x: jax.Array,
    stack: Stack,
    block_expert: jax.Array,
    block: int,
    layer: jax.Array | None,
    y: jax.Array,
    transpose: bool,
) -> jax.Array:
    """Fill the rows of the blocks whose expert is in this stack: dequantise each live expert once, then multiply.

    Args:
      x: [R, K] in the block layout ([R, N] when transposing).
      stack: [E, K, N], packed or plain, or [L, E, K, N].
      block_expert: int32 [R // block], sorted where not negative; a negative block is left as it is.
      block: rows per block.
      layer: int32 scalar, index into the stack's first axis, or None where it has no axis of layers.
      y: [R, N] that rows are written into.
      transpose: multiply by W^T, for the gradient with respect to x.

    Returns:
      y with those rows replaced.
    """
    num_experts = stack.num_experts if isinstance(stack, PackedLinear | TiledLinear) else stack.shape[-3]
    mine = block_expert[:, None] == jnp.arange(num_experts, dtype=jnp.int32)[None]
    count, start = mine.sum(0, dtype=jnp.int32), jnp.argmax(mine, axis=0).astype(jnp.int32)
    live = jnp.argsort(count == 0, stable=True).astype(jnp.int32)

    def one_expert(i: jax.Array, y: jax.Array) -> jax.Array:
        e = live[i]
        weight, perm = expert_weight(stack, layer, e, compute_dtype(x.dtype))

        def one_block(b: jax.Array, y: jax.Array) -> jax.Array:
            rows = lax.dynamic_slice_in_dim(x, b * block, block)
            product = block_product(rows, weight, perm, transpose)
            return lax.dynamic_update_slice_in_dim(y, product.astype(y.dtype), b * block, 0)

        return lax.fori_loop(start[e], start[e] + count[e], one_block, y)

    return lax.fori_loop(0, jnp.sum(count > 0, dtype=jnp.int32), one_expert, y)
