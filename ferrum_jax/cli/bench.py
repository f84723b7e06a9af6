"""`ferrum-jax bench`: speed and memory of a model on this device, through the steps that generate uses."""

from __future__ import annotations

import platform
import resource
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from ferrum_jax import __version__
from ferrum_jax.cli.options import NO_DEFAULT, Loading, UsageError, load_model, start_jax
from ferrum_jax.cli.output import Status, emit, size, table
from ferrum_jax.environment import installed
from ferrum_jax.errors import BackendError, CapacityError

if TYPE_CHECKING:
    from ferrum_jax.buckets import CompileRecord
    from ferrum_jax.checkpoint.load import Model
    from ferrum_jax.generation import Stats


@dataclass(frozen=True, kw_only=True)
class Bench(Loading):
    """Measure prefill, decode, time to the first token, compile times and peak memory.

    Runs once to compile and warm up, then --repeats times; rates are medians. Prompts are random tokens, sampling is
    greedy and an end-of-text token does not end a run, so every run does the same work. Rates count all rows. Nothing
    compiled is taken from the compile cache.

    Args:
      model: demo, a folder, or a Hugging Face id (OWNER/NAME or OWNER/NAME@REVISION).
      synthetic: in place of MODEL, a TOML file of sizes (see configs/) to fill with random packed weights.
      layers: with --synthetic, how many layers; without it all of them.
      prompt_tokens: tokens of each prompt.
      new_tokens: tokens written after each prompt.
      batch: prompts at once.
      repeats: measured runs.
      json: print a JSON object.
    """

    model: Positional[Annotated[str | None, arg(metavar="[MODEL]", help_behavior_hint=NO_DEFAULT)]] = None
    synthetic: Annotated[str | None, arg(metavar="TOML", help_behavior_hint=NO_DEFAULT)] = None
    layers: Annotated[int | None, arg(metavar="N", help_behavior_hint=NO_DEFAULT)] = None
    prompt_tokens: Annotated[int, arg(metavar="N")] = 128
    new_tokens: Annotated[int, arg(metavar="N")] = 64
    batch: Annotated[int, arg(metavar="N")] = 1
    repeats: Annotated[int, arg(metavar="N")] = 3
    json: Annotated[bool, arg(help_behavior_hint=NO_DEFAULT)] = False

    def execute(self) -> int:
        """Measure; returns the exit code."""
        self.check()
        model = load_model(self, self.model) if self.model is not None else synthetic_model(self)
        longest = self.prompt_tokens + self.new_tokens
        if longest > model.cfg.max_position:
            raise CapacityError(
                f"{self.prompt_tokens} prompt tokens and {self.new_tokens} new ones need a context of {longest}; this "
                f"model's is {model.cfg.max_position}. Ask for fewer."
            )
        with Status("compiling", self.quiet) as status, fresh_compiles():
            report = measure(self, model, status)
        if self.json:
            emit(report)
        else:
            print(text_of(report))
        return 0

    def check(self) -> None:
        """Refuse options that do not go together, before anything is loaded."""
        if (self.model is None) == (self.synthetic is None):
            raise UsageError("give either a MODEL or --synthetic with a TOML file of sizes.")
        if self.layers is not None and self.synthetic is None:
            raise UsageError("--layers goes with --synthetic; a checkpoint has the layers it has.")
        if self.new_tokens < 2:
            raise UsageError(f"--new-tokens is {self.new_tokens}; give at least 2, as decode starts at the second.")
        for name in ("prompt_tokens", "batch", "repeats"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; give at least 1.")


def synthetic_model(options: Bench) -> Model:
    """A model of random packed weights with the sizes of a TOML file.

    Args:
      options: of the command.

    Raises:
      ConfigError: the file or a size is refused.
      CapacityError: the parameters do not fit the memory.
    """
    from ferrum_jax.config_file import load_toml_config

    assert options.synthetic is not None
    cfg = load_toml_config(options.synthetic)
    if options.layers is not None:
        if not 1 <= options.layers <= cfg.num_layers:
            raise UsageError(f"--layers is {options.layers}; {options.synthetic} has 1 to {cfg.num_layers}.")
        n = options.layers
        cfg = replace(cfg, num_layers=n, moe_layers=cfg.moe_layers[:n], sliding_windows=cfg.sliding_windows[:n])
    start_jax(options)
    import tokenizers

    from ferrum_jax.checkpoint.load import LoadReport, Model, default_dtype
    from ferrum_jax.environment import check_memory, enable_compile_cache
    from ferrum_jax.params import abstract, num_bytes, random_params
    from ferrum_jax.tokenizer import Tokenizer

    dtype = options.dtype or default_dtype(cfg, options.implementation)
    bits = options.lm_head_bits or cfg.lm_head_bits
    cfg = replace(cfg, dtype=dtype, implementation=options.implementation, lm_head_bits=bits)
    needed = num_bytes(abstract(cfg))
    check_memory(needed, options.synthetic)
    enable_compile_cache()
    with Status("filling random weights", options.quiet):
        params = random_params(cfg)
    # Random weights have no words; every id of this tokenizer stands for no text.
    silent = Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, "?")))
    return Model(cfg, params, silent, LoadReport(Path(options.synthetic), None, 0.0, 0, needed, ()))


@contextmanager
def fresh_compiles() -> Iterator[None]:
    """Leave the persistent compile cache out while the block runs, so that compile times do not depend on it."""
    import jax
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    config: Any = jax.config  # its options are made at run time
    before = config.jax_enable_compilation_cache
    config.update("jax_enable_compilation_cache", False)
    reset_cache()  # JAX remembers whether it uses the cache; the files stay
    try:
        yield
    finally:
        config.update("jax_enable_compilation_cache", before)
        reset_cache()


