"""Compiling for the sweep of `ferrum-jax bench`: programs of all lines beside each other, before one is measured."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ferrum_jax.buckets import BucketedStep, Buckets
    from ferrum_jax.checkpoint.load import Model
    from ferrum_jax.sampling import SamplingParams


@dataclass(frozen=True)
class Line:
    """What the programs of a line of a sweep depend on.

    Attributes:
      batch: rows.
      prompt: tokens of each row's prompt.
      slots: that each row has in the cache.
      buckets: that the line is run with.
      sampling: of each row.
      cache_dtype: of keys and values; None means the activations'.
    """

    batch: int
    prompt: int
    slots: int
    buckets: Buckets
    sampling: Sequence[SamplingParams]
    cache_dtype: str | None


def compile_all(
    model: Model, lines: Sequence[Line], more: Mapping[tuple[BucketedStep, Hashable], dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Compile the programs of all lines, several at a time; one that does not compile is left to its line.

    Args:
      model: whose steps they are; what was compiled of them before is forgotten.
      lines: of the sweep.
      more: other programs, by step and bucket, with the shapes of their arguments.

    Returns:
      Of each line the seconds that its programs took, which overlap with those of the others, and the most temporary
      memory that one takes; a program that two lines share counts for both.
    """
    from ferrum_jax.buckets import compile_together
    from ferrum_jax.generation import steps_for

    steps_for.cache_clear()
    wanted: dict[tuple[BucketedStep, Hashable], dict[str, Any]] = {}
    of_lines = []
    for line in lines:
        programs = dict(_programs(model, line))
        wanted |= programs
        of_lines.append(set(programs))
    wanted |= more or {}
    compile_together(_job(step, bucket, arguments) for (step, bucket), arguments in wanted.items())
    found = {(step, record.bucket): record for step, _ in wanted for record in step.records}
    results = []
    for keys in of_lines:
        records = [found[key] for key in keys if key in found]
        results.append(
            {
                "compile_seconds_cold": sum(record.seconds for record in records),
                "temporary_bytes": max((record.temp_bytes or 0 for record in records), default=0),
            }
        )
    return results


def _job(step: BucketedStep, bucket: Hashable, arguments: dict[str, Any]) -> Callable[[], None]:
    """Traces a program; what compiles it. The line that needs a program that fails meets the same error again."""
    import jax

    from ferrum_jax.errors import FerrumError

    def nothing() -> None:
        """The program was not traced."""

    finish = nothing
    with contextlib.suppress(FerrumError, jax.errors.JaxRuntimeError):
        finish = step.trace(bucket, **arguments)

    def compile_it() -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            finish()

    return compile_it


def _programs(model: Model, line: Line) -> Iterator[tuple[tuple[BucketedStep, Hashable], dict[str, Any]]]:
    """Every program that `stream_batch` asks for when it runs a line, with the shapes of its arguments."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from ferrum_jax.budget import buckets_for
    from ferrum_jax.cache import init_cache
    from ferrum_jax.generation import steps_for
    from ferrum_jax.sampling import SamplerPlan, init_sampler, sample_step
    from ferrum_jax.steps import cache_kind, going

    cfg, params, rows = model.cfg, model.params, line.batch
    buckets = buckets_for(cfg, line.buckets, line.cache_dtype)
    plan = SamplerPlan.of(line.sampling)
    programs = steps_for(cfg).of(params, plan)
    cache = jax.eval_shape(lambda: init_cache(cfg, rows, line.slots, line.cache_dtype))
    kind = cache_kind(cfg, cache)
    logits = jax.ShapeDtypeStruct((rows, cfg.vocab_size), jnp.float32)
    lengths = jax.ShapeDtypeStruct((rows,), jnp.int32)
    start, widest = 0, buckets.widest(rows)
    while start < line.prompt:
        width = buckets.fit("prefill", min(line.prompt - start, widest))
        arguments = {"params": params, "tokens": jax.ShapeDtypeStruct((rows, width), jnp.int32), "lengths": lengths}
        yield (programs.prefill, (rows, width, line.slots, *kind)), {**arguments, "cache": cache, "logits": logits}
        start += width
    state = init_sampler(line.sampling, cfg.vocab_size, [[]] * rows, plan)
    yield (programs.sample, (rows,)), {"logits": logits, "state": state}
    sampled, state = jax.eval_shape(partial(sample_step, plan=plan), logits, state)
    ones = np.ones(rows, np.int32)
    arguments = {"params": params, "going": going(sampled.token, ones, ones, [()] * rows), "keep": ones}
    most = max(request.max_tokens for request in line.sampling) - 1  # the first comes from the prompt's logits
    for count in buckets.steps_of_dispatch():
        if count <= most:
            yield (programs.decode(count), (rows, line.slots, *kind)), {**arguments, "cache": cache, "state": state}


@contextmanager
def own_compile_cache() -> Iterator[None]:
    """A compile cache that begins empty, so that the first compilation is cold and the second is not."""
    import jax
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    config: Any = jax.config  # its options are made at run time
    wanted = {"jax_persistent_cache_min_compile_time_secs": 0.0, "jax_enable_compilation_cache": True}
    before = {name: config.values[name] for name in (*wanted, "jax_compilation_cache_dir")}
    # After an interrupt XLA may still compile, and write into the folder while it is removed.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for name, value in {**wanted, "jax_compilation_cache_dir": folder}.items():
            config.update(name, value)
        reset_cache()  # JAX remembers the folder it uses
        try:
            yield
        finally:
            for name, value in before.items():
                config.update(name, value)
            reset_cache()
