"""Text from a model: batches of prompts through bucketed steps, streamed as it comes.

On a GPU a dispatch is several steps, and the next one is queued before the last one's tokens are read, so that the
device never waits for the host. Rows end on the device by stop ids, limits and logits that are not finite; a stop
string ends a row on the host, and what the device has sampled past it is dropped.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ferrum_jax.buckets import Buckets
from ferrum_jax.budget import check_cache
from ferrum_jax.cache import init_cache
from ferrum_jax.checkpoint.load import Model
from ferrum_jax.errors import BackendError, CapacityError, RequestError
from ferrum_jax.sampling import Sampled, SamplerPlan, SamplingParams, init_sampler
from ferrum_jax.steps import Ahead, going
from ferrum_jax.steps import Steps as Steps
from ferrum_jax.steps import steps_for as steps_for
from ferrum_jax.stopping import StopText

Prompt = str | Sequence[int]


@dataclasses.dataclass(frozen=True, slots=True)
class Stats:
    """Counts and times of one request so far.

    Attributes:
      prompt_tokens: tokens read.
      generated_tokens: tokens sampled, the end-of-text token included.
      first_token_seconds: from the call to the first token, compilation left out.
      decode_seconds: from the first token to the latest, compilation left out.
      compile_seconds: spent on compiling, or on reading compiled programs from disk.
    """

    prompt_tokens: int
    generated_tokens: int
    first_token_seconds: float
    decode_seconds: float
    compile_seconds: float

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens over the time to the first token."""
        return self.prompt_tokens / max(self.first_token_seconds, 1e-9)

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first over their time; 0.0 before there are any."""
        return (self.generated_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One token of one row.

    Attributes:
      text: what became certain with this token; empty while a character or a possible stop string is incomplete.
      token: its id.
      logprob: its log-probability under the model's own distribution.
      finish_reason: None while going on, "stop" (end of text, stop id or stop string), "length" (max_tokens or the
        context is full) or "nonfinite_logits" (the model broke; this row's last token means nothing).
      stats: counts and times.
      top_logprobs: (id, log-probability) of the best alternatives, as many as SamplingParams.logprobs asks for.
      row: index of the prompt in the batch.
    """

    text: str
    token: int
    logprob: float
    finish_reason: str | None
    stats: Stats
    top_logprobs: tuple[tuple[int, float], ...] = ()
    row: int = 0


def stream_generate(
    model: Model,
    prompt: Prompt,
    sampling: SamplingParams | None = None,
    *,
    buckets: Buckets | None = None,
    **options: Any,
) -> Iterator[Step]:
    """Continue one prompt, token by token.

    Args:
      model: from load.
      prompt: a text, or token ids. A chat goes through `ferrum_jax.chat.render` first.
      sampling: SamplingParams, or give its fields as keyword arguments.
      buckets: sizes to compile for.
      **options: fields of SamplingParams, such as max_tokens=64, temperature=0.7, seed=1.

    Yields:
      Step per token; the last one has a finish_reason. The texts joined are the whole text.

    Raises:
      RequestError: the prompt is empty or holds ids outside the vocabulary, or a sampling value is out of range.
      CapacityError: the prompt fills the model's context.

    >>> import ferrum_jax as fj
    >>> steps = list(fj.stream_generate(fj.load("demo"), "Once upon a time", max_tokens=3))
    >>> len(steps), steps[-1].finish_reason
    (3, 'length')
    """
    request = _request(sampling, options)
    # Checked here, not at the first next(): an error belongs to the call that caused it.
    batch = _Batch.start(model, [prompt], [request], buckets or Buckets())
    return batch.steps()


def stream_batch(
    model: Model,
    prompts: Sequence[Prompt],
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    buckets: Buckets | None = None,
    **options: Any,
) -> Iterator[Step]:
    """Continue several prompts together; like stream_generate, with `Step.row` saying whose token it is.

    Args:
      model: from load.
      prompts: texts or token ids, of any lengths.
      sampling: one SamplingParams for all or one per prompt, or give fields as keyword arguments.
      buckets: sizes to compile for.
      **options: fields of SamplingParams for all prompts.

    Yields:
      Step per token and row. A row's tokens are those it gets alone.

    Raises:
      RequestError, CapacityError: as stream_generate.
    """
    if isinstance(prompts, str):
        raise RequestError("prompts is one string; give a list of prompts, or use stream_generate for one.")
    if isinstance(sampling, Sequence):
        if options:
            raise RequestError("give sampling values either as SamplingParams per prompt or as keywords, not both.")
        requests = list(sampling)
    else:
        requests = [_request(sampling, options)] * len(prompts)
    return _Batch.start(model, prompts, requests, buckets or Buckets()).steps()


