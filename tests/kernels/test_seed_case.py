"""The parity case of ferrum-infer-rs: its inputs bit for bit, its layer to 1e-5, bucketed against pair by pair.

The case stores zero points minus one and draws all sixteen codes, so a stored 15 means 16 to its own reader, which
does not fit four bits; a GPTQ file means 0 by it, with a carry into the next field. Both readings are held here: the
first with codes widened to 8 bits, the second as the words stand.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.moe import run_experts
from ferrum_kernels import GptqTensors, PackedLinear, batched_expert_matmul, dequantize, from_gptq
from tests.support import seed_case
from tests.support.checkpoint_writer import pack_fields
from tests.support.close import assert_close
from tests.support.numpy_reader import silu, softmax, unpack_fields, zero_points

EXPERTS, INTER, TOP_K = seed_case.EXPERTS, seed_case.INTER, seed_case.TOP_K
case = functools.cache(seed_case.draw_case)


def jump(seed: int, n: int) -> int:
    """Draw number n in closed form: a**n * s + c * (a**n - 1) / (a - 1) modulo 2**64."""
    a, c = seed_case.MULTIPLIER, seed_case.INCREMENT
    power = pow(a, n, (a - 1) << 64)
    return (power * seed + c * ((power - 1) // (a - 1))) % 2**64 >> 33


def test_the_generator_follows_its_definition():
    stream = seed_case.draws(0xA)
    first = [next(stream) for _ in range(400)]
    assert first[:4] == [0x439C82A1, 0x16E27232, 0x04914B63, 0x1BDD33E6]
    assert [first[n - 1] for n in (1, 17, 400)] == [jump(0xA, n) for n in (1, 17, 400)]


def test_inputs_are_bit_for_bit_those_of_the_seed():
    one = case().gate_up[0]
    assert one.qweight[0, :2].tolist() == [0x439C82A1, 0x16E27232]
    assert one.qweight[7, 63] == jump(0xA, 512)
    np.testing.assert_array_equal(
        one.scales[0, :3], np.array([0.09751864522695541, 0.02137039415538311, 0.0961214005947113], np.float32)
    )
    assert unpack_fields(one.qzeros, 4, 64)[0, :3].tolist() == [11, 13, 10]
    assert unpack_fields(one.qzeros, 4, 64)[1, 63] == jump(0xA, 512 + 128 + 128) % 16
    assert case().down[3].qweight[0, 0] == jump(0xB + 3, 1)
    np.testing.assert_array_equal(
        case().x[0, :3], np.array([-0.5896451473236084, 0.45068347454071045, 0.3265957832336426], np.float32)
    )
    np.testing.assert_array_equal(
        case().logits[0],
        np.array([0.7835547924041748, -1.3515465259552002, 1.268216609954834, -1.297976016998291], np.float32),
    )
    last = np.float32(jump(0xC0FFEE, 340) % 2**24) / np.float32(2**24)
    assert case().logits[4, 3] == np.float32(-2) + last * np.float32(4)
    assert case().x.dtype == case().logits.dtype == one.scales.dtype == np.float32


def stored_fields(t: seed_case.SeedTensors) -> tuple[np.ndarray, np.ndarray]:
    k, n = 8 * t.qweight.shape[0], t.qweight.shape[1]
    return unpack_fields(t.qweight.T, 4, k).T, unpack_fields(t.qzeros, 4, n)


def dense(t: seed_case.SeedTensors, reading: str) -> np.ndarray:
    """float64 [K, N] in the reading of the seed (stored + 1) or of a file (word-wide)."""
    codes, stored = stored_fields(t)
    zeros = stored + 1 if reading == "seed" else zero_points(t.qzeros, 4, codes.shape[1], 1)
    group = np.arange(len(codes)) // seed_case.GROUP
    return (codes - zeros[group]) * t.scales.astype(np.float64)[group]


def packed(matrices: tuple[seed_case.SeedTensors, ...], reading: str) -> PackedLinear:
    def one(t: seed_case.SeedTensors) -> PackedLinear:
        if reading == "file":
            return from_gptq(GptqTensors(t.qweight, t.qzeros, t.scales), 4, seed_case.GROUP)
        codes, stored = stored_fields(t)
        wide = GptqTensors(np.ascontiguousarray(pack_fields(codes.T, 8).T), pack_fields(stored + 1, 8), t.scales)
        return from_gptq(wide, 8, seed_case.GROUP, "gptq_v2")

    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(one, matrices))


def test_the_readings_differ_where_fifteen_is_stored():
    t = case().gate_up[0]
    _, stored = stored_fields(t)
    differs = (dense(t, "seed") != dense(t, "file")).any(0)
    assert differs[(stored == 15).any(0)].all()
    assert differs.sum() < 64


@functools.cache
def pair_by_pair(reading: str) -> np.ndarray:
    """Each token visits its experts one at a time, in float64."""
    x, probabilities = case().x.astype(np.float64), softmax(case().logits.astype(np.float64))
    out = np.zeros_like(x)
    for t, row in enumerate(x):
        chosen = np.argsort(-probabilities[t], kind="stable")[:TOP_K]
        for e in chosen:
            gate, up = np.split(row @ dense(case().gate_up[e], reading), 2)
            weight = probabilities[t, e] / probabilities[t, chosen].sum()
            out[t] += weight * ((silu(gate) * up) @ dense(case().down[e], reading))
    return out


def config(implementation: str) -> fj.ModelConfig:
    return fj.ModelConfig(
        model_type="qwen3_moe", vocab_size=8, hidden_size=seed_case.HIDDEN, num_layers=1, num_heads=2, num_kv_heads=2,
        head_dim=32, intermediate_size=INTER, num_experts=EXPERTS, top_k=TOP_K, moe_intermediate_size=INTER,
        norm_topk_prob=True, dtype="float32", implementation=implementation,
    )  # fmt: skip


@pytest.mark.parametrize("reading", ["seed", "file"])
def test_weights_are_read_exactly(reading):
    for matrices in (case().gate_up, case().down):
        exact = np.stack([dense(t, reading) for t in matrices]).astype(np.float32)
        np.testing.assert_array_equal(jax.jit(dequantize)(packed(matrices, reading)), exact)


@pytest.mark.parametrize("reading", ["seed", "file"])
@pytest.mark.parametrize("implementation", ["xla", "apple"])
class TestParity:
    def test_route_dispatch_experts_combine(self, implementation, reading):
        experts = {"gate_up": packed(case().gate_up, reading), "down": packed(case().down, reading)}

        @functools.partial(jax.jit, static_argnames="cfg")
        def layer(experts, x, logits, cfg):
            routing = fj.route(logits, cfg.top_k, cfg.norm_topk_prob)
            plan = fj.dispatch(routing.experts, cfg.num_experts)
            return fj.combine(run_experts(experts, x, plan, cfg), plan, routing.weights)

        y = layer(experts, case().x, case().logits, config(implementation))
        assert_close(y, pair_by_pair(reading), 1e-5)

    def test_batched_dispatches_into_dirty_buffers(self, implementation, reading):
        routing = fj.route(jnp.asarray(case().logits), TOP_K, norm_topk_prob=True)
        pair_expert = np.asarray(routing.experts).reshape(-1)
        order = np.argsort(pair_expert, kind="stable")
        counts = np.bincount(pair_expert, minlength=EXPERTS)
        starts = np.cumsum(counts) - counts
        # The seed runs the busiest expert first.
        batch = [
            (int(e), int(starts[e]), int(starts[e]), int(counts[e]))
            for e in np.argsort(-counts, kind="stable")
            if counts[e]
        ]

        def dirty(columns: int) -> jax.Array:
            return jnp.where(jnp.arange(len(order) * columns) % 2 == 0, 7.0, -11.0).reshape(len(order), columns)

        run = functools.partial(batched_expert_matmul, implementation=implementation)
        h = run(jnp.asarray(case().x[order // TOP_K]), packed(case().gate_up, reading), batch, dirty(2 * INTER))
        gate, up = jnp.split(h, 2, axis=-1)
        rows = run(jax.nn.silu(gate) * up, packed(case().down, reading), batch, dirty(seed_case.HIDDEN))
        pairs = np.asarray(rows)[np.argsort(order)].reshape(seed_case.BATCH, TOP_K, -1)
        assert_close((pairs * np.asarray(routing.weights)[..., None]).sum(1), pair_by_pair(reading), 1e-5)
