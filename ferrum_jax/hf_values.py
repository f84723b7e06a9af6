"""Reading keys of parsed JSON: present, in one of several spellings, or an error sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ferrum_jax.config_checks import shown
from ferrum_jax.errors import ConfigError


def mapping(where: str, value: Any) -> Mapping[str, Any]:
    """Refuse anything but a table of keys and values."""
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{where} holds {shown(value)}; a JSON object or TOML table is accepted; correct it or fetch it again."
        )
    return value


def optional(section: Mapping[str, Any], key: str, default: Any) -> Any:
    """The key's value; null and absent both mean the default, as transformers writes either."""
    value = section.get(key)
    return default if value is None else value


def required(section: Mapping[str, Any], key: str, where: str = "config.json") -> Any:
    """The key's value, which must be there."""
    if section.get(key) is None:
        raise ConfigError(f"{key} is missing from {where}; a value is needed; add it or fetch the file again.")
    return section[key]


def agreed(section: Mapping[str, Any], keys: tuple[str, ...], default: Any) -> Any:
    """The value under any of several spellings; two that differ are an error."""
    found = [(key, section[key]) for key in keys if section.get(key) is not None]
    if any(value != found[0][1] for _, value in found):
        both = " and ".join(f"{key} is {shown(value)}" for key, value in found)
        raise ConfigError(f"{both}; these are spellings of one value and must agree; remove the wrong one.")
    return found[0][1] if found else default
