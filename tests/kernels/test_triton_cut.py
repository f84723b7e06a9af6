"""The filters and the draw of sampling as Triton kernels, interpreted on the CPU: which tokens stay, which is drawn."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_jax.errors import BackendError
from ferrum_jax.sampling_filters import draw_best, keep_best
from ferrum_kernels import triton, triton_cut, triton_draw
from tests.support.triton_cases import ignore_deprecation, lower_for_cuda, normal

pytestmark = [
    ignore_deprecation,
    pytest.mark.skipif(jax.__version_info__ < (0, 10, 2), reason="the Triton kernels need jax 0.10.2"),
]
VOCAB = 5001  # two tiles, and more than a list holds
INF = np.inf
Keep = Callable[[list[int] | None, list[float] | None], np.ndarray]


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    rows = 3 * normal(1, 8, VOCAB)
    rows[0, 100:180] = 40.0  # more equal ones than stay
    rows[1] = 0.25  # too many equal ones for a list
    rows[2, ::3] = -INF
    rows[3, :2] = 0.0, -0.0
    rows[4] = np.round(rows[4])
    rows[5] *= 30
    rows[6] -= 1000
    return rows


@pytest.fixture(scope="module", params=[triton_cut.FEW, 0], ids=["few groups", "passes"])
def keep(request, logits) -> Keep:
    """What the kernels keep; one program for all limits. So few groups need no passes over the row; without any do."""
    with triton.interpreted(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_cut, "FEW", request.param)
        anew = jax.jit(lambda *given: keep_best(*given))  # not the trace of the other constant
        run = anew.lower(jnp.asarray(logits), jnp.zeros(8, jnp.int32), jnp.ones(8)).compile()

    def keep(ks: list[int] | None, ps: list[float] | None) -> np.ndarray:
        return np.asarray(run(logits, np.array(ks or [0] * 8, np.int32), np.array(ps or [1] * 8, np.float32)))

    return keep


def best(row: np.ndarray, keep: int) -> np.ndarray:
    """The ids that stay: best first, equal ones by id."""
    return np.sort(np.argsort(-row, kind="stable")[:keep])


def check_top_p(row: np.ndarray, kept: np.ndarray, among: np.ndarray, p: float) -> None:
    """The smallest set of the best among some tokens that reaches p, as far as float32 sums tell."""
    weights = np.exp(row[among].astype(np.float64) - row[among].max())
    order = np.argsort(-row[among], kind="stable")
    sums = np.cumsum(weights[order]) / weights.sum()
    stay = int(np.isfinite(kept).sum())
    ids = np.sort(among[order[:stay]])
    np.testing.assert_array_equal(kept[ids], row[ids])
    assert sums[stay - 1] > p - 1e-5 and (stay == 1 or sums[stay - 2] < p + 1e-5)


@pytest.mark.parametrize("ks", [[30, 700, 20, VOCAB, 1, 0, 50, 5000], [0, 4500, 4000, 2, 900, 5, 4097, 1]])
def test_top_k(logits, keep, ks):
    for row, kept, k in zip(logits, keep(ks, None), ks, strict=True):
        ids = best(row, k or VOCAB)
        np.testing.assert_array_equal(kept[ids], row[ids])
        assert np.isneginf(np.delete(kept, ids)).all()


@pytest.mark.parametrize(
    "ps", [[0.3, 0.5, 0.9, 0.01, 0.999, 0.9, 0.4, 0.95], [1e-6, 0.999, 0.1, 0.9, 0.2, 1e-3, 0.99, 0.7]]
)
def test_top_p(logits, keep, ps):
    for row, kept, p in zip(logits, keep(None, ps), np.array(ps, np.float32), strict=True):
        check_top_p(row, kept, np.arange(VOCAB), p)


# Few, so that the list has all of them; more than a list holds; and where one of the limits is none.
@pytest.mark.parametrize("ks", [[50, 40, 30, 20, 10, 5, 60, 100], [4900, 4200, 3000, 4500, 0, 0, 4999, 4100]])
def test_top_p_of_top_k(logits, keep, ks):
    ps = np.array([0.5, 0.9, 0.3, 0.8, 0.99, 0.7, 0.6, 0.95], np.float32)
    for row, kept, k, p in zip(logits, keep(ks, ps.tolist()), ks, ps, strict=True):
        check_top_p(row, kept, best(row, k or VOCAB), p)


def test_top_p_where_top_k_keeps_all(logits, keep):
    k, p = VOCAB + 1, float(np.float32(0.9))  # more than there are, as after min-p
    for row, kept in zip(logits, keep([k] * 8, [0.9] * 8), strict=True):
        check_top_p(row, kept, np.arange(VOCAB), p)


def test_no_limit_keeps_all(logits, keep):
    np.testing.assert_array_equal(keep(None, None), logits)


def test_the_best_token_stays_whatever_the_others_weigh(logits, keep):
    kept = keep([1] * 8, [1e-6] * 8)
    assert (np.isfinite(kept).sum(1) == 1).all()
    np.testing.assert_array_equal(kept.argmax(1), logits.argmax(1))


def test_a_row_stays_the_same_in_any_batch(logits, keep):
    with triton.interpreted():
        alone = jax.jit(keep_best)(jnp.asarray(logits[4:5]), jnp.zeros(1, jnp.int32), jnp.full(1, 0.8, jnp.float32))
    np.testing.assert_array_equal(keep(None, [0.8] * 8)[4:5], alone)


def test_draws_the_tokens_that_the_portable_operations_draw(logits):
    with triton.interpreted():
        limits = jnp.zeros(8, jnp.int32), jnp.ones(8)
        drawn = jax.jit(draw_best).lower(logits, *limits, jnp.zeros((8, 2), jnp.uint32), jnp.ones(8)).compile()
    k, p = jnp.array([0, 30, 0, 4500, 40, 0, 0, 7]), jnp.array([1, 0.9, 0.9, 1, 1, 0.5, 1, 0.6])
    temperature, rows = jnp.array([1.0, 0.5, 1, 1, 0, 2, 0, 1]), jnp.asarray(logits)
    for seed in range(20):
        keys = jnp.asarray(np.random.default_rng(seed).integers(0, 2**32, (8, 2), np.uint32))
        expected = draw_best(rows, k, p, keys, temperature)
        np.testing.assert_array_equal(drawn(rows, k, p, keys, temperature), expected)


def test_gradients_pass_by_the_search(logits):
    def kept(x):
        y = keep_best(x, jnp.array([3]), None)
        return jnp.where(y > -INF, y, 0.0).sum()

    with triton.interpreted():
        gradient = np.asarray(jax.grad(kept)(jnp.asarray(logits[7:])))
    assert np.flatnonzero(gradient).tolist() == best(logits[7], 3).tolist() and gradient.max() == 1


def test_lowers_for_cuda():
    def draw(logits, k, p, keys):
        return triton_draw.draw(logits, p, k, p, keys, k, False)

    arguments = jnp.zeros((2, 151_936)), jnp.zeros(2, jnp.int32), jnp.ones(2), jnp.zeros((2, 2), jnp.uint32)
    assert lower_for_cuda(draw, *arguments).count("stablehlo.custom_call") == 8


def test_a_process_with_a_gpu_filters_each_array_where_it_is(monkeypatch, logits):
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    text = lower_for_cuda(keep_best, jnp.zeros((2, 5001)), jnp.ones(2, jnp.int32), None)
    assert text.count("stablehlo.custom_call") == 7
    kept = jax.jit(keep_best)(jnp.asarray(logits), jnp.full(8, 3), None)  # these are on the CPU
    assert (np.isfinite(kept).sum(1) == 3).all()


def test_the_kernels_are_not_run_elsewhere_in_silence():
    logits, k = jnp.zeros((1, 4)), jnp.ones(1, jnp.int32)
    with pytest.raises(BackendError, match=r'implementation="triton" cannot run: it needs an NVIDIA GPU'):
        keep_best(logits, k, None, implementation="triton")
    with pytest.raises(BackendError, match=r'implementation="triton" cannot run: it needs an NVIDIA GPU'):
        draw_best(logits, k, None, jnp.zeros((1, 2), jnp.uint32), jnp.ones(1), implementation="triton")
    with pytest.raises(BackendError, match='implementation="cpu" does not filter logits; "triton" and "xla" do'):
        keep_best(logits, k, None, implementation="cpu")
