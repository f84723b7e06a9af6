"""What the engine runs on the device: one state that every program takes and gives back, and the programs themselves.

A program reads some tokens of some rows and samples where a row has read all it has. Which rows, what they hold and
which pages are theirs comes as one small integer array, so that a step is one transfer and one launch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ferrum_jax.buckets import BucketedStep, CompileRecord, compile_together
from ferrum_jax.cache import empty_buffers
from ferrum_jax.config import ModelConfig
from ferrum_jax.model import prefill
from ferrum_jax.paged import PagedCache
from ferrum_jax.sampling import Sampled, SamplerPlan, SamplerState, SamplingParams, init_sampler, sample_step
from ferrum_jax.sampling_params import MAX_LOGPROBS

# Before the table of pages: slot, tokens held, tokens to read, whether to sample.
COLUMNS = 4


def default_plans(vocab_size: int) -> tuple[SamplerPlan, ...]:
    """Plans from cheap to complete; a step takes the first that serves all its rows."""
    drawn = SamplerPlan(random=True, min_p=True, top_k=True, top_p=True)
    full = dataclasses.replace(
        drawn, bias=True, repetition=True, presence_frequency=True, logprobs=min(MAX_LOGPROBS, vocab_size)
    )
    return SamplerPlan(), drawn, full


def covers(plan: SamplerPlan, needed: SamplerPlan) -> bool:
    """Whether a plan has every stage of another."""
    names = SamplerPlan.__dataclass_fields__
    return all((getattr(plan, name) or 0) >= (getattr(needed, name) or 0) for name in names)


def union(plans: tuple[SamplerPlan, ...]) -> SamplerPlan:
    """The plan with every stage of all."""
    stages: dict[str, Any] = {n: any(getattr(plan, n) for plan in plans) for n in SamplerPlan.__dataclass_fields__}
    return SamplerPlan(**{**stages, "logprobs": max(plan.logprobs or 0 for plan in plans)})


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """What the programs are compiled for besides their buckets.

    Attributes:
      slots: sequences that can be on the device together.
      pages: pages of the pool.
      page: slots of a page.
      dtype: name of the cache's dtype.
      plan: stages that the sampler's state has memory for.
    """

    slots: int
    pages: int
    page: int
    dtype: str
    plan: SamplerPlan


@dataclasses.dataclass(frozen=True)
class EngineState:
    """Everything on the device that a step changes.

    Attributes:
      k, v, k_scale, v_scale: the pool, as in PagedCache.
      last: int32 [slots], the token that each sequence sampled last.
      sampler: a row per slot.
    """

    k: Any
    v: Any
    k_scale: Any
    v_scale: Any
    last: Any
    sampler: SamplerState


jax.tree_util.register_dataclass(
    EngineState, data_fields=["k", "v", "k_scale", "v_scale", "last", "sampler"], meta_fields=[]
)


def init_state(cfg: ModelConfig, shape: Shape) -> EngineState:
    """An empty state."""
    sampler = init_sampler([SamplingParams(seed=0)] * shape.slots, cfg.vocab_size, [[]] * shape.slots, shape.plan)
    return EngineState(
        *empty_buffers(cfg, (shape.pages, shape.page), shape.dtype), jnp.zeros(shape.slots, jnp.int32), sampler
    )


class EngineSteps:
    """The compiled programs of one model and one Shape."""

    def __init__(self, cfg: ModelConfig) -> None:
        """Prepare; nothing compiles before its first use.

        Args:
          cfg: the model's configuration.
        """
        self._cfg = cfg
        # Traced once for each of its shapes, whatever samples from its logits.
        self._prefill = jax.jit(functools.partial(prefill, cfg=cfg))
        self._decode: dict[SamplerPlan, BucketedStep] = {}
        self._read: dict[SamplerPlan, BucketedStep] = {}
        self._admit = BucketedStep("admit", _admit, ("state",), ())

    def decode(self, plan: SamplerPlan, params: Any, control: np.ndarray, state: EngineState) -> Any:
        """One token for each row, the one it sampled last; (Sampled, state)."""
        step, key = self._step(plan, None, control)
        return step(key, params=params, tokens=None, control=control, state=state)

    def read(self, plan: SamplerPlan, params: Any, tokens: np.ndarray, control: np.ndarray, state: EngineState) -> Any:
        """Pieces of prompts, tokens int32 [b, width]; (Sampled, state)."""
        step, key = self._step(plan, tokens, control)
        return step(key, params=params, tokens=tokens, control=control, state=state)

    def compile(self, programs: Iterable[tuple[SamplerPlan, Any, Any]], params: Any, state: EngineState) -> None:
        """Compile programs together, each another: a plan, the tokens to read or None for `decode`, and control."""

        def traced() -> Iterator[Callable[[], None]]:
            for plan, tokens, control in programs:
                step, key = self._step(plan, tokens, control)
                yield step.trace(key, params=params, tokens=tokens, control=control, state=state)

        compile_together(traced())

    def admit(self, slot: int, row: SamplerState, state: EngineState) -> EngineState:
        """The state with one row of the sampler's replaced."""
        return self._admit((), slot=np.int32(slot), row=row, state=state)

    @property
    def records(self) -> list[CompileRecord]:
        """Every compilation so far."""
        steps = [self._admit, *self._decode.values(), *self._read.values()]
        return [record for step in steps for record in step.records]

    def _step(self, plan: SamplerPlan, tokens: Any, control: np.ndarray) -> tuple[BucketedStep, Hashable]:
        """What decodes, or reads tokens, and the bucket of these arguments."""
        steps, name = (self._decode, "decode") if tokens is None else (self._read, "read")
        if plan not in steps:
            function = functools.partial(advance, plan, self._prefill)
            steps[plan] = BucketedStep(name, function, ("state",), ("engine", self._cfg, plan))
        return steps[plan], control.shape if tokens is None else (*tokens.shape, control.shape[1])


