"""A ModelConfig from a TOML file, for shapes without a checkpoint."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from ferrum_jax.config import ModelConfig, QuantConfig, RopeConfig
from ferrum_jax.errors import ConfigError
from ferrum_jax.hf_quant import dynamic_rules
from ferrum_jax.hf_values import mapping


def load_toml_config(path: str | Path) -> ModelConfig:
    """Read a model's shape from TOML: the field names of ModelConfig, with tables [rope] and [quant].

    Args:
      path: the file. Lists stand for tuples; [quant.dynamic] maps patterns to overrides as quantize_config.json does.

    Returns:
      The checked configuration.

    Raises:
      ConfigError: the file is absent or not TOML, a key is unknown or missing, or a value is refused.

    Example:
      >>> load_toml_config("configs/qwen3-30b-a3b.toml").num_experts
      128
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise ConfigError(
            f"{path} cannot be read ({problem.strerror}); a TOML file is accepted; check the path, or start from one "
            "in configs/."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise ConfigError(f"{path} is not TOML ({problem}); correct the line, or start from one in configs/.") from None
    if "rope" in table:
        table["rope"] = _build(RopeConfig, table["rope"], f"[rope] of {path.name}")
    if "quant" in table:
        section = dict(mapping(f"[quant] of {path.name}", table["quant"]))
        if "dynamic" in section:
            section["dynamic"] = dynamic_rules(section["dynamic"], path.name)
        table["quant"] = _build(QuantConfig, section, f"[quant] of {path.name}")
    return _build(ModelConfig, table, path.name)


def _build(kind: type, table: Any, where: str) -> Any:
    known = {field.name: field for field in fields(kind)}
    table = mapping(where, table)
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}."
            raise ConfigError(
                f"{where} holds the unknown key {key}; field names of {kind.__name__} are accepted; {hint}"
            )
    missing = [
        name
        for name, field in known.items()
        if name not in table and field.default is MISSING and field.default_factory is MISSING
    ]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}; every size without a default is needed; add them.")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in table.items()})
