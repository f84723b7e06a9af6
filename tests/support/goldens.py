"""Where the reference checkpoints are, and the library's reading of a folder that may lack a tokenizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ferrum_jax.checkpoint.dialect import read_dialect
from ferrum_jax.checkpoint.files import open_checkpoint
from ferrum_jax.checkpoint.leaves import LeafReader
from ferrum_jax.checkpoint.load import read_config
from ferrum_jax.checkpoint.stacks import Memory, fill, to_jax
from ferrum_jax.config import ModelConfig
from ferrum_jax.plan import make_plan
from ferrum_jax.progress import Progress

ROOT = Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "golden"
SHARED = ROOT.parent / "shared" / "checkpoints"

DEMO = "tales-13m-gptq-int4"
OWN = {DEMO: ROOT / "ferrum_jax" / "models" / DEMO}  # part of every checkout
OWN |= {
    name: GOLDENS / "checkpoints" / name for name in ("mixtral-w4g128sym", "qwen3-w4g32asymact", "qwen3moe-w4g32act")
}
FOLDERS = OWN | {name: SHARED / name for name in ("qwen3moe-w4g128sym", "qwen3moe-w4g64asym", "qwen3moe-w8g128sym")}


def reference(name: str) -> Any:
    """The recorded arrays of a checkpoint; the test is skipped where the checkpoint is not part of this checkout."""
    if not FOLDERS[name].is_dir():
        pytest.skip(f"{name} is not part of this checkout")
    own = GOLDENS / f"{name}.npz"
    return np.load(own if own.exists() else FOLDERS[name] / "reference.npz")


def read_model(folder: Path, **changes: Any) -> tuple[ModelConfig, dict[str, Any]]:
    """(cfg, params) of a folder, in float32 unless `changes` to the configuration say otherwise."""
    cfg = dataclasses.replace(read_config(folder), **{"dtype": "float32", **changes})
    files = open_checkpoint(folder)
    dialect = read_dialect(files, cfg)
    plan = make_plan(cfg, dialect.format_of)
    memory = Memory(jax.tree.leaves(plan.tree))
    with files.reader() as reader:
        fill(plan, LeafReader(reader, files, dialect, Progress("", 0, quiet=True)).fill, memory)
    return cfg, to_jax(plan.tree, memory.arrays)


def pad(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of token ids as one right-padded int32 batch [B, T] and its lengths [B]."""
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), lengths.max()), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens, lengths
