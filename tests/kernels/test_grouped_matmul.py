"""grouped_gptq_matmul: one class for every implementation, against the dense product of each row in numpy."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_kernels import MixedStack, dispatch, from_blocks, grouped_gptq_matmul, to_blocks
from ferrum_kernels.apple import UNROLLED_BLOCKS
from ferrum_kernels.errors import BackendError
from tests.support.close import ROUNDING, assert_close, normal
from tests.support.gptq_cases import make_stack
from tests.support.implementations import EXACT, skip_refused

E, P = 4, 6
IDS = np.array([[3, 0], [0, 1], [3, 0]], np.int32)  # expert 2 has no row
ONE = np.full_like(IDS, 2)
SKIPPED = np.array([[3, 0], [E, E], [-1, 0]], np.int32)
NONE = np.full_like(IDS, E)


@functools.cache
def stack_of(bits: int = 4, sym: bool = False, act_order: bool = True):
    return make_stack(0, E, bits=bits, sym=sym, act_order=act_order)


@functools.partial(jax.jit, static_argnames=("implementation", "block", "out_dtype"))
def pair_products(x, stack, ids, implementation, block=2, layer=None, out_dtype=None):
    """One row of x per pair -> one row per pair."""
    plan = dispatch(ids, E, block)
    y = grouped_gptq_matmul(
        to_blocks(x, plan), stack, plan, layer=layer, implementation=implementation, out_dtype=out_dtype
    )
    return from_blocks(y, plan)


@functools.partial(jax.jit, static_argnames="implementation")
def sorted_products(x, stack, sizes, implementation):
    return grouped_gptq_matmul(x, stack, sizes, implementation=implementation)


def expected(x, dense, ids):
    live = [
        row @ dense[e] if 0 <= e < E else np.zeros(dense.shape[-1]) for row, e in zip(x, ids.reshape(-1), strict=True)
    ]
    return np.stack(live)


def mixed_stack():
    """Experts 2 and 0 in 4 bits with act-order, 3 in 8 bits, 1 not quantised."""
    (four, a), (eight, b) = make_stack(1, 2, bits=4, act_order=True), make_stack(2, 1, bits=8)
    plain = normal(3, 1, 37, 27) / 6
    dense = np.stack([a[1], plain[0], a[0], b[0]])
    return MixedStack((four, jnp.asarray(plain), eight), ((2, 0), (1,), (3,))), dense


@pytest.mark.parametrize("implementation", EXACT)
class TestGroupedMatmul:
    @pytest.mark.parametrize(
        ("bits", "sym", "act_order"), [(2, False, False), (3, False, True), (4, True, False), (8, False, True)]
    )
    def test_each_row_is_multiplied_by_its_expert(self, implementation, bits, sym, act_order):
        skip_refused(implementation, bits)
        stack, dense = stack_of(bits, sym, act_order)
        x = normal(0, P, 37)
        assert_close(pair_products(x, stack, IDS, implementation), expected(x, dense, IDS))

    @pytest.mark.parametrize("ids", [IDS, ONE, SKIPPED, NONE], ids=["some", "one", "skipped", "none"])
    @pytest.mark.parametrize("block", [2, 4])
    def test_any_load_and_any_block_size(self, implementation, ids, block):
        stack, dense = stack_of()
        x = normal(0, P, 37)
        assert_close(pair_products(x, stack, ids, implementation, block), expected(x, dense, ids))

    def test_more_blocks_than_a_plugin_unrolls(self, implementation):
        stack, dense = stack_of()
        ids = np.random.default_rng(0).integers(-1, E + 1, UNROLLED_BLOCKS + 2).astype(np.int32)
        x = normal(0, ids.size, 37)
        assert_close(pair_products(x, stack, ids, implementation, 1), expected(x, dense, ids))

    @pytest.mark.parametrize("sizes", [[2, 0, 1, 3], [0, 0, 6, 0], [1, 2, 0, 1], [0, 0, 0, 0]], ids=str)
    def test_sorted_rows_with_group_sizes(self, implementation, sizes):
        stack, dense = stack_of()
        x = normal(0, P, 37)
        experts = np.append(np.repeat(np.arange(E), sizes), np.full(P - sum(sizes), E))
        assert_close(sorted_products(x, stack, np.array(sizes, np.int32), implementation), expected(x, dense, experts))

    def test_without_jit(self, implementation):
        stack, dense = stack_of()
        x, sizes = normal(0, P, 37), jnp.asarray([2, 0, 1, 3], jnp.int32)
        y = grouped_gptq_matmul(x, stack, sizes, implementation=implementation)
        assert_close(y, expected(x, dense, np.repeat(np.arange(E), sizes)))

    def test_a_stack_of_layers_is_indexed(self, implementation):
        made = [make_stack(seed, E, act_order=True) for seed in (0, 1)]
        stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(w for w, _ in made))
        x = normal(0, P, 37)
        for layer, (_, dense) in enumerate(made):
            y = pair_products(x, stack, IDS, implementation, layer=jnp.int32(layer))
            assert_close(y, expected(x, dense, IDS))

    def test_a_mixed_stack(self, implementation):
        stack, dense = mixed_stack()
        x = normal(0, P, 37)
        for ids in (IDS, ONE, SKIPPED):
            assert_close(pair_products(x, stack, ids, implementation), expected(x, dense, ids))

    def test_a_mixed_stack_of_layers(self, implementation):
        stack, dense = mixed_stack()
        layers = jax.tree.map(lambda leaf: jnp.stack([jnp.zeros_like(leaf), leaf]), stack)
        x = normal(0, P, 37)
        assert_close(pair_products(x, layers, IDS, implementation, layer=1), expected(x, dense, IDS))

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_a_plain_stack(self, implementation, dtype):
        stack = jnp.asarray(normal(1, E, 37, 27), dtype)
        x = normal(0, P, 37)
        assert_close(pair_products(x, stack, IDS, implementation), expected(x, np.asarray(stack, np.float32), IDS))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_sixteen_bit_activations_are_rounded_once(self, implementation, dtype):
        stack, dense = stack_of()
        x = jnp.asarray(normal(0, P, 37), dtype)
        y = pair_products(x, stack, IDS, implementation)
        assert y.dtype == dtype
        assert_close(y, expected(np.asarray(x, np.float32), dense, IDS), ROUNDING[dtype])

    def test_sums_can_be_kept_in_float32(self, implementation):
        stack, dense = stack_of()
        x = jnp.asarray(normal(0, P, 37), jnp.bfloat16)
        y = pair_products(x, stack, IDS, implementation, out_dtype=jnp.float32)
        assert y.dtype == jnp.float32
        assert_close(y, expected(np.asarray(x, np.float32), dense, IDS))

    def test_no_rows(self, implementation):
        stack, _ = stack_of()
        y = pair_products(jnp.zeros((0, 37)), stack, jnp.zeros((0, 2), jnp.int32), implementation)
        assert y.shape == (0, 27)

    def test_vmap_over_rows_and_experts(self, implementation):
        stack, dense = stack_of()
        x = normal(0, 2, P, 37)
        run = functools.partial(pair_products, implementation=implementation)
        both = np.stack([IDS, SKIPPED])
        y = jax.vmap(run, (0, None, 0))(x, stack, both)
        assert_close(y, np.stack([expected(x[i], dense, both[i]) for i in range(2)]))

    @pytest.mark.parametrize("kind", ["packed", "mixed"])
    def test_its_gradient_with_respect_to_x_is_the_dense_one(self, implementation, kind):
        stack, dense = {"packed": stack_of, "mixed": mixed_stack}[kind]()
        x, dy = normal(0, P, 37), normal(1, P, 27)
        _, pull = jax.vjp(lambda x: pair_products(x, stack, SKIPPED, implementation), x)
        assert_close(pull(dy)[0], expected(dy, dense.swapaxes(1, 2), SKIPPED))

    def test_gradients_of_a_batch(self, implementation):
        stack, dense = stack_of()
        x = normal(0, 2, P, 37)
        grad = jax.grad(lambda x: pair_products(x, stack, IDS, implementation).sum())
        ones = np.ones((P, 27), np.float32)
        assert_close(jax.vmap(grad)(x), np.stack([expected(ones, dense.swapaxes(1, 2), IDS)] * 2))

    @pytest.mark.parametrize("jit", [False, True])
    @pytest.mark.parametrize("kind", ["packed", "plain"])
    def test_the_gradient_of_a_weight_is_refused(self, implementation, kind, jit):
        packed, _ = stack_of()
        plan = dispatch(jnp.asarray(IDS), E, 2)

        def loss(weights):
            stack = dataclasses.replace(packed, scales=weights) if kind == "packed" else weights
            return grouped_gptq_matmul(jnp.ones((plan.num_rows, 37)), stack, plan, implementation=implementation).sum()

        weights = packed.scales if kind == "packed" else jnp.ones((E, 37, 27))
        message = (
            r"this product is differentiable with respect to activations only; a gradient of the packed weights was "
            r"asked for\. Differentiate a dense copy instead: dequantize\(weights\)\."
        )
        grad = jax.grad(loss)
        with pytest.raises(BackendError, match=message):
            (jax.jit(grad) if jit else grad)(weights)
