"""Sampling a batch of requests on the device: all stages in one order, one state, one plan.

Order, as in vLLM: logit bias, repetition, presence and frequency penalties, temperature, min-p, top-k, top-p, draw.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ferrum_jax.errors import RequestError
from ferrum_jax.sampling_filters import draw_best as draw_best
from ferrum_jax.sampling_filters import keep_best as keep_best
from ferrum_jax.sampling_filters import keep_min_p as keep_min_p
from ferrum_jax.sampling_filters import keep_top_k as keep_top_k
from ferrum_jax.sampling_filters import keep_top_p as keep_top_p
from ferrum_jax.sampling_params import SamplingParams as SamplingParams
from ferrum_jax.sampling_stages import apply_logit_bias as apply_logit_bias
from ferrum_jax.sampling_stages import apply_presence_frequency as apply_presence_frequency
from ferrum_jax.sampling_stages import apply_repetition_penalty as apply_repetition_penalty
from ferrum_jax.sampling_stages import apply_temperature as apply_temperature
from ferrum_jax.sampling_stages import fold_in as fold_in
from ferrum_jax.sampling_stages import greedy_token as greedy_token
from ferrum_jax.sampling_stages import gumbel as gumbel
from ferrum_jax.sampling_stages import sample_token as sample_token
from ferrum_jax.sampling_stages import token_logprob as token_logprob
from ferrum_jax.sampling_stages import top_logprobs as top_logprobs


@dataclass(frozen=True, slots=True)
class SamplerPlan:
    """Which stages a batch needs: static and hashable, part of the bucket key, so greedy decode is one argmax.

    Args:
      bias, repetition, presence_frequency, random, min_p, top_k, top_p: the stage is compiled in.
      logprobs: how many alternatives to report; 0 reports the chosen token only, None nothing.

    Example:
      >>> SamplerPlan.of([SamplingParams(), SamplingParams(temperature=1.0, top_p=0.9)])
      ... # doctest: +NORMALIZE_WHITESPACE
      SamplerPlan(bias=False, repetition=False, presence_frequency=False, random=True, min_p=False, top_k=False,
                  top_p=True, logprobs=0)
    """

    bias: bool = False
    repetition: bool = False
    presence_frequency: bool = False
    random: bool = False
    min_p: bool = False
    top_k: bool = False
    top_p: bool = False
    logprobs: int | None = 0

    @staticmethod
    def of(requests: Sequence[SamplingParams]) -> SamplerPlan:
        """The smallest plan that serves every request of a batch; filters count for random rows only."""
        drawn = [r for r in requests if r.temperature > 0]
        return SamplerPlan(
            bias=any(r.logit_bias for r in requests),
            repetition=any(r.repetition_penalty != 1 for r in requests),
            presence_frequency=any(r.presence_penalty or r.frequency_penalty for r in requests),
            random=bool(drawn),
            min_p=any(r.min_p > 0 for r in drawn),
            top_k=any(r.top_k > 0 for r in drawn),
            top_p=any(r.top_p < 1 for r in drawn),
            logprobs=max((r.logprobs for r in requests), default=0),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class SamplerState:
    """Sampling parameters and memory of each row; every leaf leads with B, so rows can be replaced one by one.

    Args:
      temperature, top_p, min_p, repetition, presence, frequency: float32 [B].
      top_k: int32 [B].
      keys: uint32 [B, 2], the raw Threefry key of each row's seed.
      step: int32 [B], how many tokens the row has sampled.
      bias: float32 [B, V], or None when the plan has no bias.
      in_prompt: bool [B, V], or None when the plan has no repetition penalty.
      counts: int32 [B, V], how often each token was generated, or None when the plan has no penalty.
    """

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    repetition: Array
    presence: Array
    frequency: Array
    keys: Array
    step: Array
    bias: Array | None
    in_prompt: Array | None
    counts: Array | None


class Sampled(NamedTuple):
    """What one step of sampling gives.

    Args:
      token: int32 [B].
      finite: bool [B], False where the model's logits held NaN or infinity: stop that row with an error.
      logprob: float32 [B] under the model's own distribution, or None when the plan asks for none.
      top_ids: int32 [B, n], best first, or None when n is 0.
      top_logprobs: float32 [B, n], or None when n is 0.
    """

    token: Array
    finite: Array
    logprob: Array | None
    top_ids: Array | None
    top_logprobs: Array | None


def init_sampler(
    requests: Sequence[SamplingParams],
    vocab_size: int,
    prompts: Sequence[Sequence[int]] | None = None,
    plan: SamplerPlan | None = None,
) -> SamplerState:
    """Puts the parameters of a batch on the device.

    Args:
      requests: one SamplingParams per row; fill padding rows with SamplingParams().
      vocab_size: V of the logits.
      prompts: token ids of each row's prompt; needed for a repetition penalty only.
      plan: stages to reserve memory for, at least `SamplerPlan.of(requests)`, which is the default.

    Returns:
      The state at step 0. A request without a seed gets one from the operating system.

    Raises:
      RequestError: a request does not fit the vocabulary, or rows, prompts and plan disagree.

    Example:
      >>> state = init_sampler([SamplingParams(temperature=1.0, seed=7)], vocab_size=8)
      >>> state.keys.tolist(), state.counts
      ([[0, 7]], None)
    """
    if not requests:
        raise RequestError("the batch holds no request; give at least one SamplingParams.")
    for request in requests:
        request.validate(vocab_size)
    needed = SamplerPlan.of(requests)
    plan = needed if plan is None else plan
    _check_plan(plan, needed)

    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([getattr(request, name) for request in requests], dtype)

    bias = np.zeros((len(requests), vocab_size), np.float32) if plan.bias else None
    if bias is not None:
        for row, request in enumerate(requests):
            for token, value in dict(request.logit_bias).items():
                bias[row, token] = value
    in_prompt = _prompt_mask(requests, prompts, vocab_size) if plan.repetition else None
    seeds = [int.from_bytes(os.urandom(8)) if r.seed is None else r.seed for r in requests]
    counted = plan.repetition or plan.presence_frequency
    rows = {
        "temperature": column("temperature", np.float32),
        "top_k": np.array([min(r.top_k, vocab_size) for r in requests], np.int32),
        "top_p": column("top_p", np.float32),
        "min_p": column("min_p", np.float32),
        "repetition": column("repetition_penalty", np.float32),
        "presence": column("presence_penalty", np.float32),
        "frequency": column("frequency_penalty", np.float32),
        "keys": np.array([[seed >> 32, seed & 0xFFFFFFFF] for seed in seeds], np.uint32),
        "step": np.zeros(len(requests), np.int32),
        "bias": bias,
        "in_prompt": in_prompt,
    }
    counts = jnp.zeros((len(requests), vocab_size), jnp.int32) if counted else None
    return SamplerState(**jax.device_put(rows), counts=counts)  # all rows' values in one transfer


def _check_plan(plan: SamplerPlan, needed: SamplerPlan) -> None:
    for name in SamplerPlan.__dataclass_fields__:
        have, need = getattr(plan, name), getattr(needed, name)
        # logprobs=None is the caller's choice to report nothing, as long as nobody asked for alternatives
        if (have or 0) < need:
            raise RequestError(
                f"the sampler plan has {name}={have}, but a request needs {name}={need}; use SamplerPlan.of(requests)."
            )


def _prompt_mask(requests: Sequence[SamplingParams], prompts: Sequence[Sequence[int]] | None, vocab: int) -> np.ndarray:
    if prompts is None:
        raise RequestError("a repetition penalty counts the prompt's tokens too; give the prompts to init_sampler.")
    if len(prompts) != len(requests):
        raise RequestError(f"there are {len(requests)} requests but {len(prompts)} prompts; give one prompt per row.")
    mask = np.zeros((len(requests), vocab), bool)
    for row, prompt in enumerate(prompts):
        ids = np.asarray(prompt, np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < vocab:
            raise RequestError(
                f"prompt {row} holds token ids from {ids.min()} to {ids.max()}, "
                f"but the vocabulary has {vocab} tokens; give ids from 0 to {vocab - 1}."
            )
        mask[row, ids] = True
    return mask


def sample_step(logits: Array, state: SamplerState, plan: SamplerPlan) -> tuple[Sampled, SamplerState]:
    """Samples the next token of every row.

    A row's draw depends on its logits, its seed and its own step, never on its neighbours. Put it in the same jit as
    the model's step, with `plan` static and `state` donated.

    Args:
      logits: float32 [B, V], as the model gives them.
      state: from `init_sampler` or the last step.
      plan: the plan the state was built for.

    Returns:
      The tokens and what is known about them, and the next state.

    Raises:
      RequestError: the state was built for a plan with fewer stages.

    Example:
      >>> plan = SamplerPlan.of([SamplingParams()])
      >>> sampled, state = sample_step(jnp.array([[0.0, 2.0, 1.0]]), init_sampler([SamplingParams()], 3), plan)
      >>> sampled.token.tolist(), state.step.tolist()
      ([1], [1])
    """
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    scores = _penalised(logits, state, plan)
    if plan.random:
        k, p = state.top_k if plan.top_k else None, state.top_p if plan.top_p else None
        keys = fold_in(state.keys, state.step)
        token = _drawn(scores, keys, state.temperature, state.min_p if plan.min_p else None, k, p)
    else:
        token = greedy_token(scores)
    logprob = None if plan.logprobs is None else token_logprob(logits, token)
    top_ids, top_values = top_logprobs(logits, plan.logprobs) if plan.logprobs else (None, None)
    counts = state.counts
    if counts is not None:
        # A comparison with every id is a scatter that any plugin can run.
        ids = jax.lax.broadcasted_iota(jnp.int32, counts.shape, 1)
        counts = counts + (ids == token[:, None]).astype(jnp.int32)
    return Sampled(token, finite, logprob, top_ids, top_values), replace(state, step=state.step + 1, counts=counts)


def _drawn(
    logits: Array, keys: Array, temperature: Array, min_p: Array | None, k: Array | None, p: Array | None
) -> Array:
    if min_p is None and not (k is None and p is None):
        return draw_best(logits, k, p, keys, temperature)
    logits = apply_temperature(logits, temperature)
    if min_p is not None:
        logits = keep_min_p(logits, min_p)
    if k is None and p is None:
        return sample_token(logits, keys, temperature)
    return draw_best(logits, k, p, keys, (temperature > 0).astype(temperature.dtype))


def _penalised(logits: Array, state: SamplerState, plan: SamplerPlan) -> Array:
    if plan.bias:
        logits = apply_logit_bias(logits, _reserved(state, "bias"))
    if plan.repetition:
        seen = _reserved(state, "in_prompt") | (_reserved(state, "counts") > 0)
        logits = apply_repetition_penalty(logits, seen, state.repetition)
    if plan.presence_frequency:
        logits = apply_presence_frequency(logits, _reserved(state, "counts"), state.presence, state.frequency)
    return logits


def _reserved(state: SamplerState, name: str) -> Array:
    value = getattr(state, name)
    if value is None:
        raise RequestError(f"the plan needs the state's {name}, which it has not; give init_sampler the same plan.")
    return value


def sample(
    logits: Array,
    key: Array,
    *,
    temperature: ArrayLike = 1.0,
    top_k: ArrayLike = 0,
    top_p: ArrayLike = 1.0,
    min_p: ArrayLike = 0.0,
) -> Array:
    """Draws a token for every row of logits: temperature, min-p, top-k and top-p in one call, for notebooks.

    Args:
      logits: [..., V], any floating dtype.
      key: one JAX key (`jax.random.key(0)` or the raw `jax.random.PRNGKey(0)`) of the default Threefry kind; row i
        draws with `fold_in(key, i)`.
      temperature, top_k, top_p, min_p: as in SamplingParams; Python numbers, or arrays that broadcast to the rows.

    Returns:
      int32 [...].

    Raises:
      RequestError: a number is out of range, or the key is not one Threefry key.

    Example:
      >>> sample(jnp.array([0.0, 5.0, 1.0]), jax.random.key(0), top_k=1).item()
      1
    """
    given: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    arrays = {name for name, value in given.items() if isinstance(value, jax.Array | np.ndarray)}
    request = SamplingParams(**{name: value for name, value in given.items() if name not in arrays})
    rows = logits.reshape(-1, logits.shape[-1]).astype(jnp.float32)

    def column(name: str) -> Array:
        value = jnp.asarray(given[name] if name in arrays else getattr(request, name))
        value = value.astype(jnp.int32 if name == "top_k" else jnp.float32)
        return jnp.broadcast_to(value, logits.shape[:-1]).reshape(-1)

    defaults = {"min_p": 0.0, "top_k": 0, "top_p": 1.0}
    filters = {name: column(name) for name, off in defaults.items() if name in arrays or getattr(request, name) != off}
    return _draw(rows, _raw_key(key), column("temperature"), filters).reshape(logits.shape[:-1])


@jax.jit
def _draw(logits: Array, key: Array, temperature: Array, filters: dict[str, Array]) -> Array:
    rows = logits.shape[0]
    keys = fold_in(jnp.broadcast_to(key, (rows, 2)), jnp.arange(rows, dtype=jnp.int32))
    return _drawn(logits, keys, temperature, *(filters.get(name) for name in ("min_p", "top_k", "top_p")))


def _raw_key(key: Array) -> Array:
    raw = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    if raw.shape != (2,) or raw.dtype != jnp.uint32:
        raise RequestError(
            f"the key is {raw.dtype}{list(raw.shape)}; give one Threefry key such as jax.random.key(0), uint32[2]."
        )
    return raw
