"""Laws of the mixture-of-experts layer: who computes what, in which order and in how many blocks, changes nothing."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import ferrum_jax as fj
from ferrum_jax.config import ModelConfig, QuantConfig
from ferrum_jax.errors import ShapeError
from tests.support.tiny import tiny_config

TOKENS, EXPERTS, HIDDEN = 8, 4, 32
CFG = tiny_config(num_layers=1)
ASYM = tiny_config(num_layers=1, norm_topk_prob=True, quant=QuantConfig(group_size=16, sym=False, desc_act=True))
MIXED = tiny_config(
    num_layers=1,
    quant=QuantConfig(group_size=16, dynamic=((r"-:.*experts\.1\.", None), (r".*up_proj", (("bits", 8),)))),
)
CONFIGS = {"symmetric": CFG, "asymmetric, act-order": ASYM, "mixed, gate and up apart": MIXED}
CLOSE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-5}

Params = dict[str, Any]
configs = pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
seeds = st.integers(0, 2**31)
orders = st.permutations(range(TOKENS))

moe_layer = jax.jit(fj.moe_layer, static_argnames=("cfg", "block"))


@functools.cache
def weights(cfg: ModelConfig) -> Params:
    return fj.layer(fj.random_params(cfg), 0)["moe"]


def states(seed: int, *lead: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((*lead, HIDDEN), np.float32))


def expert_weights(params: Params) -> dict[str, jax.Array]:
    """Every expert's dense gate, up and down: [E, K, N] each."""

    def dense(stack: Any) -> jax.Array:
        if not isinstance(stack, fj.kernels.MixedStack):
            return fj.dequantize(stack)
        parts = [np.asarray(fj.dequantize(part)) for part in stack.parts]
        found = {e: part[i] for part, ids in zip(parts, stack.experts, strict=True) for i, e in enumerate(ids)}
        return jnp.asarray(np.stack([found[e] for e in range(stack.num_experts)]))

    stacks = {name: dense(stack) for name, stack in params["experts"].items()}
    if "gate_up" in stacks:
        stacks["gate"], stacks["up"] = jnp.split(stacks.pop("gate_up"), 2, axis=-1)
    return stacks


def dense_layer(params: Params, x: jax.Array, cfg: ModelConfig) -> jax.Array:
    """Every expert on every token, written out; experts that were not chosen weigh zero."""
    w = expert_weights(params)
    probabilities = jax.nn.softmax(x @ params["router"], axis=-1)
    values, chosen = jax.lax.top_k(probabilities, cfg.top_k)
    if cfg.norm_topk_prob:
        values = values / values.sum(axis=-1, keepdims=True)
    mixture = (jax.nn.one_hot(chosen, EXPERTS) * values[..., None]).sum(axis=-2)
    inner = jax.nn.silu(jnp.einsum("td,edf->etf", x, w["gate"])) * jnp.einsum("td,edf->etf", x, w["up"])
    return jnp.einsum("te,etd->td", mixture, jnp.einsum("etf,efd->etd", inner, w["down"]))


@configs
@given(seed=seeds)
def test_blocks_of_any_size_equal_the_dense_layer(cfg: ModelConfig, seed: int) -> None:
    params, x = weights(cfg), states(seed, TOKENS)
    expected = dense_layer(params, x, cfg)
    for block in (None, 1, 8) if cfg is CFG else (None,):
        y, routing = moe_layer(params, x, cfg=cfg, block=block)
        chex.assert_trees_all_close(y, expected, **CLOSE)
    chex.assert_shape([routing.experts, routing.weights], (TOKENS, cfg.top_k))


@given(seed=seeds, order=orders)
def test_permuting_tokens_permutes_outputs(seed: int, order: list[int]) -> None:
    x, permutation = states(seed, TOKENS), np.array(order)
    y, routing = moe_layer(weights(CFG), x, cfg=CFG)
    permuted, permuted_routing = moe_layer(weights(CFG), x[permutation], cfg=CFG)
    chex.assert_trees_all_close(permuted, y[permutation], **CLOSE)
    np.testing.assert_array_equal(permuted_routing.experts, routing.experts[permutation])


