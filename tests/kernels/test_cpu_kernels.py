"""The CPU kernels on every instruction set of this machine, against numpy and against the portable operations."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrum_jax.layers import attention as plain_attention
from ferrum_jax.layers import rms_norm
from ferrum_jax.moe import route as plain_route
from ferrum_jax.rope import apply_rope, rope_tables
from ferrum_kernels import PackedLinear, cpu, from_gptq, gptq_matmul
from ferrum_kernels.errors import BackendError
from tests.support.close import ROUNDING, assert_close, normal
from tests.support.gptq_cases import Case, make_case, make_linear, make_stack
from tests.support.implementations import ISAS, instruction_set, needs_library

pytestmark = needs_library
each_isa = pytest.mark.parametrize("isa", [pytest.param(isa, marks=pytest.mark.every_isa) for isa in ISAS])
DTYPES = ["float32", "bfloat16", "float16"]


def on_every_isa(run: Callable[[], Any]) -> Iterator[Any]:
    """What a function gives on each instruction set, as numpy."""
    for isa in ISAS:
        print("on", isa)  # shown when the test fails
        with instruction_set(isa):
            y = jax.tree.map(np.asarray, run())
        yield y


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Weights of odd sizes with groups of whole words."""
    bits = draw(st.sampled_from([4, 8]))
    words = st.integers(1, 24).map(lambda n: n * 32 // bits)
    return make_case(
        draw(st.integers(0, 2**16)),
        k=draw(st.one_of(st.integers(1, 300), st.sampled_from([512, 640]))),
        n=draw(st.integers(1, 80)),
        bits=bits,
        group_size=draw(st.one_of(words, st.sampled_from([32, 64, 128, -1]))),
        sym=draw(st.booleans()),
        act_order=draw(st.booleans()),
    )


def packed(case: Case) -> PackedLinear:
    return jax.tree.map(jnp.asarray, from_gptq(case.tensors(), case.bits, case.group_size, sym=False))


def int8_product(x: np.ndarray, case: Case, perm: np.ndarray | None) -> np.ndarray:
    """float64 [M, N]: activations rounded to int8 per block, everything else exact."""
    order = np.arange(x.shape[1]) if perm is None else perm
    x, codes, y = x[:, order].astype(np.float32), case.codes[order], 0.0
    groups = -(-x.shape[1] // case.group_size)
    for g in range(groups):
        end = min(x.shape[1], (g + 1) * case.group_size)
        for begin in range(g * case.group_size, end, 128):
            block = slice(begin, min(begin + 128, end))
            most = np.abs(x[:, block]).max(-1, keepdims=True)
            inverse = np.where(most > 1e-30, np.float32(127) / np.maximum(most, np.float32(1e-30)), np.float32(0))
            rounded = np.rint(x[:, block] * inverse)
            centred = rounded.astype(np.float64) @ (codes[block] - case.zeros[g])
            y = y + case.scales[g].astype(np.float64) * (most / np.float32(127)) * centred
    return np.asarray(y)


@pytest.mark.every_isa
@given(case=cases(), rows=st.integers(1, 70), dtype=st.sampled_from(DTYPES), out=st.sampled_from(DTYPES))
def test_a_product_is_the_dense_one(case, rows, dtype, out):
    w = packed(case)
    x = jnp.asarray(normal(rows, rows, w.k), dtype)
    wide, rel = np.asarray(x, np.float32), 1e-5 if out == "float32" else ROUNDING[out]
    dense, in_codes = wide @ case.dense(), int8_product(wide, case, None if w.perm is None else np.asarray(w.perm))
    for exact, rounded in on_every_isa(lambda: [cpu.gptq_matmul(x, w, None, r, out) for r in (False, True)]):
        assert_close(exact, dense, rel)
        assert_close(rounded, in_codes, rel)


@pytest.mark.every_isa
@given(k=st.integers(1, 1100), n=st.integers(1, 80), rows=st.integers(1, 20), dtype=st.sampled_from(DTYPES))
def test_a_plain_product_widens_any_float(k, n, rows, dtype):
    x, w = normal(k, rows, k), jnp.asarray(normal(n, 2, k, n), dtype)
    for y in on_every_isa(lambda: cpu.dense_product(jnp.asarray(x), w, 1)):
        assert_close(y, x @ np.asarray(w, np.float32)[1])


@pytest.mark.every_isa
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_instruction_set_gives_the_same_bits(bits, rounded):
    w, _ = make_linear(3, k=700, n=75, bits=bits, group_size=64)
    x = jnp.asarray(normal(1, 37, 700))
    first, *others = on_every_isa(lambda: cpu.gptq_matmul(x, w, None, rounded, "float32"))
    for other in others:
        np.testing.assert_array_equal(other, first)


@each_isa
@pytest.mark.parametrize("rounded", [False, True])
def test_a_row_gets_the_same_bits_alone_and_in_a_batch(isa, rounded):
    w, _ = make_linear(4, k=1200, n=50, group_size=128)
    x = jnp.asarray(normal(2, 70, 1200))
    with instruction_set(isa):
        together = np.asarray(cpu.gptq_matmul(x, w, None, rounded, "float32"))
        for count in (1, 2, 3, 4, 7, 33):
            some = cpu.gptq_matmul(x[:count], w, None, rounded, "float32")
            np.testing.assert_array_equal(np.asarray(some), together[:count])


@pytest.mark.parametrize("rounded", [False, True])
def test_what_is_not_finite_spoils_its_own_row_alone(rounded):
    w, _ = make_linear(5, k=300, n=40)
    x = normal(3, 4, 300)
    clean = np.asarray(cpu.gptq_matmul(jnp.asarray(x), w, None, rounded, "float32"))
    x[1, 7], x[2, 250] = np.nan, np.inf
    y = np.asarray(cpu.gptq_matmul(jnp.asarray(x), w, None, rounded, "float32"))
    np.testing.assert_array_equal(y[[0, 3]], clean[[0, 3]])
    assert not np.isfinite(y[1:3]).any()


def specified_experts(x, chosen, weights, gate_up, down):
    """[T, D] in float64 from dense stacks [E, D, 2F] and [E, F, D]."""
    y = np.zeros(x.shape)
    for t in range(len(x)):
        for e, weight in zip(chosen[t], weights[t], strict=True):
            if 0 <= e < len(down):
                gate, up = np.split(x[t].astype(np.float64) @ gate_up[e], 2)
                y[t] += weight * (gate / (1 + np.exp(-gate)) * up @ down[e])
    return y


@pytest.mark.every_isa
@given(
    tokens=st.one_of(st.integers(1, 40), st.just(300)),
    experts=st.sampled_from([2, 5, 17]),  # few are shared by all threads, each of many is one thread's
    act_order=st.booleans(),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([16, 32, -1]),
    seed=st.integers(0, 99),
)
def test_experts_are_the_weighted_sum_of_their_mlps(tokens, experts, act_order, bits, group, seed):
    form = {"bits": bits, "group_size": group, "act_order": act_order}
    gate_up, dense_up = make_stack(seed, experts, k=40, n=48, **form)
    down, dense_down = make_stack(seed + 1, experts, k=24, n=40, **form)
    rng = np.random.default_rng(seed)
    x, chosen = normal(seed, tokens, 40), rng.integers(-1, experts + 2, (tokens, 3)).astype(np.int32)
    weights = rng.uniform(0, 1, (tokens, 3)).astype(np.float32)

    def run(rounded: bool) -> jax.Array:
        return cpu.experts(
            jnp.asarray(x), jnp.asarray(chosen), jnp.asarray(weights), gate_up, down, None, rounded=rounded
        )

    expected = specified_experts(x, chosen, weights, dense_up, dense_down)
    for exact, rounded in on_every_isa(lambda: (run(False), run(True))):
        assert_close(exact, expected, 2e-5)
        assert_close(rounded, expected, 5e-2)


@each_isa
@pytest.mark.parametrize("rounded", [False, True])
def test_a_token_gets_the_same_bits_from_its_experts_alone_and_in_a_batch(isa, rounded):
    gate_up, _ = make_stack(1, 17, k=256, n=640, group_size=128)
    down, _ = make_stack(2, 17, k=320, n=256, group_size=64)
    rng = np.random.default_rng(0)
    x, weights = normal(0, 300, 256), rng.uniform(0, 1, (300, 3)).astype(np.float32)
    chosen = np.minimum(rng.integers(0, 17, (300, 3)), rng.integers(0, 17, (300, 3))).astype(np.int32)  # uneven
    with instruction_set(isa):
        together, *others = (
            cpu.experts(
                jnp.asarray(x[:n]), jnp.asarray(chosen[:n]), jnp.asarray(weights[:n]), gate_up, down, None, rounded
            )
            for n in (300, 1, 2, 9, 120)
        )
    for some in others:
        np.testing.assert_array_equal(np.asarray(some), np.asarray(together[: len(some)]))


def test_nobody_s_token_gets_zero_and_a_layer_is_taken_by_number():
    gate_up, _ = make_stack(1, 6, k=32, n=32)
    down, _ = make_stack(2, 6, k=16, n=32)
    layers = jax.tree.map(lambda leaf: leaf.reshape(2, 3, *leaf.shape[1:]), (gate_up, down))
    x, weights = jnp.asarray(normal(0, 2, 32)), jnp.ones((2, 1))
    chosen = jnp.array([[2], [3]], jnp.int32)
    y = cpu.experts(x, chosen, weights, layers[0], layers[1], jnp.int32(1), False)
    alone = cpu.experts(x, chosen, weights, gate_up[3:], down[3:], None, False)
    np.testing.assert_array_equal(np.asarray(y), np.asarray(alone))
    assert float(jnp.abs(y[1]).max()) == 0.0 < float(jnp.abs(y[0]).max())


@pytest.mark.once
@pytest.mark.every_isa
@given(
    tokens=st.integers(1, 9),
    experts=st.integers(1, 130),
    norm=st.booleans(),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(DTYPES),
)
def test_routing_is_that_of_the_portable_router(tokens, experts, norm, seed, dtype):
    top_k = min(experts, 4)
    x, router = normal(seed, tokens, 48), jnp.asarray(normal(seed + 1, 48, experts), dtype)
    expected = plain_route(jnp.asarray(x @ np.asarray(router, np.float32)), top_k, norm)
    for logits, chosen, weights in on_every_isa(lambda: cpu.route(jnp.asarray(x), router, None, top_k, norm)):
        assert_close(logits, expected.logits)
        np.testing.assert_array_equal(chosen, np.asarray(expected.experts))
        assert_close(weights, expected.weights)


def test_ties_go_to_the_smaller_index_and_broken_logits_to_nan():
    x = jnp.ones((4, 1))
    router = jnp.zeros((1, 6))
    _, chosen, weights = cpu.route(x, router, None, 3, True)
    np.testing.assert_array_equal(np.asarray(chosen), [[0, 1, 2]] * 4)
    assert_close(weights, np.full((4, 3), 1 / 3))
    for broken in (jnp.nan, jnp.inf):
        weights = cpu.route(x, router.at[0, 5].set(broken), None, 3, True)[2]
        assert np.isnan(np.asarray(weights)).all()
    _, chosen, weights = cpu.route(x, router.at[0, 0].set(-jnp.inf), None, 3, False)
    np.testing.assert_array_equal(np.asarray(chosen[0]), [1, 2, 3])
    assert_close(weights[0], np.full(3, 0.2))


@pytest.mark.every_isa
@settings(max_examples=6)  # the plain operations compile anew for every shape
@given(
    tokens=st.integers(1, 40),
    share=st.integers(1, 5),
    half=st.integers(1, 40),
    norms=st.booleans(),
    window=st.sampled_from([1, 5, 70, 2**31 - 1]),
    cached=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_attention_is_that_of_the_plain_operations(tokens, share, half, norms, window, cached, seed):
    batch, slots, kv, head = 2, 150, 2, 2 * half
    rng = np.random.default_rng(seed)
    start = rng.integers(0, slots - tokens + 1, batch).astype(np.int32)
    count = np.array([tokens, rng.integers(0, tokens + 1)], np.int32)
    q, k, v = (normal(seed + i, batch, tokens, kv * n * head) for i, n in enumerate((share, 1, 1)))
    cache = [normal(seed + i, 3, batch, slots, kv, head).astype(cached) for i in (3, 4)]
    live = np.arange(slots) < (start + count)[:, None]
    cache[1][:, ~live] = np.nan  # a slot that nobody has written may hold anything
    weights = (normal(seed, head), normal(seed + 1, head)) if norms else None
    positions = start[:, None] + np.arange(tokens, dtype=np.int32)
    inv_freq = (10000.0 ** -(np.arange(half) / half)).astype(np.float32)

    @jax.jit
    def kernel():
        three, two, held, rows = jax.tree.map(jnp.asarray, ((q, k, v), weights, tuple(cache), (start, count)))
        tables = rope_tables(jnp.asarray(positions), jnp.asarray(inv_freq), 1.0)
        given: Any = (*three, two, 1e-6, *tables, held, 1, *rows, jnp.int32(window))
        return cpu.attention(*given)

    @jax.jit
    def plain(keys, values):
        """What the cache should hold of the new tokens, and what they see of this cache."""
        heads = [jnp.asarray(part).reshape(batch, tokens, -1, head) for part in (q, k, v)]
        if weights is not None:
            heads[:2] = [rms_norm(a, jnp.asarray(w), 1e-6) for a, w in zip(heads[:2], weights, strict=True)]
        heads[:2] = [apply_rope(a, jnp.asarray(positions), jnp.asarray(inv_freq)) for a in heads[:2]]
        distance = jnp.asarray(positions[:, :, None] - np.arange(slots, dtype=np.int32))
        seen = [jnp.where(live[..., None, None], a[1].astype(jnp.float32), 0.0) for a in (keys, values)]
        y = plain_attention(heads[0], seen[0], seen[1], (distance >= 0) & (distance < window))
        return [a.astype(cached).astype(jnp.float32) for a in heads[1:]], y.reshape(batch, tokens, -1)

    for y, new in on_every_isa(kernel):
        (keys, values), expected = jax.tree.map(np.asarray, plain(*new))
        for b, real in enumerate(count):
            at = (1, b, slice(start[b], start[b] + real))
            assert_close(new[0][at], keys[b, :real], 1e-2)
            np.testing.assert_array_equal(new[1][at].astype(np.float32), values[b, :real])
            assert_close(y[b, :real], expected[b, :real], 2e-5)
            assert not y[b, real:].any()
        np.testing.assert_array_equal(new[0][[0, 2]], cache[0][[0, 2]])


def test_a_donated_cache_is_written_in_place_and_a_scan_copies_no_weights():
    layers = 3
    w = jax.tree.map(lambda leaf: jnp.stack([leaf] * layers), make_linear(0, k=256, n=256, group_size=64)[0])
    cache = tuple(jnp.zeros((layers, 1, 256, 2, 64)) for _ in range(2))
    zeros, tables = jnp.zeros(1, jnp.int32), (jnp.ones((1, 1, 32)), jnp.zeros((1, 1, 32)))

    def step(x, w, cache):
        def body(carry, layer):
            x, cache = carry
            q = gptq_matmul(x, w, layer=layer, implementation="cpu")
            half = q[..., :128]
            y, cache = cpu.attention(
                q, half, half, None, 0.0, *tables, cache, layer, zeros, zeros + 1, jnp.int32(2**31 - 1)
            )
            return (y, cache), None

        return jax.lax.scan(body, (x, cache), jnp.arange(layers, dtype=jnp.int32))[0]

    x = jnp.ones((1, 1, 256))
    compiled = jax.jit(step, donate_argnums=2).lower(x, w, cache).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 32 * 1024  # a layer's weights are 32 KiB and the cache 768


def test_gradients_are_those_of_the_portable_operations():
    w, _ = make_linear(6, k=64, n=24, act_order=True)
    x = jnp.asarray(normal(0, 5, 64))

    def loss(x, name):
        return (gptq_matmul(x, w, implementation=name) ** 2).sum()

    assert_close(jax.grad(loss)(x, "cpu"), jax.grad(loss)(x, "xla"))


def test_vmap_runs_each_in_turn():
    w, dense = make_linear(7)
    x = jnp.asarray(normal(0, 3, 2, 37))
    assert_close(jax.vmap(functools.partial(gptq_matmul, w=w, implementation="cpu"))(x), np.asarray(x) @ dense)


def test_sixteen_bit_activations_are_rounded_by_default_and_not_where_exactness_is_asked_for():
    w, dense = make_linear(8, k=300)
    x = jnp.asarray(normal(0, 4, 300), jnp.bfloat16)
    exact = np.asarray(x, np.float32) @ dense
    by_name = {name: gptq_matmul(x, w, implementation=name, out_dtype=jnp.float32) for name in cpu.NAMES}
    assert_close(by_name["cpu-exact"], exact)
    np.testing.assert_array_equal(np.asarray(by_name["cpu"]), np.asarray(by_name["cpu-int8"]))
    assert 1e-4 < np.abs(np.asarray(by_name["cpu"]) - exact).max() / np.abs(exact).max() < 3e-2


def test_threads_that_call_at_once_get_their_own_results():
    w, dense = make_linear(9, k=512, n=300)
    xs = [jnp.asarray(normal(i, 6, 512)) for i in range(16)]
    run = jax.jit(lambda x: gptq_matmul(x, w, implementation="cpu-exact"))
    run(xs[0]).block_until_ready()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for x, y in zip(xs * 8, pool.map(run, xs * 8), strict=True):
            assert_close(y, np.asarray(x) @ dense)


@pytest.mark.parametrize(
    ("w", "message"),
    [
        (
            make_linear(0, bits=3)[0],
            r"the CPU kernels take 4 and 8 bits; this weight has 3\. Use implementation=\"xla\"",
        ),
        (
            make_linear(0, group_size=12)[0],
            r"groups of whole words, a multiple of 8 inputs at 4 bits; this weight has groups of 12\. Use",
        ),
        (
            dataclasses.replace(make_linear(0)[0], scales=make_linear(0)[0].scales.astype(jnp.float32)),
            r"the CPU kernels take float16 scales, as files hold them; this weight has float32\. Use",
        ),
    ],
)
def test_a_weight_they_do_not_take_is_refused_by_name_and_taken_by_none(w, message):
    x = jnp.ones((2, 37))
    with pytest.raises(BackendError, match=message):
        gptq_matmul(x, w, implementation="cpu")
    np.testing.assert_array_equal(np.asarray(gptq_matmul(x, w)), np.asarray(gptq_matmul(x, w, implementation="xla")))


def test_a_layer_outside_the_stack_is_an_error_not_a_read():
    w = jax.tree.map(lambda leaf: leaf[None], make_linear(0)[0])
    with pytest.raises(Exception, match="the layer index lies outside the stack"):
        cpu.gptq_matmul(jnp.ones((1, 37)), w, 1, False, "float32").block_until_ready()
