"""Continuous batching: sequences join and leave at any step and share one cache in pages.

The one place that holds mutable state. Each step reads a piece of waiting prompts and then one token of every sequence
that is under way, in programs of the bucket table; which pages are whose is decided here, on the host.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from ferrum_jax.buckets import BETWEEN_TOKENS, Buckets, CompileRecord, structure_of
from ferrum_jax.budget import MemoryPlan, buckets_for, plan_memory, step_bytes
from ferrum_jax.cache import cache_dtype as dtype_of_cache
from ferrum_jax.checkpoint.load import Model
from ferrum_jax.engine_steps import (
    COLUMNS,
    Shape,
    covers,
    default_plans,
    init_state,
    steps_for,
    union,
)
from ferrum_jax.environment import free_memory
from ferrum_jax.errors import ConfigError, RequestError
from ferrum_jax.paged import PAGE
from ferrum_jax.params import num_bytes
from ferrum_jax.requests import Answer, Prompt, Stats, Step, limit_of, request_of, seeded, token_ids
from ferrum_jax.sampling import Sampled, SamplerPlan, SamplingParams, init_sampler
from ferrum_jax.schedule import Schedule, Sequence


class Event(NamedTuple):
    """One token of one request.

    Attributes:
      id: as `submit` gave it.
      step: the token, its text and, at the last one, why the answer ends; `step.row` is the id too.
    """

    id: int
    step: Step


@dataclasses.dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine holds now.

    Attributes:
      running: sequences on the device.
      waiting: requests in the queue, preempted ones included.
      slots: sequences that can be on the device together.
      free_pages: pages that no sequence owns.
      pages: all of them.
      preemptions: how often a sequence gave its pages up so far.
    """

    running: int
    waiting: int
    slots: int
    free_pages: int
    pages: int
    preemptions: int


class _Flight(NamedTuple):
    """A program under way: what it will give, and for whom."""

    sampled: Sampled
    rows: list[tuple[int, Sequence, int]]  # place in the batch, sequence, its turn


