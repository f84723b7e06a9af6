"""The compiled steps of generation: reading a prompt, sampling, and one or several decode steps in one dispatch.

A dispatch of several steps decides on the device which rows go on: a row ends by a stop id, by its limit, or by logits
that are not finite, and then attends to nothing and goes to no expert. The host reads the tokens afterwards.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ferrum_jax.buckets import BucketedStep, CompileRecord, structure_of
from ferrum_jax.config import ModelConfig
from ferrum_jax.model import prefill
from ferrum_jax.paged import Cache
from ferrum_jax.sampling import Sampled, SamplerPlan, SamplerState, sample_step

LEAST_STOPS = 8  # room for a row's stop ids, so that most requests share a program


@dataclasses.dataclass(frozen=True)
class Going:
    """What the device knows of the rows between two decode steps.

    Attributes:
      token: int32 [B], the latest.
      active: int32 [B], 1 while a row goes on, else 0.
      left: int32 [B], tokens that a row may still take.
      stops: int32 [B, N], the ids that end a row, -1 where it has fewer.
    """

    token: Any
    active: Any
    left: Any
    stops: Any

    def after(self, sampled: Sampled) -> Going:
        """The rows after one more token each."""
        ended = (sampled.token[:, None] == self.stops).any(-1) | ~sampled.finite | (self.left <= 1)
        return Going(sampled.token, jnp.where(ended, 0, self.active), self.left - 1, self.stops)


jax.tree_util.register_dataclass(Going, data_fields=["token", "active", "left", "stops"], meta_fields=[])


def going(token: Any, active: Any, left: Any, stops: Sequence[Collection[int]]) -> Going:
    """Rows about to decode.

    Args:
      token: int32 [B], sampled after the prompts.
      active: [B], 1 for rows that go on after it.
      left: [B], tokens that each may still take.
      stops: the ids that end each row; rows past its end have none.

    Returns:
      Going.

    >>> going(np.zeros(2, np.int32), [1, 1], [3, 3], [{7}, ()]).stops[0].tolist()
    [7, -1, -1, -1, -1, -1, -1, -1]
    """
    most = max(LEAST_STOPS, *map(len, stops))
    table = np.full((len(active), 1 << (most - 1).bit_length()), -1, np.int32)
    for row, ids in enumerate(stops):
        table[row, : len(ids)] = sorted(ids)
    return Going(token, np.asarray(active, np.int32), np.asarray(left, np.int32), table)


class Programs:
    """The compiled steps for parameters of one structure and one sampler plan; nothing compiles before its first use.

    Args:
      cfg: the model's configuration.
      plan: of the sampler.
      read: `model.prefill` of the model; jitted, so that it is traced once for all programs that read these shapes.
    """

    def __init__(self, cfg: ModelConfig, plan: SamplerPlan, read: Callable[..., Any]) -> None:
        self.cfg, self.plan, self._read = cfg, plan, read
        self.prefill = BucketedStep("prefill", self._prefill, ("cache", "logits"), (cfg,))
        self.sample = BucketedStep("sample", self._sample, ("state",), (plan,))
        self._decode_by_count: dict[int, BucketedStep] = {}

    def decode(self, count: int) -> BucketedStep:
        """The step of `count` decode steps in one dispatch."""
        if count not in self._decode_by_count:
            function = functools.partial(decode_steps, self._read, self.plan, count)
            name = "decode" if count == 1 else f"decode {count}"
            self._decode_by_count[count] = BucketedStep(name, function, ("cache", "state"), (self.cfg, self.plan))
        return self._decode_by_count[count]

    def records(self) -> list[CompileRecord]:
        """Every compilation so far."""
        steps = self.prefill, self.sample, *self._decode_by_count.values()
        return [record for step in steps for record in step.records]

    def compile_seconds(self) -> float:
        """Spent on them."""
        return sum(record.seconds for record in self.records())

    def _prefill(self, params: Any, tokens: Any, lengths: Any, cache: Cache, logits: Any) -> Any:
        new, cache = self._read(params, tokens, lengths, cache)
        return jnp.where((lengths > 0)[:, None], new, logits), cache

    def _sample(self, logits: Any, state: Any) -> Any:
        return sample_step(logits, state, self.plan)


def decode_steps(
    read: Callable[..., Any],
    plan: SamplerPlan,
    count: int,
    params: Any,
    going: Going,
    keep: jax.Array,
    cache: Cache,
    state: SamplerState,
) -> tuple[Sampled, Going, Cache, SamplerState]:
    """Several decode steps, each on the tokens of the one before.

    Args:
      read: `model.prefill` of the model.
      plan: of the sampler.
      count: how many steps.
      params: the model's pytree.
      going: the rows.
      keep: int32 [B], 0 for rows that the host has ended.
      cache: donate it to have it written in place.
      state: of the sampler.

    Returns:
      Each step's Sampled, leaves [count, B, ...], which mean nothing for rows that have ended; the rows, cache and
      state after them.
    """

    def step(carry: tuple, _: None) -> tuple[tuple, Sampled]:
        rows, cache, state = carry
        # A prefill of one token, or of none for rows that have ended: they route to no expert.
        logits, cache = read(params, rows.token[:, None], rows.active, cache)
        # Rows that ended have no logits of their own; zeros keep them finite.
        sampled, state = sample_step(jnp.where((rows.active > 0)[:, None], logits, 0.0), state, plan)
        return (rows.after(sampled), cache, state), sampled

    carry = dataclasses.replace(going, active=going.active * keep), cache, state
    if count == 1:
        carry, sampled = step(carry, None)
        return jax.tree.map(lambda leaf: leaf[None], sampled), *carry
    carry, sampled = lax.scan(step, carry, None, length=count)
    return sampled, *carry


class Steps:
    """The compiled steps of one configuration."""

    def __init__(self, cfg: ModelConfig) -> None:
        """Prepare; nothing compiles before its first use.

        Args:
          cfg: the model's configuration.
        """
        self.cfg = cfg
        self._read = jax.jit(functools.partial(prefill, cfg=cfg))
        self._by_plan: dict[Hashable, Programs] = {}

    def of(self, params: Any, plan: SamplerPlan) -> Programs:
        """The programs for parameters of one structure and one sampler plan."""
        key = structure_of(params), plan
        if key not in self._by_plan:
            self._by_plan[key] = Programs(self.cfg, plan, self._read)
        return self._by_plan[key]

    def records(self) -> list[CompileRecord]:
        """Every compilation so far."""
        return [record for programs in self._by_plan.values() for record in programs.records()]


@functools.lru_cache(maxsize=16)
def steps_for(cfg: ModelConfig) -> Steps:
    """The compiled steps of a configuration, shared by every call in this process."""
    return Steps(cfg)


def cache_kind(cfg: ModelConfig, cache: Cache) -> tuple[str, ...]:
    """What a bucket's key says of a cache's dtype: nothing where it is the model's own."""
    name = cache.dtype.name
    return () if name == cfg.dtype else (name,)