def test_without_jit_the_layer_is_the_same() -> None:
    params, x = weights(MIXED), states(3, TOKENS)
    chex.assert_trees_all_close(fj.moe_layer(params, x, MIXED), moe_layer(params, x, cfg=MIXED), **CLOSE)


@pytest.mark.parametrize("cfg", [CFG, ASYM], ids=["symmetric", "asymmetric, act-order"])
@given(seed=seeds, order=st.permutations(range(EXPERTS)))
def test_relabelling_experts_changes_nothing_but_their_labels(cfg: ModelConfig, seed: int, order: list[int]) -> None:
    params, x, names = weights(cfg), states(seed, TOKENS), np.array(order)
    relabelled = {
        "router": params["router"][:, names],
        "experts": jax.tree.map(lambda leaf: leaf[names], params["experts"]),
    }
    (y, routing), (same, other) = (moe_layer(tree, x, cfg=cfg) for tree in (params, relabelled))
    chex.assert_trees_all_close(same, y, **CLOSE)
    np.testing.assert_array_equal(names[other.experts], routing.experts)


@pytest.mark.parametrize("implementation", ["xla", "apple"])
@pytest.mark.parametrize("chosen", range(EXPERTS))
def test_all_tokens_to_one_expert_and_the_others_are_never_read(chosen: int, implementation: str) -> None:
    cfg = dataclasses.replace(CFG, top_k=1, norm_topk_prob=True, implementation=implementation)
    params, x = weights(CFG), jnp.abs(states(chosen, TOKENS))
    router = jnp.zeros((HIDDEN, EXPERTS)).at[:, chosen].set(1.0)

    def poison(stack: fj.PackedLinear) -> fj.PackedLinear:
        dead = np.arange(EXPERTS)[:, None, None] != chosen
        return dataclasses.replace(stack, scales=jnp.where(dead, jnp.float16(jnp.nan), stack.scales))

    experts = {name: poison(stack) for name, stack in params["experts"].items()}
    y, routing = moe_layer({"router": router, "experts": experts}, x, cfg=cfg)
    assert np.all(routing.experts == chosen)
    w = {name: stack[chosen] for name, stack in expert_weights(params).items()}
    chex.assert_trees_all_close(y, (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"], **CLOSE)


def test_no_tokens_at_all_give_no_outputs() -> None:
    y, routing = fj.moe_layer(weights(CFG), jnp.zeros((0, HIDDEN)), CFG)
    assert y.shape == (0, HIDDEN) and routing.experts.shape == (0, CFG.top_k)


@given(seed=seeds, mask=hnp.arrays(np.bool_, TOKENS))
def test_masked_tokens_cost_nothing_and_give_zero(seed: int, mask: np.ndarray) -> None:
    x = states(seed, TOKENS)
    whole, _ = moe_layer(weights(CFG), x, cfg=CFG)
    poisoned = jnp.where(mask[:, None], x, jnp.nan)
    y, _ = moe_layer(weights(CFG), poisoned, cfg=CFG, mask=jnp.asarray(mask))
    chex.assert_trees_all_close(y, jnp.where(mask[:, None], whole, 0.0), **CLOSE)


@pytest.mark.parametrize("lead", [(), (1,), (2, 4), (2, 1, 4)])
def test_leading_axes_are_free(lead: tuple[int, ...]) -> None:
    x = states(0, *lead)
    y, routing = moe_layer(weights(CFG), x, cfg=CFG)
    flat, flat_routing = moe_layer(weights(CFG), x.reshape(-1, HIDDEN), cfg=CFG)
    chex.assert_shape([y, routing.logits, routing.weights], [(*lead, HIDDEN), (*lead, EXPERTS), (*lead, CFG.top_k)])
    chex.assert_trees_all_close(y.reshape(flat.shape), flat, **CLOSE)
    np.testing.assert_array_equal(routing.experts.reshape(-1, CFG.top_k), flat_routing.experts)


def test_vmap_equals_a_loop() -> None:
    batch = states(0, 3, TOKENS)
    mapped = jax.jit(jax.vmap(lambda x: fj.moe_layer(weights(CFG), x, CFG)[0]))(batch)
    looped = jnp.stack([moe_layer(weights(CFG), x, cfg=CFG)[0] for x in batch])
    chex.assert_trees_all_close(mapped, looped, **CLOSE)


@configs
def test_the_gradient_of_activations_equals_dense_autodiff(cfg: ModelConfig) -> None:
    params, x, cotangent = weights(cfg), states(1, TOKENS), states(2, TOKENS)
    mine = jax.jit(jax.grad(lambda x: jnp.vdot(fj.moe_layer(params, x, cfg)[0], cotangent)))(x)
    dense = jax.grad(lambda x: jnp.vdot(dense_layer(params, x, cfg), cotangent))(x)
    chex.assert_tree_all_finite(mine)
    chex.assert_trees_all_close(mine, dense, **CLOSE)
    assert np.abs(mine).max() > 1e-3


logit_rows = hnp.arrays(np.float32, (3, 6), elements=st.sampled_from([-2.0, -0.5, 0.0, 1.0, 3.0]))
route = jax.jit(fj.route, static_argnames=("top_k", "norm_topk_prob"))


@pytest.mark.parametrize("run", [route, fj.route], ids=["jit", "eager"])
@pytest.mark.parametrize("norm", [False, True])
@given(logits=logit_rows, top_k=st.sampled_from([1, 3, 6]))
def test_route_takes_the_best_and_settles_ties_by_index(
    run: Callable[..., Any], norm: bool, logits: np.ndarray, top_k: int
) -> None:
    routing = run(jnp.asarray(logits), top_k=top_k, norm_topk_prob=norm)
    expected = np.argsort(-logits, axis=-1, kind="stable")[:, :top_k]
    np.testing.assert_array_equal(routing.experts, expected)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    values = np.take_along_axis(probabilities, expected, axis=-1)
    values = values / values.sum(axis=-1, keepdims=True) if norm else values
    np.testing.assert_allclose(routing.weights, values, rtol=1e-5)
    if top_k == 6:
        np.testing.assert_allclose(routing.weights.sum(axis=-1), 1.0, rtol=1e-5)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 3, 5])
