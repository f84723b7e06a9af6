"""Which row goes to which expert: a sort, segment counts and blocks padded to a fixed size."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from ferrum_kernels.errors import ShapeError


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """Rows sorted by expert, each expert's rows padded to whole blocks; every shape depends on the bucket alone.

    `P` pairs of (token, expert) become at most `max_blocks(P, E, block)` blocks of `block` rows, R rows in all.

    Attributes:
      rows: int32 [R], the pair that each block row holds; P marks padding.
      slots: int32 [P], the block row where each pair went (the inverse of `rows`).
      block_expert: int32 [R // block], the expert of each block; E marks a block that nobody uses.
      group_sizes: int32 [E], pairs of each expert.
      block: rows in a block (static).

    Source: the padded layout of `moe_align_block_size` in vLLM and SGLang.
    """

    rows: Any
    slots: Any
    block_expert: Any
    group_sizes: Any
    block: int

    @property
    def num_experts(self) -> int:
        """Number of experts, live or not."""
        return self.group_sizes.shape[0]

    @property
    def num_rows(self) -> int:
        """Rows of the block layout, padding included."""
        return self.rows.shape[0]

    @property
    def blocks_per_expert(self) -> jax.Array:
        """int32 [E], live blocks of each expert."""
        return (self.group_sizes + (self.block - 1)) // self.block


jax.tree_util.register_dataclass(
    Dispatch, data_fields=["rows", "slots", "block_expert", "group_sizes"], meta_fields=["block"]
)


def max_blocks(pairs: int, num_experts: int, block: int) -> int:
    """The most blocks that `pairs` rows can need, however they fall on the experts.

    >>> max_blocks(8, 128, 16), max_blocks(4096, 128, 16)
    (8, 376)
    """
    live = min(pairs, num_experts)
    return live + (pairs - live) // block


def pick_block(pairs: int, num_experts: int) -> int:
    """Rows per block for a bucket: the power of two nearest the mean load; the layout has at most 2.5 rows per pair.

    >>> [pick_block(p, 128) for p in (8, 256, 4096, 2**20)]
    [1, 2, 32, 128]
    """
    mean = max(1.0, pairs / num_experts)
    return min(128, 2 ** round(math.log2(mean)))


def dispatch(expert_ids: jax.Array, num_experts: int, block: int | None = None) -> Dispatch:
    """Sort (token, expert) pairs by expert and lay them out in padded blocks.

    Args:
      expert_ids: int32 [T, K] or [P], the expert of each pair; ids outside [0, num_experts) are skipped
        (that is how padded tokens cost nothing).
      num_experts: E.
      block: rows per block; None picks one from P and E.

    Returns:
      A Dispatch. Within an expert, pairs keep their order, so the result is deterministic.

    Raises:
      ShapeError: expert_ids is not an integer array, or block is not positive.

    >>> d = dispatch(jnp.array([[2, 0], [0, 2]]), num_experts=3, block=2)
    >>> d.rows.tolist(), d.block_expert.tolist(), d.group_sizes.tolist()
    ([1, 2, 0, 3, 4, 4], [0, 2, 3], [2, 0, 2])
    """
    if not jnp.issubdtype(expert_ids.dtype, jnp.integer):
        raise ShapeError(f"expert_ids is {expert_ids.dtype}; expected int32 expert indices.")
    flat = expert_ids.reshape(-1).astype(jnp.int32)
    pairs = flat.shape[0]
    block = pick_block(pairs, num_experts) if block is None else block
    if block < 1:
        raise ShapeError(f"block={block}; a block has at least one row.")
    flat = jnp.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    sizes = (flat[:, None] == jnp.arange(num_experts, dtype=jnp.int32)[None]).sum(0, dtype=jnp.int32)
    return _layout(order, sizes, pairs, block)


def dispatch_sorted(group_sizes: jax.Array, num_rows: int, block: int | None = None) -> Dispatch:
    """The Dispatch of rows that are sorted by expert already: the first group_sizes[0] rows are expert 0's, and so on.

    Args:
      group_sizes: int32 [E], with a sum of at most num_rows; later rows belong to nobody.
      num_rows: P, static.
      block: rows per block; None picks one.

    Returns:
      A Dispatch over P rows.
    """
    block = pick_block(num_rows, group_sizes.shape[0]) if block is None else block
    order = jnp.arange(num_rows, dtype=jnp.int32)
    return _layout(order, group_sizes.astype(jnp.int32), num_rows, block)


def _layout(order: jax.Array, sizes: jax.Array, pairs: int, block: int) -> Dispatch:
    """Everything by gathers and comparisons: scatter is slow on CPU and missing on jax-metal."""
    num_experts = sizes.shape[0]
    num_blocks = max_blocks(pairs, num_experts, block)
    blocks = (sizes + (block - 1)) // block
    block_ends, ends = _running_sum(blocks), _running_sum(sizes)
    first_row, first_pair = (block_ends - blocks) * block, ends - sizes

    block_ids = jnp.arange(num_blocks, dtype=jnp.int32)
    block_expert = (block_ends[None, :] <= block_ids[:, None]).sum(1, dtype=jnp.int32)
    row_expert = jnp.broadcast_to(block_expert[:, None], (num_blocks, block)).reshape(-1)
    safe = jnp.minimum(row_expert, num_experts - 1)
    offset = jnp.arange(num_blocks * block, dtype=jnp.int32) - first_row[safe]
    real = (row_expert < num_experts) & (offset < sizes[safe])
    source = jnp.clip(first_pair[safe] + offset, 0, max(pairs - 1, 0))
    rows = jnp.where(real, order[source] if pairs else source, pairs).astype(jnp.int32)

    rank = jnp.argsort(order).astype(jnp.int32)
    pair_expert = (ends[None, :] <= rank[:, None]).sum(1, dtype=jnp.int32)
    live = pair_expert < num_experts
    safe = jnp.minimum(pair_expert, num_experts - 1)
    # A pair that belongs to no expert points one past the last row, where a filling gather reads zero.
    slots = jnp.where(live, first_row[safe] + rank - first_pair[safe], num_blocks * block).astype(jnp.int32)
    return Dispatch(rows=rows, slots=slots, block_expert=block_expert, group_sizes=sizes, block=block)


def _running_sum(x: jax.Array) -> jax.Array:
    """Inclusive sums of int32 [E] by comparison: cumsum lowers to reduce_window, which plugins take at best in part."""
    e = jnp.arange(x.shape[0], dtype=jnp.int32)
    return jnp.where(e[:, None] >= e[None], x[None], 0).sum(1, dtype=jnp.int32)


def to_blocks(x: jax.Array, dispatch: Dispatch, pairs_per_row: int = 1) -> jax.Array:
    """Gather rows into the block layout.

    Args:
      x: [P // pairs_per_row, D].
      dispatch: the layout.
      pairs_per_row: K when x holds one row per token and each token has K pairs, 1 when x holds one row per pair.

    Returns:
      [R, D]; padding rows are zero.
    """
    return jnp.asarray(x).at[dispatch.rows // pairs_per_row].get(mode="fill", fill_value=0)


def from_blocks(y: jax.Array, dispatch: Dispatch) -> jax.Array:
    """Gather the block layout back to one row per pair.

    Args:
      y: [R, D].
      dispatch: the layout.

    Returns:
      [P, D]; a pair that was skipped gets a zero row.
    """
    return jnp.asarray(y).at[dispatch.slots].get(mode="fill", fill_value=0)
