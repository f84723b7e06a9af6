"""From a folder or a Hub id to a Model: examine, check the memory, then fill the stacks layer by layer."""

from __future__ import annotations

import dataclasses
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ferrum_jax.checkpoint.dialect import Dialect, read_dialect
from ferrum_jax.checkpoint.files import CheckpointFiles, TensorReader, open_checkpoint
from ferrum_jax.checkpoint.hub import resolve
from ferrum_jax.checkpoint.json_files import read_json
from ferrum_jax.config import ModelConfig
from ferrum_jax.environment import check_memory, check_platform, enable_compile_cache
from ferrum_jax.errors import BackendError, CheckpointError, ConfigError, ShapeError
from ferrum_jax.kernels import GptqTensors, MixedStack, PackedLinear, from_gptq
from ferrum_jax.params import assemble, num_bytes
from ferrum_jax.plan import Plan, make_plan
from ferrum_jax.progress import Progress
from ferrum_jax.sources import Experts, Linear, Vector
from ferrum_jax.tokenizer import Tokenizer
from ferrum_kernels.bits import pack, unpack
from ferrum_kernels.ops import IMPLEMENTATIONS


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
      warnings: sentences that were given as warnings.
    """

    folder: Path
    version: str | None
    seconds: float
    bytes_read: int
    bytes_held: int
    warnings: tuple[str, ...]


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
    offline: bool | None = None,
    quiet: bool = False,
) -> Model:
    """Load a GPTQ checkpoint, or an unquantised one, as a pytree; weights stay packed.

    Args:
      model: "demo" (the model in the package), a folder, or a Hugging Face id, "owner/name" or "owner/name@revision".
      revision: branch, tag or commit on the Hub.
      dtype: "bfloat16", "float16" or "float32" for activations and unquantised weights. None means float32 on CPU,
        which computes nothing faster in 16 bits without a kernel for it, and the checkpoint's own dtype elsewhere.
      implementation: of the packed matmuls, None for the best of the device; stored in cfg.
      checkpoint_format: "gptq" or "gptq_v2", to settle what the files leave open.
      offline: True reads the Hugging Face cache only; None follows HF_HUB_OFFLINE.
      quiet: show no progress.

    Returns:
      Model. Loading streams: the host holds one layer at a time beside the parameters.

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
    folder = resolve(model, revision=revision, offline=offline, quiet=quiet)
    cfg = read_config(folder)
    check_platform()
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else cfg.dtype
    cfg = dataclasses.replace(cfg, dtype=dtype, implementation=implementation)
    tokenizer = Tokenizer.from_folder(folder)
    files = open_checkpoint(folder)
    with Progress(f"checking {folder.name}", files.nbytes, quiet) as progress:
        dialect = read_dialect(files, cfg, checkpoint_format, progress.advance)
    sentences = (*files.warnings, *dialect.warnings)
    for sentence in sentences:
        warnings.warn(sentence, CheckpointWarning, stacklevel=2)
    plan = make_plan(cfg, dialect.format_of)
    check_memory(num_bytes(plan.tree), str(model))
    enable_compile_cache()
    with Progress(f"loading {folder.name}", files.nbytes, quiet) as progress:
        params = read_params(files, plan, dialect, cfg, progress)
    seconds = time.perf_counter() - began
    report = LoadReport(folder, dialect.version, seconds, files.nbytes, num_bytes(params), sentences)
    return Model(cfg, params, tokenizer, report)


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


def read_params(
    files: CheckpointFiles, plan: Plan, dialect: Dialect, cfg: ModelConfig, progress: Progress
) -> dict[str, Any]:
    """Fill a plan from files that read_dialect has accepted.

    Args:
      files: the tensor table.
      plan: made with dialect.format_of.
      dialect: the findings.
      cfg: the model; its dtype is that of unquantised leaves.
      progress: advanced by the bytes of each tensor.

    Returns:
      The parameters, on the default device.
    """
    with files.reader() as reader:
        read = _LeafReader(reader, files, dialect, np.dtype(jnp.dtype(cfg.dtype)), progress)

        def top(name: str) -> Any:
            return read.leaf(plan.top_sources[name], plan.top[name], lead=0)

        def layer_of(run: int, offset: int) -> Any:
            return read.readers(plan.runs[run].sources[offset], plan.runs[run].tree)

        return assemble(plan, top, layer_of)


