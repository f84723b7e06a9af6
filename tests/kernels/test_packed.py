"""PackedLinear as a pytree: indexing, column slices, and what its checks say."""

from __future__ import annotations

import dataclasses
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_kernels import PackedLinear, dequantize, is_packed, slice_columns
from ferrum_kernels.errors import ShapeError
from ferrum_kernels.packed import check_packed
from tests.support.gptq_cases import make_linear, make_stack


def test_it_is_a_pytree_with_static_sizes():
    w, _ = make_linear(0, act_order=True)
    again = jax.tree.map(lambda leaf: leaf, w)
    chex.assert_trees_all_equal(again, w)
    assert (again.bits, again.group_size, again.shape) == (4, 16, (37, 27))
    assert len(jax.tree.leaves(w)) == 4
    assert w.nbytes == 4 * 5 * 27 + 2 * 3 * 27 + 4 * 3 * 4 + 4 * 37
    chex.assert_trees_all_equal(pickle.loads(pickle.dumps(w)), w)


def test_indexing_takes_an_expert_by_number_slice_or_traced_scalar():
    stack, dense = make_stack(0, 3, act_order=True)
    assert (stack.num_experts, stack.lead, stack[1].lead, stack[1:].num_experts) == (3, (3,), (), 2)
    np.testing.assert_array_equal(dequantize(stack[1:]), dense[1:])
    traced = jax.jit(lambda w, i: dequantize(w[i]))(stack, 2)
    np.testing.assert_array_equal(traced, dense[2])


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_dequantize_is_exact_under_leading_axes(bits, sym, act_order):
    stack, dense = make_stack(bits, 2, bits=bits, sym=sym, act_order=act_order)
    np.testing.assert_array_equal(jax.jit(dequantize)(stack), dense)


def test_dequantize_rounds_once_to_the_dtype_asked_for():
    w, dense = make_linear(0)
    y = dequantize(w, jnp.bfloat16)
    np.testing.assert_array_equal(y, jnp.asarray(dense).astype(jnp.bfloat16))


def test_dequantize_only_casts_a_plain_array():
    tree = {"packed": make_linear(0)[0], "plain": jnp.ones((2, 3), jnp.bfloat16)}
    dense = jax.tree.map(dequantize, tree, is_leaf=is_packed)
    assert {name: (leaf.shape, leaf.dtype.name) for name, leaf in dense.items()} == {
        "packed": ((37, 27), "float32"),
        "plain": ((2, 3), "float32"),
    }


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize(("start", "size"), [(0, 27), (0, 8), (5, 9), (26, 1)])
def test_a_column_slice_stands_for_the_columns(bits, start, size):
    made, dense = make_stack(1, 2, bits=bits, act_order=True)
    part = slice_columns(jax.tree.map(np.asarray, made), start, size)  # on the host
    check_packed(part)
    assert part.shape == (37, size)
    np.testing.assert_array_equal(jax.jit(dequantize)(part), dense[..., start : start + size])


def test_a_column_slice_can_be_traced():
    w, dense = make_linear(1, bits=3)
    part = jax.jit(lambda w: dequantize(slice_columns(w, 5, 9)))(w)
    np.testing.assert_array_equal(part, dense[:, 5:14])


def test_a_column_slice_keeps_its_part_of_the_bias_or_takes_another():
    w = dataclasses.replace(make_linear(0)[0], bias=jnp.arange(27.0))
    assert slice_columns(w, 3, 2).bias.tolist() == [3.0, 4.0]
    assert slice_columns(w, 3, 2, bias=jnp.ones(2)).bias.tolist() == [1.0, 1.0]
    assert slice_columns(make_linear(0)[0], 3, 2).bias is None


@pytest.mark.parametrize(("start", "size"), [(-1, 2), (0, 28), (27, 1), (3, 0)])
def test_a_slice_outside_the_columns_is_refused(start, size):
    message = (
        rf"columns \[{start}, {start + size}\) are outside this weight, which has 27 output columns; start must be"
    )
    with pytest.raises(ShapeError, match=message):
        slice_columns(make_linear(0)[0], start, size)


def test_a_bias_of_another_length_is_refused():
    with pytest.raises(ShapeError, match=r"bias has 3 entries; the slice has 2 columns and needs as many\."):
        slice_columns(make_linear(0)[0], 0, 2, bias=jnp.zeros(3))


def test_a_single_matrix_has_no_experts():
    w, _ = make_linear(0)
    with pytest.raises(ShapeError, match=r"is a single matrix; num_experts needs a stack with a leading axis\."):
        w.num_experts  # noqa: B018
    with pytest.raises(ShapeError, match=r"is a single matrix and has no leading axis to index\."):
        w[0]


def with_bias(w: PackedLinear) -> PackedLinear:
    return dataclasses.replace(w, bias=jnp.zeros(27))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, r"bits=5 is not a GPTQ width; accepted are 2, 3, 4 and 8\."),
        ({"group_size": 0}, r"needs positive sizes; got shape=\(37, 27\) and group_size=0\."),
        ({"shape": (37, 0)}, r"needs positive sizes; got shape=\(37, 0\) and group_size=16\."),
        (
            {"shape": (36, 28)},
            r"qweight of this 4-bit PackedLinear with shape=\(36, 28\) and group_size=16 is uint32\[5, 27\]; "
            r"expected uint32\[5, 28\]\.",
        ),
        ({"qweight": np.zeros((5, 27), np.int32)}, r"qweight of .* is int32\[5, 27\]; expected uint32\[5, 27\]\."),
        ({"scales": np.ones((3, 26))}, r"scales of .* is float64\[3, 26\]; expected a float array\[3, 27\]\."),
        (
            {"scales": np.ones((3, 27), int)},
            r"scales is int64; expected a floating dtype \(float16 as the file holds it\)",
        ),
        ({"qzeros": np.zeros((3, 3), np.uint32)}, r"qzeros of .* is uint32\[3, 3\]; expected uint32\[3, 4\]\."),
        ({"perm": np.arange(36, dtype=np.int32)}, r"perm of .* is int32\[36\]; expected int32\[37\]\."),
        ({"perm": np.arange(37)}, r"perm of .* is int64\[37\]; expected int32\[37\]\."),
        ({"bias": np.zeros(26, np.float32)}, r"bias of .* is float32\[26\]; expected a float array\[27\]\."),
        ({"bias": np.zeros(27, np.int32)}, r"bias is int32; expected a floating dtype"),
    ],
)
def test_arrays_that_do_not_fit_the_static_fields_are_refused(changes, message):
    w = with_bias(make_linear(0, act_order=True)[0])
    check_packed(w)
    with pytest.raises(ShapeError, match=message):
        check_packed(dataclasses.replace(w, **changes))


def test_the_check_works_on_abstract_and_traced_weights():
    w = with_bias(make_linear(0)[0])
    check_packed(jax.eval_shape(lambda: w))
    wrong = dataclasses.replace(w, group_size=37)
    with pytest.raises(ShapeError, match=r"scales of .* is float16\[3, 27\]; expected a float array\[1, 27\]"):
        jax.eval_shape(dequantize, wrong)
