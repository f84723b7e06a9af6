"""The sweep of `ferrum-jax bench`: decode by batch and context, prefill by prompt length, through stream_batch."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ferrum_jax.cli.bench_about import peak_memory
from ferrum_jax.cli.bench_compile import Line, compile_all
from ferrum_jax.cli.bench_experts import counting, experts_counted
from ferrum_jax.cli.bench_roofline import Ceilings, decode_bytes, prefill_flops
from ferrum_jax.cli.output import Status, size, table
from ferrum_jax.errors import BackendError, CapacityError

if TYPE_CHECKING:
    from ferrum_jax.checkpoint.load import Model
    from ferrum_jax.generation import Stats
    from ferrum_jax.sampling import SamplingParams

SLOTS = 128  # caches are a multiple of this
TOGETHER = 0.25  # of the mean gap; tokens that arrive closer to each other come from one dispatch


@dataclass(frozen=True)
class Sweep:
    """What to measure.

    Attributes:
      batches: rows of the decode lines.
      contexts: tokens in the middle of the decode of a row.
      prompts: lengths of the prefill lines.
      new_tokens: written per row in a decode line.
      repeats: measured runs of each line.
      temperature: of the sampling; 0.0 is greedy, where rows of random weights soon write the same tokens.
      cache_dtype: of keys and values; None means the activations'.
      compile_once: leave out the second compilation of each line.
    """

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prompts: tuple[int, ...]
    new_tokens: int
    repeats: int
    temperature: float = 0.0
    cache_dtype: str | None = None
    compile_once: bool = False

    def check(self, model: Model) -> None:
        """Refuse what the model's context does not hold.

        Raises:
          CapacityError: names the length.
        """
        longest = model.cfg.max_position
        for context in self.contexts:
            if context + self.new_tokens // 2 > longest:
                raise CapacityError(
                    f"--context {context} with {self.new_tokens} new tokens reaches {context + self.new_tokens // 2}; "
                    f"this model's context is {longest}. Ask for fewer."
                )
        for prompt in self.prompts:
            if prompt + 2 > longest:
                raise CapacityError(
                    f"--prefill {prompt} and 2 new tokens need a context of {prompt + 2}; this model's is {longest}. "
                    f"Ask for fewer."
                )


Rows = dict[str, list[dict[str, Any]]]


def sweep(model: Model, options: Sweep, ceiling: Ceilings, status: Status, rows: Rows) -> None:
    """Measure every line.

    Args:
      model: loaded or synthetic.
      options: what to measure.
      ceiling: of the device.
      status: told which line is on and what a line that is over has given.
      rows: {"decode": [], "prefill": []}; a line that is over adds its row here, so that a sweep which ends early loses
        none. A row that does not fit the memory has fits=False and the numbers.
    """
    wanted = list(itertools.product(options.contexts, options.batches))
    decode = [_decode_line(model, batch, context, options) for context, batch in wanted]
    prefill = [_prefill_line(model, prompt, options) for prompt in options.prompts]
    fitting = [line for line in decode + prefill if _fits(model, line)]
    status.update(f"compiling for {len(fitting)} lines")
    began = time.perf_counter()
    compiled = compile_all(model, fitting, counting(model, options.new_tokens) if options.contexts else {})
    cold = {id(line): found for line, found in zip(fitting, compiled, strict=True)}
    status.note(f"compiled for {len(fitting)} lines in {time.perf_counter() - began:.1f} s")
    for line, (context, batch) in zip(decode, wanted, strict=True):
        status.update(f"decode, {batch} rows of {context} tokens")
        measure = partial(_decode, model, line, context, options, ceiling, cold.get(id(line)))
        rows["decode"].append(_fitting(measure, batch=batch, context=context))
        status.note(_summary(f"decode {batch} x {context}", rows["decode"][-1]))
    for line, prompt in zip(prefill, options.prompts, strict=True):
        status.update(f"prefill, {prompt} tokens")
        measure = partial(_prefill, model, line, options, ceiling, cold.get(id(line)))
        rows["prefill"].append(_fitting(measure, prompt_tokens=prompt))
        status.note(_summary(f"prefill {prompt}", rows["prefill"][-1]))


def _summary(name: str, row: dict[str, Any]) -> str:
    """A row in a few words, its whole time with them."""
    if not row["fits"]:
        return f"{name}: does not fit"
    return f"{name}: {row['tokens_per_second']:.0f} tok/s ({row['seconds']:.1f} s for this line)"


def _fits(model: Model, line: Line) -> bool:
    try:
        _check_cache(model, line.batch, line.slots, line.cache_dtype)
    except _TooLarge:
        return False
    return True


class _TooLarge(Exception):
    """A row that does not fit; arguments are the numbers."""


def _fitting(measure: Callable[[], dict[str, Any]], **row: int) -> dict[str, Any]:
    import jax

    began = time.perf_counter()
    try:
        found = measure()
        return {
            **row,
            "fits": True,
            **found,
            "peak_memory_bytes": peak_memory()[0],
            "seconds": time.perf_counter() - began,
        }
    except _TooLarge as error:
        return {**row, "fits": False, **error.args[0]}
    except CapacityError as error:  # the steps' own memory beside the cache
        return {**row, "fits": False, "reason": str(error)}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {**row, "fits": False, "reason": str(error).splitlines()[0][:200]}


def _decode_line(model: Model, batch: int, context: int, options: Sweep) -> Line:
    from ferrum_jax.buckets import Buckets
    from ferrum_jax.budget import buckets_for

    start = context - options.new_tokens // 2
    slots = min(-(-(start + options.new_tokens) // SLOTS) * SLOTS, model.cfg.max_position)
    usual = buckets_for(model.cfg, None, options.cache_dtype)
    width = usual.fit("prefill", min(start, usual.widest(batch)))
    buckets = Buckets(batch=(batch,), prefill=(width,), cache=(slots,))
    sampling = _sampling(batch, options.new_tokens, options.temperature)
    return Line(batch, start, slots, buckets, sampling, options.cache_dtype)


def _prefill_line(model: Model, length: int, options: Sweep) -> Line:
    from ferrum_jax.buckets import Buckets

    slots = min(-(-(length + 2) // SLOTS) * SLOTS, model.cfg.max_position)
    buckets = Buckets(batch=(1,), cache=(slots,))
    return Line(1, length, slots, buckets, _sampling(1, 2, options.temperature), options.cache_dtype)


def _decode(
    model: Model, line: Line, context: int, options: Sweep, ceiling: Ceilings, cold: dict[str, Any] | None
) -> dict[str, Any]:
    batch = line.batch
    needed = _check_cache(model, batch, line.slots, line.cache_dtype)
    # Short prompts, but as many steps: how many one dispatch takes may depend on their time.
    warm = _warm(model, line, _prompts(model, batch, 1), options.compile_once)
    prompts = _prompts(model, batch, line.prompt)
    gaps, rates, first, run = [], [], [], None
    for _ in range(options.repeats):
        run = _timed(model, prompts, line)
        if run.stats.compile_seconds:
            run = _timed(model, prompts, line)
        arrivals, stats = run.arrivals, run.stats
        gaps += gaps_of(arrivals)
        rates.append(batch * (len(arrivals) - 1) / (arrivals[-1] - arrivals[0]))
        first.append(stats.first_token_seconds)
    assert run is not None
    touched = experts_counted(model, run.written)
    read = decode_bytes(model.cfg, model.params, batch, context, touched, line.cache_dtype)
    least = None if ceiling.bytes_per_second is None else sum(read.values()) / ceiling.bytes_per_second
    rate = statistics.median(rates)
    return {
        "tokens_per_second": rate,
        "min": min(rates),
        "max": max(rates),
        "inter_token_p50_seconds": _quantile(gaps, 0.5),
        "inter_token_p99_seconds": _quantile(gaps, 0.99),
        "first_token_seconds": statistics.median(first),
        "distinct_tokens": statistics.mean(len(set(tokens)) for tokens in zip(*run.written, strict=True)),
        "experts_touched": touched,
        "weight_bytes": read["weights"],
        "live_cache_bytes": read["cache"],
        "roofline_tokens_per_second": None if least is None else batch / least,
        "roofline_fraction": None if least is None else rate * least / batch,
        "cache_bytes": needed,
        **(cold or {}),
        "compile_seconds_warm": warm,
    }


def _prefill(
    model: Model, line: Line, options: Sweep, ceiling: Ceilings, cold: dict[str, Any] | None
) -> dict[str, Any]:
    length = line.prompt
    needed = _check_cache(model, 1, line.slots, line.cache_dtype)
    prompts = _prompts(model, 1, length)
    warm = _warm(model, line, prompts, options.compile_once)
    runs = [_timed(model, prompts, line) for _ in range(options.repeats)]
    first = [run.stats.first_token_seconds for run in runs]
    seconds = statistics.median(first)
    peak = ceiling.flops_per_second
    return {
        "tokens_per_second": length / seconds,
        "min": length / max(first),
        "max": length / min(first),
        "first_token_seconds": seconds,
        "flops": prefill_flops(model.cfg, length),
        "roofline_fraction": None if peak is None else prefill_flops(model.cfg, length) / peak / seconds,
        "cache_bytes": needed,
        **(cold or {}),
        "compile_seconds_warm": warm,
    }


def _check_cache(model: Model, batch: int, slots: int, cache_dtype: str | None) -> int:
    """Bytes of the cache, which must fit beside what the device holds."""
    import jax

    from ferrum_jax.cache import init_cache
    from ferrum_jax.environment import free_memory
    from ferrum_jax.params import num_bytes

    needed = num_bytes(jax.eval_shape(lambda: init_cache(model.cfg, batch, slots, cache_dtype)))
    free = free_memory()
    if free is not None and needed > free:
        raise _TooLarge({"cache_bytes": needed, "free_bytes": free})
    return needed


def _prompts(model: Model, batch: int, length: int) -> list[list[int]]:
    import numpy as np

    return np.random.default_rng(0).integers(0, model.cfg.vocab_size, (batch, length)).tolist()


def _sampling(batch: int, new_tokens: int, temperature: float) -> list[SamplingParams]:
    """Of each row; with a seed of its own, so that rows draw different tokens."""
    from ferrum_jax.sampling import SamplingParams

    options: dict[str, Any] = {"max_tokens": new_tokens, "ignore_eos": True, "temperature": temperature}
    return [SamplingParams(**options, seed=row if temperature else None) for row in range(batch)]


@dataclass(frozen=True)
class _Run:
    """When each token of the first row came, the stats of the last step, what each row has written."""

    arrivals: list[float]
    stats: Stats
    written: list[list[int]]


def _timed(model: Model, prompts: list[list[int]], line: Line) -> _Run:
    from ferrum_jax.generation import stream_batch

    arrivals, stats = [], None
    written: list[list[int]] = [[] for _ in prompts]
    for step in stream_batch(model, prompts, line.sampling, buckets=line.buckets, cache_dtype=line.cache_dtype):
        if step.finish_reason == "nonfinite_logits":
            raise BackendError("the model gave logits that are NaN or infinite, so its speed means nothing.")
        if step.row == 0:
            arrivals.append(time.perf_counter())
        stats = step.stats
        written[step.row].append(step.token)
    assert stats is not None
    return _Run(arrivals, stats, written)


def gaps_of(arrivals: Sequence[float]) -> list[float]:
    """Seconds between tokens; tokens that one dispatch has brought share the wait for it.

    Args:
      arrivals: when each token came.

    Returns:
      As many gaps as there are tokens after those of the first dispatch.

    >>> gaps_of([0.0, 4.0, 4.1, 8.0, 8.1])
    [2.0, 2.0, 2.0, 2.0]
    """
    together = TOGETHER * (arrivals[-1] - arrivals[0]) / max(1, len(arrivals) - 1)
    dispatches: list[list[float]] = []
    for now in arrivals:
        if dispatches and now - dispatches[-1][-1] <= together:
            dispatches[-1].append(now)
        else:
            dispatches.append([now])
    return [(now[0] - before[0]) / len(now) for before, now in itertools.pairwise(dispatches) for _ in range(len(now))]


def _quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]


def _warm(model: Model, line: Line, prompts: list[list[int]], compile_once: bool) -> float | None:
    """Run a line for the first time; seconds to compile it once more with what the compile cache has kept, or None."""
    from ferrum_jax.generation import steps_for

    if not compile_once:
        steps_for.cache_clear()
    _timed(model, prompts, line)
    return None if compile_once else sum(record.seconds for record in steps_for(model.cfg).records())


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The rows of a sweep for people."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}"

    def percent(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.0f} %"

    def too_large(row: dict[str, Any]) -> str:
        if "reason" in row:
            return f"does not fit: {row['reason']}"
        return f"does not fit: its cache takes {size(row['cache_bytes'])}, {size(row['free_bytes'])} are free"

    def compiling(row: dict[str, Any]) -> tuple[str, str]:
        return number(row.get("compile_seconds_cold")), number(row["compile_seconds_warm"])

    for name, rows, keys in (
        ("decode", report["decode"], ("batch", "context")),
        ("prefill", report["prefill"], ("prompt_tokens",)),
    ):
        fitting = [row for row in rows if row["fits"]]
        if fitting:
            decode = name == "decode"
            middle = ("p50 ms", "p99 ms", "experts") if decode else ("first token ms",)
            header = (*keys, "tok/s", *middle, "of roofline", "cache", "compile s", "warm s")
            cells = []
            for row in fitting:
                times = (
                    (row["inter_token_p50_seconds"], row["inter_token_p99_seconds"])
                    if decode
                    else (row["first_token_seconds"],)
                )
                cells.append(
                    (
                        *(str(row[key]) for key in keys),
                        f"{row['tokens_per_second']:.0f}",
                        *(f"{1e3 * value:.2f}" for value in times),
                        *((number(row["experts_touched"]),) if decode else ()),
                        percent(row["roofline_fraction"]),
                        size(row["cache_bytes"]),
                        *compiling(row),
                    )
                )
            yield name
            yield table(header, cells, left=0)
        for row in rows:
            if not row["fits"]:
                yield f"{name} {' x '.join(str(row[key]) for key in keys)}: {too_large(row)}"
        if rows:
            yield ""
