"""Laws of caches: pages in any order hold what a contiguous cache holds, and int8 codes nearly so."""

from __future__ import annotations

import dataclasses
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
from ferrum_jax.cache import DTYPES, dequantise, quantise
from ferrum_jax.errors import BackendError, CapacityError, ConfigError, ShapeError
from ferrum_jax.paged import Cache, room
from tests.support.tiny import decode_step, prefill, tiny_config

CFG = tiny_config(sliding_windows=(None, 3))
ROWS, TOKENS, PAGE, PER_ROW = 3, 6, 4, 3  # one shape, so that every law compiles once
POOL, SLOTS = ROWS * PER_ROW + 2, PAGE * PER_ROW

token_ids = hnp.arrays(np.int32, (ROWS, 2 * TOKENS), elements=st.integers(0, CFG.vocab_size - 1))
counts = hnp.arrays(np.int32, ROWS, elements=st.integers(0, TOKENS))
tables = st.permutations(range(POOL)).map(lambda ids: np.array(ids[: ROWS * PER_ROW], np.int32).reshape(ROWS, PER_ROW))


@functools.cache
def weights() -> dict[str, Any]:
    return fj.random_params(CFG)


def contiguous(dtype: Any = None) -> fj.KVCache:
    return fj.init_cache(CFG, ROWS, SLOTS, dtype=dtype)


def paged(table: np.ndarray, dtype: Any = None, fill: float = 0.0) -> fj.PagedCache:
    cache = fj.init_paged_cache(CFG, ROWS, POOL, PAGE, length=SLOTS, dtype=dtype)
    pools = {
        name: jnp.full_like(leaf, fill if leaf.dtype != jnp.int32 else 5)
        for name in ("k", "v", "k_scale", "v_scale")
        if (leaf := getattr(cache, name)) is not None
    }
    return dataclasses.replace(cache, table=jnp.asarray(table), **pools)


def read(cache: Cache, tokens: np.ndarray, first: np.ndarray, second: np.ndarray) -> list[np.ndarray]:
    """Logits after two pieces of a prompt and one more token; rows that read nothing are zero."""
    out = []
    for start, count in ((0 * first, first), (first, second)):
        piece = np.stack([np.pad(row, (0, TOKENS))[at : at + TOKENS] for row, at in zip(tokens, start, strict=True)])
        logits, cache = prefill(weights(), piece, count, cache, cfg=CFG)
        out.append(np.where(count[:, None] > 0, logits, 0))
    logits, cache = decode_step(weights(), tokens[:, -1], cache, cfg=CFG)
    assert cache.lengths.tolist() == (first + second + 1).tolist()
    return [*out, np.where((first + second < SLOTS)[:, None], logits, 0)]


@given(tokens=token_ids, first=counts, second=counts, table=tables, poison=st.sampled_from([0.0, np.nan, np.inf]))
def test_pages_in_any_order_hold_what_contiguous_slots_hold(
    tokens: np.ndarray, first: np.ndarray, second: np.ndarray, table: np.ndarray, poison: float
) -> None:
    expected = read(contiguous(), tokens, first, second)
    found = read(paged(table, fill=poison), tokens, first, second)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)


@given(tokens=token_ids, first=counts, second=counts, table=tables)
def test_the_order_of_pages_and_what_they_once_held_change_no_bit(
    tokens: np.ndarray, first: np.ndarray, second: np.ndarray, table: np.ndarray
) -> None:
    in_order = np.arange(ROWS * PER_ROW, dtype=np.int32).reshape(ROWS, PER_ROW)
    for dtype in (None, "int8"):
        clean = read(paged(in_order, dtype), tokens, first, second)
        chex.assert_trees_all_equal(read(paged(table, dtype, fill=np.nan), tokens, first, second), clean)


@given(tokens=token_ids, first=counts, second=counts)
def test_int8_codes_are_close_in_either_kind(tokens: np.ndarray, first: np.ndarray, second: np.ndarray) -> None:
    exact = read(contiguous(), tokens, first, second)
    in_order = np.arange(ROWS * PER_ROW, dtype=np.int32).reshape(ROWS, PER_ROW)
    codes, in_pages = (read(cache, tokens, first, second) for cache in (contiguous("int8"), paged(in_order, "int8")))
    for one, other, near in zip(codes, in_pages, exact, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)
        assert np.abs(one - near).max() < 0.1  # logits are of the order of 3


@given(tokens=token_ids, table=tables, none=st.sampled_from([-1, POOL, 2**31 - 1, -(2**31)]))
def test_what_is_no_page_is_not_written_and_not_read(tokens: np.ndarray, table: np.ndarray, none: int) -> None:
    full = np.full(ROWS, TOKENS, np.int32)
    whole = read(paged(table), tokens, full, 0 * full)
    short = table.copy()
    short[0, 1:] = none  # row 0 has one page of four slots for its six tokens
    before = paged(short, fill=7.0)
    logits, after = prefill(weights(), tokens[:, :TOKENS], full, before, cfg=CFG)
    assert np.isnan(logits[0]).all()
    np.testing.assert_allclose(logits[1:], whole[0][1:], rtol=0, atol=2e-5)
    used = {int(short[0, 0]), *short[1:, :2].ravel().tolist()}
    unused = [page for page in range(POOL) if page not in used]
    np.testing.assert_array_equal(after.k[:, unused], before.k[:, unused])
    np.testing.assert_array_equal(room(after), [PAGE, SLOTS, SLOTS])


