"""A model on the GPU kernels, interpreted on the CPU: laying weights out, one MoE layer, its gradient."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import layers, model
from ferrum_jax.config import QuantConfig
from ferrum_jax.params import abstract
from ferrum_kernels import TiledLinear, is_weight, triton, triton_parts, triton_tiles
from ferrum_kernels.errors import BackendError
from ferrum_kernels.pairs import Pairs
from ferrum_kernels.tiles import tile_all
from tests.support.tiny import forward, tiny_config
from tests.support.triton_cases import ignore_deprecation, lower_for_cuda, relative

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
    assert sum(isinstance(node, TiledLinear) for node in nodes) == 4  # qkv, o, gate_up, down
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


def test_pairs_that_the_next_norm_adds_up_are_the_layer(demo):
    cfg, _, tiled = demo
    cfg = dataclasses.replace(cfg, implementation="triton")
    x, stream = jnp.asarray(np.random.default_rng(2).standard_normal((2, 40, 1, cfg.hidden_size)), jnp.bfloat16)
    mask = (jnp.arange(40) != 5)[:, None]
    weight = jnp.ones((2, cfg.hidden_size), jnp.bfloat16)
    with triton.interpreted():
        whole, _ = fj.moe_layer(tiled, x, cfg, mask=mask)
        pairs, _ = fj.moe_layer(tiled, x, cfg, mask=mask, whole=False)
        found = layers.add_norm_next(stream, pairs, weight, cfg, jnp.int32(0))
        expected = layers.add_norm_next(stream, whole, weight, cfg, jnp.int32(0))
    assert isinstance(pairs, Pairs) and int(found[2]) == int(expected[2]) == 1
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert one.shape == x.shape and relative(one, np.asarray(other, np.float64)) < 5e-3


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


def steps_of(cfg):
    """prefill and decode_step as programs, each traced anew: what was patched since the last trace counts."""
    prefill = jax.jit(lambda params, tokens, lengths, cache: fj.prefill(params, tokens, lengths, cache, cfg))
    return prefill, jax.jit(lambda params, token, cache: fj.decode_step(params, token, cache, cfg))


CACHES = {
    "contiguous": lambda cfg: fj.init_cache(cfg, batch=2, length=24),
    "codes in pages": lambda cfg: dataclasses.replace(
        fj.init_paged_cache(cfg, batch=2, pages=5, length=32, dtype="int8"), table=jnp.array([[3, 1], [0, -1]])
    ),
}


@pytest.mark.parametrize("kind", CACHES)
def test_prompts_and_steps_with_its_attention_equal_the_portable_ones(demo, monkeypatch, kind):
    cfg = dataclasses.replace(demo[0], implementation="xla", num_layers=1, moe_layers=(True,), sliding_windows=(None,))
    params = fj.load("demo", quiet=True).params
    params = {**params, "layers": tuple(jax.tree.map(lambda leaf: leaf[:1], run) for run in params["layers"])}
    tokens, lengths = jnp.array([[11, 12, 13, 14, 15], [21, 22, 0, 0, 0]]), jnp.array([5, 2])

    def logits():
        (prefill, decode_step), cache = steps_of(cfg), CACHES[kind](cfg)
        first, cache = prefill(params, tokens, lengths, cache)
        more, cache = prefill(params, tokens[:, :3], jnp.array([0, 3]), cache)
        last, cache = decode_step(params, jnp.array([31, 32]), cache)
        assert cache.lengths.tolist() == [6, 6]
        return [np.asarray(x, np.float64) for x in (first, more[1], last)]

    portable = logits()
    monkeypatch.setattr(model, "_attention_of", lambda *_: model._attend_on_triton)
    with triton.interpreted():
        mine = logits()
    for found, expected in zip(mine, portable, strict=True):
        assert not (found == expected).all()
        assert relative(found, expected) < 2e-2


def test_a_whole_model_equals_the_portable_one(demo, monkeypatch):
    """With the products around attention in parts, for which the demo's inputs would be too few."""
    monkeypatch.setattr(triton_tiles, "LEAST_TURNS", 1)
    cfg = demo[0]
    params = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf,
        fj.load("demo", quiet=True).params,
    )
    tokens, lengths = jnp.array([[11, 12, 13], [21, 22, 0]]), jnp.array([3, 2])

    def logits(params, cfg):
        prefill, decode_step = steps_of(cfg)
        first, cache = prefill(params, tokens, lengths, fj.init_cache(cfg, batch=2, length=16))
        last, _ = decode_step(params, jnp.array([31, 32]), cache)
        return [np.asarray(x, np.float64) for x in (first, last)]

    portable = logits(params, dataclasses.replace(cfg, implementation="xla"))
    with triton.interpreted():
        tiled = tile_all(params)
        for name in ("qkv", "o"):
            weight = tiled["layers"][0]["attn"][name]
            assert triton_parts.count(jnp.zeros((2, weight.k), jnp.bfloat16), weight) > 1
        mine = logits(tiled, dataclasses.replace(cfg, implementation="triton"))
    for found, expected in zip(mine, portable, strict=True):
        assert relative(found, expected) < 1e-2


