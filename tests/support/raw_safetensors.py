"""Safetensors files written byte by byte, so that tests can write wrong ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file


def entry(dtype: str = "F32", shape: list[Any] | None = None, offsets: tuple[int, int] = (0, 8)) -> dict[str, Any]:
    """One tensor of a header; by default two float32 values at the start of the data."""
    return {"dtype": dtype, "shape": [2] if shape is None else shape, "data_offsets": list(offsets)}


def write_raw(path: Path, header: dict[str, Any] | bytes, body: bytes = b"", length: int | None = None) -> Path:
    """Write a header (as JSON, or bytes as they are) and a body; `length` is the announced header length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)
    return path


def write_shards(folder: Path, shards: dict[str, list[str]], weight_map: dict[str, str] | None = None) -> Path:
    """Write shards (file name to tensor names) and an index; by default the index tells the truth."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, names in shards.items():
        save_file({name: np.arange(4, dtype=np.float32) for name in names}, folder / file)
    if weight_map is None:
        weight_map = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
