"""Tiny random GPTQ checkpoints in the Hugging Face layout, of every dialect the library reads.

Weights are random codes with random float16 scales, sized so that logits are of order one: nothing is quantised, so a
checkpoint takes milliseconds and its dequantised weights are exact by construction.

>>> folder = write_checkpoint(tmp_path, TinySpec(family="mixtral", bits=3, sym=False))
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

Tensors = dict[str, np.ndarray]
Edit = Callable[[Tensors], None]

BASE_DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
MINUS_ONE = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # one in every field of a word
ARCHITECTURES = {
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
}
MIXED_DYNAMIC = {  # layer 0: four experts in the base dtype beside four in the usual bits; attention in 8 bits
    r"-:model\.layers\.0\.mlp\.experts\.[0-3]\.": {},
    r"+:.*self_attn": {"bits": 8, "group_size": 16},
}


@dataclass(frozen=True)
class TinySpec:
    """Everything that can vary in a tiny checkpoint; the defaults are a two-layer Qwen3-MoE in 4-bit symmetric v1."""

    family: Literal["qwen3_moe", "qwen3", "mixtral"] = "qwen3_moe"
    bits: int = 4
    group_size: int = 32  # -1: one group
    sym: bool = True
    desc_act: bool = False
    checkpoint_format: Literal["gptq", "gptq_v2"] | None = "gptq"  # None leaves the keys out; the words are v1
    zeros_version: Literal[1, 2] | None = None  # what the words really are, where checkpoint_format says otherwise
    dynamic: dict[str, dict[str, Any]] | None = None
    lm_head: Literal["separate", "tied", "quantized"] = "separate"
    transformers: Literal[4, 5] = 5  # whose spellings config.json uses
    old_mixtral_names: bool = False  # block_sparse_moe and w1, w3, w2
    quantization_in: tuple[str, ...] = ("config.json", "quantize_config.json")
    shards: int = 1
    dtype: str = "bfloat16"  # of embeddings, norms, routers and everything else that is not quantised
    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    intermediate_size: int = 96  # of dense MLPs
    num_experts: int = 8
    top_k: int = 2
    moe_intermediate_size: int = 32
    norm_topk_prob: bool | None = True  # None leaves the key out
    mlp_only_layers: tuple[int, ...] = ()
    attention_bias: bool = False
    sliding_window: int | None = None
    vocab_size: int = 97  # at least 97, for the tokenizer
    chat_template: str | None = None
    config_updates: dict[str, Any] = field(default_factory=dict)  # last word on config.json; a None value drops the key
    seed: int = 0


def write_checkpoint(folder: str | Path, spec: TinySpec | None = None, *, edits: Iterable[Edit] = ()) -> Path:
    """Write a whole checkpoint into `folder`, passing the tensors through `edits` first. Returns the folder."""
    spec, folder = spec or TinySpec(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = make_tensors(spec)
    for edit in edits:
        edit(tensors)
    write_json(folder / "config.json", make_config(spec))
    if "quantize_config.json" in spec.quantization_in:
        write_json(folder / "quantize_config.json", make_quantization(spec))
    save_tensors(folder, tensors, spec.shards)
    write_tokenizer(folder, spec)
    return folder


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write `data` as indented JSON."""
    path.write_text(json.dumps(data, indent=2))


def make_config(spec: TinySpec) -> dict[str, Any]:
    """config.json, in the spellings of transformers 4 or 5."""
    new = spec.transformers == 5
    is_moe, mixtral = spec.family != "qwen3", spec.family == "mixtral"
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[spec.family]],
        "model_type": spec.family,
        "hidden_act": "silu",
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.moe_intermediate_size if mixtral else spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5 if mixtral else 1e-6,
        "sliding_window": spec.sliding_window,
        "tie_word_embeddings": spec.lm_head == "tied",
        "vocab_size": spec.vocab_size,
        "bos_token_id": None,
        "eos_token_id": 0,
        "dtype" if new else "torch_dtype": spec.dtype,
        "transformers_version": "5.23.0" if new else "4.52.4",
    }
    config |= {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}} if new else {"rope_theta": 1e6}
    if not mixtral:
        config["attention_bias"] = spec.attention_bias
        config["use_sliding_window"] = spec.sliding_window is not None
        config["max_window_layers"] = 1 if spec.family == "qwen3" else 0
    if spec.family == "qwen3" and new:
        kinds = ("full_attention", "sliding_attention" if spec.sliding_window else "full_attention")
        config["layer_types"] = [kinds[layer >= 1] for layer in range(spec.num_layers)]
    if is_moe:
        config["num_local_experts" if new or mixtral else "num_experts"] = spec.num_experts
        config["num_experts_per_tok"] = spec.top_k
    if spec.family == "qwen3_moe":
        config["moe_intermediate_size"] = spec.moe_intermediate_size
        config["norm_topk_prob"] = spec.norm_topk_prob
        config["decoder_sparse_step"] = 1
        config["mlp_only_layers"] = list(spec.mlp_only_layers)
        if spec.norm_topk_prob is None:
            del config["norm_topk_prob"]
    if "config.json" in spec.quantization_in:
        config["quantization_config"] = make_quantization(spec)
    updated = config | spec.config_updates
    return {key: value for key, value in updated.items() if value is not None or key not in spec.config_updates}