class Engine:
    """Serves many requests at once; for one thread.

    >>> import ferrum_jax as fj
    >>> engine = Engine(fj.load("demo"), slots=2, pages=16)
    >>> first, second = engine.submit("Once upon a time", max_tokens=2), engine.submit([11, 12], max_tokens=3)
    >>> sorted(event.id for event in engine.run())
    [0, 0, 1, 1, 1]
    """

    def __init__(
        self,
        model: Model,
        *,
        slots: int = 8,
        pages: int | None = None,
        page: int = PAGE,
        buckets: Buckets | None = None,
        cache_dtype: Any = None,
        plans: tuple[SamplerPlan, ...] | None = None,
        overlap: bool | None = None,
    ) -> None:
        """Allocate the cache; nothing compiles before the first step or `warm_up`.

        Args:
          model: from load.
          slots: sequences on the device together.
          pages: pages of the pool; None means as many as fit the device's free memory, at most a whole context for
            every slot.
          page: tokens of a page.
          buckets: sizes to compile for. The last of `widths()`, at most 1024 unless given, is the most prompt tokens
            that a step reads between two tokens of the others.
          cache_dtype: of keys and values, a float or "int8"; None means cfg.dtype, but float32 for bfloat16 on a CPU,
            where XLA copies a whole pool of bfloat16 to write into it.
          plans: sampler stages to compile, from cheap to complete; a request that needs more is refused. One of them
            must have every stage of the others, as requests share a step. None means greedy, drawing with filters,
            and everything.
          overlap: launch a step before the tokens of the last one are looked at, so that the device does not wait for
            the host; a sequence that ends costs one more row of one step. None means on all devices but the CPU.

        Raises:
          CapacityError: the memory or a bucket does not hold what is asked for.
          ConfigError: slots, page, plans or the dtype are out of range.
        """
        if slots < 1 or page < 1:
            raise ConfigError(f"slots={slots} and page={page} must both be at least 1.")
        cfg, buckets = model.cfg, buckets_for(model.cfg, buckets, cache_dtype, BETWEEN_TOKENS)
        buckets.fit("batch", slots)
        self._model, self._buckets = model, buckets
        self._plans = default_plans(cfg.vocab_size) if plans is None else plans
        if not self._plans:
            raise ConfigError("plans is empty; give at least SamplerPlan(), which is greedy.")
        if not any(covers(plan, union(self._plans)) for plan in self._plans):
            raise ConfigError(f"no plan serves requests of all plans in one step; add {union(self._plans)}.")
        self._longest = min(cfg.max_position, buckets.cache[-1])
        narrow = cfg.dtype == "bfloat16" and jax.default_backend() == "cpu"
        dtype = dtype_of_cache(cfg, "float32" if cache_dtype is None and narrow else cache_dtype)
        whole = slots * -(-self._longest // page)
        shape = Shape(slots, whole if pages is None else pages, page, dtype.name, union(self._plans))
        structure = structure_of(model.params)
        self._steps = steps_for(cfg, shape, structure)
        if (free := free_memory()) is not None:
            memory = self._plan_memory(free, shape)
            if pages is None:
                # Other programs use the host's memory too.
                share = 0.5 if jax.default_backend() == "cpu" else 0.9
                fitting = max(1, min(whole, int(memory.pages * share)))
                shape = dataclasses.replace(shape, pages=fitting)
                self._steps = steps_for(cfg, shape, structure)
            memory.check(shape.pages)
        self._shape, self._schedule = shape, Schedule(slots, shape.pages, page)
        self._state = init_state(cfg, self._shape)
        self._overlap = jax.default_backend() != "cpu" if overlap is None else overlap
        self._flights: list[_Flight] = []
        self._events: list[Event] = []
        self._next_id = 0

    def submit(self, prompt: Prompt, sampling: SamplingParams | None = None, **options: Any) -> int:
        """Put a request into the queue.

        Args:
          prompt: a text, or token ids.
          sampling: SamplingParams, or give its fields as keyword arguments.
          **options: fields of SamplingParams.

        Returns:
          The id that its events carry: 0, 1, 2, ...

        Raises:
          RequestError: the prompt or a sampling value cannot be served.
          CapacityError: prompt and answer could never fit the context or the pages of this engine.
        """
        sampling = request_of(sampling, options)
        sampling.validate(self._model.cfg.vocab_size)
        ids = token_ids(self._model, prompt)
        limit = limit_of(ids, sampling, self._longest)
        plan = SamplerPlan.of([sampling])
        self._plan_for([plan])
        sequence = Sequence(
            id=self._next_id,
            sampling=seeded(sampling),
            plan=plan,
            answer=Answer(self._model, sampling, limit),
            tokens=list(ids),
            prompt_tokens=len(ids),
            began=time.perf_counter(),
            compiled_before=self._compile_seconds(),
        )
        self._schedule.add(sequence)
        self._next_id += 1
        return sequence.id

    def step(self) -> list[Event]:
        """Let in who fits, read a piece of prompts, advance every sequence by a token.

        Returns:
          The tokens that came, of whichever requests; empty when none did. A token of a request whose step carries a
          finish_reason is its last. After an interrupt or an error the next call goes on where this one was.
        """
        for sequence in self._schedule.let_in():
            self._state = self._steps.admit(sequence.slot, self._sampler_row(sequence), self._state)
        before = len(self._flights)
        self._read()
        self._decode()
        for _ in range(before if self._overlap else len(self._flights)):
            host = jax.device_get(self._flights[0].sampled)
            self._events += self._land(host, self._flights.pop(0).rows)
        if not self._schedule.running:
            self._flights = []  # of sequences that have ended
        events, self._events = self._events, []
        return events

    def warm_up(self, plans: tuple[SamplerPlan, ...] | None = None) -> int:
        """Compile every program that steps can ask for, several at a time, and run it without a row.

        Args:
          plans: of those that the engine was made with; None means all.

        Returns:
          How many programs there are.

        Raises:
          ConfigError: the engine was not made with one of these plans.
        """
        if unknown := [plan for plan in plans or () if plan not in self._plans]:
            raise ConfigError(f"{unknown[0]} is none of the plans that this engine was made with.")
        widths, programs, began = self._buckets.widths(), {}, time.perf_counter()
        batches = self._buckets.up_to("batch", self._shape.slots)
        longest = min(self._longest, self._shape.pages * self._shape.page)
        lengths = self._buckets.up_to("cache", longest)
        for plan, length, batch in itertools.product(self._plans if plans is None else plans, lengths, batches):
            control = self._control([], [], batch, length)
            programs[plan, 0, control.shape] = plan, None, control
            for least, width in zip((0, *widths), widths, strict=False):
                if least < length and (batch == batches[0] or batch * width <= widths[-1]):
                    programs[plan, width, control.shape] = plan, np.zeros((batch, width), np.int32), control
        before = self._compile_seconds()
        row = init_sampler([SamplingParams()], self._model.cfg.vocab_size, [[]], self._shape.plan)
        self._state = self._steps.admit(self._shape.slots, row, self._state)
        self._steps.compile(programs.values(), self._model.params, self._state)
        for plan, tokens, control in programs.values():
            step = self._steps.decode if tokens is None else functools.partial(self._steps.read, tokens=tokens)
            _, self._state = step(plan=plan, params=self._model.params, control=control, state=self._state)
        overlapped = self._compile_seconds() - before - (time.perf_counter() - began)
        for sequence in (*self._schedule.queue, *self._schedule.running):  # they waited for less than the sum
            sequence.compiled_before += max(0.0, overlapped)
        return len(programs)

    def run(self) -> Iterator[Event]:
        """Step until nothing is left; requests may be submitted and cancelled meanwhile."""
        while not self.idle:
            yield from self.step()

    def cancel(self, id: int) -> bool:
        """Forget a request and free what it holds; no event of it comes after this.

        Args:
          id: from submit.

        Returns:
          False when it has ended or was cancelled already.

        Raises:
          RequestError: no request has this id.
        """
        if not 0 <= id < self._next_id:
            known = f"ids so far are 0 to {self._next_id - 1}" if self._next_id else "none was submitted so far"
            raise RequestError(f"no request has the id {id}; {known}.")
        return self._schedule.cancel(id)

    @property
    def idle(self) -> bool:
        """Whether no request is in the queue or on the device."""
        return not (self._schedule.queue or self._schedule.running)

    @property
    def load(self) -> EngineLoad:
        """What it holds now."""
        now = self._schedule
        pages = now.pages.free, now.pages.pages
        return EngineLoad(len(now.running), len(now.queue), now.slots, *pages, now.preemptions)

    @property
    def memory(self) -> MemoryPlan | None:
        """What the device's free memory would hold besides; None where the device does not say."""
        free = free_memory()
        return None if free is None else self._plan_memory(free, self._shape)

    @property
    def records(self) -> list[CompileRecord]:
        """Compilations so far of programs like this engine's, which engines of the same model and sizes share."""
        return self._steps.records

    def _plan_memory(self, free: int, shape: Shape) -> MemoryPlan:
        """What fits into so many bytes, with the largest step that there can be."""
        cfg, most, batches = self._model.cfg, self._buckets.widths()[-1], self._buckets.up_to("batch", shape.slots)
        # One sequence reads the widest piece; where no bucket is of one row, the others are padding.
        shapes = [(batches[-1], 1), (batches[0], most), *((rows, most // rows) for rows in batches if rows <= most)]
        steps = [step_bytes(cfg, rows, width, self._longest, True, shape.dtype) for rows, width in shapes]
        steps += [record.temp_bytes or 0 for record in self._steps.records]
        kept = jax.eval_shape(lambda: init_state(cfg, shape))
        kept_bytes, name = num_bytes((kept.last, kept.sampler)), shape.dtype
        return plan_memory(
            cfg, free, page=shape.page, dtype=name, state_bytes=kept_bytes, loaded=True, temporary_bytes=max(steps)
        )

    def _sampler_row(self, sequence: Sequence) -> Any:
        vocab, prompt = self._model.cfg.vocab_size, sequence.tokens[: sequence.prompt_tokens]
        row = init_sampler([sequence.sampling], vocab, [prompt], self._shape.plan)
        counts = row.counts
        if counts is not None and sequence.generated:
            said = np.bincount(sequence.tokens[sequence.prompt_tokens :], minlength=vocab)
            counts = said[None].astype(np.int32)
        return dataclasses.replace(row, step=np.full(1, sequence.generated, np.int32), counts=counts)

    def _read(self) -> None:
        """One piece of the prompts that are being read: the oldest, and others beside it where the bucket has room."""
        reading = self._schedule.readers()
        if not reading:
            return
        most = self._buckets.widths()[-1]
        width = self._buckets.fit("prefill", min(reading[0].remaining, most))
        rows = [reading[0]]
        for sequence in reading[1:]:
            more = self._buckets.fit("batch", len(rows) + 1)
            if more * width <= most and sequence.remaining <= width:
                rows.append(sequence)
        counts = [min(sequence.remaining, width) for sequence in rows]
        longest = max(sequence.held + count for sequence, count in zip(rows, counts, strict=True))
        control = self._control(rows, counts, len(rows), longest)
        tokens = np.zeros((control.shape[0], width), np.int32)
        for place, (sequence, count) in enumerate(zip(rows, counts, strict=True)):
            tokens[place, :count] = sequence.tokens[sequence.held : sequence.held + count]
        plan = self._plan_for([sequence.plan for sequence in rows])
        sampled, self._state = self._steps.read(plan, self._model.params, tokens, control, self._state)
        self._launched(sampled, rows, counts)

    def _decode(self) -> None:
        """One token of every sequence that has sampled and not ended."""
        rows = self._schedule.decoders()
        if not rows:
            return
        control = self._control(rows, [1] * len(rows), len(rows), max(sequence.held for sequence in rows) + 1)
        plan = self._plan_for([sequence.plan for sequence in rows])
        sampled, self._state = self._steps.decode(plan, self._model.params, control, self._state)
        self._launched(sampled, rows, [1] * len(rows))

    def _control(self, rows: list[Sequence], counts: list[int], batch: int, longest: int) -> np.ndarray:
        """What `engine_steps.advance` takes, padded to the buckets of so many rows and of the longest row."""
        batch = self._buckets.fit("batch", batch)
        pages = self._schedule.pages_for(min(self._buckets.fit("cache", longest), self._longest))
        control = np.full((batch, COLUMNS + pages), self._shape.pages, np.int32)
        control[:, 0], control[:, 1:COLUMNS] = self._shape.slots, 0
        for place, (sequence, count) in enumerate(zip(rows, counts, strict=True)):
            samples = sequence.held + count >= sequence.target
            control[place, :COLUMNS] = sequence.slot, sequence.held, count, samples
            owned = self._schedule.pages.owned(sequence.id)[:pages]
            control[place, COLUMNS : COLUMNS + len(owned)] = owned
        return control

    def _launched(self, sampled: Sampled, rows: list[Sequence], counts: list[int]) -> None:
        landing = []
        for place, (sequence, count) in enumerate(zip(rows, counts, strict=True)):
            sequence.held += count
            if not sequence.reading:
                sequence.ahead += 1
                landing.append((place, sequence, sequence.turn))
        if landing:
            self._flights.append(_Flight(sampled, landing))

    def _land(self, host: Sampled, rows: list[tuple[int, Sequence, int]]) -> Iterator[Event]:
        now, compiled = time.perf_counter(), self._compile_seconds()
        for place, sequence, turn in rows:
            if sequence.slot < 0 or sequence.turn != turn:
                continue  # it ended, was cancelled or preempted while this was under way
            sequence.ahead -= 1
            sequence.tokens.append(int(host.token[place]))
            compiling = compiled - sequence.compiled_before
            since = now - sequence.began - compiling
            sequence.first = sequence.first or since
            times = sequence.first, since - sequence.first, compiling
            stats = Stats(sequence.prompt_tokens, sequence.generated, *times)
            step = sequence.answer.take(host, place, stats, sequence.id)
            if step.finish_reason is not None:
                self._schedule.leave(sequence)
            yield Event(sequence.id, step)

    def _plan_for(self, needed: list[SamplerPlan]) -> SamplerPlan:
        wanted = union(tuple(needed))
        for plan in self._plans:
            if covers(plan, wanted):
                return plan
        stages = ", ".join(name for name in SamplerPlan.__dataclass_fields__ if getattr(wanted, name))
        raise RequestError(
            f"the request needs {stages}; this engine has {', '.join(map(str, self._plans))}. Make the engine with a "
            f"plan that has every stage, or leave the request's penalties, biases or filters out."
        )

    def _compile_seconds(self) -> float:
        return sum(record.seconds for record in self._steps.records)
