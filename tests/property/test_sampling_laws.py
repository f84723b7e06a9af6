"""Each sampling stage against a plain numpy reference, with and without jit, and the laws that hold between stages."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ferrum_jax import sampling

B, V = 3, 11
variants: Any = chex.variants  # chex has no types for its decorators

# Halves tie often and are exact; ties at a cut are where implementations differ.
logits_arrays = st.lists(
    st.lists(st.integers(-12, 12).map(lambda n: n / 2), min_size=V, max_size=V), min_size=B, max_size=B
).map(lambda rows: np.array(rows, np.float32))


def column(low: float, high: float):
    values = st.floats(low, high, allow_nan=False, width=32)
    return st.lists(values, min_size=B, max_size=B).map(lambda row: np.array(row, np.float32))


sizes = st.lists(st.integers(0, V + 2), min_size=B, max_size=B).map(lambda row: np.array(row, np.int32))
count_arrays = st.lists(st.lists(st.integers(0, 3), min_size=V, max_size=V), min_size=B, max_size=B).map(
    lambda rows: np.array(rows, np.int32)
)
key_arrays = st.lists(st.integers(0, 2**64 - 1), min_size=B, max_size=B).map(
    lambda seeds: np.array([[seed >> 32, seed & 0xFFFFFFFF] for seed in seeds], np.uint32)
)


def by_rank(row: np.ndarray) -> list[int]:
    return sorted(range(V), key=lambda token: (-row[token], token))


def softmax(row: np.ndarray) -> np.ndarray:
    weights = np.exp(row.astype(np.float64) - row.max())
    return weights / weights.sum()


def only(row: np.ndarray, kept: list[int]) -> np.ndarray:
    return np.array([row[token] if token in kept else -np.inf for token in range(V)], np.float32)


def reference_top_k(logits: np.ndarray, k: np.ndarray) -> np.ndarray:
    return np.stack([only(row, by_rank(row)[: n or V]) for row, n in zip(logits, k, strict=True)])


def nucleus_sizes(row: np.ndarray, p: float) -> set[int]:
    """How many tokens a nucleus may hold: one answer, or two where p falls on a sum up to float32 rounding."""
    if p >= 1:
        return {V}
    sums = np.cumsum(softmax(row)[by_rank(row)])
    return {min(int(np.sum(sums < p + slack)) + 1, V) for slack in (-2e-6, 0, 2e-6)}


class StagesTest(chex.TestCase):
    variant: Any

    @variants(with_jit=True, without_jit=True)
    def test_stages_equal_their_reference(self):
        stages = {
            name: self.variant(getattr(sampling, name))
            for name in (
                "apply_repetition_penalty",
                "apply_presence_frequency",
                "apply_temperature",
                "keep_min_p",
                "keep_top_k",
                "keep_top_p",
            )
        }

        @given(logits_arrays, count_arrays, column(0.5, 2.0))
        def repetition(logits, counts, penalty):
            want = logits.copy()
            for row in range(B):
                for token in np.flatnonzero(counts[row]):
                    value = logits[row, token]
                    want[row, token] = value / penalty[row] if value > 0 else value * penalty[row]
            np.testing.assert_allclose(stages["apply_repetition_penalty"](logits, counts > 0, penalty), want, rtol=1e-6)

        @given(logits_arrays, count_arrays, column(-2, 2), column(-2, 2))
        def presence_frequency(logits, counts, presence, frequency):
            want = logits.astype(np.float64)
            for row, token in np.argwhere(counts):
                want[row, token] -= presence[row] + frequency[row] * counts[row, token]
            got = stages["apply_presence_frequency"](logits, counts, presence, frequency)
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

        @given(logits_arrays, column(0.0, 2.0).map(lambda row: np.where(row < 1e-3, np.float32(0), row)))
        def temperature(logits, temperature):
            want = [row / t if t else row for row, t in zip(logits, temperature, strict=True)]
            np.testing.assert_allclose(stages["apply_temperature"](logits, temperature), want, rtol=1e-6)

        @given(logits_arrays, column(0, 1))
        def min_p(logits, least):
            got = np.asarray(stages["keep_min_p"](logits, least))
            for row, floor, kept in zip(logits, least, np.isfinite(got), strict=True):
                share = softmax(row) / softmax(row).max()
                sure = abs(share - floor) > 1e-6
                np.testing.assert_array_equal(kept[sure], (share >= floor)[sure])
                assert kept[row.argmax()]
            np.testing.assert_array_equal(got[np.isfinite(got)], logits[np.isfinite(got)])

        @given(logits_arrays, sizes)
        def top_k(logits, k):
            np.testing.assert_array_equal(stages["keep_top_k"](logits, k), reference_top_k(logits, k))

        @given(logits_arrays, column(2**-20, 1))
        def top_p(logits, p):
            got = np.asarray(stages["keep_top_p"](logits, p))
            for row, share, result in zip(logits, p, got, strict=True):
                allowed = [only(row, by_rank(row)[:size]) for size in nucleus_sizes(row, share)]
                assert any((result == want).all() for want in allowed)

        for law in (repetition, presence_frequency, temperature, min_p, top_k, top_p):
            with self.subTest(law.__name__):
                law()

    @variants(with_jit=True, without_jit=True)
    def test_drawing_obeys_its_keys(self):
        fold_in, sample_token = self.variant(sampling.fold_in), self.variant(sampling.sample_token)

        @given(key_arrays, st.integers(0, 2**31 - 1))
        def fold_in_is_that_of_jax(keys, step):
            want = [jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), step) for key in keys]
            want = [jax.random.key_data(key) for key in want]
            np.testing.assert_array_equal(fold_in(keys, np.full(B, step, np.int32)), want)

        @given(logits_arrays, key_arrays)
        def rows_are_drawn_for_themselves(logits, keys):
            hot = np.ones(B, np.float32)
            forward = sample_token(logits, keys, hot)
            np.testing.assert_array_equal(sample_token(logits[::-1].copy(), keys[::-1].copy(), hot), forward[::-1])

        @given(logits_arrays, key_arrays)
        def cold_rows_are_greedy(logits, keys):
            tokens = sample_token(logits, keys, np.array([0, 1, 0], np.float32))
            assert tokens[0] == by_rank(logits[0])[0] and tokens[2] == by_rank(logits[2])[0]

        @given(logits_arrays, key_arrays, sizes)
        def removed_tokens_are_never_drawn(logits, keys, k):
            tokens = sample_token(reference_top_k(logits, k), keys, np.ones(B, np.float32))
            for row, size, token in zip(logits, k, tokens, strict=True):
                assert int(token) in by_rank(row)[: size or V]

        @given(key_arrays)
        def noise_is_finite(keys):
            assert np.isfinite(sampling.gumbel(jnp.asarray(keys), V)).all()

        for law in (
            fold_in_is_that_of_jax,
            rows_are_drawn_for_themselves,
            cold_rows_are_greedy,
            removed_tokens_are_never_drawn,
            noise_is_finite,
        ):
            with self.subTest(law.__name__):
                law()

    @variants(with_jit=True, without_jit=True)
    def test_log_probabilities(self):
        token_logprob = self.variant(sampling.token_logprob)
        top_logprobs = self.variant(lambda logits: sampling.top_logprobs(logits, V))

        @given(logits_arrays, st.lists(st.integers(0, V - 1), min_size=B, max_size=B))
        def equal_the_reference(logits, tokens):
            want = np.log(np.stack([softmax(row) for row in logits]))
            got = token_logprob(logits, np.array(tokens, np.int32))
            np.testing.assert_allclose(got, want[np.arange(B), tokens], rtol=1e-5, atol=1e-6)
            ids, values = top_logprobs(logits)
            np.testing.assert_array_equal(ids, [by_rank(row) for row in logits])
            np.testing.assert_allclose(values, np.take_along_axis(want, np.asarray(ids), 1), rtol=1e-5, atol=1e-6)

        equal_the_reference()