def make_quantization(spec: TinySpec) -> dict[str, Any]:
    """The quantisation settings, as they stand both in config.json and in quantize_config.json."""
    settings: dict[str, Any] = {
        "bits": spec.bits,
        "group_size": spec.group_size,
        "desc_act": spec.desc_act,
        "sym": spec.sym,
        "lm_head": spec.lm_head == "quantized",
        "quant_method": "gptq",
        "pack_dtype": "int32",
    }
    if spec.checkpoint_format is not None:
        settings |= {"checkpoint_format": spec.checkpoint_format, "format": spec.checkpoint_format}
    if spec.dynamic is not None:
        settings["dynamic"] = spec.dynamic
    return settings


def make_tensors(spec: TinySpec) -> Tensors:
    """All tensors of the checkpoint under their names on disk, from `spec.seed` alone."""
    rng = np.random.default_rng(spec.seed)
    maker = _Maker(spec, rng, {})
    d, q, kv = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    maker.dense("model.embed_tokens", spec.vocab_size, d)
    for layer in range(spec.num_layers):
        name = f"model.layers.{layer}"
        maker.norm(f"{name}.input_layernorm", d)
        shared = rng.permutation(d)
        for part, n in (("q", q), ("k", kv), ("v", kv)):
            maker.linear(f"{name}.self_attn.{part}_proj", d, n, shared, bias=spec.attention_bias)
        maker.linear(f"{name}.self_attn.o_proj", q, d, rng.permutation(q), bias=spec.attention_bias)
        if spec.family != "mixtral":
            maker.norm(f"{name}.self_attn.q_norm", spec.head_dim)
            maker.norm(f"{name}.self_attn.k_norm", spec.head_dim)
        maker.norm(f"{name}.post_attention_layernorm", d)
        if spec.family == "qwen3" or layer in spec.mlp_only_layers:
            maker.mlp(f"{name}.mlp", d, spec.intermediate_size)
            continue
        old = spec.family == "mixtral" and spec.old_mixtral_names
        block = f"{name}.{'block_sparse_moe' if old else 'mlp'}"
        maker.dense(f"{block}.gate", spec.num_experts, d)
        for expert in range(spec.num_experts):
            maker.mlp(f"{block}.experts.{expert}", d, spec.moe_intermediate_size, old)
    maker.norm("model.norm", d)
    if spec.lm_head == "quantized":
        maker.linear("lm_head", d, spec.vocab_size, rng.permutation(d))
    elif spec.lm_head == "separate":
        maker.dense("lm_head", spec.vocab_size, d)
    return maker.tensors


@dataclass(frozen=True)
class _Maker:
    spec: TinySpec
    rng: np.random.Generator
    tensors: Tensors

    def norm(self, module: str, n: int) -> None:
        self.tensors[f"{module}.weight"] = self.base(1 + 0.1 * self.rng.standard_normal(n))

    def dense(self, module: str, n: int, k: int) -> None:
        self.tensors[f"{module}.weight"] = self.base(self.rng.standard_normal((n, k)) / np.sqrt(k))

    def base(self, x: np.ndarray) -> np.ndarray:
        return x.astype(BASE_DTYPES[self.spec.dtype])

    def mlp(self, block: str, d: int, f: int, old_names: bool = False) -> None:
        gate, up, down = ("w1", "w3", "w2") if old_names else ("gate_proj", "up_proj", "down_proj")
        shared = self.rng.permutation(d)
        self.linear(f"{block}.{gate}", d, f, shared)
        self.linear(f"{block}.{up}", d, f, shared)
        self.linear(f"{block}.{down}", f, d, self.rng.permutation(f))

    def linear(self, module: str, k: int, n: int, order: np.ndarray, bias: bool = False) -> None:
        settings = module_settings(self.spec, module)
        if settings is None:
            self.dense(module, n, k)
        else:
            parts = random_packed(self.rng, k, n, order=order if self.spec.desc_act else None, **settings)
            self.tensors.update({f"{module}.{part}": value for part, value in parts.items()})
        if bias:
            dtype = np.float16 if settings else BASE_DTYPES[self.spec.dtype]
            self.tensors[f"{module}.bias"] = (0.1 * self.rng.standard_normal(n)).astype(dtype)


