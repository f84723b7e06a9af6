"""The Mosaic GPU kernels on a Hopper GPU: any load, no row unwritten, the same bits at every run."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_kernels import gptq_matmul, mosaic, mosaic_few, tile, triton, triton_place
from ferrum_kernels.blocks import max_blocks
from ferrum_kernels.mosaic_matmul import Ring
from tests.support.gptq_cases import make_stack
from tests.support.triton_cases import expert_layer, ignore_deprecation, relative

pytestmark = [
    pytest.mark.gpu,
    ignore_deprecation,
    pytest.mark.skipif(mosaic.unavailable() is not None, reason="not a Hopper GPU"),
]
# silu(gate) * up, each pair's output and their sum are rounded to bfloat16, 1.66e-3 each: 2.87e-3 for all three, which
# scatters with the few numbers that are compared.
ONE_ROUNDING, THREE_ROUNDINGS = 2e-3, 3.3e-3
E, K, WIDTH, FEATURES = 16, 4, 512, 256
SMALL = Ring((16, 32, 48, 64), stages=6)
NARROW = Ring((32, 64, 96, 128), parts=1)
FEW = Ring((8,), parts=1, stages=6, lag=3, warpgroups=4)
DEEP = Ring((8, 24), stages=9)
ALONE = Ring((8, 16, 24, 32), stages=5, alone=True)
SHARED = Ring((8, 16, 32), alone=True, shared=True)
ALONE_OF_ONE_PART = Ring((8, 16), parts=1, stages=3, warpgroups=4, alone=True)


@functools.cache
def layer(width=WIDTH, features=FEATURES):
    up, dense_up = make_stack(1, E, k=width, n=2 * features, bits=4, group_size=128, sym=True)
    down, dense_down = make_stack(2, E, k=features, n=width, bits=4, group_size=128, sym=True)
    return jax.tree.map(lambda a: jnp.stack([jnp.zeros_like(a), a]), (tile(up), tile(down))), dense_up, dense_down


@functools.partial(jax.jit, static_argnums=4)
def run(x, logits, mask, stacks, ring):
    _, weights, live, counts = triton.route(logits, mask, K, True)
    return live, weights, mosaic.run_experts(x, live, weights, counts, stacks[0], stacks[1], 1, ring, ring)


@pytest.mark.parametrize(
    ("tokens", "ring"),
    [
        *((77, Ring()), (77, SMALL), (77, NARROW), (600, Ring()), (7, FEW), (77, FEW), (77, DEEP)),
        *((7, ALONE), (77, ALONE), (77, ALONE_OF_ONE_PART), (7, SHARED), (77, SHARED), (600, SHARED)),
    ],
)
@pytest.mark.parametrize("load", ["random", "few experts", "one expert", "masked", "nobody"])
def test_a_layer(tokens, load, ring):
    check_layer(tokens, load, ring, WIDTH, FEATURES)


@pytest.mark.parametrize(
    ("tokens", "ring"),
    [(77, Ring()), (77, DEEP), (7, FEW), (77, FEW), (600, FEW), (600, ALONE), (77, ALONE_OF_ONE_PART)],
)
def test_the_smallest_layer_has_fewer_groups_than_a_ring_has_under_way(tokens, ring):
    check_layer(tokens, "random", ring, width=256, features=128)


# The rings of 16 to 256 tokens.
@pytest.mark.parametrize("tokens", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("load", ["random", "one expert"])
def test_the_rings_of_the_table(tokens, load):
    rings = mosaic.rings(8 * tokens, 128)
    assert rings is not None and rings[0] == rings[1]
    check_layer(tokens, load, rings[0], WIDTH, FEATURES)


def check_layer(tokens, load, ring, width, features):
    stacks, dense_up, dense_down = layer(width, features)
    rng = np.random.default_rng()
    x = jnp.asarray(rng.standard_normal((tokens, width)), jnp.bfloat16)
    bias = {"few experts": (np.arange(E) < 6) * 100, "one expert": (np.arange(E) < K) * 100}.get(load, 0)
    logits = jnp.asarray(rng.standard_normal((tokens, E)) + bias)
    mask = jnp.asarray(rng.random(tokens) < {"masked": 0.5, "nobody": 0}.get(load, 1))

    for shape in ((tokens * K + E * ring.block, features), (tokens * K, width)):
        jax.block_until_ready(jnp.full(shape, jnp.nan, jnp.bfloat16)).delete()
    live, weights, y = run(x, logits, mask, stacks, ring)
    some = np.random.default_rng(0).permutation(tokens)[:40]
    picked = np.asarray(x)[some], np.asarray(live)[some], np.asarray(weights)[some]
    expected = expert_layer(*picked, dense_up, dense_down)
    assert relative(np.asarray(y)[some], expected) < THREE_ROUNDINGS
    assert np.isfinite(np.asarray(y, np.float32)).all()
    assert (run(x, logits, mask, stacks, ring)[2] == y).all()


@pytest.mark.parametrize("tokens", [7, 77])
@pytest.mark.parametrize("ring", [ALONE, SHARED, ALONE_OF_ONE_PART])
def test_what_counts_tiles_is_zero_again_and_runs_are_alike(tokens, ring):
    (up, down), *_ = layer()
    rng = np.random.default_rng()
    x = jnp.asarray(rng.standard_normal((tokens, WIDTH)), jnp.bfloat16)
    _, _, live, counts = triton.route(jnp.asarray(rng.standard_normal((tokens, E))), None, K, True)
    blocks = max_blocks(tokens * K, E, ring.block)
    places = triton_place.place(live, counts, E, ring.columns, blocks, False)
    first, *others = (mosaic_few.experts(x, up, down, jnp.int32(1), places, K, tokens * K, ring) for _ in range(50))
    assert not places[-1].any()
    assert jnp.isfinite(first).all() and all((y == first).all() for y in others)


def test_layers_that_do_not_need_each_other_run_in_one_program():
    """XLA queues their kernels one after the other: side by side their programs would wait for each other for ever."""
    stacks, *_ = layer()
    rng = np.random.default_rng()
    xs = jnp.asarray(rng.standard_normal((8, 77, WIDTH)), jnp.bfloat16)
    logits = jnp.asarray(rng.standard_normal((8, 77, E)))
    together = jax.jit(lambda xs, logits: [run(*one, None, stacks, ALONE)[2] for one in zip(xs, logits, strict=True)])
    for _ in range(5):
        ys = together(xs, logits)
    for x, logit, y in zip(xs, logits, ys, strict=True):
        assert (run(x, logit, None, stacks, ALONE)[2] == y).all()


def test_tiles_shared_by_warpgroups_have_the_sums_of_those_that_are_not():
    (up, down), *_ = layer()
    rng = np.random.default_rng()
    x = jnp.asarray(rng.standard_normal((77, WIDTH)), jnp.bfloat16)
    live, weights = jnp.asarray(rng.integers(0, 2, (77, K)), jnp.int32), jnp.full((77, K), 1 / K)

    def y(ring):
        both = functools.partial(mosaic.run_experts, counts=None, gate_up=up, down=down, layer=1)
        return jax.jit(functools.partial(both, up_ring=ring, down_ring=ring))(x, live, weights)

    whole = np.asarray(y(dataclasses.replace(SHARED, shared=False)), np.float64)
    assert relative(y(SHARED), whole) < ONE_ROUNDING


@pytest.mark.parametrize("ring", [SMALL, ALONE, SHARED])
def test_vmap_over_layers_of_tokens(ring):
    stacks, dense_up, dense_down = layer()
    rng = np.random.default_rng()
    x = jnp.asarray(rng.standard_normal((3, 77, WIDTH)), jnp.bfloat16)
    logits = jnp.asarray(rng.standard_normal((3, 77, E)))
    batched = jax.vmap(lambda x, logits: run(x, logits, None, stacks, ring))
    live, weights, y = batched(x, logits)
    assert (batched(x, logits)[2] == y).all()
    for i in range(3):
        picked = np.asarray(x)[i, :40], np.asarray(live)[i, :40], np.asarray(weights)[i, :40]
        assert relative(y[i, :40], expert_layer(*picked, dense_up, dense_down)) < THREE_ROUNDINGS
        alone = run(x[i], logits[i], None, stacks, ring)[2]  # XLA may add a token's pairs up in another order
        assert relative(y[i], np.asarray(alone, np.float64)) < ONE_ROUNDING


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)], ids=["rows", "weights", "both"])
def test_vmap_over_products_with_one_matrix(axes):
    (_, down), _, dense = layer()
    dense, count = dense[:3], 3
    w = jax.tree.map(lambda a: a[1, :count] if axes[1] == 0 else a[1, 0], down)
    rng = np.random.default_rng()
    x = jnp.asarray(rng.standard_normal((*((count,) if axes[0] == 0 else ()), 600, FEATURES)), jnp.bfloat16)
    multiply = functools.partial(gptq_matmul, implementation="mosaic")
    y = jax.jit(jax.vmap(multiply, axes))(x, w)
    expected = np.asarray(x, np.float64) @ (dense if axes[1] == 0 else dense[0])
    assert y.shape == (count, 600, WIDTH)
    assert relative(y, expected) < ONE_ROUNDING


@pytest.fixture
def compiled_anew():
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", before)


@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.parametrize("tokens", [512, 1024, 4096])
def test_the_assembler_lets_products_run_while_others_are_decoded(tokens, capfd, monkeypatch):
    """With too few registers ptxas has every wgmma waited for, which shows in nothing but the time and its messages."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    how = mosaic.rings(8 * tokens, 128)
    assert how is not None
    stacks, *_ = layer()
    x, live = jnp.zeros((91, WIDTH), jnp.bfloat16), jnp.zeros((91, K), jnp.int32)
    weights = jnp.zeros(live.shape)

    def both(x, live, weights):
        return mosaic.run_experts(x, live, weights, None, stacks[0], stacks[1], 1, how[0], how[1])

    jax.jit(both).lower(x, live, weights).compile()
    said = "".join(capfd.readouterr())
    assert said.count("Compiling entry function") == 2
    assert not {code for code in ("C7510", "C7511", "C7512", "C7513", "C7517", "serialized") if code in said}