@dataclasses.dataclass(frozen=True)
class _LeafReader:
    reader: TensorReader
    files: CheckpointFiles
    dialect: Dialect
    dtype: np.dtype
    progress: Progress

    def readers(self, source: Any, leaf: Any) -> Any:
        """One layer, with functions that read its leaves in their place."""
        if isinstance(source, dict):
            return {key: self.readers(child, leaf[key]) for key, child in source.items()}
        return partial(self.leaf, source, leaf, lead=1)

    def leaf(self, source: Any, leaf: Any, lead: int) -> Any:
        if isinstance(source, Vector):
            return self.plain(source.name)
        if isinstance(source, Linear):
            return self.linear(source, leaf)
        assert isinstance(source, Experts)
        if isinstance(leaf, MixedStack):
            stacks = zip(leaf.parts, leaf.experts, strict=True)
            parts = tuple(self.stack([source.experts[e] for e in ids], part, lead) for part, ids in stacks)
            return MixedStack(parts, leaf.experts)
        return self.stack(list(source.experts), leaf, lead)

    def stack(self, members: list[Linear], leaf: Any, lead: int) -> Any:
        """One layer's experts in one host array per field, each written once."""
        host = jax.tree.map(lambda a: np.empty(a.shape[lead:], a.dtype), leaf)
        for e, member in enumerate(members):
            one = self.linear(member, leaf)
            for target, value in zip(jax.tree.leaves(host), jax.tree.leaves(one), strict=True):
                target[e] = value
        return host

    def linear(self, source: Linear, leaf: Any) -> Any:
        if not isinstance(leaf, PackedLinear):
            return np.concatenate([self.plain(f"{module}.weight").T for module in source.modules], axis=-1)
        parts = [self.packed(module, leaf) for module in source.modules]
        if len(parts) == 1:
            return parts[0]
        qzeros = None
        if leaf.qzeros is not None:
            zeros = [unpack(part.qzeros, part.bits, part.n_per_expert, axis=-1) for part in parts]
            qzeros = pack(np.concatenate(zeros, axis=-1), leaf.bits, axis=-1)
        return dataclasses.replace(
            parts[0],
            qweight=np.concatenate([part.qweight for part in parts], axis=-1),
            scales=np.concatenate([part.scales for part in parts], axis=-1),
            qzeros=qzeros,
            shape=leaf.shape,
        )

    def packed(self, module: str, leaf: PackedLinear) -> PackedLinear:
        names = {field: f"{module}.{field}" for field in ("qweight", "qzeros", "scales", "g_idx")}
        g_idx = self.read(names["g_idx"]) if names["g_idx"] in self.dialect.names else None
        scales = self.read(names["scales"]).astype(np.float16, copy=False)
        tensors = GptqTensors(self.read(names["qweight"]), self.read(names["qzeros"]), scales, g_idx)
        try:
            return from_gptq(
                tensors,
                leaf.bits,
                leaf.group_size,
                self.dialect.version or "gptq",
                k=leaf.k,
                sym=leaf.qzeros is None,
                act_order=leaf.perm is not None,
            )
        except ShapeError as error:
            raise CheckpointError(f"{module}: {error}") from error

    def plain(self, name: str) -> np.ndarray:
        return self.read(name).astype(self.dtype, copy=False)

    def read(self, name: str) -> np.ndarray:
        stored = self.dialect.names[name]
        self.progress.advance(self.files.tensors[stored].nbytes)
        return self.reader[stored]
