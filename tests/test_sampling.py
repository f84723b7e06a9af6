"""Sampling requests: what is refused, what a plan compiles, and what rows promise each other."""

from __future__ import annotations

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_jax import sampling
from ferrum_jax.errors import RequestError
from ferrum_jax.sampling import SamplerPlan, SamplingParams, init_sampler, sample, sample_step

V = 13

BAD_PARAMS = [
    ({"max_tokens": 0}, "max_tokens is 0; give an integer from 1 to 1048576"),
    ({"max_tokens": True}, r"max_tokens is True \(bool\)"),
    ({"max_tokens": 2.0}, r"max_tokens is 2.0 \(float\)"),
    ({"max_tokens": 10**5000}, "max_tokens is an integer of more than 30 digits"),
    ({"temperature": float("nan")}, "temperature is nan; give a number from 0.001 to 100"),
    ({"temperature": float("inf")}, "temperature is inf"),
    ({"temperature": -1.0}, "temperature is -1.0"),
    ({"temperature": 1e-9}, r"temperature is 1e-09; .*0.0 takes the best token"),
    ({"temperature": "0.5"}, r"temperature is '0.5' \(str\)"),
    ({"temperature": False}, r"temperature is False \(bool\)"),
    ({"top_k": -1}, r"top_k is -1; give an integer from 0 .*0 turns it off"),
    ({"top_p": 0.0}, r"top_p is 0.0; .*use temperature=0.0"),
    ({"top_p": 1.5}, "top_p is 1.5"),
    ({"top_p": 10**400}, "top_p is an integer of more than 30 digits"),
    ({"min_p": -0.1}, r"min_p is -0.1; .*0.0 turns it off"),
    ({"min_p": None}, r"min_p is None \(NoneType\)"),
    ({"repetition_penalty": 0.0}, r"repetition_penalty is 0.0; .*1.0 turns it off"),
    ({"presence_penalty": 2.5}, "presence_penalty is 2.5; give a number from -2 to 2"),
    ({"frequency_penalty": float("-inf")}, "frequency_penalty is -inf"),
    ({"logprobs": 21}, "logprobs is 21; give an integer from 0 to 20"),
    ({"seed": -1}, r"seed is -1; .*None draws a fresh one"),
    ({"seed": 2**64}, "seed is 18446744073709551616"),
    ({"seed": 1.0}, r"seed is 1.0 \(float\)"),
    ({"ignore_eos": 1}, "ignore_eos is 1; give True or False"),
    ({"logit_bias": {3: 101}}, r"logit_bias\[3\] is 101; give a number from -100 to 100"),
    ({"logit_bias": {3: float("nan")}}, r"logit_bias\[3\] is nan"),
    ({"logit_bias": {-3: 1}}, "logit_bias names token -3; token ids start at 0"),
    ({"logit_bias": {"3": 1}}, r"logit_bias names '3' \(str\) as a token"),
    ({"logit_bias": [(3, 1), (3, 2)]}, "logit_bias names a token twice"),
    ({"logit_bias": [3]}, "logit_bias holds something that is not a pair"),
    ({"logit_bias": 3}, "logit_bias is 3; give a mapping"),
    ({"logit_bias": {i: 0.0 for i in range(1025)}}, "logit_bias names 1025 tokens; at most 1024"),
    ({"stop": ""}, "stop holds an empty string"),
    ({"stop": ["a", ""]}, "stop holds an empty string"),
    ({"stop": ["a"] * 17}, "stop holds 17 strings; at most 16"),
    ({"stop": ["a" * 65]}, "stop holds a string of 65 characters; at most 64"),
    ({"stop": [3]}, r"stop holds 3 \(int\); give strings"),
    ({"stop": 3}, "stop is 3; give a string or a list"),
    ({"stop_token_ids": 3}, "stop_token_ids is 3; give a list"),
    ({"stop_token_ids": [True]}, r"stop_token_ids names True \(bool\)"),
    ({"stop_token_ids": [-1]}, "stop_token_ids names token -1"),
    ({"stop_token_ids": list(range(65))}, "stop_token_ids holds 65 ids; at most 64"),
]


