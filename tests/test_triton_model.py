"""A model on the GPU kernels, interpreted on the CPU: laying weights out, one MoE layer, its gradient."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import model
from ferrum_kernels import TiledLinear, is_weight, triton
from ferrum_kernels.errors import BackendError
from ferrum_kernels.tiles import tile_all
from tests.support.triton_cases import ignore_deprecation, relative

pytestmark = [
    ignore_deprecation,
    pytest.mark.skipif(jax.__version_info__ < (0, 10, 2), reason="the Triton kernels need jax 0.10.2"),
]


@pytest.fixture(scope="module")
def demo():
    """(configuration in bfloat16, one layer of experts as loaded, the same in tiles)."""
    loaded = fj.load("demo", quiet=True)
    moe = fj.layer(loaded.params, 2)["moe"]
    return dataclasses.replace(loaded.cfg, dtype="bfloat16"), moe, tile_all(moe)


def test_layers_are_laid_out_one_by_one_as_the_whole_would_be(demo):
    cfg = dataclasses.replace(demo[0], implementation="triton")
    tiled = fj.random_params(cfg, seed=3)
    whole = tile_all(fj.random_params(dataclasses.replace(cfg, implementation="xla"), seed=3))
    nodes = jax.tree.leaves(tiled, is_leaf=is_weight)
    assert sum(isinstance(node, TiledLinear) for node in nodes) >= 6
    assert jax.tree.structure(tiled) == jax.tree.structure(whole)
    for one, other in zip(jax.tree.leaves(tiled), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("tokens", [1, 12])
def test_a_moe_layer_equals_the_portable_one(demo, tokens):
    cfg, moe, tiled = demo
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, tokens, cfg.hidden_size)), jnp.bfloat16)
    mask = jnp.arange(tokens)[None] != 5
    expected, routing = fj.moe_layer(
        moe, x.astype(jnp.float32), dataclasses.replace(cfg, implementation="xla"), mask=mask
    )
    with triton.interpreted():
        y, found = fj.moe_layer(tiled, x, dataclasses.replace(cfg, implementation="triton"), mask=mask)
    np.testing.assert_array_equal(found.experts, routing.experts)
    np.testing.assert_allclose(found.weights, routing.weights, rtol=1e-5)
    assert y.dtype == jnp.bfloat16
    assert relative(y, np.asarray(expected, np.float64)) < 5e-3


def test_its_gradient_is_the_portable_one(demo):
    cfg, moe, tiled = demo
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, cfg.hidden_size)), jnp.bfloat16)

    def total(moe, x, name):
        return fj.moe_layer(moe, x, dataclasses.replace(cfg, implementation=name))[0].astype(jnp.float32).sum()

    expected = jax.grad(total, argnums=1)(moe, x.astype(jnp.float32), "xla")
    with triton.interpreted():
        found = jax.grad(total, argnums=1)(tiled, x, "triton")
    assert relative(found, np.asarray(expected, np.float64)) < 2e-2


def test_weights_in_the_layout_of_the_file_are_refused(demo):
    cfg, moe, _ = demo
    with triton.interpreted(), pytest.raises(BackendError, match=r"Lay it out once with ferrum_kernels\.tile"):
        fj.moe_layer(
            moe, jnp.ones((1, cfg.hidden_size), jnp.bfloat16), dataclasses.replace(cfg, implementation="triton")
        )


def test_prompts_and_steps_with_its_attention_equal_the_portable_ones(demo, monkeypatch):
    cfg = dataclasses.replace(demo[0], implementation="xla")
    params = fj.load("demo", quiet=True).params
    tokens, lengths = jnp.array([[11, 12, 13, 14, 15], [21, 22, 0, 0, 0]]), jnp.array([5, 2])

    def logits():
        cache = fj.init_cache(cfg, batch=2, length=24)
        first, cache = fj.prefill(params, tokens, lengths, cache, cfg)
        more, cache = fj.prefill(params, tokens[:, :3], jnp.array([0, 3]), cache, cfg)
        last, cache = fj.decode_step(params, jnp.array([31, 32]), cache, cfg)
        assert cache.lengths.tolist() == [6, 6]
        return [np.asarray(x, np.float64) for x in (first, more[1], last)]

    portable = logits()
    monkeypatch.setattr(model, "_attention_of", lambda *_: model._attend_on_triton)
    with triton.interpreted():
        mine = logits()
    for found, expected in zip(mine, portable, strict=True):
        assert not (found == expected).all()
        assert relative(found, expected) < 2e-2


def test_its_attention_is_chosen_where_activations_cache_and_heads_suit_it(demo):
    cfg = dataclasses.replace(demo[0], implementation="triton")
    of = model._attention_of
    assert of(cfg, jnp.dtype("bfloat16")) is model._attend_on_triton
    assert of(cfg, jnp.dtype("float32")) is model._attend
    assert of(dataclasses.replace(cfg, dtype="float32"), jnp.dtype("float32")) is model._attend
    assert of(dataclasses.replace(cfg, head_dim=48), jnp.dtype("bfloat16")) is model._attend
    assert of(dataclasses.replace(cfg, implementation="xla"), jnp.dtype("bfloat16")) is model._attend
