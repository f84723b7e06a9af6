"""Generation: stopping, streams, batches, seeds, log-probabilities, capacity; no compilation outside the buckets."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import steps as compiled_steps
from ferrum_jax.buckets import Buckets
from ferrum_jax.checkpoint.load import Model
from ferrum_jax.config import ModelConfig
from ferrum_jax.errors import BackendError, CapacityError, ConfigError, RequestError
from ferrum_jax.generation import Step, Steps, steps_for, stream_batch
from ferrum_jax.sampling import SamplerPlan, SamplingParams, init_sampler
from tests.support.compiling import Compilations

PROMPTS = ["Once upon a time there was a king", "The fox", "In the beginning of the world the old woman said to him"]
NO_PROMPTS: list[Any] = [None, [1, 2.5]]


@pytest.fixture(scope="module")
def model() -> Model:
    return fj.load("demo", dtype="float32", quiet=True)


def tokens(steps: list[Step], row: int = 0) -> list[int]:
    return [step.token for step in steps if step.row == row]


def test_greedy_generation_is_argmax_of_forward(model: Model) -> None:
    steps = list(fj.stream_generate(model, PROMPTS[0], max_tokens=8))
    ids = model.tokenizer.encode(PROMPTS[0])
    padded = np.zeros((1, 32), np.int32)
    forward = jax.jit(fj.forward, static_argnames="cfg")
    for step in steps:
        padded[0, : len(ids)] = ids
        logits = forward(model.params, jnp.asarray(padded), model.cfg)[0, len(ids) - 1]
        assert step.token == int(jnp.argmax(logits))
        assert step.logprob == pytest.approx(float(jax.nn.log_softmax(logits)[step.token]), abs=1e-4)
        ids.append(step.token)
    assert "".join(step.text for step in steps) == model.tokenizer.decode(tokens(steps))
    assert [step.finish_reason for step in steps] == [None] * 7 + ["length"]


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.9, "seed": 5, "top_p": 0.9}, {"repetition_penalty": 1.3, "frequency_penalty": 0.5}],
)
def test_a_batch_gives_each_prompt_what_it_gets_alone(model: Model, options: dict) -> None:
    together = list(stream_batch(model, PROMPTS, max_tokens=12, **options))
    for row, prompt in enumerate(PROMPTS):
        alone = list(fj.stream_generate(model, prompt, max_tokens=12, **options))
        assert tokens(together, row) == tokens(alone)
        np.testing.assert_allclose(
            [step.logprob for step in together if step.row == row], [step.logprob for step in alone], atol=1e-4
        )


def test_each_row_has_its_own_sampling(model: Model) -> None:
    requests = [SamplingParams(max_tokens=3), SamplingParams(max_tokens=7, temperature=1.0, seed=1)]
    steps = list(stream_batch(model, PROMPTS[:2], requests))
    assert [len(tokens(steps, row)) for row in range(2)] == [3, 7]
    assert tokens(steps, 0) == tokens(list(fj.stream_generate(model, PROMPTS[0], requests[0])))
    assert tokens(steps, 1) == tokens(list(fj.stream_generate(model, PROMPTS[1], requests[1])))


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(model: Model) -> None:
    first, again, other = (
        fj.generate(model, PROMPTS[0], max_tokens=16, temperature=1.0, seed=seed) for seed in (11, 11, 12)
    )
    assert first == again != other


def test_a_stop_string_ends_the_text_before_itself(model: Model) -> None:
    whole = fj.generate(model, PROMPTS[0], max_tokens=24)
    stop = whole.split()[3]
    steps = list(fj.stream_generate(model, PROMPTS[0], max_tokens=24, stop=(stop,)))
    assert "".join(step.text for step in steps) == whole[: whole.index(stop)]
    assert steps[-1].finish_reason == "stop"


def test_a_stop_id_ends_the_text_and_is_not_shown(model: Model) -> None:
    whole = tokens(list(fj.stream_generate(model, PROMPTS[0], max_tokens=8)))
    cut = whole.index(whole[4])
    steps = list(fj.stream_generate(model, PROMPTS[0], max_tokens=8, stop_token_ids=(whole[4],)))
    assert tokens(steps) == whole[: cut + 1] and steps[-1].finish_reason == "stop"
    assert "".join(step.text for step in steps) == model.tokenizer.decode(whole[:cut])


def test_end_of_text_stops_unless_it_is_ignored(model: Model) -> None:
    (eos,) = model.cfg.eos_token_ids
    bias = {eos: 100.0}
    (only,) = fj.stream_generate(model, PROMPTS[0], max_tokens=4, logit_bias=bias)
    assert only.token == eos and only.finish_reason == "stop" and only.text == ""
    steps = list(fj.stream_generate(model, PROMPTS[0], max_tokens=4, logit_bias=bias, ignore_eos=True))
    assert tokens(steps) == [eos] * 4 and steps[-1].finish_reason == "length"


def test_alternatives_are_the_best_tokens_with_their_logprobs(model: Model) -> None:
    (step,) = fj.stream_generate(model, PROMPTS[0], max_tokens=1, logprobs=3)
    assert len(step.top_logprobs) == 3
    assert step.top_logprobs[0] == (step.token, pytest.approx(step.logprob))
    values = [value for _, value in step.top_logprobs]
    assert values == sorted(values, reverse=True) and all(value < 0 for value in values)


def test_token_ids_are_a_prompt_too(model: Model) -> None:
    ids = model.tokenizer.encode(PROMPTS[0])
    assert fj.generate(model, [ids], max_tokens=6) == fj.generate(model, PROMPTS[:1], max_tokens=6)


def test_a_long_prompt_is_read_in_pieces(model: Model) -> None:
    ids = (model.tokenizer.encode(PROMPTS[2]) * 8)[:70]
    pieces = list(fj.stream_generate(model, ids, max_tokens=4, buckets=Buckets(prefill=(16, 32))))
    whole = list(fj.stream_generate(model, ids, max_tokens=4, buckets=Buckets(prefill=(96,))))
    assert tokens(pieces) == tokens(whole)


def test_stats_count_and_time(model: Model) -> None:
    steps = list(fj.stream_generate(model, PROMPTS[0], max_tokens=5))
    assert [step.stats.generated_tokens for step in steps] == [1, 2, 3, 4, 5]
    last = steps[-1].stats
    assert last.prompt_tokens == len(model.tokenizer.encode(PROMPTS[0]))
    assert last.first_token_seconds > 0 and last.decode_seconds > 0
    assert last.decode_tokens_per_second == pytest.approx(4 / last.decode_seconds)
    assert steps[0].stats.decode_tokens_per_second == 0.0


def test_nothing_compiles_outside_the_buckets(model: Model) -> None:
    buckets = Buckets(batch=(1, 2), prefill=(16, 32), cache=(64, 128))
    cfg = dataclasses.replace(model.cfg, pad_token_id=7)  # a configuration of its own, so nothing is compiled yet
    mine = dataclasses.replace(model, cfg=cfg)
    for prompts in (PROMPTS[:1], PROMPTS[:2], PROMPTS[1:2], PROMPTS[1:]):
        for length in (3, 5, 20):
            fj.generate(mine, prompts, max_tokens=length, buckets=buckets)
    seen = [(record.step, record.bucket) for record in steps_for(cfg).records()]
    assert len(seen) == len(set(seen))
    assert {bucket for step, bucket in seen if step == "prefill"} <= {(b, t, 64) for b in (1, 2) for t in (16, 32)}
    assert {bucket for step, bucket in seen if step == "decode"} == {(1, 64), (2, 64)}


def test_the_first_token_takes_the_steps_and_one_program_that_makes_the_cache(model: Model) -> None:
    """An operation of its own takes a GPU's host half a millisecond, before anything runs."""
    assert len(list(fj.stream_generate(model, PROMPTS[0], max_tokens=1))) == 1  # the steps are compiled by now
    jax.clear_caches()
    compilations = Compilations()
    assert next(fj.stream_generate(model, PROMPTS[0], max_tokens=2)).finish_reason is None
    assert compilations.count == 1