@pytest.mark.parametrize(
    ("values", "text"), BAD_PARAMS, ids=[f"{i}-{next(iter(row[0]))}" for i, row in enumerate(BAD_PARAMS)]
)
def test_a_bad_parameter_is_refused_in_a_sentence(values, text):
    with pytest.raises(RequestError, match=text):
        SamplingParams(**values)


@pytest.mark.parametrize(
    ("params", "text"),
    [
        (SamplingParams(logit_bias={V: 1}), f"logit_bias names token {V}, but the vocabulary has {V} tokens"),
        (SamplingParams(stop_token_ids=(99,)), "stop_token_ids names token 99, .*give ids from 0 to 12"),
        (SamplingParams(logprobs=14), "logprobs is 14, but the vocabulary has only 13 tokens"),
    ],
)
def test_what_the_vocabulary_lacks_is_refused(params, text):
    with pytest.raises(RequestError, match=text):
        params.validate(V)


def test_parameters_are_kept_in_one_hashable_form():
    one = SamplingParams(temperature=np.float64(0.5), logit_bias={7: 1, 2: -1.5}, stop="end", stop_token_ids=[4])
    two = SamplingParams(temperature=0.5, logit_bias=((2, -1.5), (7, 1.0)), stop=("end",), stop_token_ids=(4,))
    assert one == two and hash(one) == hash(two)
    assert replace(one, top_k=3).logit_bias == ((2, -1.5), (7, 1.0))


def logits_of(seed: int, rows: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, V)).astype(np.float32) * 2)


def run(requests, logits_per_step, prompts=None):
    """Tokens [steps, B] of a batch that is given the same logits at every call, and the last Sampled."""
    plan = SamplerPlan.of(requests)
    state = init_sampler(requests, V, prompts)
    step = jax.jit(sample_step, static_argnames="plan")
    history = []
    for logits in logits_per_step:
        sampled, state = step(logits, state, plan=plan)
        history.append(sampled)
    return np.stack([sampled.token for sampled in history]), history[-1]


MIXED = [
    SamplingParams(seed=3, temperature=1.0),
    SamplingParams(temperature=0.0),
    SamplingParams(seed=4, temperature=1.5, top_k=5, top_p=0.9),
    SamplingParams(seed=5, temperature=0.7, min_p=0.05, repetition_penalty=1.3),
    SamplingParams(seed=6, temperature=1.0, presence_penalty=1.0, frequency_penalty=0.5, logit_bias={1: 2.0}),
]


def test_a_row_gives_the_same_tokens_alone_and_in_a_batch():
    steps = [logits_of(seed, rows=len(MIXED)) for seed in range(6)]
    prompts = [[1, 2]] * len(MIXED)
    together, _ = run(MIXED, steps, prompts)
    for row, request in enumerate(MIXED):
        alone, _ = run([request], [logits[row : row + 1] for logits in steps], [prompts[row]])
        np.testing.assert_array_equal(alone[:, 0], together[:, row])


def test_the_seed_decides_the_tokens():
    steps = [logits_of(0)] * 12
    same, again = (run([SamplingParams(temperature=2.0, seed=9)], steps)[0] for _ in range(2))
    other = run([SamplingParams(temperature=2.0, seed=2**32 + 9)], steps)[0]
    np.testing.assert_array_equal(same, again)
    assert (same != other).any(), "the high half of the seed counts"
    assert len(set(same[:, 0].tolist())) > 1, "each step draws afresh"


def test_no_seed_draws_a_fresh_one():
    request = SamplingParams(temperature=1.0)
    assert init_sampler([request], V).keys.tolist() != init_sampler([request], V).keys.tolist()


def test_top_k_of_one_and_a_tiny_top_p_are_greedy():
    logits = logits_of(1, rows=2)
    requests = [SamplingParams(temperature=9.0, top_k=1), SamplingParams(temperature=9.0, top_p=1e-6)]
    tokens, _ = run(requests, [logits] * 5)
    np.testing.assert_array_equal(tokens, np.tile(np.argmax(np.asarray(logits), -1), (5, 1)))


