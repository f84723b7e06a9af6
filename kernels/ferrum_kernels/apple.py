"""The same functions within what the Apple plugins take: jax-metal (platform METAL) and jax-mps (platform mps).

Both lack int4 and 64-bit types, complex numbers and custom calls; jax-metal also lacks top_k and scatter. Unpacking
is therefore uint32 shifts and masks, and experts are taken by dynamic slices. Each block is one step of the loop:
these plugins pay for control flow, so short block lists are unrolled instead.

Checked on Linux by lowering for both platforms and by running on CPU; it has not run on Apple hardware.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_kernels.contract import compute_dtype
from ferrum_kernels.xla import Stack, block_product, expert_weight
from ferrum_kernels.xla import gptq_matmul as gptq_matmul

UNROLLED_BLOCKS = 16


def grouped_matmul(
    x: jax.Array,
    stack: Stack,
    block_expert: jax.Array,
    block: int,
    layer: jax.Array | None,
    y: jax.Array,
    transpose: bool,
) -> jax.Array:
    """Fill the rows of the blocks whose expert is in this stack, block after block; as `xla.grouped_matmul`."""
    num_blocks = block_expert.shape[0]
    # A block that is not ours re-reads the last expert that is, so that no other weight is touched.
    experts = jnp.where(block_expert >= 0, block_expert, jnp.max(block_expert, initial=0))

    def one_block(b: int | jax.Array, y: jax.Array) -> jax.Array:
        weight, perm = expert_weight(stack, layer, experts[b], compute_dtype(x.dtype))
        rows = lax.dynamic_slice_in_dim(x, b * block, block)
        old = lax.dynamic_slice_in_dim(y, b * block, block)
        product = block_product(rows, weight, perm, transpose).astype(y.dtype)
        return lax.dynamic_update_slice_in_dim(y, jnp.where(block_expert[b] >= 0, product, old), b * block, 0)

    if num_blocks <= UNROLLED_BLOCKS:
        for b in range(num_blocks):
            y = one_block(b, y)
        return y
    # Blocks are sorted by expert with unused ones last, so the loop ends at the last block of ours.
    ours = jnp.max(jnp.where(block_expert >= 0, jnp.arange(1, num_blocks + 1, dtype=jnp.int32), 0))
    return lax.fori_loop(0, ours, one_block, y)
