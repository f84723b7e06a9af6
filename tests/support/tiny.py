"""Tiny model configurations for laws that need no checkpoint, and the library's steps under jit."""

from __future__ import annotations

from typing import Any

import jax

import ferrum_jax as fj
from ferrum_jax.config import ModelConfig, QuantConfig

forward = jax.jit(fj.forward, static_argnames=("cfg", "with_aux"))
prefill = jax.jit(fj.prefill, static_argnames="cfg")
decode_step = jax.jit(fj.decode_step, static_argnames="cfg")


def tiny_config(**changes: Any) -> ModelConfig:
    """A two-layer Qwen3-MoE of 4 experts, float32 around 4-bit weights, changed as told."""
    settings: dict[str, Any] = {
        "model_type": "qwen3_moe",
        "vocab_size": 61,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "num_experts": 4,
        "top_k": 2,
        "moe_intermediate_size": 16,
        "max_position": 64,
        "qk_norm": True,
        "quant": QuantConfig(bits=4, group_size=16),
        "dtype": "float32",
    }
    return ModelConfig(**(settings | changes))


DENSE: dict[str, Any] = {"model_type": "qwen3", "num_experts": 0, "top_k": 0, "moe_intermediate_size": 0}
CONFIGS = {
    "qwen3_moe, a dense layer, a window": tiny_config(moe_layers=(True, False), sliding_windows=(None, 3)),
    "mixtral, asymmetric, act-order": tiny_config(
        model_type="mixtral",
        qk_norm=False,
        norm_topk_prob=True,
        num_layers=1,
        quant=QuantConfig(bits=8, group_size=16, sym=False, desc_act=True),
    ),
    "qwen3, unquantised, tied, biases": tiny_config(
        **DENSE, quant=None, tie_word_embeddings=True, attention_bias=True, num_layers=1
    ),
}