def module_settings(spec: TinySpec, module: str) -> dict[str, Any] | None:
    """bits, group_size, sym and version of one module after the first matching `dynamic` rule; None if excluded."""
    settings = {"bits": spec.bits, "group_size": spec.group_size, "sym": spec.sym}
    for pattern, overrides in (spec.dynamic or {}).items():
        if re.match(re.sub(r"^[+-]:", "", pattern), module):
            if pattern.startswith("-:"):
                return None
            settings |= {key: overrides[key] for key in settings if key in overrides}
            break
    return settings | {"version": spec.zeros_version or (2 if spec.checkpoint_format == "gptq_v2" else 1)}


def random_packed(
    rng: np.random.Generator,
    k: int,
    n: int,
    *,
    bits: int = 4,
    group_size: int = 32,
    sym: bool = True,
    version: int = 1,
    order: np.ndarray | None = None,
) -> Tensors:
    """One random linear [K, N] on disk: qweight, qzeros, scales, g_idx.

    Asymmetric zero points always include 0 and 2^bits - 1, next to each other where a borrow would show. One scale
    in sixteen is a float16 subnormal. `order` [K] permutes g_idx and leaves every group its size.
    """
    g_idx = np.arange(k) // (k if group_size == -1 else group_size)
    g_idx = g_idx if order is None else g_idx[order]
    groups, top = int(g_idx.max()) + 1, 2**bits - 1
    codes = rng.integers(0, top + 1, (k, n))
    zeros = np.full((groups, n), 2 ** (bits - 1)) if sym else rng.integers(0, top + 1, (groups, n))
    if not sym:
        zeros[:, 0], zeros[:, 1 % n], zeros[:, 2 % n] = top, 0, top
    spread = np.sqrt((4**bits - 1) / (12 if sym else 6))  # standard deviation of code - zero
    scales = rng.uniform(0.5, 1.5, (groups, n)) / (spread * np.sqrt(k))
    subnormal = rng.integers(64, 1024, (groups, n)) * 2.0**-24
    return {
        "qweight": pack_fields(codes.T, bits).T.copy(),
        "qzeros": pack_zeros(zeros, bits, version),
        "scales": np.where(rng.random((groups, n)) < 1 / 16, subnormal, scales).astype(np.float16),
        "g_idx": g_idx.astype(np.int32),
    }


def pack_fields(fields: np.ndarray, bits: int) -> np.ndarray:
    """Join each row of fields [R, C] into int32 words [R, ceil(C*bits/32)], lowest bit first, zeros at the end."""
    stream = (fields[:, :, None] >> np.arange(bits)) & 1
    stream = stream.reshape(len(fields), -1).astype(np.uint8)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return np.packbits(stream, axis=1, bitorder="little").view("<i4")


def pack_zeros(zeros: np.ndarray, bits: int, version: int) -> np.ndarray:
    """Zero points [G, N] as words; version 1 takes one from each field, with borrows across a word except in 3 bits."""
    if version == 2:
        return pack_fields(zeros, bits)
    if bits == 3:
        return pack_fields((zeros - 1) % 8, bits)
    return (pack_fields(zeros, bits).view(np.uint32) - np.uint32(MINUS_ONE[bits])).view(np.int32)


def save_tensors(folder: Path, tensors: Tensors, shards: int) -> None:
    """Write model.safetensors, or `shards` files and their index."""
    metadata = {"format": "pt"}
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata=metadata)
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(np.array_split(sorted(tensors), shards), start=1):
        file = f"model-{i:05d}-of-{shards:05d}.safetensors"
        save_file({str(name): tensors[str(name)] for name in names}, folder / file, metadata=metadata)
        weight_map |= {str(name): file for name in names}
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def write_tokenizer(folder: Path, spec: TinySpec) -> None:
    """A byte-level tokenizer without merges: <eos>, <unk>, space, the printable ASCII characters, then other bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    space = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(" ")[0][0]
    symbols = ["<eos>", "<unk>", space, *(symbol for symbol in alphabet if symbol != space)]
    symbols += [f"<extra_{i}>" for i in range(spec.vocab_size - len(symbols))]
    vocab = {symbol: i for i, symbol in enumerate(symbols[: spec.vocab_size])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "unk_token": "<unk>"}
    if spec.chat_template is not None:
        config["chat_template"] = spec.chat_template
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": 0, "do_sample": False})