def generate(
    model: Model,
    prompts: Prompt | Sequence[Prompt],
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    buckets: Buckets | None = None,
    **options: Any,
) -> Any:
    """Continue prompts and return the texts.

    Args:
      model: from load.
      prompts: a list of prompts, or one prompt.
      sampling: SamplingParams for all or per prompt, or give fields as keyword arguments.
      buckets: sizes to compile for.
      **options: fields of SamplingParams.

    Returns:
      A list of texts without their prompts, or one text for a single string.

    Raises:
      RequestError, CapacityError: as stream_generate.
      BackendError: the model gave logits that are not finite.

    >>> import ferrum_jax as fj
    >>> len(fj.generate(fj.load("demo"), ["The fox", "Once upon a time there was"], max_tokens=2))
    2
    """
    batch: Sequence[Any] = [prompts] if isinstance(prompts, str) else prompts
    texts = [""] * len(batch)
    if not texts:
        return []
    for step in stream_batch(model, batch, sampling, buckets=buckets, **options):
        if step.finish_reason == "nonfinite_logits":
            raise BackendError(
                f"prompt {step.row} gave logits that are NaN or infinite after {step.stats.generated_tokens} tokens. "
                f"Try dtype='float32'; if it stays, the weights are broken."
            )
        texts[step.row] += step.text
    return texts[0] if isinstance(prompts, str) else texts


def _request(sampling: SamplingParams | None, options: dict[str, Any]) -> SamplingParams:
    if sampling is not None and options:
        raise RequestError("give sampling values either as SamplingParams or as keywords, not both.")
    known = {field.name for field in dataclasses.fields(SamplingParams)}
    if unknown := sorted(options.keys() - known):
        raise RequestError(f"{unknown[0]!r} is not a sampling value; accepted are {', '.join(sorted(known))}.")
    return sampling or SamplingParams(**options)


