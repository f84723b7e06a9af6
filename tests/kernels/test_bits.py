"""Packing codes into words: both directions against a reader that walks the bits one by one."""

from __future__ import annotations

from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_kernels.bits import SUPPORTED_BITS, centred, pack, unpack, words_for
from ferrum_kernels.errors import ShapeError
from tests.support.checkpoint_writer import pack_fields
from tests.support.numpy_reader import unpack_fields

variants: Any = chex.variants  # chex has no types for its decorators
widths = st.sampled_from(SUPPORTED_BITS)
seeds = st.integers(0, 2**32 - 1)


def random_codes(seed: int, bits: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**bits, shape, np.uint32)


@given(widths, st.integers(1, 100), st.integers(1, 3), seeds)
def test_numpy_packing_is_the_bit_stream_and_its_inverse(bits, count, rows, seed):
    codes = random_codes(seed, bits, rows, count)
    words = pack(codes, bits, axis=-1)
    assert words.dtype == np.uint32
    assert words.shape == (rows, words_for(count, bits))
    np.testing.assert_array_equal(words, pack_fields(codes.astype(np.int64), bits).view(np.uint32))
    np.testing.assert_array_equal(unpack_fields(words, bits, count), codes)
    np.testing.assert_array_equal(unpack(words, bits, count, axis=-1), codes)


@given(widths, st.integers(1, 100), seeds)
def test_every_word_survives_unpacking_but_for_the_bits_past_the_last_code(bits, count, seed):
    words = np.random.default_rng(seed).integers(0, 2**32, (2, words_for(count, bits)), np.uint32)
    codes = unpack(words, bits, count, axis=-1)
    np.testing.assert_array_equal(codes, unpack_fields(words, bits, count))
    used = np.arange(32 * words.shape[1]) < bits * count
    mask = np.packbits(used, bitorder="little").view(np.uint32)
    np.testing.assert_array_equal(pack(codes, bits, axis=-1), words & mask)


@given(widths, st.integers(1, 70), seeds)
def test_down_the_column_is_along_the_row_transposed_under_any_leading_axes(bits, count, seed):
    codes = random_codes(seed, bits, 2, 1, count, 3)
    words = pack(codes, bits, axis=-2)
    np.testing.assert_array_equal(words, pack(codes.swapaxes(-1, -2), bits, axis=-1).swapaxes(-1, -2))
    np.testing.assert_array_equal(unpack(words, bits, count, axis=-2), codes)


def test_signed_codes_pack_like_unsigned_ones():
    codes = random_codes(0, 3, 2, 41)
    np.testing.assert_array_equal(pack(codes.astype(np.int64), 3, axis=-1), pack(codes, 3, axis=-1))


class TracedBitsTest(chex.TestCase):
    """JAX arrays take the same path as numpy arrays, traced or not. Counts are fixed, because each one compiles."""

    @variants(with_jit=True, without_jit=True)
    def test_jax_arrays_give_what_numpy_arrays_give(self):
        def check(bits, axis, shape):
            packing = self.variant(lambda codes: pack(codes, bits, axis))
            unpacking = self.variant(lambda words: unpack(words, bits, shape[axis], axis))

            @given(seeds)
            def agree(seed):
                codes = random_codes(seed, bits, *shape)
                words = packing(jnp.asarray(codes))
                assert words.dtype == jnp.uint32
                np.testing.assert_array_equal(words, pack(codes, bits, axis))
                np.testing.assert_array_equal(unpacking(words), codes)

            agree()

        check(2, -1, (3, 45))
        check(3, -2, (2, 33, 3))
        check(4, -2, (33, 3))
        check(8, -1, (2, 3, 5))


@pytest.mark.parametrize("bits", [0, 1, 5, 16])
def test_a_width_that_gptq_does_not_have_is_refused(bits):
    message = rf"bits={bits} is not a GPTQ width; accepted are 2, 3, 4 and 8\."
    with pytest.raises(ShapeError, match=message):
        pack(np.zeros((1, 8), np.uint32), bits, axis=-1)
    with pytest.raises(ShapeError, match=message):
        unpack(np.zeros((1, 8), np.uint32), bits, 8, axis=-1)


@pytest.mark.parametrize("count", [8, 17])
def test_a_word_count_that_does_not_fit_the_codes_is_refused(count):
    message = (
        rf"2 words along axis -1 of \(3, 2\) cannot hold {count} codes of 4 bits; expected {-(-count // 8)} words\."
    )
    with pytest.raises(ShapeError, match=message):
        unpack(np.zeros((3, 2), np.uint32), 4, count, axis=-1)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_centred_codes_are_the_middle_on_average_and_otherwise_as_they_were(bits):
    words = np.random.default_rng(0).integers(0, 2**32, (4096, 4), np.uint32)
    count = 4096 * 32 // bits
    before, after = (unpack(w, bits, count, axis=-2) for w in (words, centred(words, bits)))
    np.testing.assert_array_equal(after, np.where(before == 0, 2 ** (bits - 1), before))
    assert abs(after.mean() - 2 ** (bits - 1)) < 4 * after.std() / after.size**0.5
    assert abs(before.mean() - 2 ** (bits - 1)) > 0.4
    assert centred(words, 3) is words
    halves = centred(jnp.asarray(words.view(np.uint16)), bits)  # as a GPU's tiles hold codes
    assert halves.dtype == jnp.uint16
    np.testing.assert_array_equal(np.asarray(halves).view(np.uint32), centred(words, bits))