def shown(steps: list[Step]) -> list[tuple]:
    return [(step.row, step.token, step.text, step.finish_reason) for step in steps]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.9, "seed": 5, "top_k": 40, "logprobs": 2},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"stop": (" the",)},
    ],
)
@pytest.mark.parametrize("ladder", [(4,), (1, 4)])
def test_several_steps_of_one_dispatch_give_the_tokens_of_one(
    model: Model, options: dict, ladder: tuple[int, ...]
) -> None:
    one = list(stream_batch(model, PROMPTS, max_tokens=11, **options))
    several = list(stream_batch(model, PROMPTS, max_tokens=11, buckets=Buckets(steps=ladder), **options))
    assert shown(several) == shown(one)
    np.testing.assert_allclose([step.logprob for step in several], [step.logprob for step in one], atol=1e-5)
    assert [step.stats.generated_tokens for step in several] == [step.stats.generated_tokens for step in one]


def test_rows_end_on_the_device_by_their_own_stop_ids_and_limits(model: Model) -> None:
    whole = tokens(list(fj.stream_generate(model, PROMPTS[0], max_tokens=8)))
    requests = [
        SamplingParams(max_tokens=9, stop_token_ids=(whole[3],)),
        SamplingParams(max_tokens=2),
        SamplingParams(max_tokens=7, stop_token_ids=tuple(range(3000, 3020))),
    ]
    one = list(stream_batch(model, PROMPTS, requests))
    several = list(stream_batch(model, PROMPTS, requests, buckets=Buckets(steps=(4,))))
    assert shown(several) == shown(one)
    assert [step.finish_reason for step in several if step.finish_reason] == ["length", "stop", "length"]


