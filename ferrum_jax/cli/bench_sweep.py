"""The sweep of `ferrum-jax bench`: decode by batch and context, prefill by prompt length, through stream_batch."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ferrum_jax.cli.bench_about import peak_memory
from ferrum_jax.cli.bench_roofline import Ceilings, decode_bytes, prefill_flops
from ferrum_jax.cli.output import size, table
from ferrum_jax.errors import BackendError, CapacityError

if TYPE_CHECKING:
    from ferrum_jax.buckets import Buckets, CompileRecord
    from ferrum_jax.checkpoint.load import Model
    from ferrum_jax.generation import Stats
    from ferrum_jax.sampling import SamplingParams

LATEST = 16  # tokens of each row that experts are counted over
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
    """

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prompts: tuple[int, ...]
    new_tokens: int
    repeats: int
    temperature: float = 0.0
    cache_dtype: str | None = None

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


def sweep(model: Model, options: Sweep, ceiling: Ceilings, say: Callable[[str], None]) -> dict[str, list[Any]]:
    """Measure every line.

    Args:
      model: loaded or synthetic.
      options: what to measure.
      ceiling: of the device.
      say: told which line is on.

    Returns:
      {"decode": rows, "prefill": rows}; a row that does not fit the memory has fits=False and the numbers.
    """
    decode, prefill = [], []
    for context, batch in itertools.product(options.contexts, options.batches):
        say(f"decode, {batch} rows of {context} tokens")
        measure = partial(_decode, model, batch, context, options, ceiling)
        decode.append(_fitting(measure, batch=batch, context=context))
    for prompt in options.prompts:
        say(f"prefill, {prompt} tokens")
        prefill.append(_fitting(partial(_prefill, model, prompt, options, ceiling), prompt_tokens=prompt))
    return {"decode": decode, "prefill": prefill}


class _TooLarge(Exception):
    """A row that does not fit; arguments are the numbers."""


def _fitting(measure: Callable[[], dict[str, Any]], **row: int) -> dict[str, Any]:
    import jax

    try:
        return {**row, "fits": True, **measure(), "peak_memory_bytes": peak_memory()[0]}
    except _TooLarge as error:
        return {**row, "fits": False, **error.args[0]}
    except CapacityError as error:  # the steps' own memory beside the cache
        return {**row, "fits": False, "reason": str(error)}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {**row, "fits": False, "reason": str(error).splitlines()[0][:200]}


