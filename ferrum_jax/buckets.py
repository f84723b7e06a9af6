"""Static shapes: a ladder of sizes, and steps that compile once per bucket and never otherwise."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
import itertools
import os
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from ferrum_jax import kept
from ferrum_jax.errors import CapacityError, ConfigError, RetraceError

BETWEEN_TOKENS = 2**10  # of prompts that an engine reads between two tokens of its other sequences, unless told
MOST_TOKENS = 2**14  # of all rows together that one step reads: its temporary memory grows with them


def _ladder(first: int, last: int, per_octave: int = 1) -> tuple[int, ...]:
    sizes, size = [], first
    while size <= last:
        sizes += [size + size * i // per_octave for i in range(per_octave)]
        size *= 2
    return tuple(size for size in sizes if size <= last)


@dataclasses.dataclass(frozen=True, slots=True)
class Buckets:
    """The sizes that steps compile for.

    Attributes:
      batch: rows.
      prefill: tokens of a prompt read in one step; longer prompts are read in pieces, see `widest`. None means 16 to
        512, to 4096 where a GPU's kernels attend.
      cache: tokens a row can hold.
      steps: decode steps of one dispatch; None means 1 or 8 on a GPU and 1 elsewhere. With more than one size the next
        dispatch is queued before the last one's tokens are read.

    Raises:
      ConfigError: a ladder is empty, not rising or not positive.

    >>> Buckets().fit("batch", 3)
    4
    """

    batch: tuple[int, ...] = _ladder(1, 256)
    prefill: tuple[int, ...] | None = None
    cache: tuple[int, ...] = _ladder(128, 2**20)
    steps: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            sizes = getattr(self, field.name)
            if sizes is None and field.default is None:
                continue
            if not sizes or sizes[0] < 1 or any(b <= a for a, b in itertools.pairwise(sizes)):
                raise ConfigError(
                    f"Buckets.{field.name} is {sizes}; it must hold at least one size, all positive and rising."
                )

    def steps_of_dispatch(self) -> tuple[int, ...]:
        """The ladder of decode steps on this device."""
        if self.steps is not None:
            return self.steps
        return (1, 8) if jax.default_backend() == "gpu" else (1,)

    def widths(self) -> tuple[int, ...]:
        """The ladder of tokens of a prompt on this device; `budget.buckets_for` keeps it short where XLA attends."""
        if self.prefill is not None:
            return self.prefill
        return _ladder(16, 4096 if jax.default_backend() == "gpu" else 512, per_octave=2)

    def widest(self, rows: int) -> int:
        """The largest of `widths` with which so many rows read no more than 16384 tokens at once, or the smallest.

        >>> Buckets().widest(1), Buckets().widest(128), Buckets().widest(2**20)
        (512, 128, 16)
        """
        widths = self.widths()
        return max((width for width in widths if rows * width <= MOST_TOKENS), default=widths[0])

    def fit(self, name: str, size: int) -> int:
        """The smallest bucket that holds `size`.

        Args:
          name: "batch", "prefill" or "cache".
          size: what must fit.

        Raises:
          CapacityError: nothing in the ladder is large enough.
        """
        sizes = self.widths() if name == "prefill" else getattr(self, name)
        for bucket in sizes:
            if bucket >= size:
                return bucket
        raise CapacityError(f"{name} size {size} is beyond the largest bucket, {sizes[-1]}; extend Buckets.{name}.")

    def up_to(self, name: str, size: int) -> tuple[int, ...]:
        """The buckets that hold any size up to `size`.

        Args:
          name: "batch" or "cache".
          size: the largest.

        Raises:
          CapacityError: nothing in the ladder is large enough.

        >>> Buckets().up_to("batch", 5)
        (1, 2, 4, 8)
        """
        last = self.fit(name, size)
        return tuple(bucket for bucket in getattr(self, name) if bucket <= last)


@dataclasses.dataclass(frozen=True, slots=True)
class CompileRecord:
    """One compilation.

    Attributes:
      step: name of the function.
      bucket: its key.
      seconds: tracing, and compiling or reading the compile cache, or reading the whole program where programs are
        kept; of `compile_together` these overlap.
      temp_bytes: temporary memory of the program, where the device tells.
    """

    step: str
    bucket: Hashable
    seconds: float
    temp_bytes: int | None


class BucketedStep:
    """A function compiled ahead of time, once per bucket; other shapes are an error that names the argument.

    >>> import jax.numpy as jnp
    >>> double = BucketedStep("double", lambda x: x * 2)
    >>> double(("batch", 2), x=jnp.ones(2)).tolist()
    [2.0, 2.0]
    """

    def __init__(
        self, name: str, function: Callable[..., Any], donate: tuple[str, ...] = (), constants: tuple | None = None
    ) -> None:
        """Wrap a function of keyword arguments.

        Args:
          name: for records and errors.
          function: pure; called with keyword arguments only.
          donate: names of arguments whose buffers the step may reuse.
          constants: all that the function's result depends on besides its arguments, as values whose repr says all of
            them; two functions never share a name and constants. None: its programs are not kept, see `keep_programs`.
        """
        self.name = name
        self.records: list[CompileRecord] = []
        self._jitted = jax.jit(function, donate_argnames=donate)
        self._donate, self._constants = donate, constants
        self._compiled: dict[Hashable, tuple[dict[str, Any], Any]] = {}

    def __call__(self, bucket: Hashable, **arguments: Any) -> Any:
        """Run the program of a bucket, compiling it the first time.

        Args:
          bucket: hashable key.
          **arguments: the function's arguments; the same shapes and dtypes whenever the key is the same.

        Raises:
          RetraceError: the arguments differ from those the bucket was compiled for.
        """
        if bucket not in self._compiled:
            self.trace(bucket, **arguments)()
        known, compiled = self._compiled[bucket]
        signature = _signature(arguments)
        if signature != known:
            raise RetraceError(_difference(self.name, bucket, known, signature))
        return compiled(**arguments)

    def trace(self, bucket: Hashable, **arguments: Any) -> Callable[[], None]:
        """Trace the program of a bucket, unless it is compiled or a file keeps it.

        Args:
          bucket: hashable key.
          **arguments: the function's arguments, or their shapes.

        Returns:
          What compiles or reads it, in whichever thread; see `compile_together`.
        """
        if bucket in self._compiled:
            return lambda: None
        began = time.perf_counter()
        file = None
        if self._constants is not None:
            file = kept.file_for((self.name, *self._constants), self._donate, arguments)
        lowered = None if file and os.access(file, os.R_OK) else self._lower(arguments)
        traced = time.perf_counter() - began

        def finish() -> None:
            began = time.perf_counter()
            found = kept.read(file) if file and lowered is None else None
            compiled = found or (lowered or self._lower(arguments)).compile()
            memory = compiled.memory_analysis()
            temp = None if memory is None else memory.temp_size_in_bytes
            self.records.append(CompileRecord(self.name, bucket, traced + time.perf_counter() - began, temp))
            self._compiled[bucket] = _signature(arguments), compiled
            if file and not found:
                kept.write(file, compiled)

        return finish

    def _lower(self, arguments: dict[str, Any]) -> jax.stages.Lowered:
        with _uncollected():
            return self._jitted.lower(**arguments)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Look for no garbage: what a trace makes lives until it ends, and what it leaves behind is no circle."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def compile_together(jobs: Iterable[Callable[[], None]], threads: int | None = None) -> None:
    """Compile some programs while the next are traced: XLA takes a thread for each, and tracing is Python.

    While programs are traced no thread of the process looks for garbage.

    Args:
      jobs: of `BucketedStep.trace`, best as a generator that traces when it is asked for the next.
      threads: that compile; None means as many as there are processors, at most 16.

    Raises:
      Whatever a job raises; then no other begins.

    >>> import jax.numpy as jnp
    >>> double = BucketedStep("double", lambda x: x * 2)
    >>> compile_together(double.trace(n, x=jax.ShapeDtypeStruct((n,), jnp.float32)) for n in (1, 2))
    >>> sorted(record.bucket for record in double.records)
    [1, 2]
    """
    pool = ThreadPoolExecutor(threads or min(16, os.cpu_count() or 1))
    try:
        waiting: collections.deque[Future[None]] = collections.deque()
        with _uncollected():
            for job in jobs:
                waiting.append(pool.submit(job))
                while waiting and waiting[0].done():
                    waiting.popleft().result()
        for compiled in waiting:
            compiled.result()
    finally:
        # After an error or an interrupt, what has not begun to compile never does.
        pool.shutdown(cancel_futures=True)


def structure_of(params: Any) -> Hashable:
    """What of a pytree a compiled program depends on: its structure, and every leaf's shape and dtype."""
    leaves, structure = jax.tree.flatten(params)
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def _signature(arguments: dict[str, Any]) -> dict[str, Any]:
    def of(leaf: Any) -> tuple:
        return leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)

    return {
        name: (jax.tree.structure(value), [of(leaf) for leaf in jax.tree.leaves(value)])
        for name, value in arguments.items()
    }


def _difference(name: str, bucket: Hashable, known: dict[str, Any], now: dict[str, Any]) -> str:
    text = f"{name} was compiled for bucket {bucket} and would compile again: "
    for argument in [*known, *(extra for extra in now if extra not in known)]:
        if known.get(argument) == now.get(argument):
            continue
        if argument not in known or argument not in now or known[argument][0] != now[argument][0]:
            return f"{text}argument {argument!r} has another structure. Use a key of its own for it."
        old, new = next(pair for pair in zip(known[argument][1], now[argument][1], strict=True) if pair[0] != pair[1])
        return (
            f"{text}argument {argument!r} changed {_show(old)} -> {_show(new)}. "
            f"Pad it to the bucket's shape and dtype, or use a key of its own."
        )
    return f"{text}its arguments changed."


def _show(leaf: tuple) -> str:
    shape, dtype, weak = leaf
    return f"{'weak ' if weak else ''}{dtype}{list(shape)}"
