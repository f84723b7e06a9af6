"""A second reading of GPTQ checkpoints: plain numpy, slow, obvious, and sharing no code with the library it judges.

Each rule below is the file format or the published model definition written out once. Fields are unpacked bit by bit,
attention is a full [T, T] matrix, and every token visits its experts one at a time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "I32": np.int32}
BORROW = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # one in every field of a word
EXPERT_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}  # Mixtral before transformers 5


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint: `config`, `quantization` and `tensors`, with dequantised weights kept in `cache`."""

    config: dict[str, Any]
    quantization: dict[str, Any]
    tensors: dict[str, np.ndarray]
    dtype: type = np.float64
    cache: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def get(self, name: str) -> np.ndarray:
        """The tensor `name` in the working dtype."""
        return self.tensors[name].astype(self.dtype)

    def linear(self, x: np.ndarray, module: str) -> np.ndarray:
        """`x @ w + bias` of one linear module, quantised or not. x: [T, K] -> [T, N]."""
        if module not in self.cache:
            quantised = f"{module}.qweight" in self.tensors
            weight = dequantize_module(self, module) if quantised else self.tensors[f"{module}.weight"].T
            self.cache[module] = weight.astype(self.dtype)
        y = x @ self.cache[module]
        return y + self.get(f"{module}.bias") if f"{module}.bias" in self.tensors else y


@dataclass(frozen=True)
class Output:
    """What a forward pass shows: logits [T, V] and, per MoE layer, router logits [T, E], experts and weights [T, K]."""

    logits: np.ndarray
    router_logits: list[np.ndarray]
    experts: list[np.ndarray]
    weights: list[np.ndarray]


def read_checkpoint(folder: str | Path, dtype: type = np.float64) -> Checkpoint:
    """Read a Hugging Face folder whole: config.json, the quantisation settings and every *.safetensors tensor."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    quantization = config.get("quantization_config")
    if quantization is None and (folder / "quantize_config.json").exists():
        quantization = json.loads((folder / "quantize_config.json").read_text())
    tensors: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= read_safetensors(path)
    return Checkpoint(config, quantization or {}, tensors, dtype)


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Read one file: an 8-byte length, a JSON header, then the bytes each header entry points into."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, last = (start + offset for offset in entry["data_offsets"])
        tensors[name] = np.frombuffer(data[first:last], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def unpack_fields(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Split each row of int32 `words` [R, W] into `count` fields: field i is bits [i*bits, (i+1)*bits) of the row."""
    stream = np.unpackbits(np.ascontiguousarray(words).astype("<u4").view(np.uint8), axis=1, bitorder="little")
    fields = stream[:, : count * bits].reshape(len(words), count, bits)
    return fields.astype(np.int64) @ (1 << np.arange(bits))