def test_draws_follow_the_softmax():
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    rows = 20_000
    logits = jnp.asarray(np.tile(np.log(probabilities), (rows, 1)), jnp.float32)
    tokens = np.asarray(sample(logits, jax.random.key(0)))
    observed = np.bincount(tokens, minlength=4) / rows
    # four standard deviations of a binomial share
    assert (abs(observed - probabilities) < 4 * np.sqrt(probabilities * (1 - probabilities) / rows)).all()


def test_penalties_count_what_was_generated():
    flat = jnp.zeros((1, V), jnp.float32)
    tokens, _ = run([SamplingParams(presence_penalty=1.0)], [flat] * V)
    assert tokens[:, 0].tolist() == list(range(V)), "each token once, the smallest id first"
    tokens, _ = run([SamplingParams(repetition_penalty=2.0)], [flat + 1] * 3, prompts=[[0, 1]])
    assert tokens[:, 0].tolist() == [2, 3, 4], "the prompt's tokens are penalised from the start"


def test_logprobs_are_of_the_untouched_distribution():
    logits = logits_of(2)
    expected = np.asarray(logits, np.float64)[0]
    expected = expected - np.log(np.exp(expected).sum())
    worst = int(expected.argmin())
    request = SamplingParams(temperature=0.5, top_k=1, logit_bias={worst: 100.0}, logprobs=3)
    _, sampled = run([request], [logits])
    assert sampled.token.tolist() == [worst]
    np.testing.assert_allclose(sampled.logprob, expected[[worst]], rtol=1e-5)
    np.testing.assert_array_equal(sampled.top_ids[0], np.argsort(-expected, kind="stable")[:3])
    np.testing.assert_allclose(sampled.top_logprobs[0], np.sort(expected)[::-1][:3], rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_with_non_finite_logits_is_marked_and_leaves_its_neighbour_alone(bad):
    good = logits_of(3)
    requests = [SamplingParams(), SamplingParams(temperature=1.0, seed=1, top_p=0.9)]
    _, sampled = run(requests, [jnp.concatenate([good.at[0, 2].set(bad), good])])
    _, alone = run(requests[1:], [good])
    assert sampled.finite.tolist() == [False, True]
    assert sampled.token[1] == alone.token[0]


def lowered(plan: SamplerPlan, platform: str = "cpu") -> str:
    requests = [SamplingParams(temperature=1.0, seed=1)]
    state = init_sampler(requests, V, [[1]], plan)
    step = jax.jit(sample_step, static_argnames="plan")
    trace = step.trace(jnp.zeros((1, V), jnp.float32), state, plan=plan)
    return trace.lower(lowering_platforms=(platform,)).as_text()


EVERYTHING = SamplerPlan(True, True, True, True, True, True, True, logprobs=5)


def test_a_greedy_plan_compiles_to_an_argmax():
    plan = SamplerPlan.of([SamplingParams(top_k=5, top_p=0.5, min_p=0.1, seed=1)])
    assert plan == SamplerPlan(), "filters cannot change the best token"
    requests = [SamplingParams()]
    state = init_sampler(requests, V)
    text = str(jax.make_jaxpr(lambda x: sample_step(x, state, replace(plan, logprobs=None)))(jnp.zeros((1, V))))
    assert "argmax" in text
    for word in ("while", "scan", "exp", "log", "threefry", "cumsum"):
        assert not re.search(rf"\b{word}", text), word


@pytest.mark.parametrize("platform", ["METAL", "mps"])
def test_every_stage_lowers_for_apple_without_64_bits_and_custom_calls(platform):
    text = lowered(EVERYTHING, platform)
    values = re.findall(r"tensor<([^>]*)>", re.sub(r"<\{.*?\}>", "", text))  # without the attributes of operations
    assert {value.split("x")[-1] for value in values} == {"f32", "i32", "ui32", "i1"}
    operations = set(re.findall(r"hlo\.(\w+)", text))
    assert {"while", "reduce", "bitcast_convert"} <= operations
    assert not operations & {"custom_call", "top_k", "gather", "scatter", "fft", "complex"}


def test_plans_are_hashable_and_name_the_stages_a_batch_needs():
    assert SamplerPlan.of(MIXED) == SamplerPlan(True, True, True, True, True, True, True, logprobs=0)
    assert len({SamplerPlan.of(MIXED), SamplerPlan.of(MIXED), SamplerPlan()}) == 2
    state = init_sampler([SamplingParams(temperature=1.0)], V)
    assert state.bias is None and state.in_prompt is None and state.counts is None, "no memory without a need"


def test_a_larger_plan_gives_the_same_tokens():
    requests = [SamplingParams(temperature=1.0, seed=1, top_k=4)]
    small, _ = run(requests, [logits_of(5)])
    state = init_sampler(requests, V, [[0]], EVERYTHING)
    sampled, _ = jax.jit(sample_step, static_argnames="plan")(logits_of(5), state, plan=EVERYTHING)
    assert sampled.token.tolist() == small[0].tolist()


def test_batches_and_plans_that_disagree_are_refused():
    with pytest.raises(RequestError, match="the batch holds no request"):
        init_sampler([], V)
    with pytest.raises(RequestError, match="plan has random=False, but a request needs random=True"):
        init_sampler([SamplingParams(temperature=1.0)], V, plan=SamplerPlan())
    with pytest.raises(RequestError, match="plan has logprobs=None, but a request needs logprobs=2"):
        init_sampler([SamplingParams(logprobs=2)], V, plan=SamplerPlan(logprobs=None))
    repeat = SamplingParams(repetition_penalty=1.5)
    with pytest.raises(RequestError, match="give the prompts to init_sampler"):
        init_sampler([repeat], V)
    with pytest.raises(RequestError, match="there are 1 requests but 2 prompts"):
        init_sampler([repeat], V, [[1], [2]])
    with pytest.raises(RequestError, match=r"prompt 0 holds token ids from -1 to 13, .*give ids from 0 to 12"):
        init_sampler([repeat], V, [[-1, 13]])
    with pytest.raises(RequestError, match="plan needs the state's bias, which it has not"):
        sample_step(jnp.zeros((1, V)), init_sampler([SamplingParams()], V), SamplerPlan(bias=True))


def test_sample_is_the_stages_in_order():
    logits, key = logits_of(7, rows=4), jax.random.key(5)
    got = sample(logits.reshape(2, 2, V), key, temperature=0.8, top_k=6, top_p=0.8, min_p=0.02)
    column = jnp.ones(4, jnp.float32)
    scores = sampling.apply_temperature(logits, column * 0.8)
    scores = sampling.keep_min_p(scores, column * 0.02)
    scores = sampling.keep_top_p(sampling.keep_top_k(scores, jnp.full(4, 6)), column * 0.8)
    keys = sampling.fold_in(jnp.tile(jax.random.key_data(key), (4, 1)), jnp.arange(4))
    np.testing.assert_array_equal(got.reshape(-1), sampling.sample_token(scores, keys, column))
    assert got.shape == (2, 2) and got.dtype == jnp.int32


def test_sample_takes_arrays_raw_keys_and_half_precision():
    logits, key = logits_of(8, rows=3), jax.random.PRNGKey(1)
    temperature = jnp.array([0.0, 1.0, 2.0])
    got = jax.jit(sample)(logits.astype(jnp.bfloat16), key, temperature=temperature, top_k=jnp.array(4))
    want = sample(logits.astype(jnp.bfloat16), jax.random.key(1), temperature=np.asarray(temperature), top_k=4)
    np.testing.assert_array_equal(got, want)
    assert got[0] == jnp.argmax(logits.astype(jnp.bfloat16)[0])


def test_sample_refuses_bad_numbers_and_keys():
    with pytest.raises(RequestError, match="top_p is 2"):
        sample(logits_of(0), jax.random.key(0), top_p=2)
    with pytest.raises(RequestError, match=r"the key is uint32\[2, 2\]; give one Threefry key"):
        sample(logits_of(0), jax.random.split(jax.random.key(0)))
