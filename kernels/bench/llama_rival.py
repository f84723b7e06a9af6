"""llama.cpp as the rival of cpu_layer.py: a random-weight Qwen3-MoE file in Q4_0, and times of `llama-bench` on it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ferrum_jax.config import ModelConfig
from ferrum_jax.errors import BackendError

BLOCK = 32  # weights that share a scale in Q4_0: 2 bytes of float16, then 16 bytes of nibbles


def write_gguf(path: Path, cfg: ModelConfig) -> None:
    """Write a model of random weights, with every matrix in Q4_0 but the router, which llama.cpp keeps in float32.

    Args:
      path: file to write, about 0.33 GB per layer of Qwen3-30B-A3B.
      cfg: sizes, of a qwen3_moe model.

    Raises:
      BackendError: the gguf package is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise BackendError(
            "llama.cpp's file format is written by the gguf package, which is not installed; `pip install gguf`, or "
            "leave --llama-bench out."
        ) from None
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(cfg.vocab_size)
    writer.add_context_length(cfg.max_position)
    writer.add_block_count(cfg.num_layers)
    writer.add_embedding_length(cfg.hidden_size)
    writer.add_feed_forward_length(cfg.intermediate_size)
    writer.add_head_count(cfg.num_heads)
    writer.add_head_count_kv(cfg.num_kv_heads)
    writer.add_key_length(cfg.head_dim)
    writer.add_value_length(cfg.head_dim)
    writer.add_layer_norm_rms_eps(cfg.rms_norm_eps)
    writer.add_rope_freq_base(cfg.rope.theta)
    writer.add_expert_count(cfg.num_experts)
    writer.add_expert_used_count(cfg.top_k)
    writer.add_expert_feed_forward_length(cfg.moe_intermediate_size)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    rng = np.random.default_rng(0)
    packed = gguf.GGMLQuantizationType.Q4_0
    for name, shape in tensors(cfg):
        if is_plain(name):
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
        else:
            row = shape[-1] // BLOCK * 18
            nbytes = int(np.prod(shape[:-1])) * row
            writer.add_tensor_info(name, (*shape[:-1], row), np.dtype(np.uint8), nbytes, packed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape in tensors(cfg):
        writer.write_tensor_data(plain(rng, name, shape) if is_plain(name) else blocks(rng, shape))
    writer.close()


def tensors(cfg: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, inputs last as GGUF stores them, after llama.cpp's src/models/qwen3moe.cpp."""
    hidden, width, experts = cfg.hidden_size, cfg.moe_intermediate_size, cfg.num_experts
    queries, keys = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    yield "token_embd.weight", (cfg.vocab_size, hidden)
    for i in range(cfg.num_layers):
        for name, shape in {
            "attn_norm": (hidden,),
            "attn_q": (queries, hidden),
            "attn_k": (keys, hidden),
            "attn_v": (keys, hidden),
            "attn_q_norm": (cfg.head_dim,),
            "attn_k_norm": (cfg.head_dim,),
            "attn_output": (hidden, queries),
            "ffn_norm": (hidden,),
            "ffn_gate_inp": (experts, hidden),
            "ffn_gate_exps": (experts, width, hidden),
            "ffn_up_exps": (experts, width, hidden),
            "ffn_down_exps": (experts, hidden, width),
        }.items():
            yield f"blk.{i}.{name}.weight", shape
    yield "output_norm.weight", (hidden,)
    yield "output.weight", (cfg.vocab_size, hidden)


def is_plain(name: str) -> bool:
    """Whether llama.cpp keeps a tensor in float32."""
    return "norm" in name or "ffn_gate_inp" in name


def plain(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 ones for a norm, noise for the router."""
    return np.ones(shape, np.float32) if "norm" in name else rng.standard_normal(shape, np.float32) / shape[-1] ** 0.5


def blocks(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 [..., bytes of a row]: Q4_0 blocks whose products with unit activations stay near one."""
    count = int(np.prod(shape)) // BLOCK
    data = rng.integers(0, 2**64, count * 18 // 8 + 1, np.uint64).view(np.uint8)[: count * 18].reshape(count, 18)
    # Nibbles average half a step below zero; signs take that out, or every token would drift to the same experts.
    signs = rng.choice(np.array([-1, 1], np.float16), count)
    scales = signs * np.float16(1 / (4.6 * shape[-1] ** 0.5))
    data[:, :2] = scales.view(np.uint8).reshape(count, 2)
    return data.reshape(*shape[:-1], shape[-1] // BLOCK * 18)


def llama_bench(binary: Path, model: Path, prompt: int, generate: int, threads: int) -> float:
    """Run llama-bench once, after the warm-up that it does itself.

    Args:
      binary: path of llama-bench.
      model: GGUF file.
      prompt: tokens read at once, or 0.
      generate: tokens decoded one by one, or 0.
      threads: of llama.cpp.

    Returns:
      Milliseconds of all these tokens together.

    Raises:
      BackendError: it does not run.
    """
    output = _output(binary, "-m", model, "-t", threads, "-p", prompt, "-n", generate, "-r", 1, "-o", "json")
    return json.loads(output)[0]["samples_ns"][0] / 1e6


def build_of(binary: Path) -> str:
    """Version and commit of llama-bench, in its words.

    Raises:
      BackendError: it does not run.
    """
    lines = _output(binary, "--version").splitlines()
    return lines[0].removeprefix("version: ") if lines else "unknown"


def _output(binary: Path, *arguments: Any) -> str:
    try:
        done = subprocess.run([binary, *map(str, arguments)], capture_output=True, text=True)
    except OSError as error:
        raise BackendError(f"{binary} does not run ({error}); give --llama-bench the path of llama-bench.") from None
    if done.returncode:
        raise BackendError(
            f"llama-bench ended with status {done.returncode} and {done.stderr.strip()[-500:]!r}; run it by hand with "
            f"{' '.join(map(str, arguments))} to see more."
        )
    return done.stdout or done.stderr
