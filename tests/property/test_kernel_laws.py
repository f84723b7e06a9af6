"""Laws of expert dispatch and of the grouped products over it, for any routing."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ferrum_kernels import dispatch, dispatch_sorted, expert_linear, from_blocks, gptq_matmul, grouped_gptq_matmul
from ferrum_kernels.blocks import Dispatch, max_blocks, pick_block, to_blocks
from tests.support.close import assert_close, normal
from tests.support.gptq_cases import make_stack

variants: Any = chex.variants  # chex has no types for its decorators
T, K, E = 5, 2, 4
STACK, DENSE = make_stack(0, E, act_order=True)
make_plan = jax.jit(dispatch, static_argnums=(1, 2))


def routings(tokens: int = T, k: int = K, experts: int = E, skipped: bool = True):
    """int32 [tokens, k]: any experts, repeated or not, and ids that mean nobody."""
    ids = st.integers(-2, experts + 1) if skipped else st.integers(0, experts - 1)
    rows = st.lists(st.lists(ids, min_size=k, max_size=k), min_size=tokens, max_size=tokens)
    return rows.map(lambda rows: np.array(rows, np.int32))


def check_laws(plan: Dispatch, ids: np.ndarray, experts: int) -> None:
    flat, block = ids.reshape(-1), plan.block
    pairs, live = flat.size, np.flatnonzero((flat >= 0) & (flat < experts))
    rows, slots, block_expert = (np.asarray(a) for a in (plan.rows, plan.slots, plan.block_expert))
    assert plan.num_rows == max_blocks(pairs, experts, block) * block == block_expert.size * block
    # Every pair of a real expert has one row; nothing else has any.
    assert sorted(rows[rows < pairs]) == live.tolist()
    assert (rows[rows >= pairs] == pairs).all()
    # slots and rows are inverse; a skipped pair points past the end.
    np.testing.assert_array_equal(rows[slots[live]], live)
    assert (np.delete(slots, live) == plan.num_rows).all()
    # Each pair lies in a block of its expert; blocks are sorted, unused ones last, none is wasted.
    np.testing.assert_array_equal(block_expert[slots[live] // block], flat[live])
    assert (np.diff(block_expert) >= 0).all()
    sizes = np.bincount(flat[live], minlength=experts)
    np.testing.assert_array_equal(plan.group_sizes, sizes)
    used = np.bincount(block_expert, minlength=experts + 1)[:experts]
    np.testing.assert_array_equal(used, -(-sizes // block))
    np.testing.assert_array_equal(plan.blocks_per_expert, used)
    assert block_expert.max(initial=0) <= experts
    # An expert's pairs keep their order, its padding comes last.
    for e in range(experts):
        mine = rows.reshape(-1, block)[block_expert == e].reshape(-1)
        assert mine.tolist() == [*np.flatnonzero(flat == e), *[pairs] * (mine.size - sizes[e])]


@pytest.mark.parametrize(("tokens", "k", "experts", "block"), [(5, 2, 4, 2), (7, 1, 3, 3), (2, 2, 8, 1), (9, 2, 2, 5)])
def test_each_pair_goes_to_its_expert_exactly_once(tokens, k, experts, block):
    @given(routings(tokens, k, experts))
    @example(np.zeros((tokens, k), np.int32))
    @example(np.full((tokens, k), experts - 1, np.int32))
    @example(np.full((tokens, k), experts, np.int32))
    def law(ids):
        check_laws(make_plan(ids, experts, block), ids, experts)

    law()


class VariantsTest(chex.TestCase):
    @variants(with_jit=True, without_jit=True)
    def test_dispatch_is_deterministic_traced_or_not(self):
        plan_of = self.variant(functools.partial(dispatch, num_experts=E, block=2))

        @given(routings())
        def law(ids):
            plan = plan_of(jnp.asarray(ids))
            check_laws(plan, ids, E)
            chex.assert_trees_all_equal(plan, plan_of(jnp.asarray(ids)), make_plan(ids, E, 2))

        law()


@given(st.integers(0, 9), st.integers(1, 4), st.integers(1, 5))
def test_max_blocks_is_reached_and_never_exceeded(pairs, experts, block):
    loads = itertools.product(range(pairs + 1), repeat=experts)
    most = max(sum(-(-load // block) for load in spread) for spread in loads if sum(spread) <= pairs)
    assert max_blocks(pairs, experts, block) == most


@given(st.integers(0, 2**22), st.integers(1, 512))
def test_the_block_picked_wastes_little(pairs, experts):
    block = pick_block(pairs, experts)
    assert 1 <= block <= 128
    assert block.bit_count() == 1
    assert max_blocks(pairs, experts, block) * block <= 2.5 * pairs


@given(st.lists(st.integers(0, 3), min_size=E, max_size=E))
def test_group_sizes_are_a_dispatch_of_sorted_rows(sizes):
    ids = np.append(np.repeat(np.arange(E), sizes), np.full(3 * E - sum(sizes), E)).astype(np.int32)
    chex.assert_trees_all_equal(sorted_plan(np.array(sizes, np.int32)), make_plan(ids, E, 2))


sorted_plan = jax.jit(functools.partial(dispatch_sorted, num_rows=3 * E, block=2))


@functools.partial(jax.jit, static_argnames="block")
def bucketed(x, stack, ids, block=2):
    """[T, D], [T, K] -> [T, K, N]; a skipped pair gives zero."""
    plan = dispatch(ids, E, block)
    y = grouped_gptq_matmul(to_blocks(x, plan, pairs_per_row=ids.shape[1]), stack, plan)
    return from_blocks(y, plan).reshape(*ids.shape, -1)


@jax.jit
def every_expert(x, stack):
    """[T, E, N], one expert after another."""
    return jnp.stack([gptq_matmul(x, expert_linear(stack, e)) for e in range(E)], axis=1)


X = normal(0, T, 37)


def chosen(products: np.ndarray, ids: np.ndarray) -> np.ndarray:
    taken = np.take_along_axis(products, np.clip(ids, 0, E - 1)[..., None], axis=1)
    return np.where(((ids >= 0) & (ids < E))[..., None], taken, 0)


@given(routings())
@example(np.zeros((T, K), np.int32))
@example(np.full((T, K), E, np.int32))
def test_bucketed_equals_per_expert_equals_dense(ids):
    y = bucketed(X, STACK, ids)
    assert_close(y, chosen(np.asarray(every_expert(X, STACK)), ids))
    assert_close(y, chosen(np.einsum("tk,ekn->ten", X, DENSE), ids))


@pytest.mark.parametrize("block", [1, 3, 16])
def test_the_block_size_changes_nothing(block):
    @given(routings())
    def law(ids):
        assert_close(bucketed(X, STACK, ids, block), bucketed(X, STACK, ids))

    law()


@given(routings(), st.permutations(range(T)))
def test_permuting_tokens_permutes_outputs(ids, order):
    order = np.array(order)
    assert_close(bucketed(X[order], STACK, ids[order]), np.asarray(bucketed(X, STACK, ids))[order])


@given(routings(skipped=False), st.permutations(range(E)))
def test_relabelling_experts_changes_nothing(ids, names):
    new = np.argsort(names).astype(np.int32)  # where each old expert lies now
    relabelled = jax.tree.map(lambda leaf: leaf[np.array(names)], STACK)
    assert_close(bucketed(X, relabelled, new[ids]), bucketed(X, STACK, ids))


@given(routings(), st.integers(0, T - 1))
def test_a_skipped_token_changes_no_other(ids, token):
    without = ids.copy()
    without[token] = E
    expected = np.asarray(bucketed(X, STACK, ids)).copy()
    expected[token] = 0
    broken = X.copy()
    broken[token] = np.nan
    assert_close(bucketed(broken, STACK, without), expected)
