"""Routing and places of the Triton backend, interpreted on the CPU, against sorts."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_kernels import triton
from ferrum_kernels.blocks import max_blocks
from ferrum_kernels.errors import ShapeError
from ferrum_kernels.triton_place import FEW, place, route_and_place
from ferrum_kernels.triton_route import chunks
from tests.support.triton_cases import check_places, ignore_deprecation, normal

pytestmark = [
    ignore_deprecation,
    pytest.mark.skipif(jax.__version_info__ < (0, 10, 2), reason="the Triton kernels need jax 0.10.2"),
]


@pytest.fixture(autouse=True)
def on_the_cpu():
    with triton.interpreted():
        yield


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 128, 8), (5, 60, 6), (300, 8, 2)])
@pytest.mark.parametrize("norm", [True, False])
def test_routing_picks_the_best(tokens, experts, top_k, norm):
    logits = jnp.asarray(normal(0, tokens, experts))
    mask = jnp.arange(tokens) % 3 != 1
    chosen, weights, live, counts = triton.route(logits, mask, top_k, norm)
    probs, expected = jax.lax.top_k(jax.nn.softmax(logits), top_k)
    np.testing.assert_array_equal(chosen, expected)
    np.testing.assert_allclose(weights, probs / probs.sum(1, keepdims=True) if norm else probs, rtol=1e-5)
    np.testing.assert_array_equal(live, np.where(np.asarray(mask)[:, None], expected, experts))
    np.testing.assert_array_equal(counts, triton.count(live, experts))


def test_routing_settles_ties_and_shows_what_is_not_finite():
    logits = jnp.asarray([[0.0, 1.0, 1.0, 0.0], [0.0, jnp.nan, 0.0, 0.0], [0.0, jnp.inf, 0, 0], [-jnp.inf, 0, 1, -1]])
    chosen, weights, _, _ = triton.route(logits, None, 2, True)
    assert chosen[0].tolist() == [1, 2]
    assert chosen[3].tolist() == [2, 1]
    assert np.isnan(weights[1:3]).all()
    assert np.isfinite(weights[jnp.asarray([0, 3])]).all()


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "sizes"),
    [
        (1, 1, 1, (8,)),
        (7, 20, 3, (1,)),
        (150, 7, 2, (8,)),
        (200, 5, 1, (64,)),
        (150, 40, 2, (2, 4, 8)),
        (9, 3, 2, (2, 8)),
    ],
)
def test_places_are_a_stable_sort_cut_into_blocks_of_which_the_largest_come_first(tokens, experts, top_k, sizes):
    live = np.random.default_rng(tokens).integers(0, experts + 1, (tokens, top_k)).astype(np.int32)
    counts = triton.count(jnp.asarray(live), experts)
    assert counts.shape[0] == chunks(tokens)
    blocks = max_blocks(tokens * top_k, experts, sizes[-1])
    check_places(place(jnp.asarray(live), counts, experts, sizes, blocks, True), live, experts, sizes)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "sizes"),
    [
        (1, 1, 1, (8,)),
        (7, 20, 3, (1,)),
        (FEW, 7, 2, (8,)),
        (50, 40, 6, (2, 4, 8)),
        (9, 3, 3, (2, 8)),
        (FEW + 1, 8, 2, (8,)),
    ],
)
def test_routing_and_places_are_the_same_by_one_kernel(tokens, experts, top_k, sizes):
    logits = jnp.asarray(normal(0, 2, tokens, experts))
    mask = jnp.arange(tokens) % 5 != 1
    how = top_k, True, sizes, max_blocks(tokens * top_k, experts, sizes[-1]), True
    *apart, none = route_and_place(logits, mask, None, *how)
    *together, arrived = route_and_place(logits, mask, jnp.zeros(1, jnp.int32), *how)
    assert none is None and arrived is not None and arrived.tolist() == [0]
    for one, other in zip(apart[:3], together[:3], strict=True):
        np.testing.assert_array_equal(one, other)
    for places in (apart[3], together[3]):
        check_places(places, np.asarray(apart[2]), experts, sizes)


@pytest.mark.parametrize(("counter", "found"), [(np.zeros(3, np.int32), "int32[3]"), (np.zeros(1), "float32[1]")])
def test_a_counter_that_is_none_is_refused(counter, found):
    text = f"arrived is {found}; it is int32[1], the zero that add_norm_route of the same layer gives, or None."
    with pytest.raises(ShapeError, match=re.escape(text)):
        route_and_place(jnp.zeros((2, 4)), None, jnp.asarray(counter), 2, True, (8,), 4, True)


@pytest.mark.parametrize("tokens", [3, 40])
def test_routing_adds_up_the_parts_of_logits(tokens):
    parts = jnp.asarray(normal(0, 3, tokens, 16)).at[:, :, 4].set(2.0).at[:, :, 9].set(2.0)  # two experts alike
    for one, other in zip(triton.route(parts, None, 4, True), triton.route(parts.sum(0), None, 4, True), strict=True):
        np.testing.assert_array_equal(one, other)


def test_ids_that_name_nobody_are_not_counted():
    counts = np.asarray(triton.count(jnp.asarray([[-2, 0], [5, 4], [-1, 9]]), 5)).sum(0)
    np.testing.assert_array_equal(counts, np.eye(16, dtype=int)[[0, 4]].sum(0))
