"""Rounding a plain weight to codes: within half a step everywhere, exact on the grid, refused in a sentence."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ferrum_kernels import PackedLinear, dequantize, gptq_matmul, round_to_nearest
from ferrum_kernels.errors import ShapeError
from ferrum_kernels.packed import check_packed
from tests.support.close import assert_close, normal
from tests.support.implementations import EXACT
from tests.support.numpy_reader import unpack_fields

SMALLEST = 2.0**-24  # of float16
seeds = st.integers(0, 2**32 - 1)
sizes = st.tuples(st.integers(1, 70), st.integers(1, 5))  # K, N
formats = st.tuples(st.sampled_from([2, 3, 4, 8]), st.sampled_from([1, 7, 16, 128]))  # bits, group_size
dtypes = st.sampled_from([np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)])


def codes_of(w: PackedLinear) -> np.ndarray:
    """Codes around zero, int64 [K, N], read bit by bit."""
    return unpack_fields(np.ascontiguousarray(w.qweight.T), w.bits, w.k).T.astype(np.int64) - 2 ** (w.bits - 1)


def steps_of(w: PackedLinear) -> np.ndarray:
    """The scale of every weight, float64 [K, N]."""
    return np.repeat(w.scales.astype(np.float64), w.group_size, axis=0)[: w.k]


@given(sizes, formats, dtypes, st.sampled_from([-12, -7, -5, -2, 0, 4]), seeds)
@example((5, 3), (8, 128), np.dtype(np.float32), -12, 0)
def test_no_weight_moves_by_more_than_half_a_step(size, packing, dtype, exponent, seed):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(size) * 10.0 ** (exponent + rng.integers(-1, 1, size)) * (rng.random(size) < 0.8)
    weight = weight.astype(dtype)
    w = round_to_nearest(weight, *packing)
    check_packed(w)
    assert (w.bits, w.group_size, w.qzeros, w.perm) == (packing[0], min(packing[1], size[0]), None, None)
    codes, steps, most = codes_of(w), steps_of(w), 2 ** (packing[0] - 1) - 1
    assert np.abs(codes).max() <= most
    error = np.abs(codes * steps - weight.astype(np.float64))
    assert (error <= steps * (0.5 + 1e-5)).all()  # the quotient itself is rounded to float32
    # No smaller float16 would hold the group's largest weight.
    for i, scales in enumerate(w.scales):
        exact = np.abs(weight[i * w.group_size : (i + 1) * w.group_size].astype(np.float32)).max(0) / np.float32(most)
        assert (scales >= exact).all()
        assert ((np.nextafter(scales, np.float16(0)) < exact) | (scales == np.float16(SMALLEST))).all()


@given(sizes, formats, st.booleans(), seeds)
def test_what_is_on_the_grid_comes_back_as_it_was(size, packing, subnormal, seed):
    (k, n), (bits, group_size) = size, packing
    rng, most = np.random.default_rng(seed), 2 ** (bits - 1) - 1
    codes = rng.integers(-most, most + 1, size)
    codes[::group_size] = most * rng.choice([-1, 1], codes[::group_size].shape)  # every group reaches the end
    groups = -(-k // group_size)
    scales = rng.integers(1, 1024, (groups, n)) * SMALLEST if subnormal else rng.uniform(0.001, 8, (groups, n))
    scales = scales.astype(np.float16)
    weight = np.repeat(scales.astype(np.float32), group_size, axis=0)[:k] * codes.astype(np.float32)
    w = round_to_nearest(weight, bits, group_size)
    np.testing.assert_array_equal(w.scales, scales)
    np.testing.assert_array_equal(codes_of(w), codes)


def test_halves_go_to_the_even_code():
    weight = np.array([[127.0], [0.5], [1.5], [2.5], [-0.5], [-1.5]], np.float32)
    assert codes_of(round_to_nearest(weight))[:, 0].tolist() == [127, 0, 2, 2, 0, -2]


def test_columns_are_rounded_alone_and_a_view_gives_the_same():
    weight = normal(0, 150, 11)
    whole = round_to_nearest(weight, 4, 64)
    turned = round_to_nearest(np.ascontiguousarray(weight.T).T, 4, 64)
    parts = [round_to_nearest(weight[:, columns], 4, 64) for columns in (slice(0, 4), slice(4, 11))]
    for name in ("qweight", "scales"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(turned, name))
        np.testing.assert_array_equal(getattr(whole, name), np.hstack([getattr(part, name) for part in parts]))


@pytest.mark.parametrize("implementation", EXACT)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 9])
def test_every_implementation_multiplies_it(implementation: str, bits: int, rows: int) -> None:
    weight = normal(1, 160, 97)
    weight[:, 5] = 0  # a column of zeros
    weight[128:, 6] = 1e-9  # a group below what float16 scales reach
    w = round_to_nearest(weight, bits)
    x = normal(2, rows, 160)
    y = np.asarray(gptq_matmul(x, w, implementation=implementation))
    assert_close(y, x.astype(np.float64) @ (codes_of(w) * steps_of(w)))
    assert not y[:, 5].any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38, 127 * 65600.0])
def test_values_that_no_scale_holds_are_refused(value: float) -> None:
    weight = np.zeros((4, 2), np.float32)
    weight[3, 1] = value
    with pytest.raises(ShapeError, match=r"NaN, infinite or beyond 127 x 65504, .* 8 bits .*; keep it as it is\."):
        round_to_nearest(weight)


def test_the_largest_scale_is_used() -> None:
    weight = np.full((4, 2), 127 * 65504.0, np.float32)
    np.testing.assert_array_equal(dequantize(round_to_nearest(weight)), weight)


@pytest.mark.parametrize(
    ("shape", "arguments", "text"),
    [
        ((4,), {}, r"got a weight \[4\] and group_size=128; it takes a matrix \[K, N\] that is not empty"),
        ((0, 4), {}, r"got a weight \[0, 4\] and group_size=128"),
        ((4, 4), {"group_size": 0}, r"group_size=0; it takes .* groups of 1 or more inputs\."),
        ((4, 4), {"bits": 5}, r"bits=5 is not a GPTQ width"),
    ],
)
def test_what_is_no_matrix_or_no_format_is_refused(
    shape: tuple[int, ...], arguments: dict[str, int], text: str
) -> None:
    with pytest.raises(ShapeError, match=text):
        round_to_nearest(np.zeros(shape, np.float32), **arguments)
