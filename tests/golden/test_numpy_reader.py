"""The independent reader against the quantising tool's own numbers, so that it can judge the library.

Every `reference.npz` holds float32 logits of plain transformers on the weights as the tool itself dequantises them.
A correct reading is within 1e-5 of them; the mildest wrong one is off by 3e-4.
"""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import numpy_reader as reader

ROOT = Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "golden"
SHARED = ROOT.parent / "shared" / "checkpoints"

FOLDERS = {
    "tales-13m-gptq-int4": ROOT / "ferrum_jax" / "models" / "tales-13m-gptq-int4",
    "qwen3-w4g32asymact": GOLDENS / "checkpoints" / "qwen3-w4g32asymact",
    "qwen3moe-w4g32act": GOLDENS / "checkpoints" / "qwen3moe-w4g32act",
    "mixtral-w4g128sym": GOLDENS / "checkpoints" / "mixtral-w4g128sym",
    "qwen3moe-w4g64asym": SHARED / "qwen3moe-w4g64asym",
    "qwen3moe-w4g128sym": SHARED / "qwen3moe-w4g128sym",
    "qwen3moe-w8g128sym": SHARED / "qwen3moe-w8g128sym",
}


def load(name: str, dtype: type = np.float64) -> tuple[reader.Checkpoint, Any]:
    """The checkpoint called `name` and its reference arrays."""
    folder = FOLDERS[name]
    if not folder.exists():
        pytest.skip(f"{name} is not part of this checkout")
    own = GOLDENS / f"{name}.npz"
    return reader.read_checkpoint(folder, dtype), np.load(own if own.exists() else folder / "reference.npz")


def worst_logit(ckpt: reader.Checkpoint, reference: Any, prompts: range = range(4)) -> float:
    """The largest logit difference over all stored positions; long prompts keep only their last ones."""
    worst = 0.0
    for i in prompts:
        expected = reference[f"logits_q_{i}"]
        logits = reader.forward(ckpt, reference[f"ids_{i}"]).logits[-len(expected) :]
        worst = max(worst, float(np.abs(logits - expected).max()))
    return worst


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", FOLDERS)
def test_logits_equal_the_reference(name: str, dtype: type) -> None:
    ckpt, reference = load(name, dtype)
    assert worst_logit(ckpt, reference) < 1e-4


@pytest.mark.parametrize("name", FOLDERS)
def test_greedy_tokens_equal_the_reference(name: str) -> None:
    ckpt, reference = load(name)
    for i in range(4):
        assert reader.greedy(ckpt, reference[f"ids_{i}"], 8) == reference[f"greedy_q_{i}"][:8].tolist()


@pytest.mark.parametrize("name", [name for name in FOLDERS if "moe" in name or "mixtral" in name])
def test_router_logits_and_choices_equal_the_reference(name: str) -> None:
    ckpt, reference = load(name)
    for i in range(4):
        output, expected = reader.forward(ckpt, reference[f"ids_{i}"]), reference[f"router_logits_q_{i}"]
        np.testing.assert_allclose(np.stack(output.router_logits), expected, rtol=0, atol=2e-5)
        chosen = np.argsort(-expected, axis=-1, kind="stable")[..., : ckpt.config["num_experts_per_tok"]]
        np.testing.assert_array_equal(np.stack(output.experts), chosen)


@pytest.mark.parametrize("name", [name for name in FOLDERS if not name.startswith("tales")])
def test_held_out_likelihoods_equal_the_reference(name: str) -> None:
    ckpt, reference = load(name)
    for ids, expected in zip(reference["heldout_ids"][:2], reference["nll_q"][:2], strict=True):
        np.testing.assert_allclose(reader.token_nll(ckpt, ids), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["qwen3-w4g32asymact", "qwen3moe-w4g32act", "mixtral-w4g128sym"])
def test_the_tolerance_catches_zero_points_without_the_plus_one(name: str) -> None:
    ckpt, reference = load(name)
    wrong = replace(ckpt, quantization=ckpt.quantization | {"checkpoint_format": "gptq_v2"})
    assert worst_logit(wrong, reference, range(1)) > 0.3


@pytest.mark.parametrize("name", ["qwen3-w4g32asymact", "qwen3moe-w4g32act"])
def test_the_tolerance_catches_an_ignored_g_idx(name: str) -> None:
    ckpt, reference = load(name)
    tensors = {k: np.sort(v) if k.endswith(".g_idx") else v for k, v in ckpt.tensors.items()}
    assert worst_logit(replace(ckpt, tensors=tensors), reference, range(1)) > 0.3


@pytest.mark.parametrize("name", ["numpy_reader", "checkpoint_writer", "damage"])
def test_the_proof_shares_no_code_with_the_library(name: str) -> None:
    tree = ast.parse((ROOT / "tests" / "support" / f"{name}.py").read_text())
    imported = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported and not [
        m for m in imported if m.split(".")[0] in {"jax", "jaxlib", "ferrum_jax", "ferrum_kernels"}
    ]