@functools.lru_cache(maxsize=16)
def steps_for(cfg: ModelConfig, shape: Shape, structure: Hashable) -> EngineSteps:
    """The programs, shared by every engine in this process for which they are the same.

    Args:
      cfg: the model.
      shape: sizes of the state.
      structure: of the parameters, from `buckets.structure_of`.
    """
    del shape, structure
    return EngineSteps(cfg)


def advance(
    plan: SamplerPlan, read: Callable[..., Any], params: Any, tokens: Any, control: jax.Array, state: EngineState
) -> tuple[Sampled, EngineState]:
    """Read tokens and sample.

    Args:
      plan: stages of sampling.
      read: `model.prefill` of the model.
      params: its parameters.
      tokens: int32 [b, width], right-padded; None reads the token that each row sampled last.
      control: int32 [b, COLUMNS + n], per row its slot (one past the last for none), the tokens it holds, how many to
        read, whether to sample, and n pages.
      state: donated.

    Returns:
      (Sampled of every row, the state). Rows that do not sample have no meaning in Sampled.
    """
    slot, held, count, samples = (control[:, i] for i in range(COLUMNS))
    cache = PagedCache(state.k, state.v, control[:, COLUMNS:], held, state.k_scale, state.v_scale)
    if tokens is None:
        tokens = _take(state.last, slot)[:, None]
    logits, cache = read(params, tokens, count, cache)
    assert isinstance(cache, PagedCache)
    wanted = samples > 0
    absent = () if plan.bias else ("bias",)
    absent += () if plan.repetition else ("in_prompt",)
    absent += () if plan.repetition or plan.presence_frequency else ("counts",)
    rows: dict[str, Any] = {
        field.name: None if field.name in absent else _take(getattr(state.sampler, field.name), slot)
        for field in dataclasses.fields(SamplerState)
    }
    # What a row that does not sample has for logits may be anything.
    sampled, after = sample_step(jnp.where(wanted[:, None], logits, 0.0), SamplerState(**rows), plan)
    place = jnp.where(wanted, slot, state.last.shape[0])
    sampler = dataclasses.replace(
        state.sampler,
        step=_give(state.sampler.step, place, after.step),
        counts=state.sampler.counts if after.counts is None else _give(state.sampler.counts, place, after.counts),
    )
    last = _give(state.last, place, sampled.token)
    return sampled, EngineState(cache.k, cache.v, cache.k_scale, cache.v_scale, last, sampler)


def _take(array: Any, slot: jax.Array) -> Any:
    return array.at[slot].get(mode="fill", fill_value=0)


def _give(array: Any, slot: jax.Array, rows: jax.Array) -> jax.Array:
    return array.at[slot].set(rows.astype(array.dtype), mode="drop")


def _admit(slot: jax.Array, row: SamplerState, state: EngineState) -> EngineState:
    sampler = jax.tree.map(lambda stack, one: stack.at[slot].set(one[0]), state.sampler, row)
    return dataclasses.replace(state, sampler=sampler)
