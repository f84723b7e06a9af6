"""Write a checkpoint of a published shape with random weights: python kernels/bench/synthetic_checkpoint.py --help.

Names, shapes, dtypes and the order within a file are those that GPTQModel writes for the shape in --config, so loading
and speed can be measured without a download. Words come from one pool of random bytes, so 17 GB take as long as the
disk needs. Activations stay near one; the text is nonsense.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ferrum_jax.config import ModelConfig
from ferrum_jax.config_file import load_toml_config
from ferrum_jax.plan import FormatOf, config_formats
from ferrum_jax.sources import Linear, Vector, layer_sources, top_sources
from ferrum_kernels.bits import centred, words_for

POOL = 2**23  # random words to cut tensors from
THREADS = 8  # shards that are written at once, at most
BUFFER = 2**22  # bytes between calls of the system
ARCHITECTURES = {"qwen3_moe": "Qwen3MoeForCausalLM", "qwen3": "Qwen3ForCausalLM", "mixtral": "MixtralForCausalLM"}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of the checkpoint; `kind` says what random values it gets."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: str
    spread: float = 1.0

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        return int(np.prod(self.shape)) * (4 if self.dtype == "I32" else 2)


def tensors(cfg: ModelConfig) -> Iterator[Tensor]:
    """All tensors, in the order of the files."""
    format_of = config_formats(cfg)
    for source in top_sources(cfg).values():
        yield from _of(source, format_of)
    for index in range(cfg.num_layers):
        layer = layer_sources(cfg, index)
        experts = layer.get("moe", {}).pop("experts", {})
        for source in _leaves(layer):
            yield from _of(source, format_of)
        for expert in zip(*(part.experts for part in experts.values()), strict=True):
            for linear in expert:
                yield from _of(linear, format_of)


def _leaves(tree: Any) -> Iterator[Vector | Linear]:
    for child in tree.values():
        yield from _leaves(child) if isinstance(child, dict) else [child]


def _of(source: Vector | Linear, format_of: FormatOf) -> Iterator[Tensor]:
    if isinstance(source, Vector):
        kind = "ones" if "norm" in source.name else "normal"
        yield Tensor(source.name, "BF16", source.shape, kind, 0.1 if source.name.endswith(".bias") else 1.0)
        return
    (module,), (n,), k = source.modules, source.n, source.k
    found = format_of(module, k)
    if found is None:
        yield Tensor(f"{module}.weight", "BF16", (n, k), "normal", k**-0.5)
        return
    groups = -(-k // found.group_size)
    yield Tensor(f"{module}.g_idx", "I32", (k,), "groups", found.group_size)
    # As in params.random_params: a column of the weight has about unit length.
    yield Tensor(f"{module}.scales", "F16", (groups, n), "uniform", 1 / (2**found.bits * k**0.5 * 0.3))
    yield Tensor(f"{module}.qweight", "I32", (words_for(k, found.bits), n), "words")
    yield Tensor(f"{module}.qzeros", "I32", (groups, words_for(n, found.bits)), "zeros", found.bits)


class Pools:
    """Random values of every kind, made once and cut for every tensor."""

    def __init__(self, cfg: ModelConfig, seed: int) -> None:
        rng = np.random.default_rng(seed)
        bits = cfg.quant.bits if cfg.quant is not None else 4
        self.words = centred(rng.integers(0, 2**32, POOL, np.uint32), bits)
        self.normal = rng.standard_normal(POOL, np.float32)
        self.uniform = rng.uniform(0.5, 1.5, POOL // 8).astype(np.float32)
        self.stored = 0 if cfg.quant is not None and cfg.quant.checkpoint_format == "gptq_v2" else 1
        self._scaled: dict[tuple[str, float], np.ndarray] = {}

    def pieces(self, tensor: Tensor, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """The data of a tensor, in pieces no larger than a pool."""
        count = int(np.prod(tensor.shape))
        if tensor.kind == "groups":
            yield np.arange(count, dtype=np.int32) // int(tensor.spread)
        elif tensor.kind == "zeros":
            bits = int(tensor.spread)
            middle = 2 ** (bits - 1) - self.stored
            yield np.full(count, sum(middle << i for i in range(0, 32, bits)), np.uint32)
        elif tensor.kind == "ones":
            yield np.ones(count, ml_dtypes.bfloat16)
        else:
            yield from _cut(self._pool(tensor.kind, tensor.spread), count, rng)

    def _pool(self, kind: str, spread: float) -> np.ndarray:
        """The pool in the dtype and scale of a tensor; a checkpoint has few different ones."""
        if kind == "words":
            return self.words
        if (kind, spread) not in self._scaled:
            pool, dtype = (self.normal, ml_dtypes.bfloat16) if kind == "normal" else (self.uniform, np.float16)
            self._scaled[kind, spread] = (pool * np.float32(spread)).astype(dtype)
        return self._scaled[kind, spread]


def _cut(pool: np.ndarray, count: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    while count:
        size = min(count, len(pool) // 2)
        start = int(rng.integers(0, len(pool) - size))
        yield pool[start : start + size]
        count -= size


def write_weights(folder: Path, cfg: ModelConfig, shard_bytes: int, seed: int) -> int:
    """Write the shards, several at a time, and their index; returns bytes of all tensors."""
    shards: list[list[Tensor]] = [[]]
    size = total = 0
    for tensor in tensors(cfg):
        if size and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size, total = size + tensor.nbytes, total + tensor.nbytes
    pools = Pools(cfg, seed)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]

    def write(number: int) -> None:
        # A generator of its own, so that the bytes do not depend on which shard is written when.
        _write_shard(folder / names[number], shards[number], pools, np.random.default_rng([seed, number]))

    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        for _ in pool.map(write, range(len(shards))):
            pass
    weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return total


def _write_shard(path: Path, shard: list[Tensor], pools: Pools, rng: np.random.Generator) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard:
        end = offset + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=BUFFER) as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in shard:
            for piece in pools.pieces(tensor, rng):
                out.write(np.ascontiguousarray(piece).view(np.uint8).data)
    print(f"{path.name}: {len(shard)} tensors, {offset / 1e9:.2f} GB", file=sys.stderr)


def write_config(folder: Path, cfg: ModelConfig) -> None:
    """config.json, quantize_config.json and generation_config.json, in the spellings of transformers 4."""
    config = {
        "architectures": [ARCHITECTURES[cfg.model_type]],
        "model_type": cfg.model_type,
        "attention_bias": cfg.attention_bias,
        "head_dim": cfg.head_dim,
        "hidden_act": cfg.hidden_act,
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "max_position_embeddings": cfg.max_position,
        "num_attention_heads": cfg.num_heads,
        "num_hidden_layers": cfg.num_layers,
        "num_key_value_heads": cfg.num_kv_heads,
        "rms_norm_eps": cfg.rms_norm_eps,
        "rope_theta": cfg.rope.theta,
        "tie_word_embeddings": cfg.tie_word_embeddings,
        "torch_dtype": "bfloat16",
        "vocab_size": cfg.vocab_size,
    }
    if cfg.num_experts:
        key = "num_local_experts" if cfg.model_type == "mixtral" else "num_experts"
        config |= {key: cfg.num_experts, "num_experts_per_tok": cfg.top_k}
        if cfg.model_type == "mixtral":
            config["intermediate_size"] = cfg.moe_intermediate_size
        else:
            config |= {"moe_intermediate_size": cfg.moe_intermediate_size, "norm_topk_prob": cfg.norm_topk_prob}
            config |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    if cfg.quant is not None:
        settings = {key: getattr(cfg.quant, key) for key in ("bits", "group_size", "sym", "desc_act")}
        version = cfg.quant.checkpoint_format or "gptq"
        settings |= {"checkpoint_format": version, "format": version, "quant_method": "gptq", "pack_dtype": "int32"}
        config["quantization_config"] = settings
        (folder / "quantize_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    ids = {"eos_token_id": list(cfg.eos_token_ids), "bos_token_id": cfg.bos_token_id, "pad_token_id": cfg.pad_token_id}
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2))


def write_tokenizer(folder: Path, cfg: ModelConfig) -> None:
    """A byte-level tokenizer without merges; the ids that end a text get the names that Qwen gives them."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols += [f"<extra_{i}>" for i in range(len(symbols), cfg.vocab_size)]
    last = max(cfg.eos_token_ids, default=cfg.vocab_size - 1)
    special = {last - 2: "<|endoftext|>", last - 1: "<|im_start|>", last: "<|im_end|>"}
    for i, name in special.items():
        symbols[i] = name
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special.values()))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def main() -> None:
    """Parse, write, report."""
    root = Path(__file__).parents[2]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=root / "configs" / "qwen3-30b-a3b.toml")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into; made if absent")
    parser.add_argument("--layers", type=int, help="decoder layers, fewer than the config's for a quick look")
    parser.add_argument("--shard-gb", type=float, default=2.0, help="most gigabytes per file")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    cfg = load_toml_config(options.config)
    if options.layers is not None:
        # Fields that are one entry per layer are filled in again for the new number.
        cfg = dataclasses.replace(cfg, num_layers=options.layers, moe_layers=(), sliding_windows=())
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    write_config(options.out, cfg)
    write_tokenizer(options.out, cfg)
    total = write_weights(options.out, cfg, int(options.shard_gb * 1e9), options.seed)
    print(f"{options.out}: {total / 1e9:.2f} GB in {time.perf_counter() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
