"""A request on the host: its prompt as ids, where its answer ends, and what each token says."""

from __future__ import annotations

import dataclasses
import operator
import os
import reprlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ferrum_jax.errors import CapacityError, RequestError
from ferrum_jax.sampling import Sampled, SamplingParams
from ferrum_jax.stopping import StopText

if TYPE_CHECKING:
    from ferrum_jax.checkpoint.load import Model


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


def request_of(sampling: SamplingParams | None, options: dict[str, Any]) -> SamplingParams:
    """SamplingParams as given, or of keyword arguments.

    Raises:
      RequestError: both are given, or a keyword is unknown or out of range.
    """
    if sampling is not None and options:
        raise RequestError("give sampling values either as SamplingParams or as keywords, not both.")
    known = {field.name for field in dataclasses.fields(SamplingParams)}
    if unknown := sorted(options.keys() - known):
        raise RequestError(f"{unknown[0]!r} is not a sampling value; accepted are {', '.join(sorted(known))}.")
    return sampling or SamplingParams(**options)


def token_ids(model: Model, prompt: Prompt, name: str = "the prompt") -> list[int]:
    """A prompt as ids.

    Args:
      model: its tokenizer and vocabulary.
      prompt: a text, or ids.
      name: what errors call it.

    Raises:
      RequestError: it is neither, is empty, or holds an id outside the vocabulary.
    """
    try:
        ids = model.tokenizer.encode(prompt) if isinstance(prompt, str) else list(map(operator.index, prompt))
    except TypeError as error:
        raise RequestError(f"{name} is {reprlib.repr(prompt)}; give a text, or token ids such as [11, 12].") from error
    if not ids:
        raise RequestError(f"{name} is empty; give at least one token, such as the first word.")
    low, high, vocab = min(ids), max(ids), model.cfg.vocab_size
    if low < 0 or high >= vocab:
        raise RequestError(f"{name} holds token ids {low} to {high}; this model's vocabulary is 0 to {vocab - 1}.")
    return ids


def limit_of(prompt: list[int], sampling: SamplingParams, context: int) -> int:
    """Most tokens an answer can have: as many as asked for, or as the context leaves room for.

    Raises:
      CapacityError: the prompt fills the context.
    """
    if len(prompt) >= context:
        raise CapacityError(
            f"the prompt has {len(prompt)} tokens; there is room for {context}, and the answer needs some of it. "
            f"Shorten the prompt."
        )
    return min(sampling.max_tokens, context - len(prompt))


def seeded(sampling: SamplingParams) -> SamplingParams:
    """The request with a seed of its own, so that reading it a second time draws the same tokens."""
    if sampling.seed is not None or sampling.temperature == 0:
        return sampling
    return dataclasses.replace(sampling, seed=int.from_bytes(os.urandom(8)))


class Answer:
    """The text of one request as its tokens come.

    Attributes:
      count: tokens so far.
      limit: most tokens.
      stops: ids that end it.
    """

    def __init__(self, model: Model, sampling: SamplingParams, limit: int) -> None:
        """Nothing has come yet.

        Args:
          model: its tokenizer, and its end-of-text ids.
          sampling: the request.
          limit: most tokens.
        """
        end = () if sampling.ignore_eos else model.cfg.eos_token_ids or model.tokenizer.eos_token_ids
        self.count, self.limit = 0, limit
        self._alternatives = sampling.logprobs
        self.stops = frozenset(sampling.stop_token_ids) | frozenset(end)
        self._text = StopText(model.tokenizer.stream(), tuple(sampling.stop))

    def take(self, host: Sampled, place: int, stats: Stats, row: int) -> Step:
        """The next token.

        Args:
          host: what the sampler gave, as numpy arrays.
          place: the request's row in it.
          stats: of the request, this token included.
          row: the number that the Step carries.

        Returns:
          Step; with a finish_reason it is the last.
        """
        self.count += 1
        token = int(host.token[place])
        known: dict[str, Any] = {"token": token, "stats": stats, "row": row}
        known["logprob"] = float("nan") if host.logprob is None else float(host.logprob[place])
        if self._alternatives and host.top_ids is not None and host.top_logprobs is not None:
            best = zip(host.top_ids[place], host.top_logprobs[place], strict=True)
            known["top_logprobs"] = tuple((int(i), float(value)) for i, value in best)[: self._alternatives]
        if not host.finite[place]:
            return Step(text=self._text.flush(), finish_reason="nonfinite_logits", **known)
        if token in self.stops:
            return Step(text=self._text.flush(), finish_reason="stop", **known)
        piece = self._text.push(token)
        if self._text.stopped:
            return Step(text=piece, finish_reason="stop", **known)
        if self.count == self.limit:
            return Step(text=piece + self._text.flush(), finish_reason="length", **known)
        return Step(text=piece, finish_reason=None, **known)
