"""The expert stack as functions: batches of products in any order and overlap, and one expert's columns."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrum_kernels import batched_expert_matmul, dequantize, expert_linear, expert_stack, gptq_matmul
from ferrum_kernels.errors import BackendError, ShapeError
from tests.support.close import assert_close, normal
from tests.support.gptq_cases import make_stack
from tests.support.implementations import EXACT

E, M_IN, M_OUT = 3, 6, 7
STACK, DENSE = make_stack(0, E, act_order=True)
X, OUT = normal(0, M_IN, 37), normal(1, M_OUT, 27)


@st.composite
def dispatches(draw):
    m = draw(st.integers(0, M_IN))
    return draw(st.integers(0, E - 1)), draw(st.integers(0, M_IN - m)), draw(st.integers(0, M_OUT - m)), m


def one_after_another(batch) -> np.ndarray:
    out = OUT.copy()
    for e, in_row, out_row, m in batch:
        out[out_row : out_row + m] = X[in_row : in_row + m] @ DENSE[e]
    return out


@pytest.mark.parametrize("implementation", EXACT)
@given(batch=st.lists(dispatches(), max_size=5))
def test_a_batch_equals_its_products_one_after_another(implementation, batch):
    y = batched_expert_matmul(X, STACK, batch, jnp.asarray(OUT), implementation=implementation)
    assert_close(y, one_after_another(batch))


def test_the_result_has_the_dtype_of_out_which_is_not_changed():
    out = jnp.asarray(OUT, jnp.bfloat16)
    y = batched_expert_matmul(X, STACK, [(1, 0, 2, 3)], out)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y[:2], out[:2])
    np.testing.assert_array_equal(out, jnp.asarray(OUT, jnp.bfloat16))


def test_an_empty_batch_gives_out_back():
    np.testing.assert_array_equal(batched_expert_matmul(X, STACK, [], jnp.asarray(OUT)), OUT)


def test_new_dispatches_compile_nothing(monkeypatch):
    traces = []
    original = expert_stack.dispatch
    monkeypatch.setattr(expert_stack, "dispatch", lambda *args: (traces.append(args), original(*args))[1])
    x, out = X[:4], OUT[:5]  # shapes that no other test uses
    batched_expert_matmul(x, STACK, [(1, 0, 2, 3)], out)
    batched_expert_matmul(x, STACK, [(2, 3, 0, 1), (0, 0, 1, 4)], out)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([(3, 0, 0, 1)], r"dispatch names expert 3; the stack has experts 0 to 2\."),
        ([(0, 0, 0, 1), (-1, 0, 0, 1)], r"dispatch names expert -1; the stack has experts 0 to 2\."),
        ([(0, 4, 0, 3)], r"dispatch covers input rows \[4, 7\); there are rows \[0, 6\)\."),
        ([(0, -1, 0, 1)], r"dispatch covers input rows \[-1, 0\); there are rows \[0, 6\)\."),
        ([(0, 0, 0, -1)], r"dispatch covers input rows \[0, -1\); there are rows \[0, 6\)\."),
        ([(0, 0, 5, 3)], r"dispatch covers output rows \[5, 8\); there are rows \[0, 7\)\."),
    ],
)
def test_a_dispatch_outside_the_stack_or_the_rows_is_refused(batch, message):
    with pytest.raises(ShapeError, match=message):
        batched_expert_matmul(X, STACK, batch, OUT)


def test_another_k_or_n_is_refused():
    with pytest.raises(
        ShapeError, match=r"x is \[6, 36\]; the stack multiplies rows of K=37, so x must be \[M, 37\]\."
    ):
        batched_expert_matmul(X[:, :36], STACK, [], OUT)
    with pytest.raises(ShapeError, match=r"x is \[37\]; the stack multiplies rows of K=37, so x must be \[M, 37\]\."):
        batched_expert_matmul(X[0], STACK, [], OUT)
    with pytest.raises(
        ShapeError, match=r"out is \[7, 26\]; the stack gives rows of N=27, so out must be \[M', 27\]\."
    ):
        batched_expert_matmul(X, STACK, [], OUT[:, :26])


def test_implementation_is_handed_on():
    with pytest.raises(BackendError, match=r"implementation='cutlass' is unknown"):
        batched_expert_matmul(X, STACK, [(0, 0, 0, 1)], OUT, implementation="cutlass")
    y = batched_expert_matmul(X, STACK, [(0, 0, 0, 1)], OUT, implementation=["reference", "xla"])
    assert_close(y, one_after_another([(0, 0, 0, 1)]))


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", [3, 4])
def test_any_columns_of_one_expert_are_a_linear_layer(bits, sym):
    made, dense = make_stack(1, 2, bits=bits, sym=sym, act_order=True)
    stack = jax.tree.map(np.asarray, made)  # slicing runs on the host too
    for start, size in ((0, None), (5, 9), (20, None), (26, 1)):
        one = expert_linear(stack, 1, start, size)
        stop = 27 if size is None else start + size
        assert one.lead == () and one.shape == (37, stop - start)
        np.testing.assert_array_equal(jax.jit(dequantize)(one), dense[1][:, start:stop])


def test_a_column_slice_takes_a_bias():
    bias = normal(2, 9)
    one = expert_linear(jax.tree.map(np.asarray, STACK), 2, 5, 9, bias=bias)
    assert_close(jax.jit(gptq_matmul)(X, one), X @ DENSE[2][:, 5:14] + bias)


def test_a_view_outside_the_stack_is_refused():
    with pytest.raises(ShapeError, match=r"expert 3 is unknown; the stack has experts 0 to 2\."):
        expert_linear(STACK, 3)
    with pytest.raises(ShapeError, match=r"expert -1 is unknown; the stack has experts 0 to 2\."):
        expert_linear(STACK, -1)
    with pytest.raises(ShapeError, match=r"columns \[20, 28\) are outside this weight, which has 27 output columns"):
        expert_linear(STACK, 0, 20, 8)
    with pytest.raises(ShapeError, match=r"columns \[27, 27\) are outside this weight"):
        expert_linear(STACK, 0, 27)
    with pytest.raises(ShapeError, match=r"bias has 3 entries; the slice has 9 columns and needs as many\."):
        expert_linear(STACK, 0, 5, 9, bias=np.zeros(3, np.float32))
    with pytest.raises(ShapeError, match=r"is a single matrix; num_experts needs a stack with a leading axis\."):
        expert_linear(STACK[0], 0)
