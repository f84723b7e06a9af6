"""Sums, norms and router logits of the Triton backend, interpreted on the CPU, against plain numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_kernels import triton_norm
from ferrum_kernels.pairs import Pairs
from tests.support.triton_cases import ignore_deprecation, lower_for_cuda, normal, relative

pytestmark = [
    ignore_deprecation,
    pytest.mark.skipif(jax.__version_info__ < (0, 10, 2), reason="the Triton kernels need jax 0.10.2"),
]
EPS = 1e-6


def case(tokens: int, d: int, experts: int, dtype: str):
    """(stream, branch, stacked norm weights, stacked routers), two layers of both."""
    x, weight, router = (
        jnp.asarray(normal(i, *shape), dtype) for i, shape in enumerate([(tokens, d), (2, d), (2, experts, d)])
    )
    return x, jnp.asarray(normal(3, tokens, d)), weight, router


def expected(x, y, weight):
    total = (x.astype(jnp.float32) + y).astype(x.dtype)
    exact = np.asarray(total, np.float64)
    return total, exact / np.sqrt((exact**2).mean(-1, keepdims=True) + EPS) * np.asarray(weight, np.float64)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("tokens", "d", "experts"), [(1, 128, 16), (3, 96, 12), (19, 160, 40), (300, 64, 8)])
def test_sum_norm_and_logits(tokens, d, experts, dtype):
    x, y, weight, router = case(tokens, d, experts, dtype)
    for layer in (0, jnp.int32(1)):
        total, norm = expected(x, y, weight[layer])
        found = triton_norm.add_norm_route(x, y, weight, router, layer, EPS, True)
        np.testing.assert_array_equal(found[0], total)
        assert relative(found[1], norm) < 2e-3  # one rounding
        logits = np.asarray(found[1], np.float64) @ np.asarray(router[layer], np.float64).T
        parts = triton_norm.logit_parts(tokens)
        assert found[2].shape == ((parts, tokens, experts) if parts > 1 else (tokens, experts))
        assert found[2].dtype == jnp.float32 and relative(found[2].reshape(parts, tokens, -1).sum(0), logits) < 1e-6
        assert found[3].tolist() == [0]
        again = triton_norm.add_norm(x, y, weight, layer, EPS, True)[:2]
        for one, other in zip(found, again, strict=False):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("tokens", "d", "top_k"), [(1, 64, 2), (5, 96, 3), (19, 160, 8)])
def test_pairs_are_added_up_and_nobodys_are_left_out(tokens, d, top_k, weighted):
    x, _, weight, _ = case(tokens, d, 16, "bfloat16")
    live = np.random.default_rng(4).integers(-1, 18, (tokens, top_k))
    values = np.where(((live < 0) | (live >= 16)).reshape(-1, 1), np.nan, normal(5, tokens * top_k, d))
    weights = jnp.asarray(normal(6, tokens, top_k)) if weighted else None
    pairs = Pairs(jnp.asarray(values, jnp.bfloat16), jnp.asarray(live, jnp.int32), weights, 16)
    for layer in (0, jnp.int32(1)):
        total, norm = expected(x, pairs.whole(), weight[layer])
        found = triton_norm.add_norm(x, pairs, weight, layer, EPS, True)
        assert relative(found[0], np.asarray(total, np.float64)) < 2e-3  # where a multiply and an add are one
        assert relative(found[1], norm) < 4e-3
        assert found[2].tolist() == [int(layer) + 1]


def test_without_a_layer_axis():
    x, y, weight, router = case(2, 64, 8, "bfloat16")
    one = triton_norm.add_norm_route(x, y, weight[1], router[1], None, EPS, True)
    for found, layered in zip(one, triton_norm.add_norm_route(x, y, weight, router, 1, EPS, True), strict=True):
        np.testing.assert_array_equal(found, layered)


def test_a_token_that_is_not_finite_leaves_the_others_alone():
    for tokens in (2, 20):
        x, y, weight, router = case(tokens, 64, 8, "bfloat16")
        whole = triton_norm.add_norm_route(x, y, weight, router, 0, EPS, True)
        broken = triton_norm.add_norm_route(x.at[1, 5].set(jnp.nan), y, weight, router, 0, EPS, True)
        assert jnp.isnan(broken[1][1]).all() and jnp.isnan(broken[2][..., 1, :]).all()
        for one, other in zip(whole[:3], broken[:3], strict=True):
            np.testing.assert_array_equal(np.delete(one, 1, -2), np.delete(other, 1, -2))


def test_what_is_taken():
    x, _, weight, router = case(2, 64, 8, "bfloat16")
    assert triton_norm.takes(x, weight, router) and not triton_norm.takes(x, weight, router.astype(jnp.float32))
    assert not triton_norm.takes(x.astype(jnp.float32)) and not triton_norm.takes(x[:0])


@pytest.mark.parametrize(("tokens", "kernels"), [(1, 1), (4, 1), (64, 2), (1024, 2)])
def test_few_kernels_and_that_they_lower_for_cuda(tokens, kernels):
    x, y, weight, router = case(tokens, 256, 128, "bfloat16")

    def run(x, y, weight, router, layer):
        return triton_norm.add_norm_route(x, y, weight, router, layer, EPS, False)

    text = lower_for_cuda(run, x, y, weight, router, jnp.int32(1))
    assert text.count("stablehlo.custom_call") == kernels
