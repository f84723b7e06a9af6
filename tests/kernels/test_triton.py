"""The Triton kernels, interpreted on the CPU, against plain numpy; what they refuse; and that they lower for CUDA."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrum_kernels import (
    MixedStack,
    PackedLinear,
    dispatch,
    from_blocks,
    gptq_matmul,
    grouped_gptq_matmul,
    tile,
    to_blocks,
    triton,
)
from ferrum_kernels.errors import BackendError
from ferrum_kernels.triton_few import Cut
from ferrum_kernels.triton_few import down as down_of_few
from ferrum_kernels.triton_matmul import Rows, Tile, product
from ferrum_kernels.triton_rows import cut_for
from ferrum_kernels.triton_tiles import few_cuts
from tests.support.gptq_cases import make_linear, make_stack
from tests.support.triton_cases import expert_layer, ignore_deprecation, lower_for_cuda, normal, relative

pytestmark = [
    ignore_deprecation,
    pytest.mark.skipif(jax.__version_info__ < (0, 10, 2), reason="the Triton kernels need jax 0.10.2"),
]
ONE_ROUNDING, TWO_ROUNDINGS = 2e-3, 4.5e-3  # to bfloat16
EXPERTS = 8


@pytest.fixture(autouse=True)
def on_the_cpu():
    with triton.interpreted():
        yield


DIALECTS = st.fixed_dictionaries(
    {
        "k": st.sampled_from([32, 64, 160, 256]),
        "n": st.sampled_from([16, 27, 64, 96]),
        "bits": st.sampled_from([4, 8]),
        "group_size": st.sampled_from([32, 64, 96, 128, -1]),
        "sym": st.booleans(),
        "act_order": st.booleans(),
    }
)


@settings(max_examples=6)
@given(DIALECTS, st.sampled_from(["bfloat16", "float16"]), st.sampled_from([1, 3, 17]), st.booleans())
def test_a_product_of_any_dialect(sizes, dtype, rows, layered):
    w, dense = make_linear(0, **sizes)
    x = jnp.asarray(normal(rows, rows, sizes["k"]), dtype)
    expected = np.asarray(x, np.float64) @ dense
    tiled, layer = tile(w), None
    if layered:
        tiled, layer = jax.tree.map(lambda leaf: jnp.stack([jnp.zeros_like(leaf), leaf]), tiled), 1
    y = gptq_matmul(x, tiled, layer=layer, implementation="triton", out_dtype=jnp.float32)
    assert relative(y, expected) < 1e-5  # codes and scales are exact, sums are float32
    rounded = gptq_matmul(x, tiled, layer=layer, implementation="triton")
    assert rounded.dtype == dtype
    assert relative(rounded, expected) < ONE_ROUNDING


@pytest.mark.parametrize(
    ("rows", "bits", "group_size", "sym"), [(1, 4, 128, True), (5, 8, 32, False), (16, 4, -1, True)]
)
def test_few_rows_in_several_segments(rows, bits, group_size, sym):
    w, dense = make_linear(0, k=1024, n=27, bits=bits, group_size=group_size, sym=sym)
    assert cut_for(rows, 64, tile(w).num_blocks).splits > 1
    x = jnp.asarray(normal(rows, rows, 1024), jnp.bfloat16)
    y = gptq_matmul(x, tile(w), implementation="triton", out_dtype=jnp.float32)
    assert relative(y, np.asarray(x, np.float64) @ dense) < 1e-5


def test_segments_are_no_more_than_a_program_has_room_for():
    """32768 inputs in 64 segments would need more shared memory than an H100 has."""
    assert [cut_for(rows, 64, 256).splits for rows in (1, 4, 16)] == [16, 16, 4]
    assert cut_for(1, 64, 256, little_memory=True).stages < cut_for(1, 64, 256).stages
    stacks = {}
    for name, (k, n) in {"gate_up": (2048, 2048), "down": (1024, 2048)}.items():
        empty = PackedLinear(
            jax.ShapeDtypeStruct((64, k // 4, n), jnp.uint32),
            jax.ShapeDtypeStruct((64, k // 128, n), jnp.float16),
            bits=8,
            group_size=128,
            shape=(k, n),
        )
        stacks[name] = jax.eval_shape(tile, empty)
    splits = [cuts[1].splits for top_k in (2, 6, 8) if (cuts := few_cuts(6, top_k, 64, **stacks))]
    assert splits == [8, 4, 4]  # times two, eight and eight experts, the last a power of two from six


def test_a_bias_is_added():
    w, dense = make_linear(0, k=64, n=32, group_size=32)
    w = dataclasses.replace(w, bias=jnp.arange(32, dtype=jnp.float16))
    x = jnp.asarray(normal(0, 2, 64), jnp.bfloat16)
    y = gptq_matmul(x, tile(w), implementation="triton", out_dtype=jnp.float32)
    assert relative(y, np.asarray(x, np.float64) @ dense + np.arange(32)) < 1e-5


@settings(max_examples=5)
@given(DIALECTS, st.sampled_from([1, 2, 6, 16]), st.lists(st.integers(-1, 4), min_size=1, max_size=12))
def test_rows_of_a_dispatch(sizes, block, ids):
    stack, dense = make_stack(0, 4, **sizes)
    x = jnp.asarray(normal(0, len(ids), sizes["k"]), jnp.bfloat16)
    plan = dispatch(jnp.asarray(ids, jnp.int32), 4, block)
    rows = to_blocks(x, plan)
    y = grouped_gptq_matmul(rows, tile(stack), plan, implementation="triton", out_dtype=jnp.float32)
    expected = np.stack(
        [
            np.asarray(row, np.float64) @ dense[e] if 0 <= e < 4 else np.zeros(sizes["n"])
            for row, e in zip(x, ids, strict=True)
        ]
    )
    assert np.isfinite(np.asarray(y)).all()
    assert relative(from_blocks(y, plan), expected) < 1e-5


def test_a_block_larger_than_a_program_takes():
    stack, dense = make_stack(0, 2, k=64, n=32, group_size=32)
    plan = dispatch(jnp.asarray([1] * 70 + [0] * 3, jnp.int32), 2, 96)
    x = jnp.asarray(normal(0, 73, 64), jnp.bfloat16)
    y = grouped_gptq_matmul(to_blocks(x, plan), tile(stack), plan, implementation="triton", out_dtype=jnp.float32)
    expected = np.asarray(x, np.float64) @ dense[1]
    assert relative(from_blocks(y, plan)[:70], expected[:70]) < 1e-5


def test_a_mixed_stack():
    four, a = make_stack(1, 2, k=64, n=32, group_size=32)
    stack = MixedStack((tile(four), jnp.asarray(normal(3, 1, 64, 32) / 8)), ((2, 0), (1,)))
    dense = np.stack([a[1], normal(3, 1, 64, 32)[0] / 8, a[0]])
    x = jnp.asarray(normal(0, 6, 64), jnp.bfloat16)
    y = grouped_gptq_matmul(x, stack, jnp.asarray([2, 1, 3], jnp.int32), implementation="triton", out_dtype=jnp.float32)
    expected = np.stack([np.asarray(x[i], np.float64) @ dense[e] for i, e in enumerate([0, 0, 1, 2, 2, 2])])
    assert relative(y, expected) < TWO_ROUNDINGS  # the plain stack is multiplied in bfloat16


@functools.cache
def layer_of(case: int):
    """(gate and up, down, their dense weights): what a layer can be made of."""
    kinds: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (dict(k=256, n=256, group_size=128, sym=True), dict(k=128, n=256, group_size=128, sym=True)),
        (dict(k=128, n=128, group_size=32, act_order=True), dict(k=64, n=128, bits=8, group_size=64, act_order=True)),
        (dict(k=160, n=80, bits=8, group_size=-1), dict(k=40, n=160, group_size=-1)),  # nothing fits a tile
    ]
    up, down = kinds[case]
    (a, dense_a), (b, dense_b) = make_stack(1, EXPERTS, **up), make_stack(2, EXPERTS, **down)
    return tile(a), tile(b), dense_a, dense_b


# Few tokens, then small blocks, then several blocks per expert.
layers_and_tokens = pytest.mark.parametrize(
    ("case", "tokens"),
    [
        pytest.param(case, tokens, marks=() if (case, tokens) in ((0, 1), (1, 40), (2, 3)) else pytest.mark.once)
        for case in (0, 1, 2)
        for tokens in (1, 3, 40)
    ],
)


@layers_and_tokens
def test_an_expert_layer(case, tokens):
    gate_up, down, dense_up, dense_down = layer_of(case)
    rng = np.random.default_rng(tokens)
    x = jnp.asarray(rng.standard_normal((tokens, gate_up.k)), jnp.bfloat16)
    ids = rng.integers(-1, EXPERTS + 1, (tokens, 2)).astype(np.int32)  # some pairs go nowhere
    ids[0] = [3, 1]
    weights = rng.random((tokens, 2)).astype(np.float32)
    layers = jax.tree.map(lambda leaf: jnp.stack([jnp.zeros_like(leaf), leaf]), (gate_up, down))
    y = triton.experts(x, jnp.asarray(ids), jnp.asarray(weights), None, layers[0], layers[1], 1)
    assert y.dtype == jnp.bfloat16
    assert relative(y, expert_layer(np.asarray(x), ids, weights, dense_up, dense_down)) < TWO_ROUNDINGS


@layers_and_tokens
def test_a_layer_that_routes(case, tokens):
    """Whatever kernels a load takes, the layer is the routing's experts on their tokens."""
    gate_up, down, dense_up, dense_down = layer_of(case)
    x = jnp.asarray(normal(tokens, tokens, gate_up.k), jnp.bfloat16)
    logits = np.array(normal(tokens + 1, tokens, EXPERTS))
    logits[0] = [0, 1, 1, 0, -np.inf, 0, 0, 0]
    mask = np.arange(tokens) % 4 != 3
    given = x, jnp.asarray(logits), jnp.asarray(mask), 2, True, gate_up, down, None
    y, chosen, weights, arrived = triton.routed_experts(*given, jnp.zeros(1, jnp.int32))
    assert arrived is not None and arrived.tolist() == [0]
    for one, other in zip((y, chosen, weights), triton.routed_experts(*given), strict=False):
        np.testing.assert_array_equal(one, other)
    probs, expected = jax.lax.top_k(jax.nn.softmax(jnp.asarray(logits)), 2)
    np.testing.assert_array_equal(chosen, expected)
    np.testing.assert_allclose(weights, probs / probs.sum(1, keepdims=True), rtol=1e-5)
    live = np.where(mask[:, None], expected, EXPERTS)
    assert relative(y, expert_layer(np.asarray(x), live, np.asarray(weights), dense_up, dense_down)) < TWO_ROUNDINGS
    assert (np.asarray(y)[~mask] == 0).all()


