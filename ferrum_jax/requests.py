"""A request on the host: its prompt as ids, where its answer ends, and what each token says."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

from ferrum_jax.errors import CapacityError, RequestError
from ferrum_jax.generation import Prompt, Stats, Step, _request
from ferrum_jax.sampling import Sampled, SamplingParams
from ferrum_jax.stopping import StopText

if TYPE_CHECKING:
    from ferrum_jax.checkpoint.load import Model


def request_of(sampling: SamplingParams | None, options: dict[str, Any]) -> SamplingParams:
    """SamplingParams as given, or of keyword arguments.

    Raises:
      RequestError: both are given, or a keyword is unknown or out of range.
    """
    return _request(sampling, options)


def token_ids(model: Model, prompt: Prompt) -> list[int]:
    """A prompt as ids.

    Args:
      model: its tokenizer and vocabulary.
      prompt: a text, or ids.

    Raises:
      RequestError: it is empty or holds an id outside the vocabulary.
    """
    ids = model.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
    if not ids:
        raise RequestError("the prompt is empty; give at least one token, such as the first word.")
    low, high, vocab = min(ids), max(ids), model.cfg.vocab_size
    if low < 0 or high >= vocab:
        raise RequestError(f"the prompt holds token ids {low} to {high}; this model's vocabulary is 0 to {vocab - 1}.")
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
    """The text of one request as its tokens come."""

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
        self._stops = frozenset(sampling.stop_token_ids) | frozenset(end)
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
        if token in self._stops:
            return Step(text=self._text.flush(), finish_reason="stop", **known)
        piece = self._text.push(token)
        if self._text.stopped:
            return Step(text=piece, finish_reason="stop", **known)
        if self.count == self.limit:
            return Step(text=piece + self._text.flush(), finish_reason="length", **known)
        return Step(text=piece, finish_reason=None, **known)
