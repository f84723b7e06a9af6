"""The file of the weight cache: where every array and every checksum lies, and how bytes come and go.

    header      padded with spaces, so that every tensor begins on a page
    leaves      the stacks as they lie in memory, with "padding.N" between them where a size asks for it
    checksums   U64, one xxh3 for every layer of every leaf, and last the one of the header

It is safetensors, so other tools can read it.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import jax
import numpy as np
import xxhash

from ferrum_jax.checkpoint.files import DTYPES
from ferrum_jax.checkpoint.headers import MAX_HEADER_BYTES

PAGE = 4096
_SAFETENSORS = {dtype: name for name, dtype in DTYPES.items()}
Piece = tuple[int, int | None]  # (leaf, layer)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where everything lies.

    Attributes:
      header: the first bytes.
      offsets: of every leaf, from the start of the file.
      pieces: (start, end) of every leaf of every layer.
      checksums: offset of the checksums, which have the order of the pieces.
      size: of the file.
    """

    header: bytes
    offsets: tuple[int, ...]
    pieces: dict[Piece, tuple[int, int]]
    checksums: int
    size: int


def layout_of(tree: Any, metadata: dict[str, str]) -> Layout:
    """Lay out a file.

    Args:
      tree: abstract.
      metadata: for the header.

    Returns:
      Layout.
    """
    entries: dict[str, Any] = {"__metadata__": metadata}
    pieces: dict[Piece, tuple[int, int]] = {}
    end, offsets = 0, []

    def place(name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> int:
        nonlocal end
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
        return end - nbytes

    for number, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(tree)):
        dtype = np.dtype(leaf.dtype)
        nbytes = int(np.prod(leaf.shape)) * dtype.itemsize
        start = place(_name(path), _SAFETENSORS[dtype], leaf.shape, nbytes)
        offsets.append(start)
        if _name(path).startswith("layers."):
            one = nbytes // leaf.shape[0]
            pieces |= {(number, i): (start + i * one, start + (i + 1) * one) for i in range(leaf.shape[0])}
        else:
            pieces[number, None] = start, end
        if gap := -end % PAGE:
            place(f"padding.{number}", "U8", (gap,), gap)
    checksums = place("checksums", "U64", (len(pieces) + 1,), 8 * (len(pieces) + 1))
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    header = len(text).to_bytes(8, "little") + text
    base = len(header)
    return Layout(
        header,
        tuple(base + offset for offset in offsets),
        {piece: (base + start, base + stop) for piece, (start, stop) in pieces.items()},
        base + checksums,
        base + end,
    )


def _name(path: Any) -> str:
    """A leaf's name in the file, such as "layers.0.attn.qkv.qweight"."""
    return ".".join(re.findall(r"\w+", jax.tree_util.keystr(path)))


def checksum(data: Any) -> int:
    """xxh3 of a buffer."""
    hasher = xxhash.xxh3_64()
    hasher.update(data)  # in contrast to the function of one call, this lets other threads run in all versions
    return hasher.intdigest()


def map_bytes(descriptor: int, size: int) -> np.ndarray:
    """The bytes of a file as a read-only array."""
    mapped = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without large pages for files
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapped, np.uint8)


def views(mapped: np.ndarray, layout: Layout, tree: Any) -> list[np.ndarray]:
    """The leaves of a tree in the bytes of its file."""
    return [
        mapped[start : start + int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize]
        .view(np.dtype(leaf.dtype))
        .reshape(leaf.shape)
        for start, leaf in zip(layout.offsets, jax.tree.leaves(tree), strict=True)
    ]


def check(mapped: np.ndarray, layout: Layout, advance: Callable[[int], None]) -> None:
    """Compare all leaves with their checksums, by several threads.

    Args:
      mapped: the file.
      layout: its layout.
      advance: called with the bytes of each piece.

    Raises:
      ValueError: one differs.
    """

    def found_in(piece: tuple[int, int]) -> int:
        start, end = piece
        found = checksum(mapped[start:end])
        advance(end - start)
        return found

    stored = mapped[layout.checksums : layout.size - 8].view(np.uint64).tolist()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(found_in, layout.pieces.values()))
    if found != stored:
        raise ValueError("its weights do not match their checksums")


def read(file: int, out: memoryview, offset: int) -> None:
    """Fill memory from a place in a file.

    Raises:
      ValueError: the file ends before.
    """
    while out:  # one call reads at most 2 GiB
        done = os.preadv(file, [out], offset)
        if not done:
            raise ValueError("it is cut short")
        out, offset = out[done:], offset + done


def write(file: int, data: memoryview, offset: int) -> None:
    """Write memory to a place in a file."""
    while data:  # one call writes at most 2 GiB
        done = os.pwrite(file, data, offset)
        data, offset = data[done:], offset + done


def metadata_of(file: Any) -> dict[str, str]:
    """The description in the header, once its checksum is right.

    Args:
      file: open for reading.

    Raises:
      ValueError: the header is damaged.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(size - 16, MAX_HEADER_BYTES):
        raise ValueError("it is cut short")
    text = file.read(length)
    file.seek(size - 8)
    if checksum(length.to_bytes(8, "little") + text) != int.from_bytes(file.read(8), "little"):
        raise ValueError("its header does not match its checksum")
    return json.loads(text)["__metadata__"]
