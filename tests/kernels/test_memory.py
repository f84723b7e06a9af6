"""Work and temporary memory of the grouped matmul: the live experts' share, however many experts there are."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_kernels import MixedStack, PackedLinear, apple, dispatch, grouped_gptq_matmul, xla
from ferrum_kernels.bits import words_for
from ferrum_kernels.blocks import max_blocks
from tests.support.close import assert_close, normal
from tests.support.gptq_cases import make_stack
from tests.support.hlo import arrays_made

KD, N, GROUP, P, BLOCK = 128, 64, 32, 4, 2
WEIGHT = 4 * KD * N  # bytes of one dequantised expert
FEW, MANY, LAYERS = 7, 61, 3  # primes: no other axis of these programs has such a size


def abstract_stack(*lead: int) -> PackedLinear:
    def struct(shape, dtype):
        return jax.ShapeDtypeStruct((*lead, *shape), dtype)

    return PackedLinear(
        qweight=struct((words_for(KD, 4), N), jnp.uint32),
        scales=struct((KD // GROUP, N), jnp.float16),
        qzeros=struct((KD // GROUP, words_for(N, 4)), jnp.uint32),
        perm=struct((KD,), jnp.int32),
        group_size=GROUP,
        shape=(KD, N),
    )


@functools.cache
def compiled(implementation: str, experts: int, layers: int | None = None) -> Any:
    rows = max_blocks(P, experts, BLOCK) * BLOCK

    def one_layer(x, stack, ids):
        return grouped_gptq_matmul(x, stack, dispatch(ids, experts, BLOCK), implementation=implementation)

    def scan_layers(x, stack, ids):
        plan = dispatch(ids, experts, BLOCK)

        def body(total, layer):
            return total + grouped_gptq_matmul(x, stack, plan, layer=layer, implementation=implementation), None

        return jax.lax.scan(body, jnp.zeros((rows, N)), jnp.arange(layers or 0, dtype=jnp.int32))[0]

    x, ids = jax.ShapeDtypeStruct((rows, KD), jnp.float32), jax.ShapeDtypeStruct((P,), jnp.int32)
    stack = abstract_stack(experts) if layers is None else abstract_stack(layers, experts)
    return jax.jit(one_layer if layers is None else scan_layers).lower(x, stack, ids).compile()


def temporary(program) -> int:
    return program.memory_analysis().temp_size_in_bytes


def test_portable_memory_is_one_expert_and_its_rows():
    rows = 4 * max_blocks(P, MANY, BLOCK) * BLOCK * (KD + N)
    for experts, layers in ((FEW, None), (MANY, None), (MANY, LAYERS)):
        assert temporary(compiled("xla", experts, layers)) <= WEIGHT + rows + 64 * experts


def test_apple_memory_is_one_expert_per_unrolled_block():
    blocks = max_blocks(P, MANY, BLOCK)
    for experts, layers in ((FEW, None), (MANY, None), (MANY, LAYERS)):
        assert temporary(compiled("apple", experts, layers)) <= blocks * 1.25 * WEIGHT


@pytest.mark.parametrize("implementation", ["xla", "apple"])
def test_memory_grows_neither_with_experts_nor_with_layers(implementation):
    """The few bytes per expert are counts and indices."""
    few = temporary(compiled(implementation, FEW))
    assert temporary(compiled(implementation, MANY)) - few <= 64 * (MANY - FEW)
    assert temporary(compiled(implementation, MANY, LAYERS)) - few <= 64 * (MANY - FEW) + 4096 * 2


def stack_sized(text: str, experts: int, layers: int) -> list:
    """Arrays made with an axis of experts in front of a matrix: copies and conversions of a whole stack."""
    leads = {(experts,), (layers, experts), (layers * experts,)}
    return [made for made in arrays_made(text) if made.shape[:-2] in leads]


@pytest.mark.parametrize("layers", [None, LAYERS])
@pytest.mark.parametrize("implementation", ["xla", "apple"])
def test_the_compiled_program_makes_nothing_of_the_stack_s_size(implementation, layers):
    text = compiled(implementation, MANY, layers).as_text()
    assert "ragged" not in text
    assert stack_sized(text, MANY, LAYERS) == []


def test_the_search_finds_a_stack_that_is_converted():
    """Negative control: the reference dequantises every expert."""
    text = compiled("reference", FEW).as_text()
    assert stack_sized(text, FEW, LAYERS)
    assert temporary(compiled("reference", FEW)) > FEW * WEIGHT


def config(experts: int) -> fj.ModelConfig:
    return fj.ModelConfig(
        model_type="qwen3_moe", vocab_size=96, hidden_size=64, num_layers=LAYERS, num_heads=4, num_kv_heads=2,
        head_dim=16, intermediate_size=32, num_experts=experts, top_k=2, moe_intermediate_size=32, max_position=16,
        quant=fj.config.QuantConfig(group_size=32, sym=False, desc_act=True), dtype="float32", qk_norm=True,
    )  # fmt: skip


@functools.cache
def compiled_decode(experts: int, implementation: str) -> Any:
    cfg = dataclasses.replace(config(experts), implementation=implementation)
    cache = jax.eval_shape(lambda: fj.init_cache(cfg, batch=1, length=16))
    step = jax.jit(fj.decode_step, static_argnames="cfg", donate_argnames="cache")
    return step.lower(fj.abstract(cfg), jax.ShapeDtypeStruct((1,), jnp.int32), cache, cfg=cfg).compile()


@pytest.mark.parametrize("implementation", ["xla", "apple"])
def test_a_decode_step_copies_no_stack(implementation):
    few, many = (compiled_decode(experts, implementation) for experts in (FEW, MANY))
    assert stack_sized(many.as_text(), MANY, LAYERS) == []
    assert "ragged" not in many.as_text()
    # The router's [64, E] weights and logits of one layer are all that grows.
    assert temporary(many) - temporary(few) <= (MANY - FEW) * (2 * 4 * 64 + 128)
    one_layer_of_experts = MANY * 4 * 3 * 64 * 32
    assert temporary(many) < one_layer_of_experts / 10


@pytest.fixture
def dequantised(monkeypatch):
    """(layer, expert) of each weight that is dequantised while a program runs; the layer is -1 where there is none."""
    seen = []
    original = xla.expert_weight

    def counting(stack, layer, index, dtype):
        jax.debug.callback(lambda *at: seen.append(tuple(map(int, at))), -1 if layer is None else layer, index)
        return original(stack, layer, index, dtype)

    monkeypatch.setattr(xla, "expert_weight", counting)
    monkeypatch.setattr(apple, "expert_weight", counting)
    return seen


# Shapes of this group (K = 48) are of no other test, so that no program compiled without the counter is reused.
MADE, DENSE = make_stack(5, 11, k=48, n=16, act_order=True)
IDS = np.array([9, 2, 2, 9, 2, 11, -1, 2], np.int32)


def run(implementation, stack, ids, layer=None):
    def program(x, stack):
        plan = dispatch(jnp.asarray(ids), 11, BLOCK)
        rows = x[jnp.minimum(plan.rows, x.shape[0] - 1)]
        return plan, grouped_gptq_matmul(rows, stack, plan, layer=layer, implementation=implementation)

    plan, y = jax.jit(program)(normal(0, ids.size, 48), stack)
    jax.effects_barrier()
    return np.append(np.asarray(y), np.zeros((1, 16), np.float32), 0)[np.asarray(plan.slots)]


def products(ids, dense):
    x = normal(0, ids.size, 48)
    return np.stack([x[i] @ dense[e] if 0 <= e < 11 else np.zeros(16) for i, e in enumerate(ids)])


def test_each_live_expert_is_dequantised_once(dequantised):
    assert_close(run("xla", MADE, IDS), products(IDS, DENSE))
    assert sorted(dequantised) == [(-1, 2), (-1, 9)]


def test_each_block_of_an_apple_program_reads_one_live_expert(dequantised):
    assert_close(run("apple", MADE, IDS), products(IDS, DENSE))
    assert set(dequantised) == {(-1, 2), (-1, 9)}
    assert len(dequantised) == max_blocks(IDS.size, 11, BLOCK)


def test_a_long_apple_program_stops_at_the_last_live_block(dequantised):
    ids = np.append(np.full(30, 3), np.full(10, 11)).astype(np.int32)
    assert max_blocks(ids.size, 11, BLOCK) > apple.UNROLLED_BLOCKS
    assert_close(run("apple", MADE, ids), products(ids, DENSE))
    assert dequantised == [(-1, 3)] * 15


def test_nobody_is_dequantised_for_nothing(dequantised):
    run("xla", MADE, np.full(8, 11, np.int32))
    assert dequantised == []


@pytest.mark.parametrize("implementation", ["xla", "apple"])
def test_only_the_layer_asked_for_is_read(dequantised, implementation):
    layers = jax.tree.map(lambda leaf: jnp.stack([jnp.zeros_like(leaf), leaf]), MADE)
    assert_close(run(implementation, layers, IDS, layer=1), products(IDS, DENSE))
    assert set(dequantised) == {(1, 2), (1, 9)}


def test_only_the_part_that_holds_an_expert_is_read(dequantised):
    """Experts 0 to 5 are packed, 6 to 10 plain: expert 2 is place 2 of the first part, 9 is place 3 of the second."""
    stack = MixedStack((MADE[:6], jnp.asarray(DENSE[6:])), (tuple(range(6)), tuple(range(6, 11))))
    assert_close(run("xla", stack, IDS), products(IDS, DENSE))
    assert sorted(dequantised) == [(-1, 2), (-1, 3)]


@pytest.mark.parametrize("implementation", ["xla", "apple"])
def test_a_dead_expert_s_numbers_are_never_used(implementation):
    dead = np.setdiff1d(np.arange(11), IDS)
    poisoned = dataclasses.replace(MADE, scales=MADE.scales.at[dead].set(jnp.nan))
    assert_close(run(implementation, poisoned, IDS), products(IDS, DENSE))
