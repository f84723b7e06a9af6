"""Record rotary embeddings of transformers into tests/golden/rope.npz.

Needs torch, transformers (5.23 wrote the file) and numpy; none of them is a dependency of the tests themselves.

    python tests/tools/record_rope.py tests/golden/rope.npz
"""

# pyright: reportMissingImports=false

import json
import sys

import numpy as np
import torch
import transformers
from transformers.models.qwen3.modeling_qwen3 import Qwen3Config, Qwen3RotaryEmbedding

POSITIONS = [0, 1, 2, 7, 63, 500, 2047, 4096, 12_345, 32_767, 39_999]

CASES = [
    dict(name="default-64", head_dim=64, max_position=2048, rope_theta=10_000.0),
    dict(name="default-128", head_dim=128, max_position=40_960, rope_theta=1_000_000.0),
    dict(name="default-80", head_dim=80, max_position=4096, rope_theta=500_000.0),
    dict(name="linear-4", head_dim=64, max_position=8192, rope_theta=10_000.0, rope_type="linear", factor=4.0),
    dict(name="linear-2.5", head_dim=32, max_position=8192, rope_theta=1e6, rope_type="linear", factor=2.5),
    *(
        dict(
            name=f"dynamic-{length}",
            head_dim=64,
            max_position=2048,
            rope_theta=10_000.0,
            rope_type="dynamic",
            factor=4.0,
            seq_len=length,
        )
        for length in (1, 2048, 2049, 5000, 40_000)
    ),
    dict(
        name="dynamic-128-9999",
        head_dim=128,
        max_position=4096,
        rope_theta=1e6,
        rope_type="dynamic",
        factor=2.0,
        seq_len=9999,
    ),
    dict(
        name="yarn-qwen3",
        head_dim=128,
        max_position=131_072,
        rope_theta=1e6,
        rope_type="yarn",
        factor=4.0,
        original_max_position_embeddings=32_768,
    ),
    dict(
        name="yarn-attention-factor",
        head_dim=64,
        max_position=16_384,
        rope_theta=10_000.0,
        rope_type="yarn",
        factor=8.0,
        original_max_position_embeddings=2048,
        attention_factor=1.5,
        beta_fast=16.0,
        beta_slow=2.0,
    ),
    dict(
        name="yarn-mscale",
        head_dim=64,
        max_position=163_840,
        rope_theta=10_000.0,
        rope_type="yarn",
        factor=40.0,
        original_max_position_embeddings=4096,
        mscale=1.0,
        mscale_all_dim=0.707,
    ),
    dict(
        name="yarn-no-truncate",
        head_dim=64,
        max_position=131_072,
        rope_theta=150_000.0,
        rope_type="yarn",
        factor=32.0,
        original_max_position_embeddings=4096,
        truncate=False,
    ),
    dict(
        name="yarn-implicit-factor",
        head_dim=64,
        max_position=8192,
        rope_theta=10_000.0,
        rope_type="yarn",
        factor=None,
        original_max_position_embeddings=4096,
    ),
    dict(
        name="llama3-8",
        head_dim=128,
        max_position=131_072,
        rope_theta=500_000.0,
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
    dict(
        name="llama3-32",
        head_dim=64,
        max_position=131_072,
        rope_theta=500_000.0,
        rope_type="llama3",
        factor=32.0,
        low_freq_factor=2.0,
        high_freq_factor=8.0,
        original_max_position_embeddings=8192,
    ),
]


def record(case):
    """Frequencies, scaling and the first half of cos and sin as transformers computes them for one case."""
    outside = ("name", "head_dim", "max_position", "seq_len")
    rope = {"rope_type": "default", **{key: value for key, value in case.items() if key not in outside}}
    config = Qwen3Config(
        hidden_size=256,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_hidden_layers=1,
        head_dim=case["head_dim"],
        max_position_embeddings=case["max_position"],
        rope_parameters=rope,
    )
    rotary = Qwen3RotaryEmbedding(config)
    positions = [p for p in POSITIONS if p < case["seq_len"]] if "seq_len" in case else POSITIONS
    if "seq_len" in case and case["seq_len"] - 1 not in positions:
        positions = [*positions, case["seq_len"] - 1]
    cos, sin = rotary(torch.zeros(1, dtype=torch.float32), torch.tensor([positions]))
    half = case["head_dim"] // 2
    return {
        "inv_freq": rotary.inv_freq.numpy(),
        "scale": np.float64(rotary.attention_scaling),
        "positions": np.asarray(positions, np.int32),
        "cos": cos[0, :, :half].numpy(),
        "sin": sin[0, :, :half].numpy(),
    }


def main(path):
    """Write every case into one compressed file, with the parameters as JSON beside the arrays."""
    arrays = {f"{case['name']}/{key}": value for case in CASES for key, value in record(case).items()}
    about = {"transformers": transformers.__version__, "torch": torch.__version__, "cases": CASES}
    np.savez_compressed(path, about=np.asarray(json.dumps(about)), **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
