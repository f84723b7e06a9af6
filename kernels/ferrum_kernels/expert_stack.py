"""The expert stack of ferrum-kernels as functions: batched dispatches over a stack, and views of one expert.

Source: the `MarlinExpertStack` contract of ferrum-infer-rs, without its workspace and mutation.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ferrum_kernels.blocks import dispatch, from_blocks, to_blocks
from ferrum_kernels.errors import ShapeError
from ferrum_kernels.ops import Implementation, grouped_gptq_matmul
from ferrum_kernels.packed import PackedLinear, slice_columns


def batched_expert_matmul(
    x: jax.Array,
    stack: PackedLinear,
    dispatches: Sequence[tuple[int, int, int, int]],
    out: jax.Array,
    *,
    implementation: Implementation = None,
) -> jax.Array:
    """Run a batch of products, each of some rows with one expert.

    Args:
      x: [M, K].
      stack: packed experts [E, K, N].
      dispatches: host tuples (expert, in_row, out_row, m): rows in_row .. in_row + m of x times that expert go to rows
        out_row .. out_row + m of the result. Input rows may repeat; where output rows overlap, the later tuple wins.
      out: [M', N], the rows that no dispatch writes.
      implementation: as in grouped_gptq_matmul.

    Returns:
      [M', N] in out's dtype; `out` itself is not changed.

    Raises:
      ShapeError: an unknown expert, a row range outside x or out, or a K or N that does not match.

    >>> w = PackedLinear(jnp.full((2, 1, 2), 0x99999999, jnp.uint32), jnp.ones((2, 1, 2), jnp.float16), group_size=8,
    ...                  shape=(8, 2))
    >>> batched_expert_matmul(jnp.ones((1, 8)), w, [(1, 0, 1, 1)], jnp.zeros((2, 2))).tolist()
    [[0.0, 0.0], [8.0, 8.0]]
    """
    k, n = stack.shape
    if x.ndim != 2 or x.shape[1] != k:
        raise ShapeError(f"x is {list(x.shape)}; the stack multiplies rows of K={k}, so x must be [M, {k}].")
    if out.ndim != 2 or out.shape[1] != n:
        raise ShapeError(f"out is {list(out.shape)}; the stack gives rows of N={n}, so out must be [M', {n}].")
    source = np.zeros(out.shape[0], np.int32)
    experts = np.full(out.shape[0], stack.num_experts, np.int32)
    for e, in_row, out_row, m in dispatches:
        if not 0 <= e < stack.num_experts:
            raise ShapeError(f"dispatch names expert {e}; the stack has experts 0 to {stack.num_experts - 1}.")
        for what, start, rows in (("input", in_row, x.shape[0]), ("output", out_row, out.shape[0])):
            if m < 0 or start < 0 or start + m > rows:
                raise ShapeError(f"dispatch covers {what} rows [{start}, {start + m}); there are rows [0, {rows}).")
        source[out_row : out_row + m] = np.arange(in_row, in_row + m)
        experts[out_row : out_row + m] = e
    if (experts == stack.num_experts).all():
        return out
    named = implementation if implementation is None or isinstance(implementation, str) else tuple(implementation)
    return _run(x, stack, source, experts, out, named)


@functools.partial(jax.jit, static_argnames="implementation")
def _run(
    x: jax.Array, stack: PackedLinear, source: Any, experts: Any, out: jax.Array, implementation: Implementation
) -> jax.Array:
    """Compiled once per shape, whatever the dispatches: a row that none writes belongs to nobody and costs nothing."""
    plan = dispatch(experts, stack.num_experts)
    rows = to_blocks(x[source], plan)
    y = grouped_gptq_matmul(rows, stack, plan, implementation=implementation, out_dtype=out.dtype)
    return jnp.where((experts < stack.num_experts)[:, None], from_blocks(y, plan), out)


def expert_linear(
    stack: PackedLinear, expert: int, start: int = 0, size: int | None = None, bias: Any = None
) -> PackedLinear:
    """One expert's output columns as a packed linear of its own.

    Args:
      stack: packed experts [E, K, N].
      expert: which one.
      start: first output column.
      size: number of columns; None means all from `start`.
      bias: [size] or None.

    Returns:
      A single PackedLinear of shape (K, size), for gptq_matmul.

    Raises:
      ShapeError: unknown expert, a slice outside the columns, or a bias of another length.

    >>> w = PackedLinear(jnp.zeros((2, 1, 8), jnp.uint32), jnp.ones((2, 1, 8), jnp.float16), group_size=8, shape=(8, 8))
    >>> expert_linear(w, 1, start=2, size=3).shape
    (8, 3)
    """
    if not 0 <= expert < stack.num_experts:
        raise ShapeError(f"expert {expert} is unknown; the stack has experts 0 to {stack.num_experts - 1}.")
    one = stack[expert]
    return slice_columns(one, start, one.n_per_expert - start if size is None else size, bias)