def find_bits(rows: int, k: int, columns: int, n: int) -> int:
    """The one field width for which K fields fill the rows of qweight and N fields fill the columns of qzeros."""
    fits = [b for b in (2, 3, 4, 8) if -(-k * b // 32) == rows and -(-n * b // 32) == columns]
    if len(fits) != 1:
        raise ValueError(f"qweight has {rows} rows for K={k}, qzeros {columns} columns for N={n}: bits {fits} fit")
    return fits[0]


def zero_points(qzeros: np.ndarray, bits: int, n: int, version: int) -> np.ndarray:
    """Zero points [G, N]; version 1 stores them minus one: word-wide with borrows, or per field modulo 8 for 3 bits."""
    if version == 1 and bits != 3:
        qzeros = qzeros.astype(np.uint32) + np.uint32(BORROW[bits])
    fields = unpack_fields(qzeros, bits, n)
    return (fields + 1) % 8 if version == 1 and bits == 3 else fields


def dequantize(
    qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, g_idx: np.ndarray, version: int
) -> np.ndarray:
    """w[k, n] = scales[g_idx[k], n] * (q[k, n] - z[g_idx[k], n]) in float32, which holds every product exactly."""
    k, n = len(g_idx), scales.shape[1]
    bits = find_bits(qweight.shape[0], k, qzeros.shape[1], n)
    codes = unpack_fields(qweight.T, bits, k).T
    zeros = zero_points(qzeros, bits, n, version)
    return scales.astype(np.float32)[g_idx] * (codes - zeros[g_idx]).astype(np.float32)


def dequantize_module(ckpt: Checkpoint, module: str) -> np.ndarray:
    """The float32 weight [K, N] of one quantised module."""
    parts = [ckpt.tensors[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")]
    return dequantize(*parts, version=2 if ckpt.quantization.get("checkpoint_format") == "gptq_v2" else 1)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def softmax(x: np.ndarray) -> np.ndarray:
    """exp(x) / sum(exp(x)) over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x)."""
    return x / (1 + np.exp(-x))


def rotate(x: np.ndarray, theta: float) -> np.ndarray:
    """Default rotary embedding. x: [T, H, h]; features i and i + h/2 turn by position * theta^(-2i/h)."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def rope_theta(config: dict[str, Any]) -> float:
    """Base frequency, in the transformers 5 or 4 spelling; only default rotary embeddings are read here."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type {rope['rope_type']!r} is not read here, only 'default'")
    return float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))


def window(config: dict[str, Any], layer: int) -> int | None:
    """How many positions, itself included, a token of this layer sees; None for all."""
    if "layer_types" in config:
        return config["sliding_window"] if config["layer_types"][layer] == "sliding_attention" else None
    if config["model_type"] != "mixtral":
        if not config.get("use_sliding_window") or layer < config.get("max_window_layers", 0):
            return None
    return config.get("sliding_window")


def attention(ckpt: Checkpoint, x: np.ndarray, layer: int) -> np.ndarray:
    """Grouped-query attention of one layer. x: [T, D] -> [T, D]."""
    config, name = ckpt.config, f"model.layers.{layer}.self_attn"
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    q, k, v = (ckpt.linear(x, f"{name}.{p}_proj").reshape(len(x), -1, head_dim) for p in "qkv")
    if f"{name}.q_norm.weight" in ckpt.tensors:
        q = rms_norm(q, ckpt.get(f"{name}.q_norm.weight"), config["rms_norm_eps"])
        k = rms_norm(k, ckpt.get(f"{name}.k_norm.weight"), config["rms_norm_eps"])
    q, k = rotate(q, rope_theta(config)), rotate(k, rope_theta(config))
    distance = np.arange(len(x))[:, None] - np.arange(len(x))[None, :]
    visible = (distance >= 0) & (distance < (window(config, layer) or len(x)))
    out = np.empty_like(q)
    for head in range(heads):
        kv = head // (heads // kv_heads)
        scores = np.where(visible, q[:, head] @ k[:, kv].T / np.sqrt(head_dim).astype(x.dtype), -np.inf)
        out[:, head] = softmax(scores) @ v[:, kv]
    return ckpt.linear(out.reshape(len(x), -1), f"{name}.o_proj")


def swiglu(ckpt: Checkpoint, x: np.ndarray, gate: str, up: str, down: str) -> np.ndarray:
    """down(silu(gate(x)) * up(x))."""
    return ckpt.linear(silu(ckpt.linear(x, gate)) * ckpt.linear(x, up), down)


def moe(ckpt: Checkpoint, x: np.ndarray, block: str, old_names: bool) -> tuple[np.ndarray, ...]:
    """Each token's top-k experts, weighted by the router. Returns y [T, D], router logits [T, E], experts, weights."""
    config = ckpt.config
    logits = ckpt.linear(x, f"{block}.gate")
    probabilities = softmax(logits)
    experts = np.argsort(-probabilities, axis=-1, kind="stable")[:, : config["num_experts_per_tok"]]
    weights = np.take_along_axis(probabilities, experts, axis=-1)
    if config["model_type"] == "mixtral" or config.get("norm_topk_prob", False):
        weights = weights / weights.sum(axis=-1, keepdims=True)
    y = np.zeros_like(x)
    for t in range(len(x)):
        for expert, weight in zip(experts[t], weights[t], strict=True):
            names = [f"{block}.experts.{expert}.{old if old_names else new}" for new, old in EXPERT_NAMES.items()]
            y[t] += weight * swiglu(ckpt, x[t : t + 1], *names)[0]
    return y, logits, experts, weights


def forward(ckpt: Checkpoint, ids: Sequence[int] | np.ndarray) -> Output:
    """Run one sequence of token ids [T] through the model, every position attending to itself and the past."""
    config, routing = ckpt.config, []
    x = ckpt.get("model.embed_tokens.weight")[np.asarray(ids)]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        x = x + attention(ckpt, rms_norm(x, ckpt.get(f"{name}.input_layernorm.weight"), config["rms_norm_eps"]), layer)
        h = rms_norm(x, ckpt.get(f"{name}.post_attention_layernorm.weight"), config["rms_norm_eps"])
        old_names = f"{name}.block_sparse_moe.gate.weight" in ckpt.tensors
        block = f"{name}.{'block_sparse_moe' if old_names else 'mlp'}"
        if f"{block}.gate.weight" in ckpt.tensors:
            y, *route = moe(ckpt, h, block, old_names)
            routing.append(route)
        else:
            y = swiglu(ckpt, h, *(f"{block}.{p}" for p in EXPERT_NAMES))
        x = x + y
    x = rms_norm(x, ckpt.get("model.norm.weight"), config["rms_norm_eps"])
    separate = "lm_head.weight" in ckpt.tensors or "lm_head.qweight" in ckpt.tensors
    logits = ckpt.linear(x, "lm_head") if separate else x @ ckpt.get("model.embed_tokens.weight").T
    return Output(logits, *([r[i] for r in routing] for i in range(3)))


def greedy(ckpt: Checkpoint, ids: Sequence[int] | np.ndarray, steps: int) -> list[int]:
    """The `steps` most likely next tokens, one whole forward pass each; end-of-text does not stop it."""
    ids = [int(i) for i in ids]
    for _ in range(steps):
        ids.append(int(forward(ckpt, ids).logits[-1].argmax()))
    return ids[-steps:]


def token_nll(ckpt: Checkpoint, ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """Negative log likelihood, in nats, of every token after the first. ids: [T] -> [T - 1]."""
    probabilities = softmax(forward(ckpt, ids).logits)
    return -np.log(probabilities[np.arange(len(ids) - 1), np.asarray(ids)[1:]])
