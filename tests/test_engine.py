"""The engine: everyone gets what they get alone, whoever joins, leaves, gives way or breaks beside them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import engine as engines
from ferrum_jax import engine_steps
from ferrum_jax.buckets import Buckets
from ferrum_jax.checkpoint.load import Model
from ferrum_jax.config import ModelConfig
from ferrum_jax.engine import Engine, Event
from ferrum_jax.errors import CapacityError, ConfigError, FerrumError, RequestError
from ferrum_jax.sampling import SamplerPlan
from tests.support.compiling import Compilations

BUCKETS = Buckets(batch=(1, 2, 4), prefill=(16, 32), cache=(64, 128))
PAGES = 12  # 48 tokens, less than three of the sequences below come to
PROMPTS = [
    "Once upon a time there was a king",
    "The fox",
    "In the beginning of the world the old woman said to him",
    "A",
    "She was walking in the wood when she met a wolf, and the wolf said to her",
]
WAYS: list[dict[str, Any]] = [
    {"max_tokens": 12},
    {"max_tokens": 9, "temperature": 0.9, "seed": 5, "top_p": 0.9},
    {"max_tokens": 14},
    {"max_tokens": 8, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"max_tokens": 11, "temperature": 1.0, "seed": 9, "logprobs": 2, "logit_bias": {7: 2.0}},
]


@pytest.fixture(scope="module")
def model() -> Model:
    return fj.load("demo", dtype="float32", quiet=True)


@pytest.fixture(scope="module")
def alone(model: Model) -> list[list[int]]:
    return [
        [step.token for step in fj.stream_generate(model, prompt, **way)]
        for prompt, way in zip(PROMPTS, WAYS, strict=True)
    ]


def make(model: Model, **changes: Any) -> Engine:
    return Engine(model, **({"slots": 3, "pages": PAGES, "page": 4, "buckets": BUCKETS} | changes))


def tokens(events: list[Event], id: int) -> list[int]:
    return [step.token for number, step in events if number == id]


@pytest.mark.parametrize("overlap", [False, True])
def test_everyone_gets_what_they_get_alone(model: Model, alone: list[list[int]], overlap: bool) -> None:
    engine, events, ids, most = make(model, overlap=overlap), [], [], 0
    for prompt, way in zip(PROMPTS, WAYS, strict=True):  # each joins while others are under way
        ids.append(engine.submit(prompt, **way))
        events += engine.step() + engine.step()
        most = max(most, engine.load.running)
    events += engine.run()
    assert [tokens(events, id) for id in ids] == alone
    assert most == 3 and engine.idle and engine.load.free_pages == PAGES


@pytest.mark.parametrize("overlap", [False, True])
def test_who_gives_its_pages_up_says_the_same_in_the_end(model: Model, alone: list[list[int]], overlap: bool) -> None:
    engine = make(model, overlap=overlap)
    ids = [engine.submit(prompt, **way) for prompt, way in zip(PROMPTS, WAYS, strict=True)]
    events = list(engine.run())
    assert engine.load.preemptions > 0
    assert [tokens(events, id) for id in ids] == alone
    assert engine.load.free_pages == PAGES


def test_int8_pages_say_what_contiguous_int8_says(model: Model) -> None:
    engine = make(model, cache_dtype="int8", plans=(SamplerPlan(),))
    ids = [engine.submit(PROMPTS[place], max_tokens=8) for place in (0, 2)]
    events = list(engine.run())
    prefill, decode = (jax.jit(function, static_argnames="cfg") for function in (fj.prefill, fj.decode_step))
    for id, place in zip(ids, (0, 2), strict=True):
        prompt = jnp.asarray([model.tokenizer.encode(PROMPTS[place])])
        cache = fj.init_cache(model.cfg, 1, 64, dtype="int8")
        logits, cache = prefill(model.params, prompt, jnp.array(prompt.shape[1:]), cache, cfg=model.cfg)
        said = [int(logits.argmax())]
        while len(said) < 8:
            logits, cache = decode(model.params, jnp.array(said[-1:]), cache, cfg=model.cfg)
            said.append(int(logits.argmax()))
        assert tokens(events, id) == said


def test_a_step_says_what_a_stream_says(model: Model) -> None:
    options: dict[str, Any] = {"max_tokens": 10, "logprobs": 3, "stop": ("and",)}
    streamed = list(fj.stream_generate(model, PROMPTS[0], **options))
    engine = make(model)
    id = engine.submit(PROMPTS[0], **options)
    steps = [step for number, step in engine.run() if number == id]
    assert [(s.text, s.token, s.finish_reason) for s in steps] == [(s.text, s.token, s.finish_reason) for s in streamed]
    np.testing.assert_allclose([s.logprob for s in steps], [s.logprob for s in streamed], atol=1e-4)
    assert [[i for i, _ in s.top_logprobs] for s in steps] == [[i for i, _ in s.top_logprobs] for s in streamed]
    assert [s.row for s in steps] == [id] * len(steps)
    last = steps[-1].stats
    assert (last.prompt_tokens, last.generated_tokens) == (streamed[-1].stats.prompt_tokens, len(steps))
    assert last.first_token_seconds > 0 and last.decode_seconds > 0


def test_a_long_prompt_does_not_keep_the_others_waiting(model: Model) -> None:
    engine = make(model, pages=64, plans=(SamplerPlan(),))
    talking = engine.submit(PROMPTS[0], max_tokens=40)
    while not tokens(engine.step(), talking):
        pass
    ids = (model.tokenizer.encode(PROMPTS[2]) * 10)[:100]
    late = engine.submit(ids, max_tokens=3)
    for _ in range(3):  # 32, 32 and 32 of its 100 tokens
        events = engine.step()
        assert len(tokens(events, talking)) == 1 and not tokens(events, late)
    events = engine.step()
    assert len(tokens(events, talking)) == 1 and len(tokens(events, late)) >= 1
    rest = events + list(engine.run())
    assert tokens(rest, late) == [step.token for step in fj.stream_generate(model, ids, max_tokens=3)]


def test_nothing_compiles_outside_the_table_and_a_step_has_the_bucket_of_who_is_there(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = dataclasses.replace(model.cfg, pad_token_id=9)  # a configuration of its own, so nothing is compiled yet
    buckets = Buckets(batch=(1, 2), prefill=(16,), cache=(32, 64))
    greedy = SamplerPlan()
    engine = make(dataclasses.replace(model, cfg=cfg), slots=2, buckets=buckets, plans=(greedy,), pages=32)
    engine.submit("A", max_tokens=2)
    assert engine.warm_up() == 2 * (2 + 1) == len(engine.records) - 1  # a decode each, a read alone, and the admission
    stats = list(engine.run())[-1].step.stats
    assert 0 < stats.compile_seconds <= sum(record.seconds for record in engine.records)  # several at a time
    assert stats.first_token_seconds > 0 and stats.decode_seconds > 0
    compilations, seen = Compilations(), []
    run = engine._steps.decode

    def watched(plan: SamplerPlan, params: Any, control: np.ndarray, state: Any) -> Any:
        seen.append(control.shape)
        return run(plan, params, control, state)

    monkeypatch.setattr(engine._steps, "decode", watched)
    for length in (3, 9, 30):
        engine.submit(PROMPTS[0], max_tokens=length)
        engine.submit(PROMPTS[1], max_tokens=2 * length)
        engine.cancel(engine.submit(PROMPTS[2], max_tokens=2))
        list(engine.run())
    assert compilations.count == 0 and len(engine.records) == 7
    assert {rows for rows, _ in seen} == {1, 2} and {columns for _, columns in seen} == {4 + 8, 4 + 16}
    assert seen[0] == (1, 4 + 8) and seen[-1] == (1, 4 + 16)


def test_a_ladder_of_batches_that_begins_above_one_is_compiled_whole_too(model: Model) -> None:
    cfg = dataclasses.replace(model.cfg, pad_token_id=10)  # of its own, as above
    buckets = Buckets(batch=(2,), prefill=(16,), cache=(32,))
    plans = (SamplerPlan(),)
    engine = make(dataclasses.replace(model, cfg=cfg), slots=2, buckets=buckets, plans=plans, pages=8)
    assert engine.warm_up() == 2 == len(engine.records) - 1
    engine.submit("A", max_tokens=2)
    assert len(list(engine.run())) == 2 and len(engine.records) == 3


def test_plans_share_one_trace_of_the_model(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, traced = dataclasses.replace(model.cfg, pad_token_id=12), []  # of its own, as above

    def prefill(params: Any, tokens: Any, lengths: Any, cache: Any, *, cfg: ModelConfig) -> Any:
        traced.append(tokens.shape)
        return fj.prefill(params, tokens, lengths, cache, cfg)

    monkeypatch.setattr(engine_steps, "prefill", prefill)
    buckets, plans = Buckets(batch=(1,), prefill=(16,), cache=(32,)), (SamplerPlan(), SamplerPlan(random=True))
    engine = make(dataclasses.replace(model, cfg=cfg), slots=1, buckets=buckets, plans=plans, pages=8)
    assert engine.warm_up() == 2 * 2 and sorted(traced) == [(1, 1), (1, 16)]


def test_lengths_that_fill_the_same_pages_are_one_program(model: Model) -> None:
    cfg = dataclasses.replace(model.cfg, pad_token_id=11)  # of its own, as above
    buckets, plans = Buckets(batch=(1,), prefill=(16,), cache=(32, 64)), (SamplerPlan(),)
    engine = make(dataclasses.replace(model, cfg=cfg), slots=1, buckets=buckets, plans=plans, pages=2, page=64)
    assert engine.warm_up() == 2 == len(engine.records) - 1


def poison(engine: Engine, id: int) -> None:
    pages = np.array(engine._schedule.pages.owned(id))
    state = engine._state
    engine._state = dataclasses.replace(state, k=state.k.at[:, pages].set(jnp.nan), v=state.v.at[:, pages].set(jnp.nan))


def test_a_broken_cache_ends_its_sequence_alone(model: Model, alone: list[list[int]]) -> None:
    engine = make(model)
    good, bad = engine.submit(PROMPTS[0], max_tokens=12), engine.submit(PROMPTS[2], max_tokens=14)
    events = engine.step() + engine.step() + engine.step()
    poison(engine, bad)
    events += engine.step()
    (last,) = [step for id, step in events if id == bad and step.finish_reason]
    assert last.finish_reason == "nonfinite_logits" and last.stats.generated_tokens > 2
    assert engine.load.running == 1
    later = engine.submit(PROMPTS[2], max_tokens=14)  # takes the pages that hold NaN
    events += engine.run()
    assert tokens(events, good) == alone[0] and tokens(events, later) == alone[2]


def test_a_broken_embedding_ends_those_who_use_it(model: Model, alone: list[list[int]]) -> None:
    broken = model.tokenizer.encode(PROMPTS[1])[-1]
    params = {**model.params, "embed": model.params["embed"].at[broken].set(jnp.nan)}
    params["lm_head"] = model.params["embed"].T  # tied, the broken row would spoil everyone's logits
    engine = make(dataclasses.replace(model, params=params), overlap=True)
    bad, good = engine.submit(PROMPTS[1], max_tokens=5), engine.submit(PROMPTS[0], max_tokens=12)
    events = list(engine.run())
    assert [step.finish_reason for id, step in events if id == bad] == ["nonfinite_logits"]
    assert tokens(events, good) == alone[0]


def test_cancelling_frees_pages_and_silences(model: Model, alone: list[list[int]]) -> None:
    engine = make(model, overlap=True)
    kept, dropped = engine.submit(PROMPTS[0], max_tokens=12), engine.submit(PROMPTS[2], max_tokens=14)
    queued = [engine.submit(prompt, max_tokens=5) for prompt in PROMPTS[1:3]]
    events = engine.step() + engine.step()
    before = engine.load.free_pages
    assert engine.cancel(dropped) and engine.cancel(queued[1])
    assert engine.load.free_pages > before and not engine.cancel(dropped)
    events = engine.step()
    assert not tokens(events, dropped)
    engine.cancel(queued[0])
    rest = list(engine.run())
    assert {id for id, _ in rest} == {kept} and engine.load.free_pages == PAGES
    with pytest.raises(RequestError, match=r"no request has the id 9; ids so far are 0 to 3"):
        engine.cancel(9)
    with pytest.raises(RequestError, match=r"no request has the id 0; none was submitted so far"):
        make(model).cancel(0)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("where", ["launching", "landing"])
def test_an_interrupted_step_loses_no_token(
    model: Model, alone: list[list[int]], overlap: bool, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(model, overlap=overlap)
    ids = [engine.submit(prompt, **way) for prompt, way in zip(PROMPTS[:2], WAYS[:2], strict=True)]
    events = engine.step() + engine.step()

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "launching":
            patch.setattr(engine._steps, "decode", interrupted)
        else:
            patch.setattr(jax, "device_get", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    for _ in range(40):
        events += engine.step()
    assert engine.idle and [tokens(events, id) for id in ids] == alone[:2]


def test_plans_of_requests_that_share_a_step_are_served_together(model: Model) -> None:
    drawn, biased = SamplerPlan(random=True), SamplerPlan(bias=True)
    with pytest.raises(
        ConfigError, match=r"no plan serves .* in one step; add SamplerPlan\(bias=True, repetition=False"
    ):
        make(model, plans=(drawn, biased))
    engine = make(model, plans=(SamplerPlan(),))
    with pytest.raises(ConfigError, match=r"SamplerPlan\(bias=True.*\) is none of the plans that this engine was made"):
        engine.warm_up((biased,))


@pytest.mark.parametrize(
    ("prompt", "options", "error", "text"),
    [
        ("", {}, RequestError, "the prompt is empty; give at least one token"),
        ([1, 4096], {}, RequestError, "the prompt holds token ids 1 to 4096; this model's vocabulary is 0 to 4095"),
        ("a", {"temprature": 1.0}, RequestError, "'temprature' is not a sampling value; accepted are"),
        ("a", {"stop_token_ids": (5000,)}, RequestError, "stop_token_ids names token 5000, but the"),
        (
            [5] * 128,
            {},
            CapacityError,
            "the prompt has 128 tokens; there is room for 128, and the answer needs some of",
        ),
        ([5] * 40, {"max_tokens": 9}, CapacityError, "a prompt of 40 tokens and an answer of up to 9 need 12 pages of"),
        ("a", {"presence_penalty": 1.0}, RequestError, "the request needs presence_frequency; this engine has"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_runs(
    model: Model, prompt: Any, options: dict[str, Any], error: type[FerrumError], text: str
) -> None:
    engine = make(model, pages=11, plans=(SamplerPlan(),))
    with pytest.raises(error, match=re.escape(text)):
        engine.submit(prompt, **options)
    assert engine.idle and engine.submit("a", max_tokens=1) == 0


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(CapacityError) as caught:
        call()
    return str(caught.value)


def test_a_cache_that_does_not_fit_is_refused_with_the_numbers(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "free_memory", lambda: 200 * 2**20)
    before = len(jax.live_arrays())
    text = refused(lambda: make(model, pages=10_000))
    assert len(jax.live_arrays()) == before
    assert re.search(
        r"a cache of 40000 tokens needs 0\.46 GiB; the device has 0\.20 GiB free, 0\.1\d GiB of them for", text
    )
    assert re.search(
        r"for the sampler, 0\.\d\d GiB for steps: \d+ tokens fit\. Ask for fewer tokens or rows, hold", text
    )
    engine = Engine(model, slots=64, buckets=Buckets(cache=(256,), prefill=(16,)))
    assert 0 < engine.load.pages * 16 * 12288 < 100 * 2**20  # half of what is free
    monkeypatch.setattr(engines, "free_memory", lambda: 2**20)
    assert ": 0 tokens fit" in refused(lambda: make(model, pages=None))


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"slots": 0}, ConfigError, r"slots=0 and page=4 must both be at least 1"),
        ({"pages": 0}, CapacityError, r"a pool of 0 pages holds nothing"),
        ({"slots": 5}, CapacityError, r"batch size 5 is beyond the largest bucket, 4; extend Buckets\.batch"),
        ({"plans": ()}, ConfigError, r"plans is empty; give at least SamplerPlan\(\)"),
        ({"cache_dtype": "fp8"}, ConfigError, r"a cache of dtype='fp8' is unknown; accepted are"),
    ],
)
def test_engines_of_no_use_are_refused(model: Model, changes: Any, error: type[FerrumError], text: str) -> None:
    with pytest.raises(error, match=text):
        make(model, **changes)