@pytest.mark.parametrize("tokens", [1, 12])
def test_a_token_whose_logits_are_not_finite_does_not_touch_others(tokens):
    gate_up, down, _, _ = layer_of(0)
    x = jnp.asarray(normal(0, tokens + 1, gate_up.k), jnp.bfloat16)
    logits = jnp.asarray(normal(1, tokens + 1, EXPERTS)).at[0].set(jnp.nan)
    y, chosen, weights, _ = triton.routed_experts(x, logits, None, 2, True, gate_up, down, None)
    assert chosen[0].tolist() == [0, 1]
    assert np.isnan(np.asarray(weights[0])).all() and np.isnan(np.asarray(y[0], np.float32)).all()
    assert np.isfinite(np.asarray(y[1:], np.float32)).all()


@settings(max_examples=5)
@given(
    st.sampled_from([(16, 1, 4), (16, 4, 4), (32, 2, 2)]),
    st.sampled_from([4, 8]),
    st.sampled_from([32, 64, -1]),
    st.booleans(),
    st.integers(1, 3),
)
def test_cuts_do_not_change_a_product(cut, bits, group_size, merge, top_k):
    """However inputs are cut into segments, a token gets the same sum of its experts."""
    n, splits, warps = cut
    stack, dense = make_stack(3, 4, k=512, n=64, bits=bits, group_size=group_size)
    h = jnp.asarray(normal(5, 2 * top_k, 512), jnp.bfloat16)
    live = np.random.default_rng(top_k).integers(-1, 5, (2, top_k)).astype(np.int32)
    weights = np.abs(normal(6, 2, top_k))
    how = Cut(n, splits, warps, merge=merge)
    y = down_of_few(h, jnp.asarray(live), jnp.asarray(weights), tile(stack), None, how, interpret=True)
    expected = np.zeros((2, 64))
    for t, k in np.ndindex(2, top_k):
        if 0 <= live[t, k] < 4:
            expected[t] += weights[t, k] * (np.asarray(h[t * top_k + k], np.float64) @ dense[live[t, k]])
    assert relative(y, expected) < ONE_ROUNDING