def measure(options: Bench, model: Model, status: Status) -> dict[str, Any]:
    """Run the model and put the numbers together.

    Args:
      options: sizes and repeats.
      model: loaded or synthetic.
      status: told which run is on.

    Returns:
      The report that --json prints.
    """
    import numpy as np

    from ferrum_jax.generation import steps_for

    steps_for.cache_clear()  # what an earlier call in this process compiled is not this run's
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, model.cfg.vocab_size, (options.batch, options.prompt_tokens)).tolist()
    _one_run(model, prompts, options.new_tokens)
    runs = []
    for i in range(options.repeats):
        status.update(f"run {i + 1} of {options.repeats}")
        runs.append(_one_run(model, prompts, options.new_tokens))
    records = steps_for(model.cfg).records()
    peak, where = peak_memory()
    first = [run.first_token_seconds for run in runs]
    return {
        "model": options.model or options.synthetic,
        "synthetic": options.synthetic is not None,
        "prefill": _rates([options.batch * run.prefill_tokens_per_second for run in runs]),
        "decode": _rates([options.batch * run.decode_tokens_per_second for run in runs]),
        "first_token_seconds": statistics.median(first),
        "first_token_seconds_min": min(first),
        "first_token_seconds_max": max(first),
        "peak_memory_bytes": peak,
        "peak_memory_of": where,
        "parameter_bytes": model.report.bytes_held,
        "load_seconds": None if options.synthetic else model.report.seconds,
        "compile_seconds": sum(record.seconds for record in records),
        "compiles": [_compile(record) for record in records],
        "shapes": {
            "layers": model.cfg.num_layers,
            "prompt_tokens": options.prompt_tokens,
            "new_tokens": options.new_tokens,
            "batch": options.batch,
        },
        "repeats": options.repeats,
        "dtype": model.cfg.dtype,
        "lm_head_bits": model.cfg.lm_head_bits,
        "implementation": _implementation(model),
        "device": _device(),
        "versions": _versions(),
    }


def _one_run(model: Model, prompts: Sequence[Sequence[int]], new_tokens: int) -> Stats:
    from ferrum_jax.generation import stream_batch

    step = None
    for step in stream_batch(model, prompts, max_tokens=new_tokens, ignore_eos=True):
        if step.finish_reason == "nonfinite_logits":
            raise BackendError("the model gave logits that are NaN or infinite, so its speed means nothing.")
    assert step is not None
    return step.stats


def _rates(values: list[float]) -> dict[str, float]:
    return {"tokens_per_second": statistics.median(values), "min": min(values), "max": max(values)}


def _compile(record: CompileRecord) -> dict[str, Any]:
    bucket = record.bucket if isinstance(record.bucket, tuple) else (record.bucket,)
    return {
        "step": record.step,
        "bucket": list(bucket),
        "seconds": record.seconds,
        "temporary_bytes": record.temp_bytes,
    }


def peak_memory() -> tuple[int, str]:
    """The most bytes held so far, and by what: the device where it counts them, else this process."""
    import jax

    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"], "device"
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024), "process"


def _implementation(model: Model) -> str:
    from ferrum_jax.kernels import default_implementation

    return model.cfg.implementation or default_implementation()


def _device() -> dict[str, Any]:
    import jax

    device = jax.devices()[0]
    return {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()}


def _versions() -> dict[str, str | None]:
    packages = {name: installed(name) for name in ("jax", "jaxlib")}
    return {"ferrum_jax": __version__, **packages, "python": platform.python_version()}


def text_of(report: dict[str, Any]) -> str:
    """The report for people."""
    return "\n".join(_lines(report))


def _lines(report: dict[str, Any]) -> Iterator[str]:
    shapes, device, versions = report["shapes"], report["device"], report["versions"]
    head = "" if report["lm_head_bits"] is None else f" · lm_head in {report['lm_head_bits']} bits"
    yield f"{report['model']}   {shapes['layers']} layers · {report['dtype']} · {report['implementation']}{head}"
    yield (
        f"{device['platform']} ({device['kind']}) · ferrum_jax {versions['ferrum_jax']} · jax {versions['jax']} · "
        f"jaxlib {versions['jaxlib']} · Python {versions['python']}"
    )
    yield f"batch {shapes['batch']} · {shapes['prompt_tokens']} prompt tokens · {shapes['new_tokens']} new tokens"
    yield ""
    rows = [
        (name, *(f"{report[key][of]:.1f}" for of in ("tokens_per_second", "min", "max")))
        for name, key in (("prefill tok/s", "prefill"), ("decode tok/s", "decode"))
    ]
    keys = ("first_token_seconds", "first_token_seconds_min", "first_token_seconds_max")
    rows.append(("first token s", *(f"{report[key]:.3f}" for key in keys)))
    yield table((f"{report['repeats']} runs", "median", "min", "max"), rows)
    yield ""
    yield f"peak memory {size(report['peak_memory_bytes'])} ({report['peak_memory_of']})"
    yield f"parameters  {size(report['parameter_bytes'])}"
    yield f"compiling   {report['compile_seconds']:.1f} s"
    yield ""
    rows = [
        (row["step"], str(row["bucket"]), f"{row['seconds']:.2f} s", size(row["temporary_bytes"] or 0))
        for row in report["compiles"]
    ]
    yield table(("step", "bucket", "compile", "temporary memory"), rows, left=2)
