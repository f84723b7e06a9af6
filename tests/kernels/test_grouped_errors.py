"""Every sentence with which grouped_gptq_matmul and dispatch refuse an argument."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from ferrum_kernels import MixedStack, dispatch, grouped_gptq_matmul
from ferrum_kernels.errors import ShapeError
from tests.support.gptq_cases import make_linear, make_stack

E = 3
STACK, _ = make_stack(0, E)
PLAN = dispatch(jnp.zeros(4, jnp.int32), E, 2)
ROWS = jnp.zeros((PLAN.num_rows, 37))
SIZES = jnp.asarray([1, 2, 1], jnp.int32)


@pytest.mark.parametrize(
    ("stack", "layer", "message"),
    [
        (make_linear(0)[0], None, r"leading axes \(\); expected \[E\] without layer=, or \[L, E\] with layer=\."),
        (STACK, 0, r"leading axes \(3,\); expected \[E\] without layer=, or \[L, E\] with layer=\."),
        (jax.tree.map(lambda a: a[None], STACK), None, r"leading axes \(1, 3\); expected \[E\] without layer="),
        (jnp.zeros((2, 3, 37, 27)), None, r"leading axes \(2, 3\); expected \[E\] without layer="),
        (
            dataclasses.replace(STACK, bias=jnp.zeros((3, 27))),
            None,
            r"this expert stack has a bias; grouped_gptq_matmul adds none\. Take it off first\.",
        ),
        (
            dataclasses.replace(STACK, group_size=37),
            None,
            r"scales of this 4-bit PackedLinear .* is float16\[3, 3, 27\]; expected a float array\[3, 1, 27\]",
        ),
        (
            MixedStack((STACK[:2], jnp.zeros((1, 37, 26))), ((0, 1), (2,))),
            None,
            r"the parts of a mixed stack have shapes \(37, 27\) and \(37, 26\)\.",
        ),
    ],
)
def test_a_stack_of_another_form_is_refused(stack, layer, message):
    with pytest.raises(ShapeError, match=message):
        grouped_gptq_matmul(ROWS, stack, PLAN, layer=layer)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (ROWS[:, :36], r"x is float32\[6, 36\]; its last axis must be the expert stack's K=37\."),
        (ROWS.astype(jnp.int32), r"x is int32; activations are float32, bfloat16 or float16\. Cast it first\."),
        (ROWS[None], r"x is float32\[1, 6, 37\]; grouped_gptq_matmul takes rows \[R, K\]\. Fold leading axes\."),
        (ROWS[:5], r"the dispatch lays out 6 rows over 3 experts; x has 5 rows and the stack 3 experts\."),
    ],
)
def test_activations_that_do_not_fit_are_refused(x, message):
    with pytest.raises(ShapeError, match=message):
        grouped_gptq_matmul(x, STACK, PLAN)


def test_a_dispatch_over_other_experts_is_refused():
    message = r"the dispatch lays out 6 rows over 3 experts; x has 6 rows and the stack 2 experts\."
    with pytest.raises(ShapeError, match=message):
        grouped_gptq_matmul(ROWS, STACK[:2], PLAN)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (SIZES[:2], r"group sizes are int32\[2\]; expected int32\[3\]\."),
        (SIZES[None], r"group sizes are int32\[1, 3\]; expected int32\[3\]\."),
        (SIZES.astype(jnp.float32), r"group sizes are float32\[3\]; expected int32\[3\]\."),
        (SIZES + 1, r"group sizes sum to 7 with a smallest of 2; x has 6 rows\. They must be at least 0 and sum to at"),
        (SIZES - 2, r"group sizes sum to -2 with a smallest of -1; x has 6 rows\."),
    ],
)
def test_group_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ShapeError, match=message):
        grouped_gptq_matmul(ROWS, STACK, sizes)


def test_expert_ids_that_are_no_integers_are_refused():
    with pytest.raises(ShapeError, match=r"expert_ids is float32; expected int32 expert indices\."):
        dispatch(jnp.zeros(4), E)


def test_an_empty_block_is_refused():
    with pytest.raises(ShapeError, match=r"block=0; a block has at least one row\."):
        dispatch(jnp.zeros(4, jnp.int32), E, block=0)