@pytest.mark.parametrize("load", ["one expert", "none"])
def test_any_load_of_experts(load):
    gate_up, down, dense_up, dense_down = layer_of(0)
    ids = np.full((20, 2), 2 if load == "one expert" else EXPERTS, np.int32)
    x = jnp.asarray(normal(0, 20, 256), jnp.bfloat16)
    weights = np.ones((20, 2), np.float32)
    y = triton.experts(x, jnp.asarray(ids), jnp.asarray(weights), None, gate_up, down, None)
    assert relative(y, expert_layer(np.asarray(x), ids, weights, dense_up, dense_down)) < TWO_ROUNDINGS


def test_float32_is_refused():
    w, _ = make_linear(0, k=64, n=32, group_size=32)
    message = (
        r"the Triton kernels take bfloat16 and float16 activations; x is float32\. Cast it, load with "
        r'dtype="bfloat16", or use implementation="xla"\.'
    )
    with pytest.raises(BackendError, match=message):
        gptq_matmul(jnp.ones((1, 64)), tile(w), implementation="triton")
    stack, _ = make_stack(0, 2, k=64, n=32, group_size=32)
    with pytest.raises(BackendError, match=message):
        grouped_gptq_matmul(jnp.ones((1, 64)), tile(stack), jnp.asarray([1, 0]), implementation="triton")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(bits=3, group_size=32), r"tiles hold codes of 4 and 8 bits; this weight has 3\. Use implementation=.xla"),
        (dict(group_size=16), r"groups of a multiple of 32 inputs, or one group for all of them; this weight has gro"),
        (dict(group_size=32), r"this PackedLinear is laid out as in its file\. Lay it out once with ferrum_kernels\.t"),
    ],
)
def test_a_weight_that_is_not_taken_is_named(sizes, message):
    w, _ = make_linear(0, k=64, n=32, **sizes)
    with pytest.raises(BackendError, match=message):
        gptq_matmul(jnp.ones((1, 64), jnp.bfloat16), w, implementation="triton")


