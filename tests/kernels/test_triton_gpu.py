"""The Triton kernels on a GPU: every dialect, any load, the same bits at every run."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_kernels import gptq_matmul, tile, triton
from tests.support.gptq_cases import make_linear, make_stack
from tests.support.triton_cases import expert_layer, ignore_deprecation, relative

pytestmark = [pytest.mark.gpu, ignore_deprecation]
ONE_ROUNDING, TWO_ROUNDINGS = 2e-3, 2.9e-3
E, K = 16, 4


def poison(*shapes: tuple[int, ...]) -> None:
    """Leave NaN in the memory that the next outputs are likely to get."""
    for shape in shapes:
        jax.block_until_ready(jnp.full(shape, jnp.nan, jnp.float32)).delete()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("group_size", "sym", "act_order"), [(128, True, False), (32, False, True), (-1, False, False)]
)
def test_products_of_a_dialect(bits, group_size, sym, act_order, dtype):
    w, dense = make_linear(1, k=512, n=192, bits=bits, group_size=group_size, sym=sym, act_order=act_order)
    tiled = tile(w)
    rng = np.random.default_rng()
    for rows in (1, 33):
        x = jnp.asarray(rng.standard_normal((rows, 512)), dtype)
        poison((rows, 192))
        y = gptq_matmul(x, tiled, implementation="triton")
        assert relative(y, np.asarray(x, np.float64) @ dense) < ONE_ROUNDING
        assert (y == gptq_matmul(x, tiled, implementation="triton")).all()


@functools.cache
def layer_of(bits: int, group_size: int, sym: bool):
    up, dense_up = make_stack(1, E, k=512, n=512, bits=bits, group_size=group_size, sym=sym)
    down, dense_down = make_stack(2, E, k=256, n=512, bits=bits, group_size=group_size, sym=sym)
    stacks = jax.tree.map(lambda leaf: jnp.stack([jnp.zeros_like(leaf), leaf]), (tile(up), tile(down)))
    return stacks, dense_up, dense_down


@pytest.mark.parametrize("tokens", [1, 2, 12, 40, 96, 600])  # every row of the table of tiles
@pytest.mark.parametrize("load", ["random", "one expert"])
def test_a_layer(tokens, load):
    stacks, dense_up, dense_down = layer_of(4, 128, True)
    check_layer(stacks, dense_up, dense_down, tokens, load)


@pytest.mark.parametrize(("bits", "group_size", "sym"), [(8, 128, True), (4, 32, False), (8, 64, False), (4, -1, True)])
def test_a_layer_of_another_dialect(bits, group_size, sym):
    check_layer(*layer_of(bits, group_size, sym), 40, "random")


def check_layer(stacks, dense_up, dense_down, tokens, load):
    rng = np.random.default_rng()
    x = jnp.asarray(rng.standard_normal((tokens, 512)), jnp.bfloat16)
    logits = jnp.asarray(rng.standard_normal((tokens, E)) + (np.arange(E) < K) * (100 if load == "one expert" else 0))

    @jax.jit
    def run(x, logits, stacks):
        ids, weights, live, counts = triton.route(logits, None, K, True)
        return ids, weights, triton.experts(x, live, weights, counts, stacks[0], stacks[1], 1)

    poison((tokens * K, 256), (tokens * K, 512))
    ids, weights, y = run(x, logits, stacks)
    some = np.random.default_rng(0).permutation(tokens)[:40]
    picked = np.asarray(x)[some], np.asarray(ids)[some], np.asarray(weights)[some]
    assert relative(np.asarray(y)[some], expert_layer(*picked, dense_up, dense_down)) < TWO_ROUNDINGS
    assert np.isfinite(np.asarray(y, np.float32)).all()
    assert (run(x, logits, stacks)[2] == y).all()
