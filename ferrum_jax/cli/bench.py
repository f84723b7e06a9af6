"""`ferrum-jax bench`: speed and memory of a model on this device, through the steps that generate uses."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from ferrum_jax.cli.bench_about import about
from ferrum_jax.cli.bench_compare import compare, read_report, text_of_comparison
from ferrum_jax.cli.bench_compile import own_compile_cache
from ferrum_jax.cli.bench_experts import LATEST
from ferrum_jax.cli.bench_roofline import ceilings
from ferrum_jax.cli.bench_sweep import Sweep, sweep
from ferrum_jax.cli.bench_sweep import lines as rows_as_lines
from ferrum_jax.cli.options import NO_DEFAULT, CacheDtype, Loading, UsageError, load_model, start_jax
from ferrum_jax.cli.output import Status, emit, size, table
from ferrum_jax.errors import BackendError, CapacityError

if TYPE_CHECKING:
    from ferrum_jax.buckets import CompileRecord
    from ferrum_jax.checkpoint.load import Model
    from ferrum_jax.generation import Stats

DEFAULT_CONTEXT = 256


@dataclass(frozen=True, kw_only=True)
class Bench(Loading):
    """Measure prefill, decode, time to the first token, compile times and peak memory.

    Runs once to compile and warm up, then --repeats times; rates are medians. Prompts are random tokens, sampling is
    greedy and an end-of-text token does not end a run, so every run does the same work. Rates count all rows. Nothing
    compiled is taken from the compile cache.

    Lists make a sweep, a line each: --batch 1,16,64 --context 256,8192 --prefill 128,4096. A decode line writes
    --new-tokens around its context; a prefill line reads one prompt. Their programs are compiled beside each other
    first, so that the seconds of these compilations overlap; the warm ones do not. Each line says how near it comes to
    what the device must at least read or compute, where the experts that a step reads are counted, and lines that do
    not fit say so. Rows of random weights soon write the same tokens, which go to the same experts; --temperature 1
    keeps them apart. What a line has given is said on stderr as soon as it is over, and a sweep that ends early, by an
    error or Ctrl-C, still prints the lines that are over.

    Args:
      model: demo, a folder, or a Hugging Face id (OWNER/NAME or OWNER/NAME@REVISION).
      synthetic: in place of MODEL, a TOML file of sizes (see configs/) to fill with random packed weights.
      layers: with --synthetic, how many layers; without it all of them.
      prompt_tokens: tokens of each prompt.
      new_tokens: tokens written after each prompt.
      batch: prompts at once; several, with commas, make a sweep.
      context: a sweep over contexts of the decode, 256 where only batches are given.
      prefill: a sweep over lengths of prompts.
      temperature: of the sampling in a sweep.
      cache_dtype: of keys and values; without it the activations'.
      repeats: measured runs.
      compile_once: leave out the second compilation of each line of a sweep, which tells what the compile cache saves.
      compare: an earlier report (--json); prints what has changed, as new over old.
      json: print a JSON object.
    """

    model: Positional[Annotated[str | None, arg(metavar="[MODEL]", help_behavior_hint=NO_DEFAULT)]] = None
    synthetic: Annotated[str | None, arg(metavar="TOML", help_behavior_hint=NO_DEFAULT)] = None
    layers: Annotated[int | None, arg(metavar="N", help_behavior_hint=NO_DEFAULT)] = None
    prompt_tokens: Annotated[int, arg(metavar="N")] = 128
    new_tokens: Annotated[int, arg(metavar="N")] = 64
    batch: Annotated[str, arg(metavar="N[,N...]")] = "1"
    context: Annotated[str | None, arg(metavar="N[,N...]", help_behavior_hint=NO_DEFAULT)] = None
    prefill: Annotated[str | None, arg(metavar="N[,N...]", help_behavior_hint=NO_DEFAULT)] = None
    temperature: Annotated[float, arg(metavar="T")] = 0.0
    cache_dtype: CacheDtype = None
    repeats: Annotated[int, arg(metavar="N")] = 3
    compile_once: Annotated[bool, arg(help_behavior_hint=NO_DEFAULT)] = False
    compare: Annotated[str | None, arg(metavar="FILE", help_behavior_hint=NO_DEFAULT)] = None
    json: Annotated[bool, arg(help_behavior_hint=NO_DEFAULT)] = False

    def execute(self) -> int:
        """Measure; returns the exit code."""
        self.check()
        old = None if self.compare is None else read_report(self.compare)
        model = load_model(self, self.model) if self.model is not None else synthetic_model(self)
        report, error = self.sweep(model) if self.is_sweep else (self.single(model), None)
        compared = None if old is None else compare(report, old)
        try:
            if self.json:
                emit(report if compared is None else {**report, "compare": compared})
            else:
                print("\n".join(sweep_lines(report)) if self.is_sweep else text_of(report))
                if compared is not None:
                    print(f"\n{text_of_comparison(compared, str(self.compare))}")
        finally:
            if error is not None:
                raise error
        return 0

    def single(self, model: Model) -> dict[str, Any]:
        """One shape: a prompt read and continued."""
        longest = self.prompt_tokens + self.new_tokens
        if longest > model.cfg.max_position:
            raise CapacityError(
                f"{self.prompt_tokens} prompt tokens and {self.new_tokens} new ones need a context of {longest}; this "
                f"model's is {model.cfg.max_position}. Ask for fewer."
            )
        with Status("compiling", self.quiet) as status, fresh_compiles():
            return measure(self, model, status)

    def sweep(self, model: Model) -> tuple[dict[str, Any], BaseException | None]:
        """Many shapes, a row each, and what ended the sweep before its last."""
        sizes = self.batches, self.contexts, self.prompts, self.new_tokens
        wanted = Sweep(*sizes, self.repeats, self.temperature, self.cache_dtype, self.compile_once)
        wanted.check(model)
        rows: dict[str, list[Any]] = {"decode": [], "prefill": []}
        ended = None
        with Status("measuring", self.quiet) as status, own_compile_cache():
            ceiling = ceilings()
            try:
                sweep(model, wanted, ceiling, status, rows)
            except (Exception, KeyboardInterrupt) as error:
                if not any(rows.values()):
                    raise
                ended = error
        report = {
            **about(self, model),
            **rows,
            "experts_touched": f"counted in a forward pass over the last {LATEST} tokens of every row",
            "temperature": self.temperature,
            "ceilings": asdict(ceiling),
            "new_tokens": self.new_tokens,
            "ended_by": None if ended is None else (str(ended) or type(ended).__name__).splitlines()[0],
        }
        return report, ended

    @property
    def is_sweep(self) -> bool:
        """Whether there are rows to measure."""
        return len(self.batches) > 1 or self.context is not None or self.prefill is not None

    @property
    def batches(self) -> tuple[int, ...]:
        """Of --batch."""
        return numbers("--batch", self.batch)

    @property
    def contexts(self) -> tuple[int, ...]:
        """Of --context; only prefill is measured where neither it nor several batches are given."""
        if self.context is not None:
            return numbers("--context", self.context)
        return (DEFAULT_CONTEXT,) if len(self.batches) > 1 else ()

    @property
    def prompts(self) -> tuple[int, ...]:
        """Of --prefill."""
        return () if self.prefill is None else numbers("--prefill", self.prefill)

    def check(self) -> None:
        """Refuse options that do not go together, before anything is loaded."""
        if (self.model is None) == (self.synthetic is None):
            raise UsageError("give either a MODEL or --synthetic with a TOML file of sizes.")
        for option, text in (("--batch", self.batch), ("--context", self.context), ("--prefill", self.prefill)):
            if text is not None:
                numbers(option, text)
        if self.temperature and not self.is_sweep:
            raise UsageError("--temperature goes with a sweep; give --batch 1,4, --context or --prefill too.")
        if self.compile_once and not self.is_sweep:
            raise UsageError("--compile-once goes with a sweep; without one every program is compiled once anyway.")
        if self.temperature and not 0.001 <= self.temperature <= 100:
            raise UsageError(f"--temperature is {self.temperature}; give 0 for greedy, or 0.001 to 100.")
        if self.layers is not None and self.synthetic is None:
            raise UsageError("--layers goes with --synthetic; a checkpoint has the layers it has.")
        if self.new_tokens < 2:
            raise UsageError(f"--new-tokens is {self.new_tokens}; give at least 2, as decode starts at the second.")
        for name in ("prompt_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; give at least 1.")
        for context in self.contexts:
            if context <= self.new_tokens // 2:
                raise UsageError(
                    f"--context is {context}; a decode of {self.new_tokens} new tokens around it begins "
                    f"{self.new_tokens // 2} before. Give more, or fewer --new-tokens."
                )


def numbers(option: str, text: str) -> tuple[int, ...]:
    """The numbers of a list with commas.

    Args:
      option: for the error.
      text: as given.

    Raises:
      UsageError: it is no such list, or one is not positive.

    >>> numbers("--batch", "1,16")
    (1, 16)
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"{option} is {text}; give positive numbers with commas between them, such as 1,16,64.")
    return tuple(map(int, parts))


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
    prompts = rng.integers(0, model.cfg.vocab_size, (options.batches[0], options.prompt_tokens)).tolist()
    _one_run(model, prompts, options.new_tokens, options.cache_dtype)
    runs = []
    for i in range(options.repeats):
        status.update(f"run {i + 1} of {options.repeats}")
        runs.append(_one_run(model, prompts, options.new_tokens, options.cache_dtype))
    records = steps_for(model.cfg).records()
    first = [run.first_token_seconds for run in runs]
    return {
        **about(options, model),
        "prefill": _rates([options.batches[0] * run.prefill_tokens_per_second for run in runs]),
        "decode": _rates([options.batches[0] * run.decode_tokens_per_second for run in runs]),
        "first_token_seconds": statistics.median(first),
        "first_token_seconds_min": min(first),
        "first_token_seconds_max": max(first),
        "compile_seconds": sum(record.seconds for record in records),
        "compiles": [_compile(record) for record in records],
        "shapes": {
            "layers": model.cfg.num_layers,
            "prompt_tokens": options.prompt_tokens,
            "new_tokens": options.new_tokens,
            "batch": options.batches[0],
        },
    }


