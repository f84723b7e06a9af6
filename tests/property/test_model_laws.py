"""Laws of the decoder: however the tokens arrive, in whatever company, a row's logits are the same."""

from __future__ import annotations

import functools
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
from ferrum_jax.config import ModelConfig, RopeConfig
from tests.support.tiny import CONFIGS, DENSE, decode_step, forward, prefill, tiny_config

ROWS, TOKENS, SLOTS, VOCAB = 3, 6, 12, 61  # one shape, so that every law compiles once
CLOSE: dict[str, Any] = {"rtol": 0.0, "atol": 2e-5}

token_ids = hnp.arrays(np.int32, (ROWS, 2 * TOKENS), elements=st.integers(0, VOCAB - 1))
counts = hnp.arrays(np.int32, ROWS, elements=st.integers(0, TOKENS))
configs = pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)


@functools.cache
def weights(cfg: ModelConfig) -> dict[str, Any]:
    return fj.random_params(cfg)


def empty(cfg: ModelConfig, rows: int = ROWS) -> fj.KVCache:
    return fj.init_cache(cfg, batch=rows, length=SLOTS)


def window(tokens: np.ndarray, start: np.ndarray) -> np.ndarray:
    """tokens[b, start[b] : start[b] + TOKENS], with zeros past the end."""
    padded = np.pad(tokens, ((0, 0), (0, TOKENS)))
    return np.stack([row[first : first + TOKENS] for row, first in zip(padded, start, strict=True)])


def at(logits: jax.Array, lengths: np.ndarray) -> np.ndarray:
    """logits [B, T, V] after each row's token number lengths[b] >= 1."""
    return np.asarray(logits)[np.arange(ROWS), np.maximum(lengths, 1) - 1]


@configs
@given(tokens=token_ids, lengths=counts)
def test_prefill_then_decode_equals_a_longer_prefill_equals_forward(
    cfg: ModelConfig, tokens: np.ndarray, lengths: np.ndarray
) -> None:
    params, lengths = weights(cfg), np.clip(lengths, 1, TOKENS - 1)
    whole = forward(params, tokens[:, :TOKENS], cfg=cfg)
    first, cache = prefill(params, tokens[:, :TOKENS], lengths, empty(cfg), cfg=cfg)
    np.testing.assert_allclose(first, at(whole, lengths), **CLOSE)
    following, cache = decode_step(params, tokens[np.arange(ROWS), lengths], cache, cfg=cfg)
    longer, _ = prefill(params, tokens[:, :TOKENS], lengths + 1, empty(cfg), cfg=cfg)
    np.testing.assert_allclose(following, longer, **CLOSE)
    np.testing.assert_allclose(following, at(whole, lengths + 1), **CLOSE)
    assert cache.lengths.tolist() == (lengths + 1).tolist()


@configs
@given(tokens=token_ids, first=counts, second=counts)
def test_prefill_in_pieces_equals_the_whole(
    cfg: ModelConfig, tokens: np.ndarray, first: np.ndarray, second: np.ndarray
) -> None:
    params, cache = weights(cfg), empty(cfg)
    whole = forward(params, tokens, cfg=cfg)
    before, cache = prefill(params, window(tokens, 0 * first), first, cache, cfg=cfg)
    after, cache = prefill(params, window(tokens, first), second, cache, cfg=cfg)
    read, continued = first > 0, second > 0
    np.testing.assert_allclose(before[read], at(whole, first)[read], **CLOSE)
    np.testing.assert_allclose(after[continued], at(whole, first + second)[continued], **CLOSE)
    assert cache.lengths.tolist() == (first + second).tolist()


@configs
@given(tokens=token_ids, others=token_ids, lengths=counts, row=st.integers(0, ROWS - 1))
def test_a_row_does_not_see_its_batch(
    cfg: ModelConfig, tokens: np.ndarray, others: np.ndarray, lengths: np.ndarray, row: int
) -> None:
    params, lengths = weights(cfg), np.maximum(lengths, 1)
    in_batch, cache = prefill(params, tokens[:, :TOKENS], lengths, empty(cfg), cfg=cfg)
    in_batch_next, _ = decode_step(params, tokens[:, -1], cache, cfg=cfg)
    others[row], other_lengths = tokens[row], np.full(ROWS, TOKENS, np.int32)
    other_lengths[row] = lengths[row]
    in_other, cache = prefill(params, others[:, :TOKENS], other_lengths, empty(cfg), cfg=cfg)
    in_other_next, _ = decode_step(params, others[:, -1], cache, cfg=cfg)
    alone, cache = prefill(params, tokens[row : row + 1, :TOKENS], lengths[row : row + 1], empty(cfg, 1), cfg=cfg)
    alone_next, _ = decode_step(params, tokens[row : row + 1, -1], cache, cfg=cfg)
    chex.assert_trees_all_close((in_batch[row], in_batch_next[row]), (alone[0], alone_next[0]), **CLOSE)
    chex.assert_trees_all_close((in_other[row], in_other_next[row]), (alone[0], alone_next[0]), **CLOSE)


