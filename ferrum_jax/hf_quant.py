"""quantize_config.json and config.json's quantization_config to a QuantConfig; other methods are refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from ferrum_jax import config_checks as check
from ferrum_jax.config import CHECKPOINT_FORMATS, MODULE_SETTINGS, Overrides, QuantConfig
from ferrum_jax.errors import ConfigError
from ferrum_jax.hf_values import agreed, mapping, optional, required

_OUTER_FILE = "quantize_config.json"
_INNER_FILE = "config.json's quantization_config"
_FIX = "pick a GPTQ checkpoint of the model, or quantise the original one with GPTQModel"
_METHOD_FIXES = {
    "gguf": "run the file with llama.cpp, or " + _FIX,
    "exl2": "run it with ExLlamaV2, or " + _FIX,
    "exl3": "run it with ExLlamaV3, or " + _FIX,
}
# Keys that only one other method writes: they name a section that does not name itself.
_TELLTALES = {
    "zero_point": "awq",
    "load_in_4bit": "bitsandbytes",
    "load_in_8bit": "bitsandbytes",
    "config_groups": "compressed-tensors",
    "weight_block_size": "fp8",
}
# Keys of GPTQModel, AutoGPTQ and transformers that steer quantising or running, not the meaning of stored weights.
_HARMLESS = frozenset(
    "meta damp_percent damp_auto_increment static_groups true_sequential mse gptaq foem act_group_aware fallback "
    "hessian offload_to_disk offload_to_disk_path pack_impl gc_mode device auto_forward_data_parallel telemetry "
    "wait_for_submodule_finalizers dense_vram_strategy dense_vram_strategy_devices moe_vram_strategy moe "
    "moe_vram_strategy_devices mock_quantization model_name_or_path model_file_base_name tokenizer dataset backend "
    "model_seqlen block_name_to_quantize module_name_preceding_first_block batch_size pad_token_id use_cuda_fp16 "
    "max_input_length cache_block_outputs modules_in_block_to_quantize modules_to_not_convert use_exllama "
    "disable_exllama exllama_config use_triton warmup_triton is_marlin_format".split()
)
_READ = frozenset(
    "bits group_size sym desc_act lm_head dynamic quant_method method checkpoint_format format pack_dtype rotation "
    "adapter".split()
)


def quant_config_from_hf(config: Mapping[str, Any], quantize_config: Mapping[str, Any] | None) -> QuantConfig | None:
    """Quantisation of a checkpoint from its two metadata copies.

    Args:
      config: config.json.
      quantize_config: quantize_config.json, if there is one.

    Returns:
      The settings, or None for an unquantised checkpoint. Where the copies differ on something that shapes or
      data can prove, quantize_config.json (written by the quantiser) is taken with a warning.

    Raises:
      ConfigError: another method or format, a bad value, or copies that differ on the zero point convention.
    """
    if optional(config, "compression_config", None) is not None:
        raise _refused("config.json's compression_config", "compressed-tensors")
    found = [
        (where, _read(mapping(where, section), where))
        for where, section in ((_OUTER_FILE, quantize_config), (_INNER_FILE, config.get("quantization_config")))
        if section is not None
    ]
    if len(found) < 2:
        return found[0][1] if found else None
    outer, inner = found[0][1], found[1][1]
    formats = {one.checkpoint_format for one in (outer, inner)} - {None}
    if len(formats) > 1:
        raise ConfigError(
            f"{_OUTER_FILE} says checkpoint_format {outer.checkpoint_format} and {_INNER_FILE} says "
            f"{inner.checkpoint_format}; zero points are stored differently, so both must say the same; correct the "
            "wrong one."
        )
    outer = replace(outer, checkpoint_format=formats.pop() if formats else None)
    for field in fields(QuantConfig):
        mine, other = getattr(outer, field.name), getattr(inner, field.name)
        if mine != other and field.name != "checkpoint_format":
            warnings.warn(
                f"{_OUTER_FILE} says {field.name} {check.shown(mine)} and {_INNER_FILE} says {check.shown(other)}; "
                f"{_OUTER_FILE} is used, as the quantiser wrote it; correct the wrong one.",
                stacklevel=4,
            )
    return outer


def dynamic_rules(dynamic: Mapping[str, Any], where: str) -> tuple[tuple[str, Overrides | None], ...]:
    """Ordered rules of a `dynamic` object: {pattern: overrides}, where "-:" before the pattern excludes."""
    rules: list[tuple[str, Overrides | None]] = []
    for pattern, section in mapping(f"dynamic of {where}", dynamic).items():
        inside = f"the dynamic rule {check.shown(pattern)} of {where}"
        if pattern.startswith("-:"):
            rules.append((pattern, None))
            continue
        section = mapping(inside, section)
        _refuse_foreign(section, inside)
        _warn_unknown(section, inside)
        rules.append((pattern, tuple((key, section[key]) for key in MODULE_SETTINGS if section.get(key) is not None)))
    return tuple(rules)


def _read(section: Mapping[str, Any], where: str) -> QuantConfig:
    method = agreed(section, ("quant_method", "method"), None)
    if method is None and (marks := [_TELLTALES[key] for key in _TELLTALES if key in section]):
        raise _refused(where, marks[0])
    _refuse_foreign(section, where)
    _warn_unknown(section, where)
    return QuantConfig(
        bits=required(section, "bits", where),
        group_size=required(section, "group_size", where),
        sym=optional(section, "sym", True),
        desc_act=optional(section, "desc_act", False),
        checkpoint_format=agreed(section, ("checkpoint_format", "format"), None),
        lm_head=optional(section, "lm_head", False),
        dynamic=dynamic_rules(optional(section, "dynamic", {}), where),
    )


def _refused(where: str, method: Any) -> ConfigError:
    fix = _METHOD_FIXES.get(str(method), _FIX)
    return ConfigError(f"{where} says quant_method {check.shown(method)}; only gptq is accepted; {fix}.")


def _refuse_foreign(section: Mapping[str, Any], where: str) -> None:
    method = agreed(section, ("quant_method", "method"), "gptq")
    if not isinstance(method, str) or method.lower() != "gptq":
        raise _refused(where, method.lower() if isinstance(method, str) else method)
    layout = agreed(section, ("checkpoint_format", "format"), None)
    if section.get("is_marlin_format") is True:
        layout = "marlin"
    if layout is not None and layout not in CHECKPOINT_FORMATS:
        raise ConfigError(
            f"{where} says checkpoint_format {check.shown(layout)}; gptq or gptq_v2 is accepted; save it again with "
            "GPTQModel in format gptq, or pick another checkpoint."
        )
    packed = optional(section, "pack_dtype", "int32")
    if packed != "int32":
        raise ConfigError(
            f"{where} says pack_dtype {check.shown(packed)}; int32 is accepted; quantise again with "
            "pack_dtype int32, or pick another checkpoint."
        )
    for key, need in (("rotation", "a Hadamard transform at run time"), ("adapter", "a LoRA adapter at run time")):
        if section.get(key):
            raise ConfigError(
                f"{where} says {key} {check.shown(section[key])}, which needs {need}; only weights that stand alone "
                f"are accepted; quantise again without {key}, or pick another checkpoint."
            )


def _warn_unknown(section: Mapping[str, Any], where: str) -> None:
    unknown = sorted(str(key) for key in section if key not in _READ and key not in _HARMLESS)
    if unknown:
        warnings.warn(
            f"{where} holds unknown keys, which are not used: {', '.join(unknown)}; check whether they change how "
            "the weights are stored.",
            stacklevel=5,
        )
