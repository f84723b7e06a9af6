"""The Triton kernels on a GPU: every dialect, any load, the same bits at every run."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_jax.sampling_stages import _keep_portably, keep_top_k, keep_top_p
from ferrum_kernels import gptq_matmul, tile, triton, triton_norm
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


def test_the_filters_of_sampling_keep_what_the_portable_ones_keep():
    logits = 3 * jax.random.normal(jax.random.key(0), (5, 151_936))
    logits = logits.at[0, 100:180].set(40.0).at[1].set(0.25).at[2, ::3].set(-jnp.inf)
    for keep, limits, weights in (
        (keep_top_k, jnp.array([30, 700, 20, 1, 50_000], jnp.int32), jnp.ones_like(logits)),
        (keep_top_p, jnp.array([0.3, 0.5, 0.9, 0.01, 0.999]), jax.nn.softmax(logits, axis=-1)),
    ):
        poison(logits.shape)
        found = keep(logits, limits)
        np.testing.assert_array_equal(found, keep(logits, limits))
        expected = _keep_portably(logits, weights, limits.astype(jnp.float32))
        # Sums of float32 in another order may put the cut of a wide set a token away.
        assert (jnp.abs((found > -jnp.inf).sum(-1) - (expected > -jnp.inf).sum(-1)) <= 2).all()
        assert (found[0] == expected[0]).all() and (found[3] == expected[3]).all()


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 16, 40, 300])
def test_sums_norms_and_router_logits(tokens):
    rng = np.random.default_rng()
    x, weight, router = (
        jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((tokens, 2048), (3, 2048), (3, 128, 2048))
    )
    y = jnp.asarray(rng.standard_normal((tokens, 2048)), jnp.bfloat16)
    poison((tokens, 2048), (tokens, 2048), (tokens, 128))
    total, norm, logits = triton_norm.add_norm_route(x, y, weight, router, jnp.int32(2), 1e-6, False)
    exact = np.asarray(total, np.float64)
    np.testing.assert_array_equal(total, (x.astype(jnp.float32) + y.astype(jnp.float32)).astype(x.dtype))
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(weight[2], np.float64)
    assert relative(norm, exact) < ONE_ROUNDING
    assert relative(logits, np.asarray(norm, np.float64) @ np.asarray(router[2], np.float64).T) < 1e-5


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 16])
@pytest.mark.parametrize(("k", "n"), [(2048, 5120), (4096, 2048), (768, 320)])
def test_products_of_few_rows(rows, k, n):
    w, dense = make_linear(3, k=k, n=n, bits=4, group_size=128, sym=True)
    tiled = jax.tree.map(lambda leaf: jnp.stack([jnp.zeros_like(leaf), leaf]), tile(w))
    x = jnp.asarray(np.random.default_rng().standard_normal((rows, k)), jnp.bfloat16)
    poison((rows, n))
    y = gptq_matmul(x, tiled, layer=jnp.int32(1), implementation="triton")
    assert relative(y, np.asarray(x, np.float64) @ dense) < ONE_ROUNDING
