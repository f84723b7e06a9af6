"""JSON files of a checkpoint, read strictly: one object, no key twice, bounded size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ferrum_jax.checkpoint.content import disguise, read_bytes, refetch
from ferrum_jax.errors import CheckpointError

MAX_JSON_BYTES = 64 * 2**20


class DuplicateKeyError(ValueError):
    """A JSON object holds the same key twice; readers disagree on which value counts."""


def parse_object(text: bytes) -> dict[str, Any]:
    """Parse one JSON object in which no key repeats, at any depth.

    Args:
        text: UTF-8 bytes, with or without a byte order mark.

    Returns:
        The object as a dict.

    Raises:
        DuplicateKeyError: a key occurs twice in one object.
        ValueError: the bytes are not UTF-8, not JSON or not an object.

    >>> parse_object(b'{"bits": 4}')
    {'bits': 4}
    """
    try:
        value = json.loads(text.decode("utf-8-sig"), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")
    return value


def read_json(path: str | Path, what: str, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON file of a checkpoint.

    Args:
        path: the file.
        what: what the file holds, in words that fit "it should hold ...", for example "the model configuration".
        limit: largest accepted size in bytes.

    Returns:
        The object in the file.

    Raises:
        CheckpointError: the file is missing, empty, too large, not UTF-8, not JSON, not an object, has a key
            twice, or is a Git LFS pointer or a web page in disguise.

    >>> from ferrum_jax.checkpoint.hub import DEMO_FOLDER
    >>> read_json(DEMO_FOLDER / "config.json", "the model configuration")["model_type"]
    'qwen3_moe'
    """
    path = Path(path)
    content = read_bytes(path, limit, what)
    try:
        return parse_object(content)
    except DuplicateKeyError as error:
        raise CheckpointError(
            f"{path} has the key {error.args[0]!r} twice in one object, so its meaning is ambiguous. "
            "Remove one of the two."
        ) from None
    except ValueError as error:
        other = disguise(content)
        if other is not None:
            raise CheckpointError(f"{path} is {other} ({len(content)} bytes), not {what}. {refetch(path)}") from None
        raise CheckpointError(
            f"{path} is not a JSON object ({error}); it should hold {what}. {refetch(path)}"
        ) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        seen: set[str] = set()
        raise DuplicateKeyError(next(key for key, _ in pairs if key in seen or seen.add(key)))
    return mapping
