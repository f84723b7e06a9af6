"""Text from a model: batches of prompts through bucketed steps, streamed as it comes.

On a GPU a dispatch is several steps, and the next one is queued before the last one's tokens are read, so that the
device never waits for the host. Rows end on the device by stop ids, limits and logits that are not finite; a stop
string ends a row on the host, and what the device has sampled past it is dropped.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ferrum_jax.buckets import Buckets
from ferrum_jax.budget import buckets_for, check_cache
from ferrum_jax.cache import KVCache, init_cache
from ferrum_jax.cache import cache_dtype as dtype_of_cache
from ferrum_jax.checkpoint.load import Model
from ferrum_jax.config import ModelConfig
from ferrum_jax.errors import BackendError, CapacityError, RequestError
from ferrum_jax.requests import Answer, request_of, token_ids
from ferrum_jax.requests import Prompt as Prompt
from ferrum_jax.requests import Stats as Stats
from ferrum_jax.requests import Step as Step
from ferrum_jax.sampling import Sampled, SamplerPlan, SamplingParams, init_sampler
from ferrum_jax.steps import Ahead, cache_kind, going
from ferrum_jax.steps import Steps as Steps
from ferrum_jax.steps import steps_for as steps_for


def stream_generate(
    model: Model,
    prompt: Prompt,
    sampling: SamplingParams | None = None,
    *,
    buckets: Buckets | None = None,
    cache_dtype: Any = None,
    **options: Any,
) -> Iterator[Step]:
    """Continue one prompt, token by token.

    Args:
      model: from load.
      prompt: a text, or token ids. A chat goes through `ferrum_jax.chat.render` first.
      sampling: SamplingParams, or give its fields as keyword arguments.
      buckets: sizes to compile for.
      cache_dtype: of keys and values, a float or "int8", which is half of bfloat16's memory; None means cfg.dtype.
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
    request = request_of(sampling, options)
    # Checked here, not at the first next(): an error belongs to the call that caused it.
    batch = _Batch.start(model, [prompt], [request], buckets_for(model.cfg, buckets, cache_dtype), cache_dtype)
    return batch.steps()


def stream_batch(
    model: Model,
    prompts: Sequence[Prompt],
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    buckets: Buckets | None = None,
    cache_dtype: Any = None,
    **options: Any,
) -> Iterator[Step]:
    """Continue several prompts together; like stream_generate, with `Step.row` saying whose token it is.

    Args:
      model: from load.
      prompts: texts or token ids, of any lengths.
      sampling: one SamplingParams for all or one per prompt, or give fields as keyword arguments.
      buckets: sizes to compile for.
      cache_dtype: of keys and values, a float or "int8", which is half of bfloat16's memory; None means cfg.dtype.
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
        requests = [request_of(sampling, options)] * len(prompts)
    return _Batch.start(model, prompts, requests, buckets_for(model.cfg, buckets, cache_dtype), cache_dtype).steps()


def generate(
    model: Model,
    prompts: Prompt | Sequence[Prompt],
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    buckets: Buckets | None = None,
    cache_dtype: Any = None,
    **options: Any,
) -> Any:
    """Continue prompts and return the texts.

    Args:
      model: from load.
      prompts: a list of prompts, or one prompt.
      sampling: SamplingParams for all or per prompt, or give fields as keyword arguments.
      buckets: sizes to compile for.
      cache_dtype: of keys and values, a float or "int8", which is half of bfloat16's memory; None means cfg.dtype.
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
    for step in stream_batch(model, batch, sampling, buckets=buckets, cache_dtype=cache_dtype, **options):
        if step.finish_reason == "nonfinite_logits":
            raise BackendError(
                f"prompt {step.row} gave logits that are NaN or infinite after {step.stats.generated_tokens} tokens. "
                f"Try dtype='float32'; if it stays, the weights are broken."
            )
        texts[step.row] += step.text
    return texts[0] if isinstance(prompts, str) else texts


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty(cfg: ModelConfig, batch: int, slots: int, dtype: Any) -> tuple[KVCache, jax.Array]:
    """A cache and logits of nothing, in one dispatch."""
    return init_cache(cfg, batch, slots, dtype), jnp.zeros((batch, cfg.vocab_size), jnp.float32)


@dataclasses.dataclass
class _Batch:
    """One run of the host loop; the only mutable thing here."""

    model: Model
    prompts: list[list[int]]
    requests: list[SamplingParams]
    limits: list[int]
    buckets: Buckets
    cache_dtype: Any
    began: float

    @staticmethod
    def start(
        model: Model, prompts: Sequence[Prompt], requests: list[SamplingParams], buckets: Buckets, cache_dtype: Any
    ) -> _Batch:
        if not prompts:
            raise RequestError("there are no prompts; give at least one.")
        if len(requests) != len(prompts):
            raise RequestError(f"there are {len(prompts)} prompts and {len(requests)} SamplingParams; give one each.")
        ids = [token_ids(model, prompt, f"prompt {row}") for row, prompt in enumerate(prompts)]
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
        dtype = dtype_of_cache(model.cfg, cache_dtype)
        return _Batch(model, ids, requests, limits, buckets, dtype, time.perf_counter())

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

        widest = self.buckets.widest(batch)
        check_cache(cfg, batch, slots, min(widest, max(map(len, prompts))), self.cache_dtype)
        cache, logits = _empty(cfg, batch, slots, self.cache_dtype)
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        kind, start = cache_kind(cfg, cache), 0
        while start < lengths.max():
            width = self.buckets.fit("prefill", min(int(lengths.max()) - start, widest))
            tokens = np.zeros((batch, width), np.int32)
            for row, prompt in enumerate(prompts):
                piece = prompt[start : start + width]
                tokens[row, : len(piece)] = piece
            count = np.clip(lengths - start, 0, width).astype(np.int32)
            logits, cache = programs.prefill(
                (batch, width, slots, *kind), params=params, tokens=tokens, lengths=count, cache=cache, logits=logits
            )
            start += width
        # Made while a device that runs beside the host reads the prompts.
        state = init_sampler(requests, cfg.vocab_size, prompts, plan)
        sampled, state = programs.sample((batch,), logits=logits, state=state)

        answers = [Answer(self.model, *request) for request in zip(self.requests, self.limits, strict=True)]
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
                    step = answers[row].take(one, row, stats, row)
                    active[row] = step.finish_reason is None
                    yield step
            if not active.any():
                return
            if ahead is None:
                on_device = going(sampled.token, active.copy(), left, [answer.stops for answer in answers])
                ahead = Ahead(programs, params, on_device, cache, state, self.buckets.steps_of_dispatch())
            ahead.fill(active, left)
            found = ahead.take()