def _decode(model: Model, batch: int, context: int, options: Sweep, ceiling: Ceilings) -> dict[str, Any]:
    from ferrum_jax.buckets import Buckets
    from ferrum_jax.budget import buckets_for

    start = context - options.new_tokens // 2
    slots = min(-(-(start + options.new_tokens) // SLOTS) * SLOTS, model.cfg.max_position)
    usual = buckets_for(model.cfg, None, options.cache_dtype)
    width = usual.fit("prefill", min(start, usual.widest(batch)))
    buckets = Buckets(batch=(batch,), prefill=(width,), cache=(slots,))
    needed = _check_cache(model, batch, slots, options.cache_dtype)
    # Short prompts, but as many steps: how many one dispatch takes may depend on their time.
    sampling = _sampling(batch, options.new_tokens, options.temperature)
    compiles = _compile(model, _prompts(model, batch, 1), sampling, buckets, options.cache_dtype)
    prompts = _prompts(model, batch, start)
    gaps, rates, first, run = [], [], [], None
    for _ in range(options.repeats):
        run = _timed(model, prompts, sampling, buckets, options.cache_dtype)
        if run.stats.compile_seconds:
            run = _timed(model, prompts, sampling, buckets, options.cache_dtype)
        arrivals, stats = run.arrivals, run.stats
        gaps += gaps_of(arrivals)
        rates.append(batch * (len(arrivals) - 1) / (arrivals[-1] - arrivals[0]))
        first.append(stats.first_token_seconds)
    assert run is not None
    touched = experts_counted(model, run.written)
    read = decode_bytes(model.cfg, model.params, batch, context, touched, options.cache_dtype)
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
        **compiles,
    }


def _prefill(model: Model, length: int, options: Sweep, ceiling: Ceilings) -> dict[str, Any]:
    from ferrum_jax.buckets import Buckets

    slots = min(-(-(length + 2) // SLOTS) * SLOTS, model.cfg.max_position)
    buckets = Buckets(batch=(1,), cache=(slots,))
    needed = _check_cache(model, 1, slots, options.cache_dtype)
    prompts = _prompts(model, 1, length)
    sampling = _sampling(1, 2, options.temperature)
    compiles = _compile(model, prompts, sampling, buckets, options.cache_dtype)
    runs = [_timed(model, prompts, sampling, buckets, options.cache_dtype) for _ in range(options.repeats)]
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
        **compiles,
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


def _timed(
    model: Model,
    prompts: list[list[int]],
    sampling: list[SamplingParams],
    buckets: Buckets,
    cache_dtype: str | None,
) -> _Run:
    from ferrum_jax.generation import stream_batch

    arrivals, stats = [], None
    written: list[list[int]] = [[] for _ in prompts]
    for step in stream_batch(model, prompts, sampling, buckets=buckets, cache_dtype=cache_dtype):
        if step.finish_reason == "nonfinite_logits":
            raise BackendError("the model gave logits that are NaN or infinite, so its speed means nothing.")
        if step.row == 0:
            arrivals.append(time.perf_counter())
        stats = step.stats
        written[step.row].append(step.token)
    assert stats is not None
    return _Run(arrivals, stats, written)


def experts_counted(model: Model, written: list[list[int]]) -> float | None:
    """How many experts of a layer a decode step reads, counted in a forward pass over the latest tokens of every row.

    Args:
      model: that wrote them.
      written: tokens of each row, all of one length; the pass sees the last LATEST of them and nothing before.

    Returns:
      The mean over MoE layers, at the last token; None for a model without experts.
    """
    import jax
    import jax.numpy as jnp

    from ferrum_jax.model import forward

    if not model.cfg.num_experts:
        return None

    def chosen(params: Any, tokens: Any) -> list[Any]:
        _, aux = forward(params, tokens, model.cfg, with_aux=True)
        return [routing.experts[:, :, -1] for routing in aux.routing if routing is not None]

    tokens = jnp.asarray([row[-LATEST:] for row in written], jnp.int32)
    layers = [layer for run in jax.device_get(jax.jit(chosen)(model.params, tokens)) for layer in run]
    return statistics.mean(len(set(layer.ravel().tolist())) for layer in layers)


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


def _compile(
    model: Model,
    prompts: list[list[int]],
    sampling: list[SamplingParams],
    buckets: Buckets,
    cache_dtype: str | None,
) -> dict[str, Any]:
    """Compile what a line needs, then once more with what the compile cache has kept."""
    from ferrum_jax.generation import steps_for

    records: list[list[CompileRecord]] = []
    for _ in range(2):
        steps_for.cache_clear()
        _timed(model, prompts, sampling, buckets, cache_dtype)
        records.append(steps_for(model.cfg).records())
    cold, warm = records
    return {
        "compile_seconds_cold": sum(record.seconds for record in cold),
        "compile_seconds_warm": sum(record.seconds for record in warm),
        "temporary_bytes": max((record.temp_bytes or 0 for record in cold), default=0),
    }


@contextmanager
def own_compile_cache() -> Iterator[None]:
    """A compile cache that begins empty, so that the first compilation is cold and the second is not."""
    import jax
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    config: Any = jax.config  # its options are made at run time
    wanted = {"jax_persistent_cache_min_compile_time_secs": 0.0, "jax_enable_compilation_cache": True}
    before = {name: config.values[name] for name in (*wanted, "jax_compilation_cache_dir")}
    with tempfile.TemporaryDirectory() as folder:
        for name, value in {**wanted, "jax_compilation_cache_dir": folder}.items():
            config.update(name, value)
        reset_cache()  # JAX remembers the folder it uses
        try:
            yield
        finally:
            for name, value in before.items():
                config.update(name, value)
            reset_cache()


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
        return f"{row['compile_seconds_cold']:.1f}", f"{row['compile_seconds_warm']:.1f}"

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
