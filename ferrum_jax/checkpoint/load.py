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
import numpy as np

from ferrum_jax import config_checks as check
from ferrum_jax.checkpoint.dialect import read_dialect
from ferrum_jax.checkpoint.files import open_checkpoint
from ferrum_jax.checkpoint.hub import resolve
from ferrum_jax.checkpoint.json_files import read_json
from ferrum_jax.checkpoint.leaves import LeafReader
from ferrum_jax.checkpoint.stacks import Memory, fill, shares_memory, to_jax
from ferrum_jax.checkpoint.weight_cache import LEAST, Entry, Facts, find_entry, read_entry, weight_bytes, writing
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
from ferrum_jax.params import assemble, layout_for, num_bytes
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
      weight_cache: the file that the parameters are mapped from, None where they are in memory of the process.
      from_cache: whether an earlier load has written that file, so that the checkpoint itself was not read.
    """

    folder: Path
    version: str | None
    seconds: float
    bytes_read: int
    bytes_held: int
    warnings: tuple[str, ...]
    weight_cache: Path | None = None
    from_cache: bool = False


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
      weight_cache: keep the assembled weights on disk and map them from there at the next start, on CPU. None does so
        for checkpoints of 256 MiB and more unless FERRUM_JAX_WEIGHT_CACHE is "off"; True and False decide.
      quiet: show no progress.

    Returns:
      Model. The weights exist once: on CPU they are read to where they stay, elsewhere the host holds one layer at a
      time beside the parameters.

    Raises:
      CheckpointError: a file is missing, damaged, contradictory or unsupported.
      ConfigError: the configuration is not one this package runs.
      CapacityError: the parameters do not fit the device's memory.
      BackendError: JAX and its Apple plugin do not fit together, the implementation is unknown, or weight_cache is
        True on another device than the CPU.

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
    found = None if entry is None else _from_cache(entry, folder.name, str(model), quiet)
    if found is None:
        facts, params, file = _from_checkpoint(folder, cfg, checkpoint_format, entry, str(model), quiet)
    else:
        (facts, params), file = found, entry and entry.path
    seconds = time.perf_counter() - began
    sizes = facts.bytes_read, num_bytes(params)
    report = LoadReport(folder, facts.version, seconds, *sizes, facts.warnings, file, found is not None)
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
    if weight_cache and jax.default_backend() != "cpu":
        raise BackendError(
            f"weight_cache=True works on the CPU, this device is {jax.default_backend()}; leave the argument out, or "
            f"set JAX_PLATFORMS=cpu."
        )
    wanted = not switched_off(WEIGHT_CACHE) and jax.default_backend() == "cpu" and weight_bytes(folder) >= LEAST
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


def _from_cache(entry: Entry, name: str, model: str, quiet: bool) -> tuple[Facts, Any] | None:
    """(facts, parameters) as an earlier load has left them, None where it has not or they are damaged."""
    try:
        nbytes = entry.path.stat().st_size
    except OSError:
        return None
    check_memory(nbytes, model)
    try:
        with Progress(f"checking {name}", nbytes, quiet) as progress:
            kept = read_entry(entry, progress.advance)
    except CheckpointError as error:
        warnings.warn(f"{error}; the checkpoint is read instead.", CheckpointWarning, stacklevel=3)
        return None
    if kept is None:
        return None
    facts, tree, arrays = kept
    for sentence in facts.warnings:
        warnings.warn(sentence, CheckpointWarning, stacklevel=3)
    return facts, to_jax(tree, arrays)


def _from_checkpoint(
    folder: Path, cfg: ModelConfig, checkpoint_format: str | None, entry: Entry | None, model: str, quiet: bool
) -> tuple[Facts, Any, Path | None]:
    """(facts, parameters, file that holds them or None), all read anew."""
    files = open_checkpoint(folder)
    with Progress(f"checking {folder.name}", files.nbytes, quiet) as progress:
        dialect = read_dialect(files, cfg, checkpoint_format, progress.advance)
    facts = Facts(dialect.version, files.nbytes, (*files.warnings, *dialect.warnings))
    for sentence in facts.warnings:
        warnings.warn(sentence, CheckpointWarning, stacklevel=3)
    plan = make_plan(cfg, dialect.format_of)
    check_memory(num_bytes(plan.tree), model)
    with Progress(f"loading {folder.name}", files.nbytes, quiet) as progress, files.reader() as reader:
        leaves = LeafReader(reader, files, dialect, progress)
        if not shares_memory():
            return facts, _layer_by_layer(plan, leaves, layout_for(cfg)), None
        if entry is not None:
            try:
                with writing(entry, plan.tree, facts) as target:
                    fill(plan, leaves.fill, target, leaves.forget)
                    arrays = target.finish()
                    if find_entry(entry.path.parent, folder, cfg, checkpoint_format) != entry:
                        raise CheckpointError(f"{folder} changed while it was read. Load it again.")
                return facts, to_jax(plan.tree, arrays), entry.path
            except OSError as problem:
                _not_kept(f"{entry.path.parent} cannot be written ({problem.strerror}), so", stacklevel=4)
        target = Memory(jax.tree.leaves(plan.tree))
        fill(plan, leaves.fill, target)
        return facts, to_jax(plan.tree, target.arrays), None


def _layer_by_layer(plan: Plan, leaves: LeafReader, layout: Callable[[Any], Any]) -> dict[str, Any]:
    """The parameters on a device with memory of its own, the host holds one leaf of one layer at a time."""

    def leaf(source: Any, leaf: Any, lead: int) -> Any:
        out = jax.tree.map(lambda a: np.empty(a.shape[lead:], a.dtype), leaf)
        leaves.fill(source, out)
        return out

    def readers(source: Any, tree: Any) -> Any:
        if isinstance(source, dict):
            return {key: readers(child, tree[key]) for key, child in source.items()}
        return partial(leaf, source, tree, lead=1)

    return assemble(
        plan,
        lambda name: leaf(plan.top_sources[name], plan.top[name], lead=0),
        lambda run, offset: readers(plan.runs[run].sources[offset], plan.runs[run].tree),
        layout,
    )


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
