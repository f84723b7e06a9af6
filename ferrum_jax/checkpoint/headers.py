"""The header of one safetensors file: names, dtypes, shapes and sizes, validated, without reading a weight.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ferrum_jax.checkpoint.content import disguise, refetch, unreadable
from ferrum_jax.checkpoint.json_files import DuplicateKeyError, parse_object
from ferrum_jax.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32}
_BITS |= {"I64": 64, "U64": 64, "F64": 64, "C64": 64, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8}
_BITS |= {"F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says about one tensor.

    Args:
        name: key of the tensor, for example "model.layers.0.self_attn.q_proj.qweight".
        dtype: safetensors name of the element type: "I32", "F16", "BF16", "F32", ...
        shape: dimensions.
        nbytes: size of the data in bytes.
        file: the safetensors file that holds it.
        offset: where the data starts, in bytes from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and validate the header of one safetensors file.

    Args:
        path: the file. Only its header is read.

    Returns:
        Tensor name to TensorInfo, in the order of the data.

    Raises:
        CheckpointError: the file is missing, empty, cut short, not safetensors (a Git LFS pointer, a web page, a
            pickle), or its header is corrupt, contradictory or holds a key twice.

    >>> from ferrum_jax.checkpoint.hub import DEMO_FOLDER
    >>> header = read_header(DEMO_FOLDER / "model.safetensors")
    >>> header["model.norm.weight"].dtype
    'BF16'
    """
    header, body_start, body_bytes = _parse(path)
    for name in header:
        _check_name(path, name)
    try:
        with safe_open(path, framework="np"):
            pass  # opening is what validates: dtypes, shapes, and offsets that cover the file without hole or overlap
    except SafetensorError as error:
        reason = next(_contradictions(header, body_bytes), f"has a header that safetensors refuses: {error}")
        raise CheckpointError(f"{path} {reason}. {refetch(path)}") from error
    except OSError as error:
        raise unreadable(path, error) from error
    infos = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        infos[name] = TensorInfo(name, entry["dtype"], tuple(entry["shape"]), last - first, path, body_start + first)
    return infos


def _parse(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return the header as JSON, and start and size of what follows. safetensors accepts a repeated key, we do not."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(512)
            length = int.from_bytes(head[:8], "little")
            plausible = len(head) >= 8 and length <= min(size - 8, MAX_HEADER_BYTES)
            file.seek(8)
            text = file.read(length) if plausible else b""
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing. {refetch(path)}") from None
    except OSError as error:
        raise unreadable(path, error) from error
    if not head:
        raise CheckpointError(f"{path} is empty. {refetch(path)}")
    if not plausible and (other := disguise(head)):
        raise CheckpointError(f"{path} is {other} of {size} bytes, not safetensors weights. {refetch(path)}")
    if len(head) < 8:
        raise CheckpointError(f"{path} has only {size} bytes, less than the shortest safetensors file. {refetch(path)}")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path} announces a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are accepted, "
            f"so it is corrupt or not a safetensors file. {refetch(path)}"
        )
    if not plausible:
        raise CheckpointError(
            f"{path} is cut short inside its header: {length:,} bytes announced, {size - 8:,} there. {refetch(path)}"
        )
    try:
        header = parse_object(text)
    except DuplicateKeyError as error:
        raise CheckpointError(
            f"{path} has the key {error.args[0]!r} twice in its header, so which data counts is ambiguous. "
            "Write the file again with one tensor of each name."
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path} has a corrupt header ({error}). {refetch(path)}") from None
    header.pop("__metadata__", None)
    return header, 8 + length, size - 8 - length


def _check_name(path: Path, name: str) -> None:
    if not name or not name.isprintable() or name[0] in "/\\" or ".." in re.split(r"[/\\]", name):
        raise CheckpointError(
            f"{path} names a tensor {name!r}; names may not be empty, look like a path out of the folder or hold "
            "control characters. Do not trust this file: take the checkpoint from its publisher."
        )


def _contradictions(header: dict[str, Any], body_bytes: int) -> Iterator[str]:
    """Say, tensor by tensor, what is wrong with a header that safetensors refused."""
    for name, entry in header.items():
        yield from _malformed(name, entry)
    end, previous = 0, ""
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        if first < end:
            yield f"is corrupt: tensor {name!r} overlaps {previous!r}"
        if first > end:
            yield f"is corrupt: {first - end:,} bytes before tensor {name!r} belong to no tensor"
        if last > body_bytes:
            yield f"is cut short: tensor {name!r} ends at byte {last:,} of the data, the file holds {body_bytes:,}"
        end, previous = last, name
    if end < body_bytes:
        yield f"is corrupt: {body_bytes - end:,} bytes after the last tensor belong to no tensor"


def _malformed(name: str, entry: Any) -> Iterator[str]:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        yield f"is corrupt: tensor {name!r} lacks a dtype, a shape or data_offsets"
        return
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        yield f"holds tensor {name!r} of unknown dtype {dtype!r}; known are {', '.join(_BITS)}"
    elif not _sizes(shape):
        yield f"is corrupt: tensor {name!r} has the impossible shape {shape!r}"
    elif not (_sizes(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        yield f"is corrupt: tensor {name!r} has the impossible data_offsets {offsets!r}"
    elif (needed := math.prod(shape) * _BITS[dtype]) != 8 * (offsets[1] - offsets[0]):
        yield (
            f"is corrupt: tensor {name!r} of dtype {dtype} and shape {shape} needs {needed // 8:,} bytes, "
            f"its data_offsets give {offsets[1] - offsets[0]:,}"
        )


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)
