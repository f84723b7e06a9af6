"""The Triton kernels on a GPU: every dialect, any load, the same bits at every run.

Inputs are new at every run, and a failure says from which seed. What must not be read is NaN, and so is the memory that
results are written to.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.sampling_filters import draw_best, keep_best
from ferrum_jax.sampling_stages import gumbel
from ferrum_kernels import gptq_matmul, tile, triton, triton_norm, triton_parts, triton_place, triton_rows
from ferrum_kernels.blocks import max_blocks
from ferrum_kernels.pairs import Pairs
from ferrum_kernels.tiles import TiledLinear
from tests.support.bench_scripts import script
from tests.support.gptq_cases import make_linear, make_stack
from tests.support.tiny import tiny_config
from tests.support.triton_cases import check_places, expert_layer, ignore_deprecation, relative

pytestmark = [pytest.mark.gpu, ignore_deprecation]
ONE_ROUNDING, TWO_ROUNDINGS, THREE_ROUNDINGS = 2e-3, 2.9e-3, 3.3e-3
# One rounding of the sums, where the reference rounds what lies between the products as well: 1.66e-3 for 512 numbers,
# give or take 7e-5, and more where one of those lies so close between two of bfloat16 that the other is taken.
OF_A_LAYER = 2.3e-3
E, K, D, F = 16, 4, 512, 256


@pytest.fixture
def rng():
    seed = np.random.SeedSequence().entropy
    print(f"inputs come from np.random.default_rng({seed})")
    return np.random.default_rng(seed)


def poison(*shapes: tuple[int, ...]) -> None:
    """Leave NaN in the memory that the next outputs are likely to get."""
    for shape in shapes:
        jax.block_until_ready(jnp.full(shape, jnp.nan, jnp.float32)).delete()


def nan_like(leaf: jax.Array) -> jax.Array:
    return jnp.full_like(leaf, jnp.nan) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def check_product(rng, rows, dtype="bfloat16", *, k, n=192, **dialect):
    w, dense = make_linear(int(rng.integers(2**31)), k=k, n=n, **dialect)
    tiled = tile(w)
    for count in rows:
        x = jnp.asarray(rng.standard_normal((count, k)), dtype)
        poison((count, n))
        y = gptq_matmul(x, tiled, implementation="triton")
        assert relative(y, np.asarray(x, np.float64) @ dense) < ONE_ROUNDING
        assert (y == gptq_matmul(x, tiled, implementation="triton")).all()


# Inputs that fill no block of weights, except for groups of 128, whose blocks they fill.
INPUTS = {32: 416, 64: 448, 128: 512, -1: 416}


@pytest.mark.parametrize("act_order", [False, True], ids=["", "act-order"])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", INPUTS)
@pytest.mark.parametrize("bits", [4, 8])
def test_products_of_a_dialect(rng, bits, group_size, sym, act_order):
    sizes = {"k": INPUTS[group_size], "bits": bits, "group_size": group_size}
    check_product(rng, (1, 33), sym=sym, act_order=act_order, **sizes)


@pytest.mark.parametrize(("bits", "sym"), [(4, True), (4, False), (8, True), (8, False)])
def test_products_in_float16(rng, bits, sym):
    check_product(rng, (5,), "float16", k=448, bits=bits, group_size=64, sym=sym)


@pytest.mark.parametrize("n", [64, 320, 2048])
def test_products_of_any_size(rng, n):
    check_product(rng, (2, 7, 8, 65, 129, 1023, 4096), k=1024, n=n, group_size=128, sym=True)


@functools.cache
def layer_of(bits: int, group_size: int, sym: bool, act_order: bool = False):
    """Stacks of two layers, of which the first is NaN, and the dense weights of the second."""
    kind = {"bits": bits, "group_size": group_size, "sym": sym, "act_order": act_order}
    up, dense_up = make_stack(1, E, k=D, n=2 * F, **kind)
    down, dense_down = make_stack(2, E, k=F, n=D, **kind)
    stacks = jax.tree.map(lambda leaf: jnp.stack([nan_like(leaf), leaf]), (tile(up), tile(down)))
    return stacks, dense_up, dense_down


def without(stack: TiledLinear, dead: jax.Array) -> TiledLinear:
    """A stack whose dead experts are NaN."""
    return dataclasses.replace(stack, scales=jnp.where(dead[None, :, None, None], jnp.nan, stack.scales))


@pytest.mark.parametrize("tokens", [1, 2, 12, 33, 96, 600, 4096])  # every row of the table of tiles
@pytest.mark.parametrize("load", ["random", "one set of experts", "one expert"])
def test_a_layer(rng, tokens, load):
    check_layer(rng, layer_of(4, 128, True), tokens, load)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize(
    "dialect",
    [
        (8, 128, True),
        (4, 32, False),
        (4, 64, True),
        (8, 64, False),
        (4, -1, True),
        (8, -1, False),
        (4, 32, True, True),
        (8, 128, False, True),
    ],
    ids=lambda dialect: "-".join(map(str, dialect)),
)
def test_a_layer_of_another_dialect(rng, dialect, tokens):
    check_layer(rng, layer_of(*dialect), tokens, "random")


def check_layer(rng, made, tokens, load):
    stacks, dense_up, dense_down = made
    x = jnp.asarray(rng.standard_normal((tokens, D)), jnp.bfloat16)
    logits = rng.standard_normal((tokens, E))
    if load == "one set of experts":
        logits = logits + (rng.permutation(E) < K) * 100
    top_k = K
    if load == "one expert":
        top_k, logits = 1, logits + (np.arange(E) == rng.integers(E)) * 100
    logits = jnp.asarray(logits, jnp.float32)

    @jax.jit
    def run(x, logits, stacks):
        ids, weights, live, counts = triton.route(logits, None, top_k, True)
        dead = jnp.ones(E, bool).at[ids.reshape(-1)].set(False)
        up, down = (without(stack, dead) for stack in stacks)
        together = triton.routed_experts(x, logits, None, top_k, True, up, down, 1, jnp.zeros(1, jnp.int32))
        return ids, weights, triton.experts(x, live, weights, counts, up, down, 1), *together

    poison((tokens * top_k, F), (tokens * top_k, D), (tokens, D))
    ids, weights, y, together, *routing, arrived = run(x, logits, stacks)
    best, _ = jax.lax.top_k(logits, top_k)
    np.testing.assert_allclose(jnp.take_along_axis(logits, ids, 1), best, atol=1e-4)
    some = rng.permutation(tokens)[:40]
    picked = np.asarray(x)[some], np.asarray(ids)[some], np.asarray(weights)[some]
    assert np.isfinite(np.asarray(y, np.float32)).all()
    # Of many pairs each one's output is rounded as well as their sum.
    most = TWO_ROUNDINGS if tokens * top_k >= triton.MANY_PAIRS else OF_A_LAYER
    assert relative(np.asarray(y)[some], expert_layer(*picked, dense_up, dense_down, jnp.bfloat16)) < most
    # Chosen in the experts' own kernel or before it, and at every run.
    np.testing.assert_array_equal(routing[0], ids)
    np.testing.assert_allclose(routing[1], weights, rtol=1e-5)
    assert arrived.tolist() == [0]
    assert relative(together, np.asarray(y, np.float64)) < ONE_ROUNDING
    assert (run(x, logits, stacks)[2] == y).all()
    assert (run(x, logits, stacks)[3] == together).all()


@pytest.mark.parametrize("tokens", [3, 130])
def test_masked_tokens_are_sent_nowhere(rng, tokens):
    stacks, dense_up, dense_down = layer_of(4, 128, True)
    mask = rng.random(tokens) < 0.5
    mask[0] = True
    x = rng.standard_normal((tokens, D)).astype(np.float32)
    logits = jnp.asarray(rng.standard_normal((tokens, E)), jnp.float32)
    poison((tokens * K, F), (tokens * K, D), (tokens, D))

    @jax.jit
    def run(x, mask):
        ids, weights, live, counts = triton.route(logits, mask, K, True)
        return ids, weights, triton.experts(x, live, weights, counts, stacks[0], stacks[1], 1)

    # What a padding token holds must not matter.
    given = jnp.asarray(np.where(mask[:, None], x, np.nan), jnp.bfloat16)
    ids, weights, y = run(given, jnp.asarray(mask))
    assert (np.asarray(y)[~mask] == 0).all()
    picked = np.asarray(given)[mask], np.asarray(ids)[mask], np.asarray(weights)[mask]
    assert relative(np.asarray(y)[mask], expert_layer(*picked, dense_up, dense_down, jnp.bfloat16)) < OF_A_LAYER
    # Every expert empty.
    _, _, nothing = run(given, jnp.zeros(tokens, bool))
    assert (np.asarray(nothing) == 0).all()


@pytest.mark.parametrize("tokens", [9, 16, 64, 128, 300, 600, 4096])
@pytest.mark.parametrize(("experts", "top_k", "sizes"), [(128, 8, (8, 32)), (60, 6, (16,)), (8, 2, (16, 24, 32))])
def test_routing_and_places(rng, tokens, experts, top_k, sizes):
    parts = jnp.asarray(rng.standard_normal((3, tokens, experts)), jnp.float32)
    mask = jnp.asarray(rng.random(tokens) < 0.7)
    blocks = max_blocks(tokens * top_k, experts, sizes[-1])

    @jax.jit
    def run(parts, mask):
        chosen, weights, live, counts = triton.route(parts, mask, top_k, True)
        apart = chosen, weights, live, triton_place.place(live, counts, experts, sizes, blocks, False)
        how = top_k, True, sizes, blocks, False
        one = triton_place.route_and_place(parts, mask, jnp.zeros(1, jnp.int32), *how)
        # The counter is zero again, so the same array serves a second time.
        return apart, one, triton_place.route_and_place(parts, mask, one[-1], *how)

    apart, *together = run(parts, mask)
    chosen, weights, live, places = apart
    logits = parts.sum(0)
    best, _ = jax.lax.top_k(logits, top_k)
    np.testing.assert_allclose(jnp.take_along_axis(logits, chosen, 1), best, atol=1e-4)
    np.testing.assert_allclose(weights, jax.nn.softmax(best), rtol=1e-4)
    np.testing.assert_array_equal(live, np.where(np.asarray(mask)[:, None], chosen, experts))
    check_places(places, np.asarray(live), experts, sizes)
    for *routing, others, arrived in together:
        assert arrived.tolist() == [0]
        for one, other in zip(routing, apart, strict=False):
            np.testing.assert_array_equal(one, other)
        check_places(others, np.asarray(live), experts, sizes)


def test_no_tokens():
    stacks, _, _ = layer_of(4, 128, True)
    sizes = {"hidden_size": D, "num_experts": E, "top_k": K, "moe_intermediate_size": F, "num_layers": 1}
    cfg = tiny_config(**sizes, dtype="bfloat16", implementation="triton")
    moe = {"router": jnp.zeros((D, E)), "experts": {"gate_up": stacks[0][1], "down": stacks[1][1]}}
    y, routing = fj.moe_layer(moe, jnp.zeros((2, 0, D), jnp.bfloat16), cfg)
    assert (y.shape, routing.experts.shape) == ((2, 0, D), (2, 0, K))


@pytest.mark.parametrize("routing", ["uniform", "zipf", "one"])
def test_a_layer_of_qwen3_30b_a3b(routing):
    gpu_table = script("gpu_table")
    layers, experts, top_k, hidden, intermediate = 2, 128, 8, 2048, 768
    up = gpu_table.random_stack(1, (layers, experts), hidden, 2 * intermediate, 128)
    down = gpu_table.random_stack(2, (layers, experts), intermediate, hidden, 128)
    for tokens in (1, 8, 64, 1024, 4096) if routing == "uniform" else (64, 1024):
        assert gpu_table.checked((up, down), tokens, top_k, routing, jnp.bfloat16) <= THREE_ROUNDINGS


@pytest.mark.parametrize("ks", [None, (30, 700, 20, 1, 50_000, 0)], ids=["all", "k"])
@pytest.mark.parametrize("ps", [None, (0.3, 0.5, 0.9, 0.01, 0.999, 0.8)], ids=["all", "p"])
def test_the_filters_of_sampling_keep_what_the_portable_ones_keep(rng, ks, ps):
    logits = 3 * jax.random.normal(jax.random.key(int(rng.integers(2**31))), (6, 151_936))
    logits = logits.at[0, 100:180].set(40.0).at[1].set(0.25).at[2, ::3].set(-jnp.inf).at[5].multiply(0.3)
    k, p = None if ks is None else jnp.array(ks), None if ps is None else jnp.array(ps)
    poison(logits.shape)
    found = keep_best(logits, k, p, implementation="triton")
    np.testing.assert_array_equal(found, keep_best(logits, k, p, implementation="triton"))
    np.testing.assert_array_equal(found, keep_best(logits, k, p))  # the kernels are what None takes here
    expected = keep_best(logits, k, p, implementation="xla")
    # Sums of float32 in another order may put the cut of a wide set some tokens away.
    counts = [np.asarray((x > -jnp.inf).sum(-1)) for x in (found, expected)]
    assert (np.abs(counts[0] - counts[1]) <= 2 + counts[1] // 1000).all()
    assert (found[0] == expected[0]).all() and (found[3] == expected[3]).all()
    if p is None:
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("rows", [1, 33])
def test_draws_the_tokens_that_the_portable_operations_draw(rng, rows):
    logits = 3 * jax.random.normal(jax.random.key(int(rng.integers(2**31))), (rows, 151_936))
    keys = jnp.asarray(rng.integers(0, 2**32, (rows, 2), np.uint32))
    k, temperature = (
        jnp.asarray(rng.choice([0, 1, 50, 20_000], rows), jnp.int32),
        jnp.asarray(rng.choice([0.0, 1.0], rows)),
    )
    drawn, expected = (draw_best(logits, k, None, keys, temperature, implementation=name) for name in ("triton", "xla"))
    # Logarithms may differ in the last place, which decides between tokens that are as good.
    assert (drawn == expected).mean() > 0.9 or rows == 1
    noise = np.where(np.asarray(temperature)[:, None] > 0, gumbel(keys, logits.shape[1]), 0.0)
    kept = np.asarray(keep_best(logits, k, None, implementation="xla")) + noise
    worst = kept.max(1) - np.take_along_axis(kept, np.asarray(drawn)[:, None], 1)[:, 0]
    assert worst.max() < 1e-4


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 16, 40, 300])
def test_sums_norms_and_router_logits(tokens):
    rng = np.random.default_rng()
    x, weight, router = (
        jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((tokens, 2048), (3, 2048), (3, 128, 2048))
    )
    y = jnp.asarray(rng.standard_normal((tokens, 2048)), jnp.bfloat16)
    poison((tokens, 2048), (tokens, 2048), (tokens, 128))
    total, norm, logits, arrived = triton_norm.add_norm_route(x, y, weight, router, jnp.int32(2), 1e-6, False)
    exact = np.asarray(total, np.float64)
    np.testing.assert_array_equal(total, (x.astype(jnp.float32) + y.astype(jnp.float32)).astype(x.dtype))
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(weight[2], np.float64)
    assert relative(norm, exact) < ONE_ROUNDING and arrived.tolist() == [0]
    logits = logits.reshape(-1, tokens, 128).sum(0)
    assert relative(logits, np.asarray(norm, np.float64) @ np.asarray(router[2], np.float64).T) < 1e-5


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 16])
@pytest.mark.parametrize(("k", "n"), [(2048, 5120), (4096, 2048), (768, 320), (32_768, 64)])
def test_products_of_few_rows(rows, k, n):
    w, dense = make_linear(3, k=k, n=n, bits=4, group_size=128, sym=True)
    tiled = jax.tree.map(lambda leaf: jnp.stack([jnp.zeros_like(leaf), leaf]), tile(w))
    x = jnp.asarray(np.random.default_rng().standard_normal((rows, k)), jnp.bfloat16)
    poison((rows, n))
    y = gptq_matmul(x, tiled, layer=jnp.int32(1), implementation="triton")
    assert relative(y, np.asarray(x, np.float64) @ dense) < ONE_ROUNDING


@pytest.mark.parametrize(
    ("rows", "k", "n"),
    [(1, 4096, 2048), (7, 1024, 320), (16, 2048, 5120), (33, 4096, 2048), (64, 2048, 5120), (200, 4096, 2048)],
)
def test_products_in_parts(rng, rows, k, n):
    check_parts(rng, rows, "bfloat16", k=k, n=n, bits=4, group_size=128, sym=True)


@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize(
    "dialect",
    [(8, 128, True), (4, 32, False), (4, 64, True), (8, 64, False), (4, -1, True), (4, 32, True, True)],
    ids=lambda dialect: "-".join(map(str, dialect)),
)
def test_products_in_parts_of_a_dialect(rng, rows, dialect):
    names = ("bits", "group_size", "sym", "act_order")
    check_parts(rng, rows, "float16", k=1024, n=192, **dict(zip(names, dialect, strict=False)))


def check_parts(rng, rows, dtype, *, k, n, **dialect):
    """Parts, and what the norm that reads them makes of them."""
    w, dense = make_linear(int(rng.integers(2**31)), k=k, n=n, **dialect)
    tiled = jax.tree.map(lambda leaf: jnp.stack([nan_like(leaf), leaf]), tile(w))
    x, stream = (jnp.asarray(rng.standard_normal((rows, size)), dtype) for size in (k, n))
    count = triton_parts.count(x, tiled)
    assert count > 1
    exact = np.asarray(x, np.float64) @ dense
    poison((count, rows, n), (rows, n), (rows, n))

    @jax.jit
    def run(x, stream, tiled, layer):
        y = triton_parts.product(x, tiled, layer)
        weight = jnp.ones((2, n), dtype)
        return y, *triton_norm.add_norm(stream, y, weight, layer, 1e-6, False)[:2]

    y, total, norm = run(x, stream, tiled, jnp.int32(1))
    assert y.shape == (count, rows, n) and relative(y.sum(0), exact) < 1e-4
    assert relative(total, np.asarray(stream, np.float64) + exact) < ONE_ROUNDING
    total = np.asarray(total, np.float64)
    assert relative(norm, total / np.sqrt((total**2).mean(-1, keepdims=True) + 1e-6)) < ONE_ROUNDING
    for one, again in zip((y, norm), run(x, stream, tiled, jnp.int32(1))[::2], strict=True):
        assert (one == again).all()


@pytest.mark.parametrize(("tokens", "dtype", "weighted"), [(16, "float32", False), (64, "bfloat16", True)])
def test_pairs_of_experts_and_their_norm(rng, tokens, dtype, weighted):
    """Where nobody's rows, which no kernel writes, hold NaN."""
    d, top_k = 2048, 8
    live = rng.integers(0, 129, (tokens, top_k))
    values = np.where((live < 128).reshape(-1, 1), rng.standard_normal((tokens * top_k, d)), np.nan)
    weights = jnp.asarray(rng.random((tokens, top_k)), jnp.float32) if weighted else None
    pairs = Pairs(jnp.asarray(values, dtype), jnp.asarray(live, jnp.int32), weights, 128)
    stream, weight = jnp.asarray(rng.standard_normal((tokens, d)), jnp.bfloat16), jnp.ones((3, d), jnp.bfloat16)
    run = jax.jit(lambda stream, pairs, layer: triton_norm.add_norm(stream, pairs, weight, layer, 1e-6, False))
    y, norm, after = run(stream, pairs, jnp.int32(1))
    exact = np.asarray(stream, np.float64) + np.asarray(pairs.whole(), np.float64)
    assert relative(y, exact) < ONE_ROUNDING and after.tolist() == [2]
    total = np.asarray(y, np.float64)
    assert relative(norm, total / np.sqrt((total**2).mean(-1, keepdims=True) + 1e-6)) < ONE_ROUNDING
    for one, again in zip((y, norm), run(stream, pairs, jnp.int32(1))[:2], strict=True):
        assert (one == again).all()


@pytest.mark.parametrize(
    "cut",
    [
        triton_rows.Cut(64, 1, 4, 3, rows=32, parts=3, merge=True),  # parts of 10 and 11 blocks
        triton_rows.Cut(128, 1, 8, 2, rows=64, parts=4, step=2, merge=True),
        triton_rows.Cut(16, 2, 4, 4, rows=16, parts=4),
    ],
    ids=str,
)
def test_a_product_however_it_is_cut(rng, cut):
    w, dense = make_linear(7, k=4096, n=256, bits=4, group_size=128, sym=True)
    x = jnp.asarray(rng.standard_normal((45, 4096)), jnp.bfloat16)  # the last program's rows are not all there
    poison((cut.parts, 45, 256))
    y = triton_rows.product(x, tile(w), None, cut, jnp.float32, False)
    assert relative(y.sum(0), np.asarray(x, np.float64) @ dense) < 1e-4
    assert (y == triton_rows.product(x, tile(w), None, cut, jnp.float32, False)).all()
