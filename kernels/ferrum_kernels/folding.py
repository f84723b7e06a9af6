"""Folding an act-order permutation into the product before it, so that no activation is gathered at run time.

The inputs of an expert's down projection are silu(gate) * up, which nothing else reads: with the columns of gate and up
in the order in which down's rows are packed, down needs no permutation any more. Gate, up and down are then one unit:
together they compute what they did, but a column of gate and up is no longer the checkpoint's column of that number.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ferrum_kernels.errors import ShapeError
from ferrum_kernels.tiles import TiledLinear


def reorder_columns(w: TiledLinear, order: jax.Array) -> TiledLinear:
    """The weight whose output n is output `order[..., n]` of this one.

    Args:
      w: a tiled weight with any leading axes.
      order: int32 [..., N] with the same leading axes.

    Returns:
      A TiledLinear of the same shape; columns that only fill up its tiles stay where they are.

    Raises:
      ShapeError: the order has another shape.

    >>> from ferrum_kernels import PackedLinear, dequantize, tile
    >>> w = PackedLinear(jnp.full((1, 2), 0x99999999, jnp.uint32), jnp.asarray([[1, 2]], jnp.float16), group_size=8,
    ...                  shape=(8, 2))
    >>> dequantize(reorder_columns(tile(w), jnp.asarray([1, 0])))[0].tolist()
    [2.0, 1.0]
    """
    if order.shape != (*w.lead, w.n_per_expert):
        raise ShapeError(
            f"order is {list(order.shape)}; a TiledLinear with leading axes {list(w.lead)} and {w.n_per_expert} "
            f"outputs needs {[*w.lead, w.n_per_expert]}."
        )
    wide = w.words.shape[-2]
    rest = jnp.broadcast_to(jnp.arange(w.n_per_expert, wide, dtype=order.dtype), (*w.lead, wide - w.n_per_expert))
    padded = jnp.concatenate([order, rest], axis=-1)

    def taken(array: Any, order: jax.Array, axis: int) -> Any:
        if array is None:
            return None
        take = lambda array, order: jnp.take(array, order, axis=axis, mode="clip")  # noqa: E731
        for _ in w.lead:
            take = jax.vmap(take)
        return take(array, order)

    return dataclasses.replace(
        w,
        words=taken(w.words, padded, -2),
        scales=taken(w.scales, padded, -1),
        zeros=taken(w.zeros, padded, -1),
        bias=taken(w.bias, order, -1),
    )


def folds(experts: dict[str, Any]) -> bool:
    """Whether the permutation of down's inputs can become the order of gate's and up's columns: all are tiled."""
    return all(isinstance(w, TiledLinear) for w in experts.values()) and experts["down"].perm is not None


def reorder_gate_and_up(experts: dict[str, Any], order: jax.Array) -> dict[str, Any]:
    """{"gate_up"} or {"gate", "up"} with the columns of gate, and those of up, in an order int32 [..., F]."""
    both = jnp.concatenate([order, order + order.shape[-1]], axis=-1)
    return {name: reorder_columns(w, both if name == "gate_up" else order) for name, w in experts.items()}
