"""What a request asks of the sampler, checked in full before anything reaches the device. Imports no jax."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ferrum_jax.errors import RequestError

MAX_NEW_TOKENS = 1_048_576
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARS = 64
MAX_STOP_IDS = 64
MAX_BIASES = 1024

# name: (lowest, highest, what to do instead)
_FLOATS = {
    "top_p": (1e-6, 1.0, "1.0 turns it off; for the single best token use temperature=0.0"),
    "min_p": (0.0, 1.0, "0.0 turns it off"),
    "repetition_penalty": (0.01, 100.0, "1.0 turns it off, above 1 discourages repeats"),
    "presence_penalty": (-2.0, 2.0, "0.0 turns it off"),
    "frequency_penalty": (-2.0, 2.0, "0.0 turns it off"),
}
_INTS = {
    "max_tokens": (1, MAX_NEW_TOKENS, "ask for at least one token"),
    "top_k": (0, 2**31 - 1, "0 turns it off"),
    "logprobs": (0, MAX_LOGPROBS, "it counts the alternatives reported beside the chosen token"),
}


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is sampled and when it stops.

    Args:
      max_tokens: most tokens to generate, at least 1.
      temperature: 0.0 takes the best token (greedy); otherwise 0.001 to 100.
      top_k: keep the k best tokens; 0 keeps all.
      top_p: keep the smallest set of best tokens with at least this probability; 1.0 keeps all.
      min_p: keep tokens with at least this fraction of the best token's probability; 0.0 keeps all.
      repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or the output.
      presence_penalty: subtracted once from every token already generated, -2 to 2.
      frequency_penalty: subtracted once per earlier generation of the token, -2 to 2.
      logit_bias: token id -> number in -100 to 100 added to its logit; kept as a sorted tuple of pairs.
      seed: 0 to 2**64 - 1; None draws a fresh one for every request.
      stop: strings that end the text (a single string is taken as one); at most 16 of at most 64 characters.
      stop_token_ids: token ids that end the text.
      logprobs: how many alternatives to report with their log-probabilities, 0 to 20.
      ignore_eos: go on after the model's own end-of-text token.

    Raises:
      RequestError: a value has the wrong type or is out of range.

    Example:
      >>> SamplingParams(temperature=0.7, logit_bias={7: -100, 3: 1}).logit_bias
      ((3, 1.0), (7, -100.0))
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] = ()
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    logprobs: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        checked: dict[str, object] = {name: _integer(name, getattr(self, name), *rule) for name, rule in _INTS.items()}
        checked |= {name: _number(name, getattr(self, name), *rule) for name, rule in _FLOATS.items()}
        checked["temperature"] = _temperature(self.temperature)
        checked["logit_bias"] = _biases(self.logit_bias)
        if self.seed is not None:
            checked["seed"] = _integer("seed", self.seed, 0, 2**64 - 1, "None draws a fresh one")
        checked["stop"] = _stops(self.stop)
        checked["stop_token_ids"] = _stop_ids(self.stop_token_ids)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos is {_show(self.ignore_eos)}; give True or False.")
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def validate(self, vocab_size: int) -> None:
        """Checks what depends on the model: every token id and the number of log-probabilities.

        Args:
          vocab_size: number of logits the model gives, V.

        Raises:
          RequestError: an id is outside the vocabulary, or more log-probabilities than tokens are asked for.

        Example:
          >>> SamplingParams(stop_token_ids=(7,)).validate(vocab_size=8)
        """
        ids = [("logit_bias", token) for token in dict(self.logit_bias)]
        ids += [("stop_token_ids", token) for token in self.stop_token_ids]
        for name, token in ids:
            if token >= vocab_size:
                raise RequestError(
                    f"{name} names token {_show(token)}, but the vocabulary has {vocab_size} tokens; "
                    f"give ids from 0 to {vocab_size - 1}."
                )
        if self.logprobs > vocab_size:
            raise RequestError(
                f"logprobs is {self.logprobs}, but the vocabulary has only {vocab_size} tokens; ask for fewer."
            )


def _show(value: object) -> str:
    # Python refuses to print integers of thousands of digits, and a request may hold megabytes of text.
    if isinstance(value, int) and abs(value) >= 10**30:
        return "an integer of more than 30 digits"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _integer(name: str, value: object, low: int, high: int, advice: str) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise RequestError(f"{name} is {_show(value)} ({type(value).__name__}); give an integer from {low} to {high}.")
    if not low <= int(value) <= high:
        raise RequestError(f"{name} is {_show(value)}; give an integer from {low} to {high} ({advice}).")
    return int(value)


def _number(name: str, value: object, low: float, high: float, advice: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise RequestError(
            f"{name} is {_show(value)} ({type(value).__name__}); give a number from {low:g} to {high:g}."
        )
    number: Any = value  # type checkers know no order for Real
    if not low <= number <= high:  # NaN fails every comparison
        raise RequestError(f"{name} is {_show(value)}; give a number from {low:g} to {high:g} ({advice}).")
    return float(number)


def _temperature(value: object) -> float:
    advice = "0.0 takes the best token; smaller positive values overflow float32"
    if isinstance(value, numbers.Real) and not isinstance(value, bool) and value == 0:
        return 0.0
    return _number("temperature", value, 1e-3, 100.0, advice)


def _biases(value: object) -> tuple[tuple[int, float], ...]:
    if isinstance(value, Mapping):
        value = value.items()
    if not isinstance(value, Iterable) or isinstance(value, str):
        raise RequestError(
            f"logit_bias is {_show(value)}; give a mapping of token id to number, such as {{42: -100.0}}."
        )
    try:
        pairs = [(token, bias) for token, bias in value]
    except (TypeError, ValueError):
        raise RequestError("logit_bias holds something that is not a pair; give a mapping of id to number.") from None
    if len(pairs) > MAX_BIASES:
        raise RequestError(f"logit_bias names {len(pairs)} tokens; at most {MAX_BIASES} are taken.")
    checked = sorted((_token("logit_bias", token), _bias(token, bias)) for token, bias in pairs)
    if len({token for token, _ in checked}) < len(checked):
        raise RequestError("logit_bias names a token twice; give each token id once.")
    return tuple(checked)


def _bias(token: object, bias: object) -> float:
    advice = "-100 all but forbids a token, 100 all but forces it"
    return _number(f"logit_bias[{token}]", bias, -100.0, 100.0, advice)


def _token(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise RequestError(f"{name} names {_show(value)} ({type(value).__name__}) as a token; give integer token ids.")
    if int(value) < 0:
        raise RequestError(f"{name} names token {_show(value)}; token ids start at 0.")
    return int(value)


def _stops(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, list | tuple):
        raise RequestError(f"stop is {_show(value)}; give a string or a list of strings.")
    if len(value) > MAX_STOPS:
        raise RequestError(f"stop holds {len(value)} strings; at most {MAX_STOPS} are taken.")
    for text in value:
        if not isinstance(text, str):
            raise RequestError(f"stop holds {_show(text)} ({type(text).__name__}); give strings.")
        if not text:
            raise RequestError("stop holds an empty string, which would end every text at once; leave it out.")
        if len(text) > MAX_STOP_CHARS:
            raise RequestError(f"stop holds a string of {len(text)} characters; at most {MAX_STOP_CHARS} are taken.")
    return tuple(value)


def _stop_ids(value: object) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise RequestError(f"stop_token_ids is {_show(value)}; give a list of token ids.")
    if len(value) > MAX_STOP_IDS:
        raise RequestError(f"stop_token_ids holds {len(value)} ids; at most {MAX_STOP_IDS} are taken.")
    return tuple(_token("stop_token_ids", token) for token in value)
