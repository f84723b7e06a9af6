"""Memory is planned in numbers that hold: of weights, caches and steps; what does not fit is refused with them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import budget
from ferrum_jax.buckets import Buckets
from ferrum_jax.budget import buckets_for, plan_memory, step_bytes, token_bytes, weight_bytes
from ferrum_jax.cache import DTYPES
from ferrum_jax.engine import Engine
from ferrum_jax.errors import CapacityError
from ferrum_jax.params import num_bytes
from tests.support.tiny import CONFIGS, tiny_config

CFG = tiny_config()
QWEN3_30B = tiny_config(
    vocab_size=151_936,
    hidden_size=2048,
    num_layers=48,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    intermediate_size=6144,
    num_experts=128,
    top_k=8,
    moe_intermediate_size=768,
    max_position=40_960,
    dtype="bfloat16",
    quant=dataclasses.replace(CFG.quant, group_size=128),  # type: ignore[type-var]
)


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_weights_take_what_they_are_said_to_take(cfg: fj.ModelConfig) -> None:
    assert weight_bytes(cfg) == num_bytes(fj.random_params(cfg))


def test_tiles_are_counted_as_load_lays_them_out() -> None:
    cfg = tiny_config(quant=dataclasses.replace(CFG.quant, group_size=32), implementation="triton", dtype="bfloat16")  # type: ignore[type-var]
    assert weight_bytes(cfg) == num_bytes(fj.random_params(cfg))
    assert weight_bytes(cfg) > weight_bytes(dataclasses.replace(cfg, implementation="xla"))  # padded to whole tiles


@pytest.mark.parametrize("dtype", DTYPES)
def test_caches_take_what_they_are_said_to_take(dtype: str) -> None:
    for cache, tokens in ((fj.init_cache(CFG, 2, 10, dtype), 20), (fj.init_paged_cache(CFG, 2, 3, 4, dtype=dtype), 12)):
        pools = [leaf for leaf in (cache.k, cache.v, cache.k_scale, cache.v_scale) if leaf is not None]
        assert num_bytes(pools) == tokens * token_bytes(CFG, dtype)


def test_the_numbers_of_a_large_model_add_up_without_a_device() -> None:
    before = len(jax.live_arrays())
    plan = plan_memory(QWEN3_30B, 80 * 2**30, rows=64, page=16)
    assert len(jax.live_arrays()) == before
    assert plan.token_bytes == 98_304 and 15 < plan.weight_bytes / 2**30 < 17
    used = plan.weight_bytes + plan.step_bytes + plan.tokens * plan.token_bytes
    assert 80 * 2**30 - 16 * plan.token_bytes < used <= 80 * 2**30
    assert plan.rows(40_960) == plan.pages // 2560 and plan.rows(17) == plan.pages // 2
    codes = plan_memory(QWEN3_30B, 80 * 2**30, rows=64, page=16, dtype="int8")
    assert codes.token_bytes == 2 * 48 * 4 * (128 + 4) and codes.tokens > 1.9 * plan.tokens
    small = plan_memory(QWEN3_30B, 8 * 2**30)
    assert (small.cache_bytes, small.pages, small.tokens, small.rows(1)) == (0, 0, 0, 0)


def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    plan = plan_memory(QWEN3_30B, 24 * 2**30, rows=8, length=4096, temporary_bytes=2**30)
    plan.check(plan.pages)
    with pytest.raises(CapacityError) as caught:
        plan.check(1_000_000)
    text = str(caught.value)
    assert text.startswith("a cache of 1000000 tokens needs 91.55 GiB; the device has 24.00 GiB free, ")
    assert "after 15." in text or "after 16." in text
    assert f"GiB for the parameters, 1.00 GiB for steps: {plan.tokens} tokens fit. Ask for fewer tokens" in text


def test_generation_refuses_before_it_allocates(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fj.load("demo", dtype="float32", quiet=True)
    monkeypatch.setattr(budget, "free_memory", lambda: 3 * 2**20)
    before = len(jax.live_arrays())
    with pytest.raises(CapacityError, match=r"a cache of 2048 tokens needs 0\.02 GiB; the device has 0\.00 GiB free"):
        list(fj.stream_generate(model, "The fox", max_tokens=2000, buckets=Buckets(prefill=(16,))))
    assert len(jax.live_arrays()) == before
    monkeypatch.setattr(budget, "free_memory", lambda: None)  # a device that does not say is taken at its word
    assert len(list(fj.stream_generate(model, "The fox", max_tokens=2))) == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_estimate_of_a_step_is_near_what_the_compiler_says(dtype: str) -> None:
    model = fj.load("demo", dtype=dtype, quiet=True)
    engine = Engine(model, slots=4, pages=64, buckets=Buckets(batch=(4,), prefill=(64,), cache=(512,)))
    engine.submit("The fox", max_tokens=2)
    list(engine.run())
    told: dict[Any, int | None] = {record.step: record.temp_bytes for record in engine.records}
    if told["decode"] is None:
        pytest.skip("this backend does not say")
    for name, width in (("decode", 1), ("read", 64)):
        estimate = step_bytes(model.cfg, 4, width, 512, paged=True)
        assert 0.7 < estimate / np.float64(told[name]) < 6  # older compilers take less
    memory = engine.memory
    assert memory is not None and memory.step_bytes >= max(told["decode"], told["read"] or 0)


@pytest.mark.parametrize(
    ("changes", "dtype", "widest"),
    [
        ({"implementation": "triton"}, None, 4096),
        ({"implementation": "triton"}, "int8", 4096),
        ({"implementation": "triton"}, "float32", 512),
        ({"implementation": "triton", "head_dim": 48}, None, 512),
        ({"implementation": "xla"}, None, 512),
    ],
)
def test_where_xla_attends_its_scores_are_counted_and_prompts_are_read_in_smaller_pieces(
    changes: dict[str, Any], dtype: str | None, widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = dataclasses.replace(QWEN3_30B, **changes)
    short, long = (step_bytes(cfg, 1, 512, length, dtype=dtype) for length in (16, 8192))
    assert (long > short + 512 * 8192 * cfg.num_heads * 4) == (widest == 512)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert buckets_for(cfg, None, dtype).widest(1) == widest
    assert buckets_for(cfg, None, dtype, most=1024).widths()[-1] == min(widest, 1024)
    given = Buckets(prefill=(16, 2048))
    assert buckets_for(cfg, given, dtype, most=1024) is given


def test_an_engine_plans_for_the_piece_that_its_smallest_batch_reads() -> None:
    model = fj.load("demo", quiet=True)
    engine = Engine(model, slots=6, pages=64, buckets=Buckets(batch=(4, 8), prefill=(64,), cache=(512,)))
    memory = engine.memory
    if memory is None:
        pytest.skip("the system does not say what is free")
    read, decode = step_bytes(model.cfg, 4, 64, 512, paged=True), step_bytes(model.cfg, 8, 1, 512, paged=True)
    assert memory.step_bytes >= max(read, decode)
