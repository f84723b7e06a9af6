"""The edges of the decoder: full caches, unknown tokens, wrong shapes, donated buffers, abstract parameters."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.errors import CapacityError, RequestError, ShapeError
from tests.support.tiny import DENSE, decode_step, forward, prefill, tiny_config

CFG = tiny_config(num_layers=1)
VOCAB, SLOTS = CFG.vocab_size, 4
PROMPT = np.array([[1, 2, 3, 4], [5, 6, 0, 0]], np.int32)
LENGTHS = np.array([4, 2], np.int32)


@functools.cache
def weights() -> dict[str, Any]:
    return fj.random_params(CFG)


def full_row() -> tuple[jax.Array, fj.KVCache]:
    return prefill(weights(), PROMPT, LENGTHS, fj.init_cache(CFG, 2, SLOTS), cfg=CFG)


def test_a_full_row_gives_nan_under_jit_and_leaves_the_others_alone() -> None:
    _, cache = full_row()
    logits, after = decode_step(weights(), np.array([7, 7], np.int32), cache, cfg=CFG)
    assert np.isnan(logits[0]).all()
    chex.assert_tree_all_finite(logits[1])
    np.testing.assert_array_equal(after.k[:, 0], cache.k[:, 0])  # nothing was overwritten
    longer = fj.init_cache(CFG, 2, SLOTS + 1)
    _, longer = prefill(weights(), PROMPT, LENGTHS, longer, cfg=CFG)
    roomy, _ = decode_step(weights(), np.array([7, 7], np.int32), longer, cfg=CFG)
    np.testing.assert_allclose(logits[1], roomy[1], rtol=0, atol=1e-5)


def test_a_full_row_is_an_error_when_it_can_be_seen() -> None:
    _, cache = full_row()
    with pytest.raises(CapacityError, match=r"row 0 would hold 5 tokens; the cache has room for 4. Make it longer"):
        fj.decode_step(weights(), jnp.array([7, 7]), cache, CFG)
    with pytest.raises(CapacityError, match=r"row 0 would hold 8 tokens"):
        fj.prefill(weights(), jnp.asarray(PROMPT), jnp.asarray(LENGTHS), cache, CFG)


@pytest.mark.parametrize("lengths", [[5, 2], [-1, 2]])
def test_impossible_lengths_are_an_error_or_nan(lengths: list[int]) -> None:
    host, cache = np.array(lengths, np.int32), fj.init_cache(CFG, 2, 8)
    with pytest.raises(CapacityError, match=r"lengths are \[-?\d, 2\]; each must be between 0 and T=4"):
        fj.prefill(weights(), jnp.asarray(PROMPT), jnp.asarray(host), cache, CFG)
    logits, _ = prefill(weights(), PROMPT, host, cache, cfg=CFG)
    assert np.isnan(logits[0]).all() and np.isfinite(logits[1]).all()


@pytest.mark.parametrize("token", [VOCAB, -1, 2**31 - 1, -(2**31)])
def test_an_unknown_token_gives_nan_under_jit_and_an_error_otherwise(token: int) -> None:
    tokens = PROMPT.copy()
    tokens[0, 1] = token
    logits = forward(weights(), tokens, cfg=CFG)
    assert np.isnan(logits[0, 1:]).all() and np.isfinite(logits[1]).all()
    logits, cache = prefill(weights(), tokens, LENGTHS, fj.init_cache(CFG, 2, 8), cfg=CFG)
    assert np.isnan(logits[0]).all() and np.isfinite(logits[1]).all()
    step, _ = decode_step(weights(), np.array([token, 7], np.int32), cache, cfg=CFG)
    assert np.isnan(step[0]).all() and np.isfinite(step[1]).all()
    low, high = min(token, 0), max(token, 6)
    with pytest.raises(RequestError, match=rf"token ids span {low} to {high}; this model's vocabulary is 0 to 60"):
        fj.forward(weights(), jnp.asarray(tokens), CFG)
    with pytest.raises(RequestError, match=r"token ids span"):
        fj.decode_step(weights(), jnp.array([token, 7]), cache, CFG)


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (np.zeros(3, np.int32), r"tokens are int32\[3\]; expected int32\[B, T\]"),
        (np.zeros((1, 3), np.float32), r"tokens are float32\[1, 3\]; expected int32\[B, T\]"),
        (np.zeros((1, 3), np.bool_), r"tokens are bool\[1, 3\]"),
    ],
)
def test_tokens_of_another_kind_are_refused(tokens: np.ndarray, text: str) -> None:
    with pytest.raises(ShapeError, match=text):
        fj.forward(weights(), jnp.asarray(tokens), CFG)


def test_rows_must_agree() -> None:
    cache = fj.init_cache(CFG, 3, 8)
    with pytest.raises(ShapeError, match=r"tokens have 2 rows, lengths are \[2\] and the cache has 3 rows; all three"):
        fj.prefill(weights(), jnp.asarray(PROMPT), jnp.asarray(LENGTHS), cache, CFG)
    with pytest.raises(ShapeError, match=r"tokens are int32\[2, 4\]; expected int32\[B\]"):
        fj.decode_step(weights(), jnp.asarray(PROMPT), cache, CFG)


@pytest.mark.parametrize(
    ("batch", "length", "text"),
    [
        (0, 8, r"a cache of batch=0 and length=8 holds nothing"),
        (1, 0, r"batch=1 and length=0 holds nothing"),
        (1, 65, r"length=65 exceeds this model's context of 64 positions"),
    ],
)
def test_caches_of_no_use_are_refused(batch: int, length: int, text: str) -> None:
    with pytest.raises(CapacityError, match=text):
        fj.init_cache(CFG, batch, length)


def test_a_donated_cache_is_written_in_place() -> None:
    step = jax.jit(fj.decode_step, static_argnames="cfg", donate_argnames="cache")
    cache, token = fj.init_cache(CFG, 2, 8), np.array([1, 2], np.int32)
    compiled = step.lower(weights(), token, cache, cfg=CFG).compile()
    analysis = compiled.memory_analysis()
    assert analysis.alias_size_in_bytes >= cache.k.nbytes + cache.v.nbytes  # type: ignore[union-attr]
    places = cache.k.unsafe_buffer_pointer(), cache.v.unsafe_buffer_pointer()
    _, after = step(weights(), token, cache, cfg=CFG)
    assert cache.k.is_deleted() and cache.v.is_deleted()
    assert places == (after.k.unsafe_buffer_pointer(), after.v.unsafe_buffer_pointer())


def test_abstract_parameters_run_through_eval_shape_without_memory() -> None:
    large = tiny_config(
        vocab_size=151_936,
        hidden_size=2048,
        num_layers=48,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        intermediate_size=6144,
        num_experts=128,
        top_k=8,
        moe_intermediate_size=768,
        max_position=40_960,
    )
    before = len(jax.live_arrays())
    params = fj.abstract(large)
    cache = jax.eval_shape(functools.partial(fj.init_cache, large, 4, 1024))
    tokens, lengths = jax.ShapeDtypeStruct((4, 128), jnp.int32), jax.ShapeDtypeStruct((4,), jnp.int32)
    logits, after = jax.eval_shape(functools.partial(fj.prefill, cfg=large), params, tokens, lengths, cache)
    assert (logits.shape, logits.dtype) == ((4, 151_936), jnp.float32)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, cache)
    assert jax.eval_shape(functools.partial(fj.forward, cfg=large), params, tokens).shape == (4, 128, 151_936)
    assert len(jax.live_arrays()) == before


def test_aux_shows_the_residual_stream_and_the_routing() -> None:
    cfg = tiny_config(num_layers=3, moe_layers=(False, True, True))
    params = fj.random_params(cfg)
    logits, aux = forward(params, PROMPT, cfg=cfg, with_aux=True)
    np.testing.assert_allclose(logits, forward(params, PROMPT, cfg=cfg), rtol=0, atol=1e-6)
    assert aux.hidden.shape == (4, 2, 4, 32)
    np.testing.assert_array_equal(aux.hidden[0], params["embed"][PROMPT])
    dense, moe = aux.routing
    assert dense is None and moe.experts.shape == (2, 2, 4, 2) and moe.logits.shape == (2, 2, 4, 4)


def test_a_cache_may_be_narrower_than_the_activations() -> None:
    cfg = tiny_config(**DENSE, num_layers=1)
    params, narrow = fj.random_params(cfg), fj.init_cache(cfg, 2, 8, dtype=jnp.bfloat16)
    logits, cache = prefill(params, PROMPT, LENGTHS, narrow, cfg=cfg)
    exact, _ = prefill(params, PROMPT, LENGTHS, fj.init_cache(cfg, 2, 8), cfg=cfg)
    assert cache.k.dtype == jnp.bfloat16
    assert 0 < np.abs(logits - exact).max() < 0.05
