"""From a folder or a Hub id to a Model: examine, check the memory, then fill the stacks layer by layer."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax

from ferrum_jax import config_checks as check
from ferrum_jax.checkpoint.device import Job, Unit, place_all, units_of, working_bytes
from ferrum_jax.checkpoint.dialect import read_dialect
from ferrum_jax.checkpoint.files import open_checkpoint
from ferrum_jax.checkpoint.hub import resolve
from ferrum_jax.checkpoint.json_files import read_json
from ferrum_jax.checkpoint.leaves import LeafReader
from ferrum_jax.checkpoint.stacks import Memory, fill, shares_memory, to_jax
from ferrum_jax.checkpoint.weight_cache import (
    LEAST,
    Entry,
    Facts,
    Writer,
    find_entry,
    read_entry,
    reading,
    weight_bytes,
    writing,
)
from ferrum_jax.config import ModelConfig
from ferrum_jax.environment import (
    WEIGHT_CACHE,
    check_memory,
    check_platform,
    enable_compile_cache,
    make_private,
    switched_off,
    weight_cache_folder,
)
from ferrum_jax.errors import BackendError, CheckpointError, ConfigError
from ferrum_jax.kernels import default_implementation
from ferrum_jax.params import layout_for, num_bytes
from ferrum_jax.plan import Plan, make_plan
from ferrum_jax.progress import Progress
from ferrum_jax.tokenizer import Tokenizer
from ferrum_kernels import cpu
from ferrum_kernels.ops import IMPLEMENTATIONS
from ferrum_kernels.ops import resolve as resolve_implementation


class CheckpointWarning(UserWarning):
    """A checkpoint whose metadata and data disagree, or that holds more than its model needs."""


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What loading took.

    Attributes:
      folder: where the files are.
      version: "gptq", "gptq_v2" or None, as decided from the data.
      seconds: wall time of the whole load.
      bytes_read: size of the checkpoint's tensors.
      bytes_held: size of the parameters.
      warnings: sentences about the checkpoint that were given as warnings.
      weight_cache: the file that holds the parameters for the next start (on CPU also for this one, which maps it),
        None where there is none.
      from_cache: whether an earlier load has written that file, so that the checkpoint itself was not read.
      check_seconds: of these, for headers and for what is examined before any memory is taken.
    """

    folder: Path
    version: str | None
    seconds: float
    bytes_read: int
    bytes_held: int
    warnings: tuple[str, ...]
    weight_cache: Path | None = None
    from_cache: bool = False
    check_seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model: configuration, parameters and tokenizer.

    Attributes:
      cfg: frozen configuration, a static argument of jit.
      params: the pytree described in ferrum_jax.params.
      tokenizer: text <-> ids, and the chat template.
      report: what loading took.
    """

    cfg: ModelConfig
    params: dict[str, Any]
    tokenizer: Tokenizer
    report: LoadReport


def load(
    model: str | Path,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    implementation: str | None = None,
    checkpoint_format: str | None = None,
    lm_head_bits: int | None = None,
    offline: bool | None = None,
    weight_cache: bool | None = None,
    quiet: bool = False,
) -> Model:
    """Load a GPTQ checkpoint, or an unquantised one, as a pytree; weights stay packed.

    Args:
      model: "demo" (the model in the package), a folder, or a Hugging Face id, "owner/name" or "owner/name@revision".
      revision: branch, tag or commit on the Hub.
      dtype: "bfloat16", "float16" or "float32" for activations and unquantised weights. None means the checkpoint's
        own, but float32 on a CPU without the CPU kernels, where 16 bits are slower (see `default_dtype`).
      implementation: of the packed matmuls, None for the best of the device; stored in cfg.
      checkpoint_format: "gptq" or "gptq_v2", to settle what the files leave open.
      lm_head_bits: 8 or 4 holds the output projection in so many bits, rounded while it is read, where the checkpoint
        stores it unquantised; stored in cfg. None holds it as the checkpoint does. Where the checkpoint ties it to the
        embedding, the packed projection comes beside the embedding, which stays as it is.
      offline: True reads the Hugging Face cache only; None follows HF_HUB_OFFLINE.
      weight_cache: keep the assembled weights on disk, to be mapped from there (CPU) or sent to the device in large
        transfers at the next start. None does so for checkpoints of 256 MiB and more unless FERRUM_JAX_WEIGHT_CACHE
        is "off"; True and False decide.
      quiet: show no progress.

    Returns:
      Model. The weights exist once: on CPU they are read to where they stay, elsewhere the host holds one layer at a
      time beside the parameters.

    Raises:
      CheckpointError: a file is missing, damaged, contradictory or unsupported.
      ConfigError: the configuration is not one this package runs.
      CapacityError: the parameters do not fit the device's memory.
      BackendError: JAX and its Apple plugin do not fit together, or the implementation is unknown.

    >>> import ferrum_jax as fj
    >>> model = fj.load("demo")
    >>> model.cfg.num_experts, model.params["embed"].shape
    (16, (4096, 256))
    """
    began = time.perf_counter()
    if checkpoint_format not in (None, "gptq", "gptq_v2"):
        raise ConfigError(f"checkpoint_format={checkpoint_format!r} is unknown; accepted are 'gptq' and 'gptq_v2'.")
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise BackendError(f"implementation={implementation!r} is unknown; accepted are None, {IMPLEMENTATIONS}.")
    check.lm_head_bits(lm_head_bits)
    folder = resolve(model, revision=revision, offline=offline, quiet=quiet)
    cfg = read_config(folder)
    check_platform()
    if implementation is not None:
        resolve_implementation(implementation)  # what cannot run here is refused before anything is read
    if dtype is None:
        dtype = default_dtype(cfg, implementation)
    cfg = dataclasses.replace(cfg, dtype=dtype, implementation=implementation, lm_head_bits=lm_head_bits)
    tokenizer = Tokenizer.from_folder(folder)
    enable_compile_cache()
    entry = _cache_entry(folder, cfg, checkpoint_format, weight_cache)
    found = None if entry is None else _from_cache(entry, cfg, folder.name, str(model), quiet)
    if found is None:
        facts, params, file, checked = _from_checkpoint(folder, cfg, checkpoint_format, entry, str(model), quiet)
    else:
        (facts, params), file, checked = found, entry and entry.path, 0.0
    seconds = time.perf_counter() - began
    sizes = facts.bytes_read, num_bytes(params)
    report = LoadReport(folder, facts.version, seconds, *sizes, facts.warnings, file, found is not None, checked)
    return Model(cfg, params, tokenizer, report)


def default_dtype(cfg: ModelConfig, implementation: str | None) -> str:
    """The dtype that `dtype=None` stands for.

    Args:
      cfg: as the checkpoint says.
      implementation: of the packed products.

    Returns:
      The checkpoint's own; float32 on the CPU where XLA runs the products, which takes longer over 16 bits.
    """
    if jax.default_backend() != "cpu":
        return cfg.dtype
    kernels = (default_implementation() if implementation is None else implementation) in cpu.NAMES
    return cfg.dtype if kernels and cfg.quant is not None and cfg.quant.bits in cpu.BITS else "float32"


def _cache_entry(
    folder: Path, cfg: ModelConfig, checkpoint_format: str | None, weight_cache: bool | None
) -> Entry | None:
    """Where the assembled weights are or will be kept; None for a load that leaves the cache alone."""
    wanted = not switched_off(WEIGHT_CACHE) and weight_bytes(folder) >= LEAST
    if not (wanted if weight_cache is None else weight_cache):
        return None
    if why := make_private(weight_cache_folder()):
        _not_kept(f"{why}, so", stacklevel=4)
        return None
    try:
        return find_entry(weight_cache_folder(), folder, cfg, checkpoint_format)
    except OSError:
        return None  # a file is missing or cannot be read, which open_checkpoint says in full


def _not_kept(why: str, stacklevel: int) -> None:
    warnings.warn(
        f"{why} the assembled weights are not kept and every start reads the checkpoint. Set {WEIGHT_CACHE} to a "
        f"folder of your own on a disk with room, or to off.",
        CheckpointWarning,
        stacklevel=stacklevel,
    )


def _from_cache(entry: Entry, cfg: ModelConfig, name: str, model: str, quiet: bool) -> tuple[Facts, Any] | None:
    """(facts, parameters) as an earlier load has left them, None where it has not or they are damaged."""
    try:
        nbytes = entry.path.stat().st_size
    except OSError:
        return None
    try:
        if shares_memory():
            check_memory(nbytes, model)
            with Progress(f"checking {name}", nbytes, quiet) as progress:
                kept = read_entry(entry, progress.advance)
            return None if kept is None else (_said(kept[0], stacklevel=4), to_jax(*kept[1:]))
        with Progress(f"loading {name}", nbytes, quiet) as progress, reading(entry, progress.advance) as reader:
            if reader is None:
                return None
            units = units_of(reader.tree)
            _check_device(reader.tree, units, layout_for(cfg), model)
            return _said(reader.facts, stacklevel=4), place_all(reader.tree, units, reader, layout_for(cfg))
    except CheckpointError as error:
        warnings.warn(f"{error}; the checkpoint is read instead.", CheckpointWarning, stacklevel=3)
        return None


def _said(facts: Facts, stacklevel: int) -> Facts:
    """The facts, once their warnings have been given."""
    for sentence in facts.warnings:
        warnings.warn(sentence, CheckpointWarning, stacklevel=stacklevel)
    return facts


def _check_device(tree: Any, units: list[Unit], layout: Callable[[Any], Any], model: str) -> None:
    """Refuse parameters that do not fit the device as they will lie there, with what laying them out takes."""
    check_memory(num_bytes(jax.eval_shape(layout, tree)), model, working_bytes(tree, units))


def _from_checkpoint(
    folder: Path, cfg: ModelConfig, checkpoint_format: str | None, entry: Entry | None, model: str, quiet: bool
) -> tuple[Facts, Any, Path | None, float]:
    """(facts, parameters, file that holds them or None, seconds of checking), all read anew."""
    began = time.perf_counter()
    files = open_checkpoint(folder)
    with Progress(f"checking {folder.name}", files.nbytes, quiet) as progress:
        dialect = read_dialect(files, cfg, checkpoint_format, progress.advance)
    facts = _said(Facts(dialect.version, files.nbytes, (*files.warnings, *dialect.warnings)), stacklevel=4)
    plan = make_plan(cfg, dialect.format_of)
    check_memory(num_bytes(plan.tree), model)
    if not shares_memory():
        _check_device(plan.tree, units_of(plan.tree), layout_for(cfg), model)
    checked = time.perf_counter() - began
    with Progress(f"loading {folder.name}", files.nbytes, quiet) as progress, files.reader() as reader:
        leaves = LeafReader(reader, files, dialect, progress)
        if entry is not None:
            complete = None
            try:
                with writing(entry, plan.tree, facts) as target:
                    params = _filled(plan, leaves, layout_for(cfg), target)
                    if find_entry(entry.path.parent, folder, cfg, checkpoint_format) != entry:
                        raise CheckpointError(f"{folder} changed while it was read. Load it again.")
                    complete = params
                return facts, complete, entry.path, checked
            except OSError as problem:
                _not_kept(f"{entry.path.parent} cannot be written ({problem.strerror}), so", stacklevel=4)
            if complete is not None:  # the file got no name; a second copy beside the parameters might not fit
                return facts, complete, None, checked
        return facts, _filled(plan, leaves, layout_for(cfg), None), None, checked


def _filled(plan: Plan, leaves: LeafReader, layout: Callable[[Any], Any], kept: Writer | None) -> Any:
    """The parameters, read from the checkpoint; `kept` is written on the way."""
    if not shares_memory():
        params = place_all(plan.tree, units_of(plan.tree, plan), FromCheckpoint(leaves, kept), layout)
        if kept is not None:
            kept.finish()
        return params
    if kept is not None:
        fill(plan, leaves.fill, kept, leaves.forget)
        return to_jax(plan.tree, kept.finish())
    target = Memory(jax.tree.leaves(plan.tree))
    fill(plan, leaves.fill, target)
    return to_jax(plan.tree, target.arrays)


@dataclasses.dataclass(frozen=True)
class FromCheckpoint:
    """The leaves of a checkpoint as a `device.Feed`, written to the weight cache on the way to the device.

    Attributes:
      leaves: reads them.
      kept: the file of the cache, None where none is wanted.
    """

    leaves: LeafReader
    kept: Writer | None

    def fill(self, unit: Unit, host: Any) -> list[Job]:
        """Reads of some megabytes each."""
        return self.leaves.jobs(unit.source, host)

    def check(self, unit: Unit, host: Any) -> list[Job]:
        """Writes to the file, which keeps a checksum of each."""
        if self.kept is None:
            return []
        pairs = zip(jax.tree.leaves(unit.arrays), jax.tree.leaves(host), strict=True)
        return [partial(self.kept.close, number, unit.layer, array) for number, array in pairs]


def read_config(folder: Path) -> ModelConfig:
    """The configuration of a checkpoint folder, from config.json and the files that go with it.

    Args:
      folder: with config.json, and optionally quantize_config.json and generation_config.json.

    Returns:
      ModelConfig.

    Raises:
      CheckpointError: a file is missing or damaged.
      ConfigError: a value is not supported.
    """
    config = read_json(folder / "config.json", "the model configuration")
    others = []
    for name, what in (
        ("quantize_config.json", "the quantisation settings"),
        ("generation_config.json", "the generation settings"),
    ):
        others.append(read_json(folder / name, what) if (folder / name).exists() else None)
    return ModelConfig.from_hf(config, *others)