def _one_run(model: Model, prompts: Sequence[Sequence[int]], new_tokens: int, cache_dtype: str | None) -> Stats:
    from ferrum_jax.generation import stream_batch

    step = None
    for step in stream_batch(model, prompts, max_tokens=new_tokens, ignore_eos=True, cache_dtype=cache_dtype):
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


def text_of(report: dict[str, Any]) -> str:
    """The report for people."""
    return "\n".join(_lines(report))


def sweep_lines(report: dict[str, Any]) -> Iterator[str]:
    """The report of a sweep for people."""
    yield from _head(report)
    yield f"{report['new_tokens']} new tokens around each context · {report['repeats']} runs"
    yield ""
    yield from rows_as_lines(report)
    if report["ended_by"] is not None:
        yield f"ended early: {report['ended_by']}"
    yield from _memory(report)
    ceiling = report["ceilings"]
    if ceiling["bytes_per_second"] is not None:
        flops = ceiling["flops_per_second"]
        compute = "" if flops is None else f", {flops / 1e12:.0f} TFLOP/s"
        yield f"roofline    {ceiling['bytes_per_second'] / 1e12:.2f} TB/s{compute} ({ceiling['source']})"
        yield f"            experts touched by a step: {report['experts_touched']}"


def _head(report: dict[str, Any]) -> Iterator[str]:
    device, versions = report["device"], report["versions"]
    head = "" if report["lm_head_bits"] is None else f" · lm_head in {report['lm_head_bits']} bits"
    yield f"{report['model']}   {report['layers']} layers · {report['dtype']} · {report['implementation']}{head}"
    if report["xla_attends_because"]:
        yield f"XLA attends, not {report['implementation']}: {report['xla_attends_because']}"
    yield (
        f"{device['platform']} ({device['kind']}) · ferrum_jax {versions['ferrum_jax']} · jax {versions['jax']} · "
        f"jaxlib {versions['jaxlib']} · Python {versions['python']}"
    )


def _memory(report: dict[str, Any]) -> Iterator[str]:
    yield f"peak memory {size(report['peak_memory_bytes'])} ({report['peak_memory_of']})"
    yield f"parameters  {size(report['parameter_bytes'])}"


def _lines(report: dict[str, Any]) -> Iterator[str]:
    yield from _head(report)
    shapes = report["shapes"]
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
    yield from _memory(report)
    yield f"compiling   {report['compile_seconds']:.1f} s"
    yield ""
    rows = [
        (row["step"], str(row["bucket"]), f"{row['seconds']:.2f} s", size(row["temporary_bytes"] or 0))
        for row in report["compiles"]
    ]
    yield table(("step", "bucket", "compile", "temporary memory"), rows, left=2)
