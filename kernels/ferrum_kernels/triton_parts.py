"""A product left in parts: float32 sums over parts of the inputs, which the kernel that reads the product adds up.

A matrix of few outputs makes few programs, each with a long sum. Cut along the inputs as well there are enough, but no
program has all of a sum, and one more kernel to add parts up would take back most of what was won. `triton_norm` reads
parts, and so does attention of one new token.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from ferrum_kernels import triton, triton_rows, xla
from ferrum_kernels.derivatives import differentiable
from ferrum_kernels.tiles import TiledLinear
from ferrum_kernels.triton_tiles import part_cut


def count(x: jax.Array, w: Any) -> int:
    """How many parts a product has on this device; 1 where it is better whole or these kernels do not take it.

    Args:
      x: [..., K].
      w: a weight of shape (K, N), or a stack [L] of them.
    """
    rows = math.prod(x.shape[:-1])
    if not isinstance(w, TiledLinear) or w.bias is not None or x.dtype not in (jnp.bfloat16, jnp.float16) or not rows:
        return 1
    if triton.unavailable() or triton.refuses(w) or w.words.shape[-2] != w.n_per_expert:
        return 1
    cut = part_cut(rows, w)
    return cut.parts if cut else 1


def product(x: jax.Array, w: TiledLinear, layer: Any = None) -> jax.Array:
    """x @ W in parts.

    Args:
      x: bfloat16 or float16 [..., K].
      w: one matrix, or a stack [L] of them with `layer`; `count(x, w)` is more than 1.
      layer: index into the stack, or None.

    Returns:
      float32 [parts, ..., N]; the product is their sum. Differentiable with respect to x.
    """
    rows = x.reshape(-1, x.shape[-1])
    cut = part_cut(rows.shape[0], w)
    if cut is None:
        raise ValueError(f"a product of {rows.shape[0]} rows is not cut into parts; count(x, w) says so.")
    parts = cut.parts

    def kernel(x: jax.Array, constants: tuple) -> jax.Array:
        w, index = constants
        given = triton.padded(triton.in_order(x, w, index), w)
        return triton_rows.product(given, w, index, cut, jnp.float32, triton.is_interpreted())

    def specified(x: jax.Array, constants: tuple) -> jax.Array:
        w, index = constants
        one = w if index is None else jax.tree.map(lambda leaf: leaf[index], w)
        whole = xla.gptq_matmul(x, one).astype(jnp.float32)
        return jnp.concatenate([whole[None], jnp.zeros((parts - 1, *whole.shape), jnp.float32)])

    index = None if layer is None else jnp.asarray(layer, jnp.int32)
    y = differentiable(kernel, specified)(rows, (w, index))
    return y.reshape(parts, *x.shape[:-1], y.shape[-1])