@pytest.mark.parametrize("ring", mosaic.MATRIX_RINGS)
@pytest.mark.parametrize("rows", [512, 1025])
def test_one_matrix(rows, ring, monkeypatch):
    (_, down), _, dense = layer()
    dense = dense[0]
    w = jax.tree.map(lambda a: a[:, 0], down)
    poisoned = type(w)(w.words, w.scales.at[0].set(jnp.nan), group_size=128, shape=w.shape)
    monkeypatch.setattr(mosaic, "MATRIX_RINGS", (ring,))
    x = jnp.asarray(np.random.default_rng().standard_normal((rows, FEATURES)), jnp.bfloat16)
    jax.block_until_ready(jnp.full((rows, WIDTH), jnp.nan, jnp.bfloat16)).delete()
    multiply = jax.jit(lambda x, w, layer: mosaic.gptq_matmul(x, w, layer, jnp.bfloat16))
    y = multiply(x, poisoned, 1)
    assert relative(y, np.asarray(x, np.float64) @ dense) < ONE_ROUNDING
    assert (multiply(x, poisoned, 1) == y).all()


@pytest.mark.parametrize("ring", [Ring(), ALONE])
def test_scales_of_any_size(ring):
    stacks, *_ = layer()
    up, down = jax.tree.map(lambda a: a[1], stacks)
    scales = np.asarray(up.scales).copy()
    scales[:, 0] = 0
    scales[:, 1, ::2] = 6e-8
    dense = np.asarray(jnp.asarray(scales, jnp.float32))
    assert dense.min() == 0
    up = type(up)(up.words, jnp.asarray(scales), group_size=128, shape=up.shape)
    x = jnp.asarray(np.random.default_rng().standard_normal((64, WIDTH)), jnp.bfloat16)
    live = jnp.asarray(np.random.default_rng(1).integers(0, E, (64, K)), jnp.int32)
    weights = jnp.full((64, K), 1 / K, jnp.float32)
    got = mosaic.run_experts(x, live, weights, None, up, down, None, ring, ring)
    expected = triton.experts(x, live, weights, None, up, down, None)
    assert relative(got, np.asarray(expected, np.float64)) < THREE_ROUNDINGS
