"""The filters of sampling as Triton kernels, interpreted on the CPU: which tokens stay."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_jax.sampling_stages import keep_top_k, keep_top_p
from ferrum_kernels import triton, triton_cut
from tests.support.triton_cases import ignore_deprecation, lower_for_cuda, normal

pytestmark = [
    ignore_deprecation,
    pytest.mark.skipif(jax.__version_info__ < (0, 10, 2), reason="the Triton kernels need jax 0.10.2"),
]
VOCAB = 20_001  # two chunks' worth of turns and a rest
INF = np.inf


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    rows = 3 * normal(1, 6, VOCAB)
    rows[0, 100:180] = 40.0  # more equal ones than stay
    rows[1] = 0.25
    rows[2, ::3] = -INF
    rows[3, :2] = 0.0, -0.0
    return rows


def best(row: np.ndarray, keep: int) -> np.ndarray:
    """The ids that stay: best first, equal ones by id."""
    return np.sort(np.argsort(-row, kind="stable")[:keep])


def test_top_k(logits):
    ks = [30, 700, 20, VOCAB, 1, 0]
    with triton.interpreted():
        found = np.asarray(keep_top_k(jnp.asarray(logits), jnp.array(ks, jnp.int32)))
    for row, kept, k in zip(logits, found, ks, strict=True):
        ids = best(row, k or VOCAB)
        np.testing.assert_array_equal(kept[ids], row[ids])
        assert np.isneginf(np.delete(kept, ids)).all()


def test_top_p(logits):
    ps = np.array([0.3, 0.5, 0.9, 0.01, 0.999, 1.0], np.float32)
    with triton.interpreted():
        found = np.asarray(keep_top_p(jnp.asarray(logits), jnp.asarray(ps)))
    for row, kept, p in zip(logits, found, ps, strict=True):
        weights = np.exp(row.astype(np.float64) - row.max())
        order = np.argsort(-row, kind="stable")
        sums = np.cumsum(weights[order]) / weights.sum()
        stay = int(np.isfinite(kept).sum())
        ids = best(row, VOCAB if p == 1 else stay)
        np.testing.assert_array_equal(kept[ids], row[ids])
        if p < 1:  # the smallest set that reaches p, as far as float32 sums tell
            assert sums[stay - 1] > p - 1e-5 and (stay == 1 or sums[stay - 2] < p + 1e-5)


def test_a_row_stays_the_same_in_any_batch(logits):
    with triton.interpreted():
        together = keep_top_p(jnp.asarray(logits), jnp.full(6, 0.8, jnp.float32))
        alone = keep_top_p(jnp.asarray(logits[4:5]), jnp.full(1, 0.8, jnp.float32))
    np.testing.assert_array_equal(together[4:5], alone)


@pytest.mark.parametrize("likely", [False, True])
def test_lowers_for_cuda(likely):
    keep = functools.partial(triton_cut.keep_best, likely=likely, interpret=False)
    text = lower_for_cuda(keep, jnp.zeros((2, 151_936)), jnp.ones(2))
    assert text.count("stablehlo.custom_call") == 10
