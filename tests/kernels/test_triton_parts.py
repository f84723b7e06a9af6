"""Products cut along their inputs, and who adds the parts up: interpreted on the CPU, against plain numpy."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_jax.layers import add_norm, linear, linear_parts
from ferrum_jax.moe import add_norm_route
from ferrum_kernels import tile, triton, triton_parts
from ferrum_kernels.triton_rows import Cut, product
from ferrum_kernels.triton_tiles import part_cut
from tests.support.gptq_cases import make_linear
from tests.support.tiny import tiny_config
from tests.support.triton_cases import ignore_deprecation, lower_for_cuda, normal, relative

pytestmark = [
    ignore_deprecation,
    pytest.mark.skipif(jax.__version_info__ < (0, 10, 2), reason="the Triton kernels need jax 0.10.2"),
]
CFG = tiny_config(dtype="bfloat16", implementation="triton")
ROWS, K, N = 21, 1024, 128


@pytest.fixture(autouse=True)
def on_the_cpu():
    with triton.interpreted():
        yield


def layers_of(**dialect):
    """A stack of two weights, of which the first is zero, and the dense second."""
    w, dense = make_linear(0, **{"k": K, "n": N, "bits": 4, "group_size": 128, "sym": True, **dialect})
    return jax.tree.map(lambda leaf: jnp.stack([jnp.zeros_like(leaf), leaf]), tile(w)), dense


@pytest.mark.parametrize(
    ("cut", "dialect"),
    [
        (Cut(64, 1, 4, 3, rows=16, parts=2, merge=True), (4, 128, True)),
        (Cut(32, 1, 4, 3, rows=32, parts=3), (4, 32, False)),  # parts of two and three blocks
        (Cut(64, 1, 4, 3, rows=8, parts=4, step=2, merge=True), (8, 64, True)),
        (Cut(16, 2, 4, 3, rows=16, parts=2), (4, -1, False)),
        (Cut(16, 2, 4, 3, rows=16, parts=2), (4, 64, False)),
    ],
    ids=str,
)
def test_a_product_however_it_is_cut(cut, dialect):
    bits, group_size, sym = dialect
    stack, dense = layers_of(bits=bits, group_size=group_size, sym=sym, n=64)
    x = jnp.asarray(normal(1, ROWS, K), jnp.bfloat16)
    y = product(x, stack, 1, cut, jnp.float32, True)
    assert y.shape == (cut.parts, ROWS, 64)
    blocks = np.cumsum(np.asarray(x, np.float64)[:, :, None] * dense, axis=1)  # sums of the first inputs
    assert relative(y.sum(0), blocks[:, -1]) < 1e-5
    assert not any(np.array_equal(y[0], part) for part in y[1:])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("act_order", [False, True])
def test_the_parts_of_a_layer_and_their_sum(dtype, act_order):
    stack, dense = layers_of(act_order=act_order)
    cfg = dataclasses.replace(CFG, dtype=dtype)
    x, stream = (jnp.asarray(normal(i, 3, 7, size), dtype) for i, size in ((1, K), (2, N)))
    parts = linear_parts(x, stack, cfg, layer=jnp.int32(1))
    assert parts.dtype == jnp.float32 and parts.shape == (triton_parts.count(x, stack), 3, 7, N)
    assert relative(parts.sum(0), np.asarray(x, np.float64) @ dense) < 1e-5
    weight, router = jnp.asarray(normal(3, 2, N), dtype), jnp.asarray(normal(4, 2, 8, N), dtype)
    whole = parts.sum(0)
    few = slice(0, 1)  # rows of the kernel that gives logits too
    for rows in (few, slice(None)):
        total, norm, logits, _ = add_norm_route(stream[rows], parts[:, rows], weight, router, cfg, 1)
        np.testing.assert_array_equal(total, (stream[rows].astype(jnp.float32) + whole[rows]).astype(dtype))
        again = add_norm(stream[rows], parts[:, rows], weight, cfg, 1)
        np.testing.assert_array_equal(again[0], total)
        np.testing.assert_array_equal(again[1], norm)
        assert logits is not None
        logits = logits.reshape(-1, *norm.shape[:-1], 8).sum(0)
        assert relative(logits, np.asarray(norm, np.float64) @ np.asarray(router[1], np.float64).T) < 1e-6


def test_a_derivative_goes_through_parts():
    stack, _ = layers_of()
    x, stream = (jnp.asarray(normal(i, 5, size), jnp.bfloat16) for i, size in ((1, K), (2, N)))
    weight = jnp.ones((2, N), jnp.bfloat16)

    def total(x, multiply):
        y = multiply(x, stack, CFG, layer=jnp.int32(1))
        return add_norm(stream, y, weight, CFG, jnp.int32(1))[0].astype(jnp.float32).sum()

    found, expected = (jax.grad(total)(x, multiply) for multiply in (linear_parts, linear))
    assert relative(found, np.asarray(expected, np.float64)) < 1e-2


def test_what_is_not_cut_into_parts():
    stack, _ = layers_of()
    x = jnp.asarray(normal(1, 5, K), jnp.bfloat16)
    assert triton_parts.count(x, stack) > 1
    biased = dataclasses.replace(stack, bias=jnp.zeros((2, N), jnp.float16))
    padded, _ = layers_of(n=48)
    for rows, w in ((x, biased), (x, padded), (x[:0], stack), (x.astype(jnp.float32), stack), (x, jnp.zeros((K, N)))):
        assert triton_parts.count(rows, w) == 1
    assert triton_parts.count(jnp.zeros((4096, K), jnp.bfloat16), stack) == 1
    assert linear_parts(x, padded, CFG, layer=1).shape == (5, 48)
    assert linear_parts(x, stack, CFG, jnp.ones(N), layer=1).shape == (5, N)
    with pytest.raises(ValueError, match=r"a product of 4096 rows is not cut into parts; count\(x, w\) says so\."):
        triton_parts.product(jnp.zeros((4096, K), jnp.bfloat16), stack, 1)


def test_parts_are_enough_programs_and_none_is_too_short():
    """The output product of Qwen3-30B-A3B; a matrix so wide that it needs none; and one with too few inputs."""
    stack, _ = layers_of()

    def cut_of(rows: int, k: int, n: int) -> Cut | None:
        words, scales = jnp.zeros((1, k // 128, n, 1), jnp.uint16), stack.scales
        return part_cut(rows, dataclasses.replace(stack, words=words, scales=scales, shape=(k, n)))

    for rows in (8, 16, 64, 128):
        cut = cut_of(rows, 4096, 2048)
        assert cut and 132 <= 2048 // cut.n * -(-rows // (cut.rows or 1)) * cut.parts <= 512
        assert cut_of(rows, 1024, 64 * 1024) is None and cut_of(rows, 256, 2048) is None
    assert cut_of(4096, 4096, 2048) is None


@pytest.mark.parametrize("rows", [8, 64])
def test_a_product_and_its_sum_are_two_kernels_and_nothing_else(rows):
    stack, _ = layers_of()

    def run(x, stream, stack, weight, layer):
        with triton.interpreted(False):
            y = triton_parts.product(x, stack, layer)
            return add_norm(stream, y, weight, CFG, layer)

    args = (jax.ShapeDtypeStruct((rows, size), jnp.bfloat16) for size in (K, N))
    text = lower_for_cuda(run, *args, stack, jax.ShapeDtypeStruct((2, N), jnp.bfloat16), jnp.int32(1))
    assert text.count("stablehlo.custom_call") == 2
    assert "stablehlo.reduce" not in text and "stablehlo.add" not in text