@configs
@given(
    tokens=token_ids,
    lengths=counts,
    garbage=st.sampled_from([0, VOCAB - 1, VOCAB, -1, np.iinfo(np.int32).max, np.iinfo(np.int32).min]),
)
def test_padding_tokens_and_what_a_cache_once_held_are_inert(
    cfg: ModelConfig, tokens: np.ndarray, lengths: np.ndarray, garbage: int
) -> None:
    params, prompt = weights(cfg), tokens[:, :TOKENS]
    clean = prefill(params, prompt, lengths, empty(cfg), cfg=cfg)
    clean_next, _ = decode_step(params, tokens[:, -1], clean[1], cfg=cfg)
    padded = np.where(np.arange(TOKENS) < lengths[:, None], prompt, garbage)
    poisoned = jax.tree.map(lambda leaf: leaf if leaf.ndim == 1 else jnp.full_like(leaf, jnp.nan), empty(cfg))
    logits, cache = prefill(params, padded, lengths, poisoned, cfg=cfg)
    following, _ = decode_step(params, tokens[:, -1], cache, cfg=cfg)
    read = lengths > 0
    chex.assert_trees_all_equal((logits[read], following), (clean[0][read], clean_next))


@pytest.mark.parametrize("name", ["mixtral, asymmetric, act-order", "qwen3, unquantised, tied, biases"])
def test_without_jit_the_logits_are_the_same(name: str) -> None:
    cfg = CONFIGS[name]
    params, tokens = weights(cfg), np.arange(ROWS * TOKENS, dtype=np.int32).reshape(ROWS, TOKENS)
    lengths = np.array([6, 1, 3], np.int32)
    compiled, cache = prefill(params, tokens, lengths, empty(cfg), cfg=cfg)
    eager, eager_cache = fj.prefill(params, jnp.asarray(tokens), jnp.asarray(lengths), empty(cfg), cfg)
    chex.assert_trees_all_close((compiled, cache), (eager, eager_cache), **CLOSE)
    chex.assert_tree_all_finite(eager)


@given(tokens=token_ids, place=st.integers(0, TOKENS - 1))
def test_a_token_changes_its_own_position_and_later_ones_only(tokens: np.ndarray, place: int) -> None:
    cfg = CONFIGS["mixtral, asymmetric, act-order"]
    changed = tokens.copy()
    changed[:, place] = (changed[:, place] + 1) % VOCAB
    before, after = (forward(weights(cfg), ids, cfg=cfg) for ids in (tokens, changed))
    np.testing.assert_array_equal(before[:, :place], after[:, :place])
    assert np.all(np.abs(before[:, place] - after[:, place]).max(axis=-1) > 0)


@given(tokens=token_ids)
def test_a_sliding_window_forgets_in_forward_and_with_a_cache(tokens: np.ndarray) -> None:
    size = 3
    cfg = tiny_config(**DENSE, num_layers=1, sliding_windows=(size,))
    changed = tokens.copy()
    changed[:, 0] = (changed[:, 0] + 1) % VOCAB
    before, after = (forward(weights(cfg), ids[:, :TOKENS], cfg=cfg) for ids in (tokens, changed))
    differences = np.abs(before - after).max(axis=(0, 2))
    assert np.all(differences[:size] > 0) and np.all(differences[size:] == 0)
    full = np.full(ROWS, TOKENS, np.int32)
    steps = []
    for ids in (tokens, changed):
        logits, cache = prefill(weights(cfg), ids[:, :TOKENS], full, empty(cfg), cfg=cfg)
        following, _ = decode_step(weights(cfg), ids[:, TOKENS], cache, cfg=cfg)
        steps.append((logits, following))
    chex.assert_trees_all_equal(*steps)
    np.testing.assert_allclose(steps[0][0], before[:, -1], **CLOSE)


@given(tokens=token_ids)
def test_dynamic_ntk_stretches_each_row_by_its_own_length(tokens: np.ndarray) -> None:
    original = 4
    plain = tiny_config(**DENSE, num_layers=1)
    cfg = tiny_config(
        **DENSE, num_layers=1, rope=RopeConfig(rope_type="dynamic", factor=4.0, original_max_position=original)
    )
    prompt, lengths = tokens[:, :TOKENS], np.array([original, TOKENS, 1], np.int32)
    mixed, _ = prefill(weights(cfg), prompt, lengths, empty(cfg), cfg=cfg)
    default, _ = prefill(weights(cfg), prompt, lengths, empty(plain), cfg=plain)
    np.testing.assert_allclose(mixed[::2], default[::2], **CLOSE)
    alone, _ = prefill(weights(cfg), prompt[1:2], lengths[1:2], empty(cfg, 1), cfg=cfg)
    np.testing.assert_allclose(mixed[1], alone[0], **CLOSE)
    np.testing.assert_allclose(mixed[1], forward(weights(cfg), prompt, cfg=cfg)[1, -1], **CLOSE)
    if len(set(prompt[1].tolist())) > 1:  # rotations do not show where every value is the same
        assert np.abs(mixed[1] - default[1]).max() > 1e-5