@dataclasses.dataclass
class _Batch:
    """One run of the host loop; the only mutable thing here."""

    model: Model
    prompts: list[list[int]]
    requests: list[SamplingParams]
    limits: list[int]
    buckets: Buckets
    began: float

    @staticmethod
    def start(model: Model, prompts: Sequence[Prompt], requests: list[SamplingParams], buckets: Buckets) -> _Batch:
        if len(requests) != len(prompts):
            raise RequestError(f"there are {len(prompts)} prompts and {len(requests)} SamplingParams; give one each.")
        ids = [_token_ids(model, prompt, row) for row, prompt in enumerate(prompts)]
        context = model.cfg.max_position
        for row, prompt in enumerate(ids):
            if len(prompt) >= context:
                raise CapacityError(
                    f"prompt {row} has {len(prompt)} tokens; this model's context is {context}, and the answer needs "
                    f"room too. Shorten the prompt."
                )
        for request in requests:
            request.validate(model.cfg.vocab_size)
        limits = [min(request.max_tokens, context - len(prompt)) for request, prompt in zip(requests, ids, strict=True)]
        return _Batch(model, ids, requests, limits, buckets, time.perf_counter())

    def steps(self) -> Iterator[Step]:
        cfg, params, rows = self.model.cfg, self.model.params, len(self.prompts)
        batch = self.buckets.fit("batch", rows)
        longest = max(len(prompt) + limit for prompt, limit in zip(self.prompts, self.limits, strict=True))
        slots = min(self.buckets.fit("cache", longest), cfg.max_position)
        plan = SamplerPlan.of(self.requests)
        padding = batch - rows
        requests, prompts = self.requests + [SamplingParams()] * padding, self.prompts + [[]] * padding
        programs = steps_for(cfg).of(params, plan)
        compiled_before = programs.compile_seconds()

        widest = self.buckets.prefill[-1]
        check_cache(cfg, batch, slots, min(widest, max(map(len, prompts))))
        state = init_sampler(requests, cfg.vocab_size, prompts, plan)
        cache = init_cache(cfg, batch, slots)
        logits = jnp.zeros((batch, cfg.vocab_size), jnp.float32)
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        start = 0
        while start < lengths.max():
            width = self.buckets.fit("prefill", min(int(lengths.max()) - start, widest))
            tokens = np.zeros((batch, width), np.int32)
            for row, prompt in enumerate(prompts):
                piece = prompt[start : start + width]
                tokens[row, : len(piece)] = piece
            count = np.clip(lengths - start, 0, width).astype(np.int32)
            logits, cache = programs.prefill(
                (batch, width, slots), params=params, tokens=tokens, lengths=count, cache=cache, logits=logits
            )
            start += width
        sampled, state = programs.sample((batch,), logits=logits, state=state)

        texts = [StopText(self.model.tokenizer.stream(), tuple(request.stop)) for request in self.requests]
        stops = [self._stop_ids(request) for request in self.requests]
        active = np.array([1] * rows + [0] * padding, np.int32)
        left = np.array([limit - 1 for limit in self.limits] + [0] * padding, np.int32)
        found: Sampled | None = jax.tree.map(lambda leaf: leaf[None], jax.device_get(sampled))
        ahead, count, first, before = None, 0, 0.0, 0.0
        while found is not None:
            compiling = programs.compile_seconds() - compiled_before
            elapsed = time.perf_counter() - self.began - compiling
            if ahead is not None:
                ahead.took(len(found.token), elapsed - before)
            first, before = first or elapsed, elapsed
            for i in range(len(found.token)):
                count += 1
                one = jax.tree.map(lambda leaf, i=i: leaf[i], found)
                for row in map(int, np.flatnonzero(active[:rows])):
                    stats = Stats(len(self.prompts[row]), count, first, elapsed - first, compiling)
                    step = self._row(row, one, texts[row], stops[row], count, stats)
                    active[row] = step.finish_reason is None
                    yield step
            if not active.any():
                return
            if ahead is None:
                on_device = going(sampled.token, active.copy(), left, stops)
                ahead = Ahead(programs, params, on_device, cache, state, self.buckets.steps_of_dispatch())
            ahead.fill(active, left)
            found = ahead.take()

    def _stop_ids(self, request: SamplingParams) -> frozenset[int]:
        end = self.model.cfg.eos_token_ids or self.model.tokenizer.eos_token_ids
        return frozenset(request.stop_token_ids) | frozenset(() if request.ignore_eos else end)

    def _row(self, row: int, host: Sampled, text: StopText, stops: frozenset[int], count: int, stats: Stats) -> Step:
        token, request = int(host.token[row]), self.requests[row]
        logprob = float(host.logprob[row])  # pyright: ignore[reportOptionalSubscript]
        top: tuple[tuple[int, float], ...] = ()
        if request.logprobs and host.top_ids is not None and host.top_logprobs is not None:
            best = zip(host.top_ids[row], host.top_logprobs[row], strict=True)
            top = tuple((int(i), float(value)) for i, value in best)[: request.logprobs]
        if not host.finite[row]:
            return Step(text.flush(), token, logprob, "nonfinite_logits", stats, top, row)
        if token in stops:
            return Step(text.flush(), token, logprob, "stop", stats, top, row)
        piece = text.push(token)
        if text.stopped:
            return Step(piece, token, logprob, "stop", stats, top, row)
        if count == self.limits[row]:
            return Step(piece + text.flush(), token, logprob, "length", stats, top, row)
        return Step(piece, token, logprob, None, stats, top, row)


def _token_ids(model: Model, prompt: Prompt, row: int) -> list[int]:
    if isinstance(prompt, str):
        ids = model.tokenizer.encode(prompt)
    else:
        ids = [int(token) for token in prompt]
    if not ids:
        raise RequestError(f"prompt {row} is empty; give at least one token, such as the first word.")
    low, high, vocab = min(ids), max(ids), model.cfg.vocab_size
    if low < 0 or high >= vocab:
        raise RequestError(
            f"prompt {row} holds token ids {low} to {high}; this model's vocabulary is 0 to {vocab - 1}."
        )
    return ids