def test_a_row_whose_logits_break_between_two_reads_of_the_host_ends_alone(model: Model) -> None:
    alone = tokens(list(fj.stream_generate(model, PROMPTS[0], max_tokens=9)))
    broken = next(token for token in alone if alone.count(token) == 1 and token != alone[0])
    params = {**model.params, "embed": model.params["embed"].at[broken].set(jnp.nan)}
    params["lm_head"] = model.params["embed"].T
    bad = dataclasses.replace(model, params=params)
    steps = list(stream_batch(bad, PROMPTS[:2], max_tokens=9, buckets=Buckets(steps=(4,))))
    mine = [step for step in steps if step.row == 0]
    assert [step.token for step in mine[:-1]] == alone[: alone.index(broken) + 1]
    assert mine[-1].finish_reason == "nonfinite_logits"
    assert tokens(steps, 1) == tokens(list(fj.stream_generate(model, PROMPTS[1], max_tokens=9)))


def test_edited_parameters_of_another_structure_get_steps_of_their_own(model: Model) -> None:
    steps = Steps(model.cfg)
    plan = SamplerPlan()
    dense = jax.tree.map(fj.dequantize, model.params, is_leaf=lambda node: isinstance(node, fj.PackedLinear))
    assert steps.of(model.params, plan) is steps.of(model.params, plan)
    assert steps.of(dense, plan) is not steps.of(model.params, plan)


def test_a_row_with_broken_logits_ends_and_leaves_the_others_alone(model: Model) -> None:
    broken = model.tokenizer.encode(PROMPTS[1])[-1]
    params = {**model.params, "embed": model.params["embed"].at[broken].set(jnp.nan)}
    # Tied embeddings: the broken row of the output projection would spoil every row, so give it one of its own.
    params["lm_head"] = model.params["embed"].T
    bad = dataclasses.replace(model, params=params)
    steps = list(stream_batch(bad, PROMPTS[:2], max_tokens=4))
    assert [step.finish_reason for step in steps if step.row == 1] == ["nonfinite_logits"]
    assert tokens(steps, 0) == tokens(list(fj.stream_generate(model, PROMPTS[0], max_tokens=4)))
    with pytest.raises(BackendError, match=r"prompt 1 gave logits that are NaN or infinite after 1 tokens\. Try"):
        fj.generate(bad, PROMPTS[:2], max_tokens=4)


