"""Hugging Face JSON, as transformers 4 or 5 spells it, to a ModelConfig."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from ferrum_jax import config_checks as check
from ferrum_jax.config import ROPE_TYPES, ModelConfig, RopeConfig
from ferrum_jax.errors import ConfigError
from ferrum_jax.families import FAMILIES, Family
from ferrum_jax.hf_quant import quant_config_from_hf
from ferrum_jax.hf_values import agreed, mapping, optional, required

# RopeConfig field -> key of rope_parameters (transformers 5) and rope_scaling (transformers 4).
_ROPE_KEYS = {
    "factor": "factor",
    "original_max_position": "original_max_position_embeddings",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "truncate": "truncate",
}
_LAYER_KINDS = ("full_attention", "sliding_attention")


def model_config_from_hf(
    config: Mapping[str, Any],
    quantize_config: Mapping[str, Any] | None = None,
    generation_config: Mapping[str, Any] | None = None,
) -> ModelConfig:
    """See `ModelConfig.from_hf`, which is the public name."""
    config = mapping("config.json", config)
    generation = mapping("generation_config.json", generation_config or {})
    model_type = check.choice("model_type", config.get("model_type"), tuple(FAMILIES))
    family = FAMILIES[model_type]
    num_layers = _size(config, "num_layers", "num_hidden_layers")
    hidden_size = _size(config, "hidden_size", "hidden_size")
    num_heads = _size(config, "num_heads", "num_attention_heads")
    vocab_size = _size(config, "vocab_size", "vocab_size")
    max_position = _size(config, "max_position", "max_position_embeddings")
    special = {
        key: optional(generation, key, optional(config, key, None))
        for key in ("eos_token_id", "bos_token_id", "pad_token_id")
    }
    return ModelConfig(
        model_type=model_type,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=optional(config, "num_key_value_heads", num_heads),
        head_dim=_head_dim(config, family, hidden_size, num_heads),
        intermediate_size=required(config, "intermediate_size"),
        rms_norm_eps=optional(config, "rms_norm_eps", family.rms_norm_eps),
        rope=_rope(config, family, max_position),
        max_position=max_position,
        tie_word_embeddings=optional(config, "tie_word_embeddings", False),
        qk_norm=family.qk_norm,
        attention_bias=optional(config, "attention_bias", False),
        sliding_windows=_sliding_windows(config, family, num_layers),
        hidden_act=optional(config, "hidden_act", "silu"),
        quant=quant_config_from_hf(config, quantize_config),
        dtype=agreed(config, ("dtype", "torch_dtype"), "bfloat16"),
        eos_token_ids=_ids(special["eos_token_id"]),
        bos_token_id=special["bos_token_id"],
        pad_token_id=_pad(special["pad_token_id"], vocab_size),
        **(_experts(config, family, num_layers) if family.moe else {}),
    )


def _size(config: Mapping[str, Any], name: str, key: str) -> int:
    return check.integer(name, required(config, key), *check.SIZES[name])


def _head_dim(config: Mapping[str, Any], family: Family, hidden_size: int, num_heads: int) -> Any:
    head_dim = optional(config, "head_dim", family.head_dim)
    if head_dim is None and hidden_size % num_heads:
        raise ConfigError(
            f"head_dim is missing and hidden_size {hidden_size} is not a multiple of the {num_heads} heads; "
            "config.json must give one or the other; add head_dim."
        )
    return hidden_size // num_heads if head_dim is None else head_dim


def _experts(config: Mapping[str, Any], family: Family, num_layers: int) -> dict[str, Any]:
    num_experts = agreed(config, ("num_experts", "num_local_experts"), None)
    if num_experts is None:
        raise ConfigError(
            f"num_experts is missing for model_type {config['model_type']}; num_experts or num_local_experts is "
            "accepted; fetch config.json again."
        )
    check.integer("num_experts", num_experts, *check.SIZES["num_experts"])
    norm = family.norm_topk_prob
    return {
        "num_experts": num_experts,
        "top_k": required(config, "num_experts_per_tok"),
        "moe_intermediate_size": required(config, family.expert_size_key),
        "norm_topk_prob": optional(config, "norm_topk_prob", False) if norm is None else norm,
        "moe_layers": _moe_layers(config, family, num_layers, num_experts),
    }


def _moe_layers(config: Mapping[str, Any], family: Family, num_layers: int, num_experts: int) -> tuple[bool, ...]:
    if not family.mixed_layers:
        return (num_experts > 0,) * num_layers
    step = check.integer("decoder_sparse_step", optional(config, "decoder_sparse_step", 1), 1, num_layers)
    dense = optional(config, "mlp_only_layers", [])
    if not isinstance(dense, list) or not all(check.is_integer(one) and 0 <= one < num_layers for one in dense):
        raise ConfigError(
            f"mlp_only_layers is {check.shown(dense)}; a list of layer numbers from 0 to {num_layers - 1} is accepted; "
            "correct it."
        )
    return tuple(num_experts > 0 and layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers))


def _sliding_windows(config: Mapping[str, Any], family: Family, num_layers: int) -> tuple[int | None, ...]:
    if family.sliding_switch and not check.boolean("use_sliding_window", optional(config, "use_sliding_window", False)):
        window = None
    elif family.sliding_switch:
        window = required(config, "sliding_window")
    else:
        window = optional(config, "sliding_window", None)
    if not family.window_from_layer:
        return (window,) * num_layers
    kinds = optional(config, "layer_types", None)
    if kinds is None:
        first = check.integer("max_window_layers", optional(config, "max_window_layers", 28), 0, check.MAX_POSITION)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise ConfigError(
            f"layer_types is {check.shown(kinds)}; a list with one kind for each of the {num_layers} layers is "
            "accepted; correct it."
        )
    for kind in kinds:
        check.choice("an entry of layer_types", kind, _LAYER_KINDS)
    if window is None and "sliding_attention" in kinds:
        raise ConfigError(
            "layer_types holds sliding_attention but there is no window; use_sliding_window true and a sliding_window "
            "are accepted with it; add them or make every layer full_attention."
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rope(config: Mapping[str, Any], family: Family, max_position: int) -> RopeConfig:
    raw = mapping("rope_parameters", agreed(config, ("rope_parameters", "rope_scaling"), {}))
    _refuse_rope(config, raw)
    rope_type = check.choice("rope_type", agreed(raw, ("rope_type", "type"), "default"), ROPE_TYPES)
    values = {name: raw[key] for name, key in _ROPE_KEYS.items() if raw.get(key) is not None}
    if rope_type == "dynamic":
        # transformers measures dynamic NTK against max_position_embeddings, whatever else the file says.
        values["original_max_position"] = max_position
    elif rope_type in ("yarn", "llama3"):
        values.setdefault("original_max_position", max_position)
    if rope_type == "yarn" and "factor" not in values:
        original = check.integer("original_max_position", values["original_max_position"], 1, max_position)
        values["factor"] = max_position / original
    if rope_type != "default" and "factor" not in values:
        raise ConfigError(
            f"rope type {rope_type} has no factor; a number of 1.0 or more is accepted; add factor to rope_parameters."
        )
    return RopeConfig(rope_type=rope_type, theta=_rope_value(config, raw, "rope_theta", family.rope_theta), **values)


def _rope_value(config: Mapping[str, Any], raw: Mapping[str, Any], key: str, default: float) -> Any:
    """A value that transformers 5 keeps inside rope_parameters and transformers 4 beside it."""
    inside = f"rope_parameters.{key}"
    return agreed({inside: raw.get(key), key: config.get(key)}, (inside, key), default)


def _refuse_rope(config: Mapping[str, Any], raw: Mapping[str, Any]) -> None:
    if nested := [key for key in _LAYER_KINDS if key in raw]:
        raise ConfigError(
            f"rope_parameters differ per layer kind ({', '.join(nested)}); one set for all layers is accepted; pick "
            "another checkpoint."
        )
    partial = _rope_value(config, raw, "partial_rotary_factor", 1.0)
    if partial != 1:
        raise ConfigError(
            f"partial_rotary_factor is {check.shown(partial)}; only 1.0 is accepted, which rotates whole heads; pick "
            "another checkpoint."
        )
    known = {*_ROPE_KEYS.values(), "rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if unknown := sorted(raw.keys() - known):
        warnings.warn(
            f"rope_parameters holds unknown keys, which are not used: {', '.join(unknown)}; check whether the model "
            "needs them.",
            stacklevel=5,
        )


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _pad(value: Any, vocab_size: int) -> Any:
    if check.is_integer(value) and not 0 <= value < vocab_size:
        warnings.warn(
            f"pad_token_id is {value}, outside the vocabulary of {vocab_size}; it is not used, because padding is "
            "masked; correct config.json to silence this.",
            stacklevel=4,
        )
        return None
    return value
