"""Checks of configuration values, each with a sentence: what was found, what is accepted, what to do."""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Any

from ferrum_jax.errors import ConfigError

if TYPE_CHECKING:
    from ferrum_jax.config import ModelConfig

MAX_POSITION = 2**24

# A hostile file may hold a megabyte where a number belongs: the message shows its beginning.
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60
shown = _REPR.repr

# Least and most of every size. The tops are far above any published model: they stop a damaged or hostile
# file before anything is allocated.
SIZES: dict[str, tuple[int, int]] = {
    "vocab_size": (1, 2**22),
    "hidden_size": (1, 2**18),
    "num_layers": (1, 512),
    "num_heads": (1, 1024),
    "num_kv_heads": (1, 1024),
    "head_dim": (2, 1024),
    "intermediate_size": (1, 2**20),
    "num_experts": (0, 4096),
    "top_k": (0, 4096),
    "moe_intermediate_size": (0, 2**20),
    "max_position": (1, MAX_POSITION),
}

# Fields that config.json spells differently: errors name both, so that either file can be corrected.
HF_NAMES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "num_experts": "num_local_experts",
    "top_k": "num_experts_per_tok",
    "max_position": "max_position_embeddings",
    "theta": "rope_theta",
    "original_max_position": "original_max_position_embeddings",
}


def label(name: str) -> str:
    """The field's name, with config.json's spelling where it differs."""
    return f"{name} ({HF_NAMES[name]} in config.json)" if name in HF_NAMES else name


def is_integer(value: Any) -> bool:
    """Whether a value is a whole number; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def integer(name: str, value: Any, least: int, most: int) -> int:
    """Refuse anything but an int within [least, most]."""
    if not is_integer(value) or not least <= value <= most:
        raise ConfigError(
            f"{label(name)} is {shown(value)}; an integer from {least} to {most} is accepted; correct it or fetch the "
            "file again."
        )
    return value


def number(name: str, value: Any, *, least: float | None = None, above: float | None = None) -> float:
    """Refuse anything but a finite number that is at least `least` and above `above`."""
    # NaN fails every comparison, and an int too long for a float still compares.
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30
    if not good or (least is not None and value < least) or (above is not None and value <= above):
        bound = f" of {least} or more" if least is not None else f" above {above}" if above is not None else ""
        raise ConfigError(
            f"{label(name)} is {shown(value)}; a finite number{bound} is accepted; correct it or fetch the file again."
        )
    return float(value)


def boolean(name: str, value: Any) -> bool:
    """Refuse anything but true and false."""
    if not isinstance(value, bool):
        raise ConfigError(f"{label(name)} is {shown(value)}; true or false is accepted; correct it without quotes.")
    return value


def choice(name: str, value: Any, accepted: tuple[Any, ...]) -> Any:
    """Refuse anything that is not one of the accepted values, types included."""
    if not any(value == one and type(value) is type(one) for one in accepted):
        names = ", ".join(str(one) for one in accepted)
        raise ConfigError(
            f"{label(name)} is {shown(value)}; one of {names} is accepted; correct it or pick another checkpoint."
        )
    return value


def group_size(name: str, value: Any) -> int:
    """Refuse anything but -1 and positive integers."""
    if not is_integer(value) or not (value == -1 or 1 <= value <= SIZES["intermediate_size"][1]):
        raise ConfigError(
            f"{name} is {shown(value)}; -1 (one group over all input rows) or an integer from 1 to "
            f"{SIZES['intermediate_size'][1]} is accepted; correct it or fetch the file again."
        )
    return value


def lm_head_bits(value: Any) -> None:
    """Refuse anything but None and the widths that every kernel takes."""
    if value is not None and not (is_integer(value) and value in (4, 8)):
        raise ConfigError(
            f"lm_head_bits is {shown(value)}; 4 or 8 is accepted, and None, which keeps the output projection as the "
            "checkpoint has it; pick one of them."
        )


def module_setting(key: str, accepted: tuple[str, ...]) -> None:
    """Refuse an override that does not belong to one module."""
    if key not in accepted:
        raise ConfigError(f"{key} is not a setting of a module; {', '.join(accepted)} are accepted; remove it.")


def parts(cfg: ModelConfig, rope: type, quant: type) -> None:
    """Nested settings are of their own kinds, so that the whole stays hashable."""
    for name, kinds, accepted in (
        ("rope", (rope,), "a RopeConfig"),
        ("quant", (quant, type(None)), "a QuantConfig or None"),
        ("implementation", (str, type(None)), "a name or None"),
    ):
        value = getattr(cfg, name)
        if not isinstance(value, kinds):
            raise ConfigError(f"{name} is {shown(value)}; {accepted} is accepted; build it first.")


def layers(cfg: ModelConfig) -> None:
    """Per-layer tuples have one well-typed entry per layer."""
    for name in ("moe_layers", "sliding_windows"):
        values = getattr(cfg, name)
        if not isinstance(values, tuple) or len(values) != cfg.num_layers:
            raise ConfigError(
                f"{name} is {shown(values)}; one entry for each of the {cfg.num_layers} layers is accepted; give that "
                "many or leave it out."
            )
    for moe in cfg.moe_layers:
        boolean("an entry of moe_layers", moe)
    for window in cfg.sliding_windows:
        if window is not None:
            integer("an entry of sliding_windows", window, 1, MAX_POSITION)


def heads(cfg: ModelConfig) -> None:
    """Key and value heads divide the query heads, and a head splits into two halves for the rotation."""
    if cfg.num_heads % cfg.num_kv_heads:
        raise ConfigError(
            f"{label('num_heads')} is {cfg.num_heads} and {label('num_kv_heads')} is {cfg.num_kv_heads}; the first "
            "must be a multiple of the second; correct one of them."
        )
    if cfg.head_dim % 2:
        raise ConfigError(
            f"head_dim is {cfg.head_dim}; an even number is accepted, because rotary embeddings turn pairs; correct it."
        )


def experts(cfg: ModelConfig) -> None:
    """Routing picks 1 to E of E experts, and MoE layers exist exactly when experts do."""
    if cfg.num_experts and not 1 <= cfg.top_k <= cfg.num_experts:
        raise ConfigError(
            f"{label('top_k')} is {cfg.top_k} with {cfg.num_experts} experts; an integer from 1 to "
            f"{cfg.num_experts} is accepted; correct it."
        )
    if cfg.num_experts and not cfg.moe_intermediate_size:
        raise ConfigError(
            f"moe_intermediate_size is 0 with {cfg.num_experts} experts; the hidden size of one expert is accepted; "
            "add it."
        )
    if not cfg.num_experts and any(cfg.moe_layers):
        raise ConfigError(
            f"moe_layers marks {sum(cfg.moe_layers)} MoE layers but num_experts is 0; experts and MoE layers come "
            "together; set num_experts or leave moe_layers out."
        )


def token_ids(cfg: ModelConfig) -> None:
    """Special ids are rows of the embedding."""
    if not isinstance(cfg.eos_token_ids, tuple):
        raise ConfigError(
            f"eos_token_ids is {shown(cfg.eos_token_ids)}; a list of token ids is accepted; wrap a single id in one."
        )
    named = [("eos_token_ids", one) for one in cfg.eos_token_ids]
    named += [("bos_token_id", cfg.bos_token_id), ("pad_token_id", cfg.pad_token_id)]
    for name, value in named:
        if value is not None:
            integer(name, value, 0, cfg.vocab_size - 1)