class Ahead:
    """Decode steps on their way: dispatched before the last ones are read, where a dispatch may be several.

    Args:
      programs: the compiled steps.
      params: the model's pytree.
      rows: from `going`.
      cache: with the prompts read; donated.
      state: of the sampler after the first token; donated.
      ladder: steps that a dispatch may be, rising.
    """

    SECONDS = 0.05  # of a dispatch, at most, so that a stream feels immediate

    def __init__(
        self, programs: Programs, params: Any, rows: Going, cache: Cache, state: Any, ladder: tuple[int, ...]
    ) -> None:
        self._programs, self._params, self._ladder = programs, params, ladder
        self._rows, self._cache, self._state = rows, cache, state
        self._queue: deque[tuple[int, Sampled]] = deque()
        self._planned = 0
        self._step_seconds = float("inf")

    def fill(self, active: np.ndarray, left: np.ndarray) -> None:
        """Dispatch until enough steps are on their way.

        Args:
          active: int32 [B], 1 for rows that the host has not ended.
          left: int32 [B], tokens that each row might take at first.
        """
        depth = 1 if len(self._ladder) == 1 else 2
        while active.any() and len(self._queue) < depth:
            rest = int(left[active > 0].max()) - self._planned
            if rest <= 0:
                return
            fitting = [n for n in self._ladder if n <= rest and n * self._step_seconds <= self.SECONDS]
            count = max(fitting, default=self._ladder[0])
            stops = self._rows.stops.shape[1]
            kind = cache_kind(self._programs.cfg, self._cache)
            bucket = *self._cache.k.shape[1:3], *kind, *(() if stops == LEAST_STOPS else (stops,))
            sampled, self._rows, self._cache, self._state = self._programs.decode(count)(
                bucket,
                params=self._params,
                going=self._rows,
                keep=active.copy(),
                cache=self._cache,
                state=self._state,
            )
            self._planned += count
            self._queue.append((count, sampled))

    def take(self) -> Sampled | None:
        """The oldest dispatch's tokens on the host, leaves [steps, B, ...]; None when none is on its way."""
        return jax.device_get(self._queue.popleft()[1]) if self._queue else None

    def took(self, steps: int, seconds: float) -> None:
        """Tell how long some steps have taken; the least counts, as the reader's own time is in it."""
        self._step_seconds = min(self._step_seconds, seconds / steps)