@pytest.mark.parametrize(("rows", "kernels"), [(48, {"route_place"}), (100, {"route", "place"})])
def test_a_step_of_few_tokens_routes_and_places_them_by_one_kernel(demo, monkeypatch, rows, kernels):
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    cfg = dataclasses.replace(demo[0], implementation="triton")
    token, cache = jax.ShapeDtypeStruct((rows,), jnp.int32), jax.eval_shape(lambda: fj.init_cache(cfg, rows, 64))
    with triton.interpreted(False):
        params = jax.eval_shape(tile_all, abstract(cfg))
        text = lower_for_cuda(steps_of(cfg)[1], params, token, cache)
    assert set(re.findall(r'name = "(route_place|route|place)"', text)) == kernels


def attention_of(cfg, dtype=None, page=None, **changes):
    cfg = dataclasses.replace(cfg, **changes)
    empty = fj.init_cache(cfg, 1, 32, dtype) if page is None else fj.init_paged_cache(cfg, 1, 2, page, dtype=dtype)
    return model._attention_of(cfg, empty)


NOT_TAKEN = {
    "caches of the activations' dtype, bfloat16, and int8; this one is of float32": {"dtype": "float32"},
    "pages of a power of two from 16; these are of 8": {"page": 8},
    "pages of a power of two from 16; these are of 24": {"page": 24},
    "heads of 16, 32, 64, 128 and 256; these are of 48": {"head_dim": 48},
    "caches of int8 for heads from 64; these are of 32": {"head_dim": 32, "dtype": "int8"},
}


@pytest.mark.parametrize("name", ["triton", None])
def test_its_attention_is_chosen_where_activations_cache_and_heads_suit_it(demo, name, monkeypatch):
    monkeypatch.setattr(layers, "default_implementation", lambda: "triton")
    cfg = dataclasses.replace(demo[0], implementation=name)
    for given in ({}, {"dtype": "int8"}, {"page": 16}, {"dtype": "int8", "page": 32}):
        assert attention_of(cfg, **given) is model._attend_on_triton
    assert attention_of(dataclasses.replace(cfg, implementation="xla")) is model._attend


@pytest.mark.parametrize("problem", NOT_TAKEN)
def test_what_its_attention_does_not_take_goes_to_xla_unless_it_was_named(demo, problem, monkeypatch):
    monkeypatch.setattr(layers, "default_implementation", lambda: "triton")
    assert attention_of(dataclasses.replace(demo[0], implementation=None), **NOT_TAKEN[problem]) is model._attend
    expected = re.escape(f'implementation="triton" cannot read this cache: its attention takes {problem}. Make another')
    with pytest.raises(BackendError, match=expected):
        attention_of(dataclasses.replace(demo[0], implementation="triton"), **NOT_TAKEN[problem])


def test_act_order_experts_are_folded_and_stay_one_model(tmp_path):
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "dtype": "bfloat16", "head_dim": 16}
    cfg = tiny_config(**sizes, quant=QuantConfig(bits=4, group_size=32, desc_act=True, sym=False))
    plain = dataclasses.replace(cfg, implementation="xla")
    packed = fj.random_params(plain, seed=1)
    tiled = fj.random_params(dataclasses.replace(cfg, implementation="triton"), seed=1)
    experts, was = tiled["layers"][0]["moe"]["experts"], packed["layers"][0]["moe"]["experts"]
    assert was["down"].perm is not None and experts["down"].perm is None
    # A column of gate and up is where down's packed rows want it; the order in which x is read stays.
    order = np.asarray(was["down"].perm)[1, 2]
    columns = np.concatenate([order, order + 64])
    found, dense = (fj.dequantize(stack["gate_up"][1][2]) for stack in (experts, was))
    np.testing.assert_array_equal(found, dense[:, columns])
    np.testing.assert_array_equal(experts["gate_up"].perm, was["gate_up"].perm)
    tokens = np.arange(12, dtype=np.int32)[None]
    expected = forward(packed, tokens, cfg=plain)
    np.testing.assert_allclose(forward(tiled, tokens, cfg=plain), expected, rtol=0, atol=2e-2)
    # Layers are taken out, put back, saved and restored as they are.
    again = fj.set_layer(tiled, 1, fj.layer(tiled, 1))
    _, restored = fj.load_params(fj.save_params(tmp_path / "saved", cfg, tiled))
    for other in (again, restored):
        assert jax.tree.structure(other) == jax.tree.structure(tiled)
        for one, two in zip(jax.tree.leaves(other), jax.tree.leaves(tiled), strict=True):
            np.testing.assert_array_equal(one, two)
