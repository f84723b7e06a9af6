"""The weights exist once: peak memory of a whole process against the size of the packed model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import ml_dtypes
import numpy as np
import pytest

from tests.support.checkpoint_writer import (
    TinySpec,
    make_config,
    make_quantization,
    save_tensors,
    write_json,
    write_tokenizer,
)

LAYERS, EXPERTS, HIDDEN, INTERMEDIATE, GROUP = 16, 32, 1024, 512, 128
SPEC = TinySpec(
    num_layers=LAYERS,
    num_experts=EXPERTS,
    hidden_size=HIDDEN,
    moe_intermediate_size=INTERMEDIATE,
    group_size=GROUP,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=32768,
    lm_head="tied",
)
NOISE = 32 * 2**20  # compiled updates, blocks that malloc keeps, Python's own growth
BASE = ml_dtypes.bfloat16

CHILD = """
import gc, json, sys
import jax, numpy as np
import ferrum_jax as fj

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

fj.load("demo", quiet=True)  # imports, compiler and thread pools are not the model's memory
gc.collect()
resident, anonymous = status("VmRSS"), status("RssAnon")
model = fj.load(sys.argv[1], dtype="bfloat16", lm_head_bits=8, weight_cache=sys.argv[2] == "cache", quiet=True)
for leaf in jax.tree.leaves(model.params):
    np.asarray(leaf).view(np.uint8).max()  # every page
print(json.dumps({
    "growth": status("VmHWM") - resident,
    "anonymous": status("RssAnon") - anonymous,
    "held": model.report.bytes_held,
    "from_cache": model.report.from_cache,
}))
"""


def write_large(folder: Path) -> int:
    """Random words under the names of a real model, without quantising anything; returns bytes of one layer."""
    rng = np.random.default_rng(0)

    def packed(module: str, k: int, n: int) -> dict[str, np.ndarray]:
        return {
            f"{module}.qweight": rng.integers(-(2**31), 2**31, (k // 8, n), np.int32),
            f"{module}.qzeros": np.full((k // GROUP, n // 8), 0x77777777, np.int32),
            f"{module}.scales": rng.uniform(0.001, 0.002, (k // GROUP, n)).astype(np.float16),
            f"{module}.g_idx": np.arange(k, dtype=np.int32) // GROUP,
        }

    def layer(name: str) -> dict[str, np.ndarray]:
        q, kv = SPEC.num_heads * SPEC.head_dim, SPEC.num_kv_heads * SPEC.head_dim
        tensors = {f"{name}.mlp.gate.weight": rng.standard_normal((EXPERTS, HIDDEN)).astype(BASE)}
        for norm, n in (("input_layernorm", HIDDEN), ("post_attention_layernorm", HIDDEN)):
            tensors[f"{name}.{norm}.weight"] = np.ones(n, BASE)
        for part in ("q", "k"):
            tensors[f"{name}.self_attn.{part}_norm.weight"] = np.ones(SPEC.head_dim, BASE)
        for part, k, n in (("q", HIDDEN, q), ("k", HIDDEN, kv), ("v", HIDDEN, kv), ("o", q, HIDDEN)):
            tensors |= packed(f"{name}.self_attn.{part}_proj", k, n)
        expert_sizes = {"gate": (HIDDEN, INTERMEDIATE), "up": (HIDDEN, INTERMEDIATE), "down": (INTERMEDIATE, HIDDEN)}
        for expert in range(EXPERTS):
            for part, (k, n) in expert_sizes.items():
                tensors |= packed(f"{name}.mlp.experts.{expert}.{part}_proj", k, n)
        return tensors

    layers = [layer(f"model.layers.{i}") for i in range(LAYERS)]
    tensors = {name: tensor for one in layers for name, tensor in one.items()}
    tensors["model.embed_tokens.weight"] = rng.standard_normal((SPEC.vocab_size, HIDDEN)).astype(BASE)
    tensors["model.norm.weight"] = np.ones(HIDDEN, BASE)
    write_json(folder / "config.json", make_config(SPEC))
    write_json(folder / "quantize_config.json", make_quantization(SPEC))
    save_tensors(folder, tensors, shards=2)
    write_tokenizer(folder, SPEC)
    return sum(tensor.nbytes for tensor in layers[0].values())


def start(folder: str, mode: str) -> dict[str, int]:
    command = [sys.executable, "-c", CHILD, folder, mode]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_is_the_packed_model_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with TemporaryDirectory(dir=tmp_path) as folder:  # 840 MB that pytest need not keep
        monkeypatch.setenv("FERRUM_JAX_WEIGHT_CACHE", f"{folder}/cache")
        one_layer = write_large(Path(folder))
        alone, cold, warm = start(folder, "alone"), start(folder, "cache"), start(folder, "cache")
    assert (alone["from_cache"], cold["from_cache"], warm["from_cache"]) == (False, False, True)
    for seen in (alone, cold, warm):
        assert seen["held"] > 400 * 2**20
        assert seen["growth"] <= seen["held"] + one_layer + NOISE
    # The pages of the file are the only copy.
    assert max(cold["anonymous"], warm["anonymous"]) < one_layer + NOISE