def test_a_logit_that_is_nan_or_infinite_shows_in_every_weight(bad: float, place: int, norm: bool) -> None:
    logits = np.zeros((2, 6), np.float32)
    logits[0, place] = bad
    routing = fj.route(jnp.asarray(logits), top_k=2, norm_topk_prob=norm)
    assert np.isnan(routing.weights[0]).all() and np.isfinite(routing.weights[1]).all()
    assert np.all((routing.experts >= 0) & (routing.experts < 6))


def test_minus_infinity_rules_an_expert_out() -> None:
    logits = jnp.array([[-jnp.inf, 0.0, 0.0]])
    routing = fj.route(logits, top_k=2)
    assert routing.experts.tolist() == [[1, 2]] and routing.weights.tolist() == [[0.5, 0.5]]


def test_huge_logits_do_not_overflow() -> None:
    routing = fj.route(jnp.array([3e38, -3e38, 1.0]), top_k=2)
    assert routing.experts.tolist() == [0, 1] and routing.weights.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("top_k", [0, 5, -1])
def test_route_refuses_more_experts_than_there_are(top_k: int) -> None:
    with pytest.raises(ShapeError, match=rf"top_k={top_k}; a router over 4 experts chooses between 1 and 4"):
        fj.route(jnp.zeros(4), top_k=top_k)
