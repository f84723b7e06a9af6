"""Save parameters with orbax and read them back, packed words bit for bit.

    folder/
      ferrum.json    version, configuration, structure of the pytree, SHA-256 of every file of arrays
      arrays/        what `orbax.checkpoint.StandardCheckpointer` writes

Where the structure is known beforehand, orbax alone does it: it saves and restores the pytree as it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ferrum_jax.checkpoint.json_files import read_json
from ferrum_jax.config import ModelConfig, QuantConfig, RopeConfig
from ferrum_jax.environment import check_memory, installed
from ferrum_jax.errors import BackendError, CheckpointError
from ferrum_jax.params import num_bytes
from ferrum_jax.tree_text import abstract_from, describe, tuples

VERSION = 1
DESCRIPTION = "ferrum.json"
ARRAYS = "arrays"


def save_params(path: str | Path, cfg: ModelConfig, params: dict[str, Any]) -> Path:
    """Write a configuration and its parameters into a new folder, which appears complete or not at all.

    Args:
      path: folder to make; it must not exist, its parents may.
      cfg: the model.
      params: its pytree, edited or not; the tokenizer is not part of it.

    Returns:
      The folder.

    Raises:
      CheckpointError: the folder exists or cannot be written, or the pytree holds something else than dicts, tuples,
        PackedLinear, MixedStack and arrays.
      BackendError: the installed orbax does not work with the installed JAX.

    >>> import ferrum_jax as fj, tempfile
    >>> model = fj.load("demo")
    >>> folder = save_params(f"{tempfile.mkdtemp()}/saved", model.cfg, model.params)
    >>> sorted(file.name for file in folder.iterdir())
    ['arrays', 'ferrum.json']
    """
    path = Path(path).absolute()
    if path.exists():
        raise CheckpointError(f"{path} exists already and is not overwritten; choose another folder or remove it.")
    description: dict[str, Any] = {
        "version": VERSION,
        "orbax": installed("orbax-checkpoint"),
        "config": dataclasses.asdict(cfg),
        "params": describe(params),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the last step is a rename within one file system.
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as temporary:
            folder = Path(temporary, path.name)
            with _checkpointer() as checkpointer:
                checkpointer.save(folder / ARRAYS, params)
            description["files"] = {name: _digest(folder / name) for name in _files(folder)}
            (folder / DESCRIPTION).write_text(json.dumps(description, indent=1), encoding="utf-8")
            os.rename(folder, path)
    except OSError as problem:
        raise CheckpointError(
            f"{path} cannot be written ({problem.strerror or problem}); choose a folder on a disk that is writable "
            f"and has {num_bytes(params) / 2**30:.2f} GiB free."
        ) from problem
    return path


def load_params(path: str | Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Read what save_params wrote, on the default device. Files are verified before anything is allocated.

    Args:
      path: the folder.

    Returns:
      (cfg, params), equal to what was saved bit for bit.

    Raises:
      CheckpointError: the folder is not of save_params, is damaged, or was written by another version.
      CapacityError: the parameters do not fit the device's memory.
      BackendError: the installed orbax does not work with the installed JAX.

    >>> import ferrum_jax as fj, tempfile
    >>> model = fj.load("demo")
    >>> cfg, params = load_params(save_params(f"{tempfile.mkdtemp()}/saved", model.cfg, model.params))
    >>> cfg == model.cfg, params["norm"].shape
    (True, (256,))
    """
    path = Path(path).absolute()
    file = path / DESCRIPTION
    if not file.is_file():
        raise CheckpointError(
            f"{path} is not a folder of saved parameters: it has no {DESCRIPTION}. Only what save_params wrote is "
            f"accepted; a GPTQ checkpoint is read by ferrum_jax.load."
        )
    description = read_json(file, "the description of saved parameters")
    version = description.get("version")
    if version != VERSION:
        raise CheckpointError(
            f"{file} is of version {version!r}; version {VERSION} is accepted. Read it with the ferrum_jax that wrote "
            f"it and save it in a format that both know, or change the installed ferrum_jax."
        )
    try:
        cfg = _config(description["config"])
        target = abstract_from(description["params"])
        files = dict(description["files"])
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        raise CheckpointError(f"{file} is damaged ({problem!r}); copy the folder again, or save again.") from problem
    _verify(path, files)
    check_memory(num_bytes(target), str(path))
    device = jnp.zeros(0).sharding
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), target)
    checkpointer = _checkpointer()
    try:
        with checkpointer:
            return cfg, checkpointer.restore(path / ARRAYS, target)
    except Exception as problem:  # orbax raises many kinds, Exception itself among them
        raise CheckpointError(
            f"{path} is whole, but orbax-checkpoint {installed('orbax-checkpoint')} cannot read it "
            f"({str(problem).partition(chr(10))[0]}); it was written by orbax-checkpoint {description.get('orbax')}: "
            f"install that version."
        ) from problem


def orbax_fits() -> bool:
    """Whether the installed orbax works with the installed JAX: 0.11.24 and later call what jax 0.5.0 lacks."""
    version = tuple(map(int, re.findall(r"\d+", installed("orbax-checkpoint") or "")[:3]))
    return version < (0, 11, 24) or hasattr(jax.monitoring, "record_scalar")


def _checkpointer() -> Any:
    if not orbax_fits():
        raise BackendError(
            f"orbax-checkpoint {installed('orbax-checkpoint')} does not work with jax {jax.__version__}, although it "
            f'says so; install "orbax-checkpoint<0.11.24" or a newer jax.'
        )
    import orbax.checkpoint as ocp  # slow, and needed by nothing else

    return ocp.StandardCheckpointer()


def _config(value: dict[str, Any]) -> ModelConfig:
    fields = tuples(value)
    quant = None if fields["quant"] is None else QuantConfig(**fields["quant"])
    return ModelConfig(**{**fields, "rope": RopeConfig(**fields["rope"]), "quant": quant})


def _files(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in (folder / ARRAYS).rglob("*") if file.is_file())


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _verify(folder: Path, files: dict[str, str]) -> None:
    # orbax reads a flipped bit as another weight, and reports a cut file in pages.
    for name, digest in files.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{folder} lacks {name}; copy the folder again, or save again.")
        if _digest(file) != digest:
            raise CheckpointError(f"{file} is damaged: it is not what was saved; copy the folder again, or save again.")