def test_the_context_limits_the_answer(model: Model) -> None:
    cfg = dataclasses.replace(model.cfg, max_position=24)
    short = dataclasses.replace(model, cfg=cfg)
    ids = model.tokenizer.encode(PROMPTS[2])[:10]
    steps = list(fj.stream_generate(short, ids, max_tokens=100))
    assert len(steps) == 14 and steps[-1].finish_reason == "length"
    with pytest.raises(CapacityError, match=r"prompt 0 has 24 tokens; this model's context is 24, and the"):
        fj.stream_generate(short, ids * 2 + ids[:4])


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda m: fj.stream_generate(m, ""), "prompt 0 is empty; give at least one token"),
        (lambda m: fj.stream_generate(m, [1, 4096]), "prompt 0 holds token ids 1 to 4096; this model's vocabulary is"),
        (
            lambda m: fj.stream_generate(m, NO_PROMPTS[0]),
            "prompt 0 is None; give a text, or token ids such as [11, 12]",
        ),
        (lambda m: fj.stream_generate(m, NO_PROMPTS[1]), "prompt 0 is [1, 2.5]; give a text, or token ids"),
        (lambda m: fj.generate(m, [5, 6]), "prompt 0 is 5; give a text, or token ids"),
        (lambda m: fj.stream_generate(m, [-1]), "prompt 0 holds token ids -1 to -1; this model's vocabulary is"),
        (lambda m: fj.stream_generate(m, "a", temprature=1.0), "'temprature' is not a sampling value; accepted are"),
        (lambda m: fj.stream_generate(m, "a", SamplingParams(), seed=1), "either as SamplingParams or as keywords"),
        (lambda m: stream_batch(m, "a"), "prompts is one string; give a list of prompts, or use stream_generate"),
        (lambda m: stream_batch(m, ["a"], [SamplingParams()], seed=1), "per prompt or as keywords, not both"),
        (lambda m: stream_batch(m, []), "there are no prompts; give at least one"),
        (lambda m: stream_batch(m, ["a", "b"], [SamplingParams()]), "there are 2 prompts and 1 SamplingParams"),
        (lambda m: fj.stream_generate(m, "a", stop_token_ids=(5000,)), "stop_token_ids names token 5000, but the"),
    ],
)
def test_bad_requests_are_refused_at_the_call(model: Model, call: object, error: str) -> None:
    with pytest.raises(RequestError, match=re.escape(error)):
        call(model)  # pyright: ignore[reportCallIssue]


def test_no_prompts_give_no_texts(model: Model) -> None:
    assert fj.generate(model, []) == []


def test_a_cache_in_int8_continues_alike_and_compiles_under_a_key_of_its_own(model: Model) -> None:
    cfg = dataclasses.replace(model.cfg, pad_token_id=9)  # of its own, as above
    mine = dataclasses.replace(model, cfg=cfg)
    plain = list(fj.stream_generate(mine, PROMPTS[0], max_tokens=4))
    codes = list(fj.stream_generate(mine, PROMPTS[0], max_tokens=4, cache_dtype="int8"))
    assert [step.token for step in plain] == [step.token for step in codes]
    keys = [record.bucket for record in steps_for(cfg).records() if record.step == "prefill"]
    assert [key[3:] for key in keys if isinstance(key, tuple)] == [(), ("int8",)]
    with pytest.raises(ConfigError, match=r"a cache of dtype='int4' is unknown; accepted are .*int8 and None"):
        fj.stream_generate(mine, PROMPTS[0], cache_dtype="int4")


def test_where_xla_attends_no_step_reads_a_piece_of_more_than_512_tokens(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = dataclasses.replace(model.cfg, pad_token_id=12, implementation="xla")  # of its own, as above
    mine = dataclasses.replace(model, cfg=cfg)
    monkeypatch.setattr(Buckets, "widths", lambda self: self.prefill or (16, 1024))
    assert len(list(fj.stream_generate(mine, list(range(11, 51)), max_tokens=1))) == 1
    assert [record.bucket for record in steps_for(cfg).records() if record.step == "prefill"] == [(1, 16, 128)]
    assert fj.Engine(mine, slots=1, pages=8)._buckets.widths() == (16,)


def test_one_and_several_steps_of_a_dispatch_share_one_trace_of_the_model(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = []

    def prefill(params: Any, tokens: Any, lengths: Any, cache: Any, *, cfg: ModelConfig) -> Any:
        traced.append(tokens.shape)
        return fj.prefill(params, tokens, lengths, cache, cfg)

    monkeypatch.setattr(compiled_steps, "prefill", prefill)
    requests = [SamplingParams()]
    plan = SamplerPlan.of(requests)
    given = {
        "params": model.params,
        "going": compiled_steps.going(np.zeros(1, np.int32), [1], [9], [()]),
        "keep": np.ones(1, np.int32),
        "cache": jax.eval_shape(lambda: fj.init_cache(model.cfg, 1, 32)),
        "state": init_sampler(requests, model.cfg.vocab_size, [[]], plan),
    }
    programs = Steps(model.cfg).of(model.params, plan)
    for count in (1, 4):
        programs.decode(count).trace(count, **given)
    assert traced == [(1, 1)]
