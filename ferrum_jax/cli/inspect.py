"""`ferrum-jax inspect`: what a checkpoint holds and needs, from headers and small tensors alone, without a device."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from tyro.conf import Positional, arg

from ferrum_jax.cli.options import NO_DEFAULT, Checkpoint, ModelName
from ferrum_jax.cli.output import emit, size, table
from ferrum_jax.errors import FerrumError, RequestError

if TYPE_CHECKING:
    from ferrum_jax.checkpoint.dialect import Dialect
    from ferrum_jax.checkpoint.files import CheckpointFiles
    from ferrum_jax.config import ModelConfig
    from ferrum_jax.plan import Format

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Inspect(Checkpoint):
    """Say what a checkpoint is, what memory it needs and what is wrong with it.

    Reads headers and every tensor but the packed words; uses no device. A Hugging Face id is downloaded first.
    Ends with exit code 1 when there are problems.

    Args:
      model: demo, a folder, or a Hugging Face id (OWNER/NAME or OWNER/NAME@REVISION).
      tensors: list every tensor.
      memory: GiB to plan for; without it what is free in this machine's main memory.
      json: print a JSON object.
    """

    model: Positional[ModelName]
    tensors: Annotated[bool, arg(help_behavior_hint=NO_DEFAULT)] = False
    memory: Annotated[float | None, arg(metavar="GIB", help_behavior_hint=NO_DEFAULT)] = None
    json: Annotated[bool, arg(help_behavior_hint=NO_DEFAULT)] = False

    def execute(self) -> int:
        """Examine; returns the exit code."""
        if self.memory is not None and not 0 < self.memory < 2**20:
            raise RequestError(f"--memory {self.memory:g} is no amount of memory; give GiB above 0, such as 24.")
        report = examine(self)
        if self.json:
            emit(report)
        else:
            print(text_of(report))
        return 1 if report["problems"] else 0


def examine(options: Inspect) -> dict[str, Any]:
    """Read a checkpoint as far as it can be read.

    Args:
      options: of the command.

    Returns:
      The report that --json prints; what could not be found out is None, and "problems" says why.
    """
    from ferrum_jax.checkpoint.dialect import read_dialect
    from ferrum_jax.checkpoint.files import open_checkpoint
    from ferrum_jax.checkpoint.hub import resolve
    from ferrum_jax.checkpoint.load import read_config
    from ferrum_jax.progress import Progress
    from ferrum_jax.tokenizer import Tokenizer

    problems: list[str] = []
    offline = options.offline or None

    def attempt(read: Callable[[], T]) -> T | None:
        try:
            return read()
        except FerrumError as error:
            problems.append(str(error))
            return None

    folder = attempt(lambda: resolve(options.model, options.revision, offline, options.quiet))
    cfg = files = dialect = tokenizer = None
    if folder is not None:
        cfg = attempt(lambda: read_config(folder))
        files = attempt(lambda: open_checkpoint(folder))
        tokenizer = attempt(lambda: Tokenizer.from_folder(folder))
    if cfg is not None:
        cfg = replace(cfg, dtype=options.dtype or cfg.dtype)
    if cfg is not None and files is not None:
        with Progress(f"checking {files.folder.name}", files.nbytes, options.quiet) as progress:
            dialect = attempt(lambda: read_dialect(files, cfg, options.checkpoint_format, progress.advance))
    return {
        "model": options.model,
        "folder": None if folder is None else str(folder),
        "architecture": None if cfg is None else architecture(cfg),
        "dialect": None if cfg is None or dialect is None else describe(dialect, cfg, options.checkpoint_format),
        "memory": None if cfg is None or dialect is None else budget(cfg, dialect, options.memory),
        "chat_template": None if tokenizer is None else tokenizer.chat_template is not None,
        "tensors": tensor_rows(files, dialect) if options.tensors and files is not None else None,
        "problems": problems,
        "warnings": [*(files.warnings if files else ()), *(dialect.warnings if dialect else ())],
    }


def architecture(cfg: ModelConfig) -> dict[str, Any]:
    """Sizes of the model, and its parameters: all of them, and those a token passes through."""
    from ferrum_jax.sources import Experts, Linear, Vector, layer_sources, top_sources

    def count(node: Any, of_experts: float) -> float:
        if isinstance(node, dict):
            return sum(count(child, of_experts) for child in node.values())
        if isinstance(node, Experts):
            return of_experts * sum(count(expert, 1) for expert in node.experts)
        return math.prod(node.shape) if isinstance(node, Vector) else node.k * sum(node.n)

    trees: list[Any] = [top_sources(cfg), *(layer_sources(cfg, i) for i in range(cfg.num_layers))]
    share = cfg.top_k / cfg.num_experts if cfg.num_experts else 0.0
    assert all(isinstance(leaf, Vector | Linear) for leaf in trees[0].values())
    return {
        "model_type": cfg.model_type,
        "layers": cfg.num_layers,
        "moe_layers": sum(cfg.moe_layers),
        "hidden_size": cfg.hidden_size,
        "heads": cfg.num_heads,
        "kv_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "experts": cfg.num_experts,
        "experts_per_token": cfg.top_k,
        "vocabulary": cfg.vocab_size,
        "context": cfg.max_position,
        "rope": cfg.rope.rope_type,
        "parameters": round(sum(count(tree, 1) for tree in trees)),
        "active_parameters": round(sum(count(tree, share) for tree in trees)),
    }


def describe(dialect: Dialect, cfg: ModelConfig, chosen: str | None) -> dict[str, Any]:
    """How the weights are packed, and where the version of the zero points is known from."""
    formats = Counter(words_of(found) for found in dialect.formats.values())
    if dialect.version is None:
        source = None
    elif chosen is not None:
        source = "option"
    elif any(found.sym for found in dialect.formats.values()):
        source = "data"
    else:
        source = "metadata" if cfg.quant is not None and cfg.quant.checkpoint_format else "assumed"
    return {
        "quantised": dialect.version is not None,
        "version": dialect.version,
        "version_from": source,
        "bits": sorted({found.bits for found in dialect.formats.values()}),
        "group_sizes": sorted({found.group_size for found in dialect.formats.values()}),
        "sym": all(found.sym for found in dialect.formats.values()),
        "act_order": any(found.order for found in dialect.formats.values()),
        "packed_modules": len(dialect.formats),
        "formats": dict(formats.most_common()),
    }


def words_of(found: Format) -> str:
    """A packing in words.

    >>> from ferrum_jax.plan import Format
    >>> words_of(Format(4, 128))
    '4-bit g128 sym'
    """
    return f"{found.bits}-bit g{found.group_size} {'sym' if found.sym else 'asym'}{' act-order' if found.order else ''}"


def budget(cfg: ModelConfig, dialect: Dialect, memory: float | None) -> dict[str, Any]:
    """Bytes of the parameters and of the cache, and how many tokens of cache fit beside the parameters."""
    import jax.numpy as jnp

    from ferrum_jax.environment import free_host_memory
    from ferrum_jax.params import num_bytes
    from ferrum_jax.plan import make_plan

    weights = num_bytes(make_plan(cfg, dialect.format_of).tree)
    per_token = 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim * jnp.dtype(cfg.dtype).itemsize
    available = free_host_memory() if memory is None else int(memory * 2**30)
    return {
        "dtype": cfg.dtype,
        "weights_bytes": weights,
        "kv_bytes_per_token": per_token,
        "context_bytes": per_token * cfg.max_position,
        "available_bytes": available,
        "tokens_that_fit": None if available is None else max(0, available - weights) // per_token,
    }


def tensor_rows(files: CheckpointFiles, dialect: Dialect | None) -> list[dict[str, Any]]:
    """Every tensor of the files, with the packing of its module where that is known."""
    formats = {}
    if dialect is not None:
        for name, stored in dialect.names.items():
            if (found := dialect.formats.get(name.rpartition(".")[0])) is not None:
                formats[stored] = words_of(found)
    return [
        {
            "name": info.name,
            "dtype": info.dtype,
            "shape": list(info.shape),
            "bytes": info.nbytes,
            "file": info.file.name,
            "format": formats.get(info.name),
        }
        for info in files.tensors.values()
    ]


def text_of(report: dict[str, Any]) -> str:
    """The report for people."""
    name = Path(report["folder"]).name if report["folder"] else report["model"]
    lines = [f"{name}   {' · '.join(_identity(report))}".rstrip()]
    if (memory := report["memory"]) is not None:
        context = report["architecture"]["context"]
        lines.append(
            f"weights {size(memory['weights_bytes'])} · KV {size(memory['kv_bytes_per_token'])}/token · context "
            f"{context} tokens ({size(memory['context_bytes'])}) · {memory['dtype']}"
        )
        if memory["available_bytes"] is not None:
            fit = memory["tokens_that_fit"]
            full = fit // context
            words = f"{full} x {context} tokens" if full else f"{fit} tokens" if fit else "the weights do not fit"
            lines.append(f"in {size(memory['available_bytes'])}: {words}, before temporary memory")
    for kind in ("problems", "warnings"):
        found = report[kind]
        lines += [f"{kind}: none"] if not found else [f"{kind}:", *(f"  - {sentence}" for sentence in found)]
    if report["tensors"] is not None:
        header = ("tensor", "dtype", "shape", "format", "file", "bytes")
        rows = [
            (row["name"], row["dtype"], str(row["shape"]), row["format"] or "", row["file"], f"{row['bytes']}")
            for row in report["tensors"]
        ]
        lines += ["", table(header, rows, left=5)]
    return "\n".join(lines)


def _identity(report: dict[str, Any]) -> list[str]:
    parts = []
    if (arch := report["architecture"]) is not None:
        parts += [arch["model_type"], f"{arch['layers']} layers"]
        if arch["experts"]:
            parts.append(f"{arch['experts']} experts, {arch['experts_per_token']} active")
        parts.append(f"{_millions(arch['parameters'])} parameters, {_millions(arch['active_parameters'])} active")
    if (dialect := report["dialect"]) is not None:
        if not dialect["quantised"]:
            return [*parts, "not quantised"]
        source = {"data": "checked in data", "metadata": "says the metadata", "option": "as told"}
        version = {"gptq": "v1", "gptq_v2": "v2"}[dialect["version"]]
        counts = dialect["formats"].items()
        packed = ", ".join(words if len(counts) == 1 else f"{n} x {words}" for words, n in counts)
        parts.append(f"GPTQ {packed}, zeros {version} ({source.get(dialect['version_from'], 'assumed')})")
    return parts


def _millions(count: int) -> str:
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
