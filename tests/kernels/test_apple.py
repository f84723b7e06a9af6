"""The apple implementation lowers, whole steps at a time, to what jax-metal and jax-mps take; on CPU it is right.

`jax.export` lowers for platforms that are not here. Nothing of this has run on Apple hardware.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.config import QuantConfig
from ferrum_jax.sampling import SamplerPlan, SamplingParams, init_sampler, sample_step
from ferrum_kernels import dispatch, grouped_gptq_matmul
from ferrum_kernels.apple import UNROLLED_BLOCKS
from tests.support.close import assert_close
from tests.support.gptq_cases import make_stack
from tests.support.stablehlo import lower, refused

PLATFORMS = ["METAL", "mps"]
BATCH, LENGTH = 2, 16
GREEDY = SamplerPlan.of([SamplingParams()])

CFG = fj.ModelConfig(
    model_type="qwen3_moe", vocab_size=96, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
    intermediate_size=48, num_experts=24, top_k=2, moe_intermediate_size=32, norm_topk_prob=True, max_position=64,
    quant=QuantConfig(group_size=32, sym=False, desc_act=True), dtype="float32", qk_norm=True, implementation="apple",
)  # fmt: skip
MODELS = {
    "asymmetric act-order": CFG,
    "3 bits in bfloat16": dataclasses.replace(
        CFG, dtype="bfloat16", quant=QuantConfig(bits=3, group_size=-1, sym=False), tie_word_embeddings=True
    ),
    "a dense layer and a window": dataclasses.replace(
        CFG, moe_layers=(False, True), sliding_windows=(4, None), quant=QuantConfig(group_size=16)
    ),
}


def decode_and_sample(params, token, cache, state, cfg):
    """One step as generation runs it: logits, the greedy token, the next state."""
    logits, cache = fj.decode_step(params, token, cache, cfg)
    sampled, state = sample_step(logits, state, GREEDY)
    return sampled.token, sampled.logprob, sampled.finite, cache, state


def arguments(cfg: fj.ModelConfig):
    cache = fj.init_cache(cfg, BATCH, LENGTH)
    state = init_sampler([SamplingParams()] * BATCH, cfg.vocab_size)
    return fj.abstract(cfg), cache, state


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", MODELS)
class TestWholeSteps:
    def test_a_decode_step_with_its_greedy_token(self, name, platform):
        params, cache, state = arguments(MODELS[name])
        step = functools.partial(decode_and_sample, cfg=MODELS[name])
        text = lower(step, platform, params, jnp.zeros(BATCH, jnp.int32), cache, state)
        assert refused(text) == set()
        assert "stablehlo.dynamic_slice" in text and "stablehlo.dot_general" in text

    def test_a_prefill(self, name, platform):
        params, cache, _ = arguments(MODELS[name])
        tokens, lengths = jnp.zeros((BATCH, LENGTH), jnp.int32), jnp.full(BATCH, LENGTH, jnp.int32)
        step = functools.partial(fj.prefill, cfg=MODELS[name])
        assert refused(lower(step, platform, params, tokens, lengths, cache)) == set()


@pytest.mark.parametrize("platform", PLATFORMS)
def test_both_forms_of_the_block_loop_lower(platform):
    stack, _ = make_stack(0, 4, bits=3, act_order=True)

    def run(pairs):
        def f(x, stack, ids):
            plan = dispatch(ids, 4, 1)
            return grouped_gptq_matmul(x, stack, plan, implementation="apple")

        return lower(f, platform, jnp.zeros((pairs, 37)), stack, jnp.zeros(pairs, jnp.int32))

    unrolled, looped = run(UNROLLED_BLOCKS), run(UNROLLED_BLOCKS + 1)
    assert refused(unrolled) == refused(looped) == set()
    assert "stablehlo.while" not in unrolled
    assert "stablehlo.while" in looped


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_gradient_with_respect_to_activations_lowers(platform):
    stack, _ = make_stack(0, 4, act_order=True)

    def loss(x, stack):
        return grouped_gptq_matmul(x, stack, dispatch(jnp.arange(4), 4, 1), implementation="apple").sum()

    assert refused(lower(jax.grad(loss), platform, jnp.zeros((4, 37)), stack)) == set()


# jax 0.5 writes top_k as a custom call.
TOP_K = {"stablehlo.custom_call"} if jax.__version__.startswith("0.5.") else {"stablehlo.composite", "chlo.top_k"}
KEY = jax.ShapeDtypeStruct((2,), jnp.uint32)
FLOATS = jax.ShapeDtypeStruct((4, 8), jnp.float32)


def random_bits(key):
    return jax.lax.rng_bit_generator(jnp.concatenate([key, key]), (4,))[1]


@pytest.mark.parametrize(
    ("function", "argument", "found"),
    [
        (lambda x: jax.lax.top_k(x, 2), FLOATS, TOP_K),
        (lambda x: x.at[jnp.arange(2)].set(0.0), FLOATS, {"stablehlo.scatter"}),
        (lambda x: x.astype(jnp.int4), FLOATS, {"i4"}),
        (lambda x: x.astype(jnp.float8_e4m3fn), FLOATS, {"f8E4M3FN"}),
        (jnp.fft.fft, FLOATS, {"stablehlo.fft", "complex<f32>"}),
        (random_bits, KEY, {"stablehlo.rng_bit_generator"}),
        (lambda x: jnp.linalg.cholesky(x[:, :4]), FLOATS, {"stablehlo.cholesky"}),
    ],
    ids=["top_k", "scatter", "int4", "float8", "fft", "rng", "cholesky"],
)
def test_the_check_sees_what_is_not_taken(function, argument, found):
    assert found <= refused(lower(function, "METAL", argument))


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.mark.parametrize("dtype", ["float64", "int64", "uint64"])
def test_the_check_sees_64_bits(x64, dtype):
    text = lower(lambda x: x + x, "mps", jax.ShapeDtypeStruct((4,), dtype))
    assert refused(text) == {{"float64": "f64", "int64": "i64", "uint64": "ui64"}[dtype]}


def test_the_check_sees_dynamic_shapes():
    size = jax.export.symbolic_shape("n")
    assert "dynamic shape" in refused(lower(lambda x: x + 1.0, "mps", jax.ShapeDtypeStruct(size, jnp.float32)))


def test_the_check_sees_the_scatter_of_the_portable_cache():
    cfg = dataclasses.replace(CFG, implementation="xla")
    params, cache, state = arguments(cfg)
    step = functools.partial(decode_and_sample, cfg=cfg)
    text = lower(step, "METAL", params, jnp.zeros(BATCH, jnp.int32), cache, state)
    assert refused(text) == {"stablehlo.scatter"}


def test_the_same_steps_on_cpu_give_the_logits_of_the_portable_path():
    """The goldens hold both against recorded references."""
    params = fj.random_params(CFG)
    tokens = np.random.default_rng(0).integers(0, CFG.vocab_size, (1, 3)).astype(np.int32)

    @functools.partial(jax.jit, static_argnames="cfg")
    def both_steps(params, tokens, cfg):
        cache = fj.init_cache(cfg, 1, LENGTH)
        first, cache = fj.prefill(params, tokens[:, :2], jnp.array([2], jnp.int32), cache, cfg)
        return first, fj.decode_step(params, tokens[:, 2], cache, cfg)[0]

    apple = both_steps(params, tokens, CFG)
    portable = both_steps(params, tokens, dataclasses.replace(CFG, implementation="xla"))
    for one, other in zip(apple, portable, strict=True):
        assert np.abs(other).max() > 0.1
        assert_close(one, other)