def test_a_row_without_pages_disturbs_nobody() -> None:
    tokens = np.arange(ROWS * 2 * TOKENS, dtype=np.int32).reshape(ROWS, -1)
    table = np.arange(ROWS * PER_ROW, dtype=np.int32).reshape(ROWS, PER_ROW)
    expected = read(paged(table), tokens, np.full(ROWS, 4, np.int32), np.full(ROWS, 2, np.int32))
    table[1] = POOL
    dead = np.array([4, 0, 4], np.int32)
    found = read(paged(table, fill=np.nan), tokens, dead, dead // 2)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one[::2], other[::2], rtol=0, atol=2e-5)


@given(heads=hnp.arrays(np.float32, (5, 8), elements=st.floats(-100, 100, width=32)))
def test_codes_are_off_by_at_most_half_a_step(heads: np.ndarray) -> None:
    words, scale = jax.jit(quantise)(heads)
    np.testing.assert_allclose(scale, np.abs(heads).max(axis=-1) / 127, rtol=1e-6)
    back = dequantise(words, scale, jnp.float32)
    assert (np.abs(back - heads) <= 0.5001 * np.asarray(scale)[:, None]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_head_that_is_not_finite_reads_as_nan(value: float) -> None:
    words, scale = quantise(jnp.array([[1.0, value, 2.0, 0.0], [1.0, 3.0, 2.0, 0.0]]))
    back = dequantise(words, scale, jnp.float32)
    assert np.isnan(back[0]).all() and np.isfinite(back[1]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_donated_pool_is_written_in_place(dtype: str) -> None:
    step = jax.jit(fj.decode_step, static_argnames="cfg", donate_argnames="cache")
    cache = fj.init_paged_cache(CFG, 2, 4, 4, dtype=dtype)
    pools = [leaf for leaf in jax.tree.leaves(cache) if leaf.ndim > 2]
    places = [leaf.unsafe_buffer_pointer() for leaf in pools]
    _, after = step(weights(), np.array([1, 2], np.int32), cache, cfg=CFG)
    assert all(leaf.is_deleted() for leaf in pools) and len(pools) == (4 if dtype == "int8" else 2)
    assert places == [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(after) if leaf.ndim > 2]


def test_sizes_are_what_was_asked_for() -> None:
    cache = fj.init_paged_cache(CFG, batch=2, pages=7, dtype="int8")
    assert (cache.pages, cache.page, cache.capacity) == (7, 16, 48)
    assert cache.k_scale.shape == (2, 7, 16, 2) and cache.k_scale.dtype == jnp.float32
    assert fj.init_paged_cache(CFG, batch=1, pages=99).capacity == CFG.max_position
    contiguous = fj.init_cache(CFG, 3, 10, dtype="int8")
    assert contiguous.v_scale.shape == (2, 3, 10, 2)
    assert contiguous.v.shape == (2, 3, 10, 2, 2) and contiguous.v.dtype == jnp.int32  # heads of 8, four to a word
    assert [c.dtype for c in (cache, contiguous, fj.init_cache(CFG, 1, 1))] == ["int8", "int8", "float32"]


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: fj.init_paged_cache(CFG, 0, 1), CapacityError, r"batch=0, pages=1, page=16 and length=None holds not"),
        (lambda: fj.init_paged_cache(CFG, 1, 1, length=0), CapacityError, r"length=0 holds nothing; each must be at"),
        (
            lambda: fj.init_paged_cache(CFG, 1, 1, length=65),
            CapacityError,
            r"length=65 exceeds this model's context of",
        ),
        (lambda: fj.init_paged_cache(CFG, 1, 1, dtype="int4"), ConfigError, r"a cache of dtype='int4' is unknown; acc"),
        (lambda: fj.init_cache(CFG, 1, 1, dtype="q8"), ConfigError, r"dtype='q8' is unknown; accepted are bfloat16, f"),
    ],
)
def test_caches_of_no_use_are_refused(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_steps_that_cannot_work_are_refused() -> None:
    cache = fj.init_paged_cache(CFG, 2, 2, 4)
    tokens, lengths = jnp.zeros((2, 6), jnp.int32), jnp.array([6, 2])
    with pytest.raises(
        CapacityError, match=r"row 0 would hold 6 tokens; the cache has room for 4. Put more pages into"
    ):
        fj.prefill(weights(), tokens, lengths, cache, CFG)
    with pytest.raises(ShapeError, match=r"tokens have 3 rows, lengths are \[3\] and the cache has 2 rows"):
        fj.decode_step(weights(), jnp.zeros(3, jnp.int32), cache, CFG)
    with pytest.raises(BackendError, match=r"pages are written by scatter, which implementation='apple' does without"):
        fj.decode_step(weights(), jnp.zeros(2, jnp.int32), cache, dataclasses.replace(CFG, implementation="apple"))
