"""gptq_matmul: one class for every implementation, against the dense product in numpy."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_kernels import gptq_matmul
from ferrum_kernels.errors import ShapeError
from tests.support.close import ROUNDING, assert_close, normal
from tests.support.gptq_cases import make_linear
from tests.support.implementations import EXACT, skip_refused

FORMATS = [
    {"bits": 2, "sym": False, "act_order": False},
    {"bits": 3, "sym": False, "act_order": True},
    {"bits": 4, "sym": True, "act_order": False},
    {"bits": 4, "sym": False, "act_order": True, "group_size": -1},
    {"bits": 8, "sym": False, "act_order": True},
]


@pytest.mark.parametrize("implementation", EXACT)
class TestGptqMatmul:
    @pytest.mark.parametrize("form", FORMATS, ids=str)
    def test_it_is_the_dense_product(self, implementation, form):
        skip_refused(implementation, form["bits"])
        w, dense = make_linear(0, **form)
        x = normal(0, 5, 37)
        y = jax.jit(functools.partial(gptq_matmul, implementation=implementation))(x, w)
        assert y.dtype == jnp.float32
        assert_close(y, x @ dense)

    def test_without_jit(self, implementation):
        w, dense = make_linear(0, act_order=True)
        x = normal(0, 5, 37)
        assert_close(gptq_matmul(x, w, implementation=implementation), x @ dense)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_sixteen_bit_activations_are_rounded_once(self, implementation, dtype):
        w, dense = make_linear(0)
        x = jnp.asarray(normal(0, 5, 37), dtype)
        exact = np.asarray(x, np.float32) @ dense
        y = gptq_matmul(x, w, implementation=implementation)
        assert y.dtype == dtype
        assert_close(y, exact, ROUNDING[dtype])
        wide = gptq_matmul(x, w, implementation=implementation, out_dtype=jnp.float32)
        assert wide.dtype == jnp.float32
        assert_close(wide, exact)

    def test_a_bias_is_added(self, implementation):
        w, dense = make_linear(0)
        bias, x = normal(1, 27).astype(np.float16), normal(0, 5, 37)
        w = dataclasses.replace(w, bias=jnp.asarray(bias))
        y = gptq_matmul(x, w, implementation=implementation)
        assert_close(y, x @ dense + bias.astype(np.float32))

    @pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 3)])
    def test_leading_axes_are_free(self, implementation, lead):
        w, dense = make_linear(0)
        x = normal(0, *lead, 37)
        y = gptq_matmul(x, w, implementation=implementation)
        assert y.shape == (*lead, 27)
        assert_close(y, x @ dense)

    def test_it_works_under_vmap_over_rows_and_over_weights(self, implementation):
        (w, dense), (v, other) = make_linear(0, act_order=True), make_linear(1, act_order=True)
        multiply = functools.partial(gptq_matmul, implementation=implementation)
        x = normal(0, 2, 5, 37)
        assert_close(jax.jit(jax.vmap(multiply, (0, None)))(x, w), x @ dense)
        both = jax.tree.map(lambda *leaves: jnp.stack(leaves), w, v)
        assert_close(jax.jit(jax.vmap(multiply))(x, both), x @ np.stack([dense, other]))

    @pytest.mark.parametrize("act_order", [False, True])
    def test_its_gradient_with_respect_to_x_is_the_dense_one(self, implementation, act_order):
        w, dense = make_linear(0, act_order=act_order)
        x, dy = normal(0, 5, 37), normal(1, 5, 27)
        _, pull = jax.vjp(lambda x: gptq_matmul(x, w, implementation=implementation), x)
        assert_close(pull(dy)[0], dy @ dense.T)


W, _ = make_linear(0)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (jnp.zeros((5, 36)), r"x is float32\[5, 36\]; its last axis must be the weight's K=37\."),
        (jnp.zeros(()), r"x is float32\[\]; its last axis must be the weight's K=37\."),
        (jnp.zeros((5, 37), jnp.int32), r"x is int32; activations are float32, bfloat16 or float16\. Cast it first\."),
    ],
)
def test_activations_of_another_shape_or_dtype_are_refused(x, message):
    with pytest.raises(ShapeError, match=message):
        gptq_matmul(x, W)


def test_a_stack_is_refused():
    stack = jax.tree.map(lambda leaf: leaf[None], W)
    message = r"this PackedLinear has leading axes \(1,\); gptq_matmul takes one matrix, or a stack \[L\] with layer=\."
    with pytest.raises(ShapeError, match=message):
        gptq_matmul(jnp.zeros((5, 37)), stack)


def test_a_weight_whose_arrays_do_not_fit_is_refused():
    message = r"qweight of this 8-bit PackedLinear .* is uint32\[5, 27\]; expected uint32\[10, 27\]"
    with pytest.raises(ShapeError, match=message):
        gptq_matmul(jnp.zeros((5, 37)), dataclasses.replace(W, bits=8))