def test_zero_points_that_offsets_of_32_bits_do_not_reach_are_refused():
    w = tile(make_linear(0, k=64, n=64, group_size=32, sym=False)[0])
    for layers, refused in ((2**23, False), (2**24 + 1, True), (2**25, True), (2**25 + 1, False)):
        stack = dataclasses.replace(w, zeros=jax.ShapeDtypeStruct((layers, 2, 64), jnp.uint8))
        message = triton.refuses(stack)
        assert (message is not None) == refused
    stack = dataclasses.replace(w, zeros=jax.ShapeDtypeStruct((2**25, 2, 64), jnp.uint8))
    with pytest.raises(BackendError, match=r"this stack has 4\.0 GiB of zero points; between 2 and 4 GiB the compiler"):
        triton.check(stack)


def test_gradients_are_those_of_the_dense_product():
    stack, dense = make_stack(0, 3, k=64, n=32, group_size=32, act_order=True)
    plan = dispatch(jnp.asarray([2, 0, 2], jnp.int32), 3, 2)
    x = jnp.asarray(normal(0, 3, 64), jnp.bfloat16)

    def total(x):
        y = grouped_gptq_matmul(to_blocks(x, plan), tile(stack), plan, implementation="triton", out_dtype=jnp.float32)
        return from_blocks(y, plan).sum()

    expected = np.stack([dense[e].sum(1) for e in (2, 0, 2)])
    assert relative(jax.grad(total)(x), expected) < TWO_ROUNDINGS


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_tiles_are_read_by_the_portable_implementations(implementation):
    stack, dense = make_stack(0, 3, k=64, n=32, group_size=32, act_order=True)
    x = normal(0, 3, 64)
    y = grouped_gptq_matmul(jnp.asarray(x), tile(stack), jnp.asarray([1, 0, 2]), implementation=implementation)
    assert relative(y, np.stack([x[i] @ dense[e] for i, e in enumerate([0, 2, 2])])) < 1e-5


@pytest.mark.parametrize("tokens", [1, 16, 512])
@pytest.mark.parametrize("case", [0, 1, 2])
def test_a_layer_lowers_for_cuda_without_a_copy_of_its_stack(case, tokens):
    """Only kernels read the stacks: a slice by layer would show as an operation on them."""
    gate_up, down, _, _ = layer_of(case)
    layers = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((3, *leaf.shape), leaf.dtype), (gate_up, down))
    token = jax.ShapeDtypeStruct((tokens, gate_up.k), jnp.bfloat16)

    def run(x, logits, stacks, layer, arrived):
        with triton.interpreted(False):
            return triton.routed_experts(x, logits, None, 2, True, stacks[0], stacks[1], layer, arrived)[0]

    logits = jax.ShapeDtypeStruct((tokens, EXPERTS), jnp.float32)
    index, counter = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((), (1,)))
    text = lower_for_cuda(run, token, logits, layers, index, counter)
    names = {"x".join(map(str, s.words.shape)) for s in layers}
    for line in text.splitlines():
        if any(f"tensor<{name}xui16>" in line for name in names):
            assert "custom_call" in line or "func.func" in line, line
    # Routing, places, two products; some tokens are routed and placed by one kernel; few need no places where columns
    # fit, and their first product routes.
    kernels = {1: {0: 2, 1: 3, 2: 3}[case], 16: 3, 512: 4}[tokens]
    assert len(re.findall(r"custom_call @__gpu\$xla\.gpu\.triton", text)) == kernels


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_every_dialect_lowers_for_cuda(bits, sym, dtype):
    w, _ = make_linear(0, k=256, n=64, bits=bits, group_size=64, sym=sym)
    x = jax.ShapeDtypeStruct((64, 256), jnp.dtype(dtype))
    for cut in (Tile(16, 1, 2), Tile(64, 4, 3, merge=True, step=2)):
        run = functools.partial(product, layer=None, rows=Rows(32), blocks=2, out_rows=64, tile=cut, out_dtype=dtype)
        assert "xla.gpu.triton" in lower_for_cuda(lambda x, w, run=run: run(x, w), x, tile(w))
