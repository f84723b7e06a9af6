"""Reading and writing GPTQ tensors: every dialect, bit for bit, against weights whose codes are known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_kernels import GptqTensors, dequantize, from_gptq, to_gptq
from ferrum_kernels.bits import unpack
from ferrum_kernels.errors import ShapeError
from ferrum_kernels.gptq_format import decode_zeros, encode_zeros, input_order
from tests.support import numpy_reader
from tests.support.checkpoint_writer import pack_fields
from tests.support.gptq_cases import VERSIONS, make_case

# (K, N, group): words not filled, odd last group, one group, whole words, groups of one
SIZES = [(37, 27, 16), (45, 33, -1), (96, 64, 32), (9, 5, 1)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_round_trip_is_bit_exact(bits, version, sym, act_order, size):
    k, n, group_size = size
    case = make_case(bits, k, n, bits=bits, group_size=group_size, sym=sym, act_order=act_order)
    tensors = case.tensors(version)
    w = from_gptq(tensors, bits, group_size, version)
    assert w.shape == (k, n)
    assert (w.qzeros is None) == sym
    assert (w.perm is None) == bool((case.g_idx == np.sort(case.g_idx)).all())
    written = to_gptq(w, version)
    for field in ("qweight", "qzeros", "scales", "g_idx"):
        before, after = getattr(tensors, field), getattr(written, field)
        assert after.dtype == before.dtype, field
        np.testing.assert_array_equal(after, before, err_msg=field)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_is_read_stands_for_the_weight_that_was_written(bits, version, act_order):
    case = make_case(bits, bits=bits, act_order=act_order)
    tensors = case.tensors(version)
    w = from_gptq(tensors, bits, 16, version)
    np.testing.assert_array_equal(np.asarray(dequantize(w)), case.dense())
    assert tensors.g_idx is not None
    second = numpy_reader.dequantize(tensors.qweight, tensors.qzeros, case.scales, tensors.g_idx, VERSIONS[version])
    np.testing.assert_array_equal(second, case.dense())


@given(st.sampled_from([2, 3, 4, 8]), st.sampled_from(sorted(VERSIONS)), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_any_zero_points_survive_storage(bits, version, n, seed):
    zeros = np.random.default_rng(seed).choice([0, 1, 2 ** (bits - 1), 2**bits - 1], (3, n))
    packed = pack_fields(zeros, bits).view(np.uint32)
    stored = encode_zeros(packed, bits, n, version)
    assert stored.dtype == np.int32
    np.testing.assert_array_equal(decode_zeros(stored, bits, n, version), packed)
    np.testing.assert_array_equal(numpy_reader.zero_points(stored, bits, n, VERSIONS[version]), zeros)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_zero_point_of_zero_borrows_across_the_word(bits):
    """Adding one to each field alone, masked, misreads the neighbour of every zero point of 0."""
    count = 32 // bits
    zeros = np.full((1, count), 2 ** (bits - 1))
    zeros[0, :3] = [0, 2**bits - 1, 0]
    stored = encode_zeros(pack_fields(zeros, bits).view(np.uint32), bits, count, "gptq")
    per_field = (numpy_reader.unpack_fields(stored, bits, count) + 1) % 2**bits
    assert (per_field != zeros).sum() >= 2
    decoded = decode_zeros(stored, bits, count, "gptq")
    np.testing.assert_array_equal(unpack(decoded, bits, count, axis=-1), zeros)


def test_three_bit_zero_points_wrap_field_by_field():
    zeros = np.array([[0, 7, 0, 1] * 8])
    stored = encode_zeros(pack_fields(zeros, 3).view(np.uint32), 3, 32, "gptq")
    np.testing.assert_array_equal(numpy_reader.unpack_fields(stored, 3, 32), (zeros + 7) % 8)
    np.testing.assert_array_equal(unpack(decode_zeros(stored, 3, 32, "gptq"), 3, 32, axis=-1), zeros)


def test_every_float16_scale_is_kept_subnormals_included():
    scales = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16)
    n = scales.size
    tensors = GptqTensors(
        qweight=np.full((1, n), 0x0F0F0F0F, np.int32),
        qzeros=np.full((1, -(-n // 8)), 0x77777777, np.int32),
        scales=scales[None],
    )
    w = from_gptq(tensors, 4, 8)
    assert w.scales.dtype == np.float16
    expected = scales.astype(np.float32)[None] * np.array([7, -8] * 4, np.float32)[:, None]
    assert (scales[: 2**10 - 1] < np.finfo(np.float16).tiny).all()
    np.testing.assert_array_equal(np.asarray(dequantize(w)), expected)


def test_inputs_are_sorted_by_group_and_keep_their_order_within_it():
    assert input_order(np.array([0, 0, 1, 1, 2]), 2) is None
    order = input_order(np.array([2, 1, 0, 1, 0]), 2)
    assert order is not None
    assert order.dtype == np.int32
    assert order.tolist() == [2, 4, 1, 3, 0]


def test_the_number_of_inputs_comes_from_g_idx_the_words_or_the_caller():
    tensors = make_case(0, 37, 8, sym=True).tensors()
    assert from_gptq(tensors, 4, 16).shape == (37, 8)
    without = dataclasses.replace(tensors, g_idx=None)
    assert from_gptq(without, 4, 16).shape == (40, 8)
    assert from_gptq(without, 4, 16, k=37).shape == (37, 8)


def test_optional_parts_can_be_demanded_or_dropped():
    tensors = make_case(0, sym=True).tensors()
    assert from_gptq(tensors, 4, 16).qzeros is None
    kept = from_gptq(tensors, 4, 16, sym=False, act_order=True)
    np.testing.assert_array_equal(unpack(kept.qzeros, 4, 27, axis=-1), np.full((3, 27), 8))
    np.testing.assert_array_equal(kept.perm, np.arange(37))
    with pytest.raises(ShapeError, match=r"zero points are not all 8, so this weight is not symmetric; use sym=None\."):
        from_gptq(make_case(0).tensors(), 4, 16, sym=True)


def test_a_bias_goes_through_both_ways():
    bias = np.arange(27, dtype=np.float16)
    w = from_gptq(dataclasses.replace(make_case(0).tensors(), bias=bias), 4, 16)
    np.testing.assert_array_equal(to_gptq(w).bias, bias)
    assert to_gptq(dataclasses.replace(w, bias=None)).bias is None


def test_an_unknown_version_is_refused_by_name():
    message = r"checkpoint_format 'marlin' is unknown; accepted are 'gptq' \(v1\) and 'gptq_v2'\."
    tensors = make_case(0).tensors()
    with pytest.raises(ShapeError, match=message):
        from_gptq(tensors, 4, 16, "marlin")
    with pytest.raises(ShapeError, match=message):
        to_gptq(from_gptq(tensors, 4, 16), "marlin")
    with pytest.raises(ShapeError, match=message):
        decode_zeros(tensors.qzeros, 4, 27, "marlin")


@pytest.mark.parametrize("group_size", [0, -2])
def test_a_group_size_that_is_no_size_is_refused(group_size):
    message = rf"group_size={group_size} is no size; accepted are 1 or more inputs, and -1 for one group\."
    with pytest.raises(ShapeError, match=message):
        from_gptq(make_case(0).tensors(), 4, group_size)


@pytest.mark.parametrize(
    ("g_idx", "message"),
    [
        ([0, 0, 1, 3], r"g_idx holds groups 0 to 3; K=4 with group_size=2 has 0 to 1\."),
        ([-1, 0, 1, 1], r"g_idx holds groups -1 to 1; K=4 with group_size=2 has 0 to 1\."),
        (
            [0, 1, 1, 1],
            r"g_idx puts 1 inputs into group 0; every group must have group_size=2 inputs \(the last one may have",
        ),
    ],
)
def test_groups_out_of_range_or_of_unequal_size_are_refused(g_idx, message):
    with pytest.raises(ShapeError, match=message):
        input_order(np.array(g_idx), 2)


def test_tensors_that_contradict_each_other_are_refused():
    tensors = make_case(0).tensors()

    def read(**changes):
        return from_gptq(dataclasses.replace(tensors, **changes), 4, 16)

    with pytest.raises(ShapeError, match=r"qweight has 4 rows of words; 37 inputs of 4 bits need 5\."):
        read(qweight=tensors.qweight[:4])
    with pytest.raises(
        ShapeError, match=r"3 words along axis -1 of \(3, 3\) cannot hold 27 codes of 4 bits; expected 4"
    ):
        read(qzeros=tensors.qzeros[:, :3])
    with pytest.raises(
        ShapeError, match=r"qzeros of this 4-bit PackedLinear .* is uint32\[2, 4\]; expected uint32\[3, 4\]"
    ):
        read(qzeros=tensors.qzeros[:2])
    with pytest.raises(ShapeError, match=r"scales of this .* is float16\[2, 27\]; expected a float array\[3, 27\]"):
        read(scales=tensors.scales[:2])
    with pytest.raises(ShapeError, match=r"bits=5 is not a GPTQ width; accepted are 2, 3, 4 and 8\."):
        from_gptq(tensors, 5, 16, k=32)


def test_a_stack_is_written_one_matrix_at_a_time():
    w = from_gptq(make_case(0).tensors(), 4, 16)
    stack = dataclasses.replace(
        w, **{field: np.stack([getattr(w, field)] * 2) for field in ("qweight", "scales", "qzeros")}
    )
    message = r"to_gptq takes one matrix, this PackedLinear has leading axes \(2,\); index it first\."
    with pytest.raises(ShapeError, match=message):
        to_gptq(stack)
    np.testing.assert_array_equal(to_gptq(stack[1]).qweight, make_case(0).tensors().qweight)
