"""Assembled weights on disk: written while a checkpoint is loaded, mapped into memory by the next start.

One safetensors file per checkpoint, dtype and lm_head_bits, in a folder of the user:

    header      padded with spaces, so that every tensor begins on a page
    leaves      the stacks as they lie in memory, with "padding.N" between them where a size asks for it
    checksums   U64, one xxh3 for every layer of every leaf, and last the one of the header

The page cache holds the only copy of the weights: the load writes them to the file and then maps it, as the next start
does, so processes share them and the system may drop and read them again. A file that is not exactly what this version
would write for the same checkpoint is never used.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import mmap
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xxhash

from ferrum_jax.checkpoint.files import DTYPES, INDEX
from ferrum_jax.checkpoint.headers import MAX_HEADER_BYTES
from ferrum_jax.config import ModelConfig
from ferrum_jax.errors import CheckpointError
from ferrum_jax.params import abstract
from ferrum_jax.tree_text import abstract_from, describe

VERSION = 1  # a change of what words mean needs a new one; other shapes are noticed without
PAGE = 4096
LEAST = 2**28  # bytes of weights from which a checkpoint is worth keeping
SPARE_DISK = 2 * 2**30  # bytes that stay free
_FORMAT = "ferrum_jax weights"
_TEMPORARY = ".incomplete"
_SAFETENSORS = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a load finds out beside the weights, so that the next one need not look again.

    Attributes:
      version: of the zero points, "gptq", "gptq_v2" or None.
      bytes_read: size of the checkpoint's tensors.
      warnings: sentences about the checkpoint.
    """

    version: str | None
    bytes_read: int
    warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Entry:
    """The place of one checkpoint in the cache.

    Attributes:
      path: the file, there or not.
      key: digest of everything that the weights are made of.
    """

    path: Path
    key: str


def weight_bytes(folder: Path) -> int:
    """Size of all safetensors files of a checkpoint."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def find_entry(cache: Path, folder: Path, cfg: ModelConfig, checkpoint_format: str | None) -> Entry:
    """Where the weights of a checkpoint are kept, and what they must have been made of.

    Args:
      cache: folder of the cache.
      folder: the checkpoint.
      cfg: its configuration, with the dtype and lm_head_bits of the load.
      checkpoint_format: as the user gave it.

    Returns:
      Entry. Only headers are read.

    Raises:
      OSError: a file cannot be read.
    """
    # Fields that no weight depends on.
    cfg = dataclasses.replace(cfg, implementation=None, eos_token_ids=(), bos_token_id=None, pad_token_id=None)
    digest = hashlib.blake2b(digest_size=16)

    def add(*values: Any) -> None:
        digest.update(repr(values).encode())

    # One layer shows whether this version lays out parameters as the one that has written them.
    one = dataclasses.replace(cfg, num_layers=1, moe_layers=cfg.moe_layers[:1], sliding_windows=cfg.sliding_windows[:1])
    add(VERSION, checkpoint_format, cfg, describe(abstract(one)))
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            status, length = os.fstat(file.fileno()), int.from_bytes(file.read(8), "little")
            add(path.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            digest.update(file.read(min(length, MAX_HEADER_BYTES)))
    if (folder / INDEX).exists():
        digest.update((folder / INDEX).read_bytes())
    what = (str(folder.resolve()), cfg.dtype, checkpoint_format, cfg.lm_head_bits)
    place = hashlib.blake2b(repr(what).encode(), digest_size=8)
    name = re.sub(r"[^\w.-]", "_", folder.resolve().name)[:64]
    return Entry(cache / f"{name}-{place.hexdigest()}.safetensors", digest.hexdigest())


def read_entry(
    entry: Entry, advance: Callable[[int], None] = lambda done: None
) -> tuple[Facts, Any, list[np.ndarray]] | None:
    """Map the weights of an entry, after checking every byte of them.

    Args:
      entry: from find_entry.
      advance: called with the bytes of each piece checked, from several threads.

    Returns:
      (facts, abstract tree, its leaves), or None where nothing is kept for this state of the checkpoint. The leaves
      are read-only views of the file.

    Raises:
      CheckpointError: the file is damaged or was written by something else.
    """
    try:
        with entry.path.open("rb") as file:
            metadata = _metadata(file)
            if metadata["key"] != entry.key:
                return None
            tree = abstract_from(json.loads(metadata["params"]))
            layout = _layout(tree, metadata)
            file.seek(0)
            if file.read(len(layout.header)) != layout.header or os.fstat(file.fileno()).st_size != layout.size:
                raise ValueError("its size or its header is not what belongs to its description")
            mapped = _map(file.fileno(), layout.size)
        _check(mapped, layout, advance)
        facts = json.loads(metadata["facts"])
        return Facts(**{**facts, "warnings": tuple(facts["warnings"])}), tree, _views(mapped, layout, tree)
    except FileNotFoundError:
        return None
    except OSError as problem:
        raise CheckpointError(f"{entry.path} cannot be read ({problem.strerror})") from problem
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise CheckpointError(f"{entry.path} is damaged or not a file of weights ({problem})") from problem


def _metadata(file: Any) -> dict[str, str]:
    """The description in the header, once its checksum is right."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(size - 16, MAX_HEADER_BYTES):
        raise ValueError("it is cut short")
    text = file.read(length)
    file.seek(size - 8)
    if _checksum(length.to_bytes(8, "little") + text) != int.from_bytes(file.read(8), "little"):
        raise ValueError("its header does not match its checksum")
    return json.loads(text)["__metadata__"]


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where everything lies: offsets are bytes from the start of the file; pieces are (leaf, layer): (start, end)."""

    header: bytes
    offsets: tuple[int, ...]
    pieces: dict[tuple[int, int | None], tuple[int, int]]
    checksums: int
    size: int


def _layout(tree: Any, metadata: dict[str, str]) -> _Layout:
    entries: dict[str, Any] = {"__metadata__": metadata}
    pieces: dict[tuple[int, int | None], tuple[int, int]] = {}
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
    return _Layout(
        header,
        tuple(base + offset for offset in offsets),
        {piece: (base + start, base + stop) for piece, (start, stop) in pieces.items()},
        base + checksums,
        base + end,
    )


def _name(path: Any) -> str:
    """A leaf's name in the file, such as "layers.0.attn.qkv.qweight"."""
    return ".".join(re.findall(r"\w+", jax.tree_util.keystr(path)))


def _checksum(data: Any) -> int:
    hasher = xxhash.xxh3_64()
    hasher.update(data)  # in contrast to the function of one call, this lets other threads run in all versions
    return hasher.intdigest()


def _map(descriptor: int, size: int) -> np.ndarray:
    """The bytes of a file as a read-only array."""
    mapped = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without large pages for files
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapped, np.uint8)


def _views(mapped: np.ndarray, layout: _Layout, tree: Any) -> list[np.ndarray]:
    return [
        mapped[start : start + int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize]
        .view(np.dtype(leaf.dtype))
        .reshape(leaf.shape)
        for start, leaf in zip(layout.offsets, jax.tree.leaves(tree), strict=True)
    ]


def _check(mapped: np.ndarray, layout: _Layout, advance: Callable[[int], None]) -> None:
    def checksum(piece: tuple[int, int]) -> int:
        start, end = piece
        found = _checksum(mapped[start:end])
        advance(end - start)
        return found

    stored = mapped[layout.checksums : layout.size - 8].view(np.uint64).tolist()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(checksum, layout.pieces.values()))
    if found != stored:
        raise ValueError("its weights do not match their checksums")


class Writer:
    """Stacks in a file of the cache, a Target of `stacks.fill`; made by `writing`."""

    def __init__(self, file: int, layout: _Layout, tree: Any) -> None:
        self._file, self._layout, self._tree = file, layout, tree
        self._leaves = jax.tree.leaves(tree)
        self._checksums: dict[tuple[int, int | None], int] = {}

    def open(self, leaf: int, layer: int | None) -> np.ndarray:
        """Memory of its own, for one layer only."""
        shape = self._leaves[leaf].shape
        return np.empty(shape if layer is None else shape[1:], np.dtype(self._leaves[leaf].dtype))

    def close(self, leaf: int, layer: int | None, filled: np.ndarray) -> None:
        """Write to the file; system calls make large pages in the page cache where a writable map would not."""
        data = filled.reshape(-1).view(np.uint8).data
        _write(self._file, data, self._layout.pieces[leaf, layer][0])
        self._checksums[leaf, layer] = _checksum(data)

    def finish(self) -> list[np.ndarray]:
        """The leaves of the tree as read-only views of the complete file."""
        layout = self._layout
        checksums = [*(self._checksums[piece] for piece in layout.pieces), _checksum(layout.header)]
        _write(self._file, np.array(checksums, np.uint64).view(np.uint8).data, layout.checksums)
        _write(self._file, memoryview(layout.header), 0)
        return _views(_map(self._file, layout.size), layout, self._tree)


@contextmanager
def writing(entry: Entry, tree: Any, facts: Facts) -> Iterator[Writer]:
    """Write an entry; it appears when the block ends without an error, and replaces what was there.

    Args:
      entry: from find_entry.
      tree: the abstract tree.
      facts: to go with it.

    Returns:
      A context manager that gives a Writer.

    Raises:
      OSError: the folder cannot be written, or the disk has no room; words say which.
    """
    metadata = {
        "format": _FORMAT,
        "key": entry.key,
        "params": json.dumps(describe(tree)),
        "facts": json.dumps(dataclasses.asdict(facts)),
    }
    layout = _layout(tree, metadata)
    folder = entry.path.parent
    entry.path.unlink(missing_ok=True)  # of another state of the checkpoint, or damaged
    _remove_orphans(folder)
    free = shutil.disk_usage(folder).free
    if free < layout.size + SPARE_DISK:
        raise OSError(
            errno.ENOSPC,
            f"{layout.size / 2**30:.1f} GiB are needed and {SPARE_DISK / 2**30:.0f} GiB to spare, "
            f"{free / 2**30:.1f} GiB are free",
        )
    file, name = tempfile.mkstemp(_TEMPORARY, dir=folder)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)  # as long as this process lives
        yield Writer(file, layout, tree)
        os.replace(name, entry.path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
    finally:
        os.close(file)


def _remove_orphans(folder: Path) -> None:
    """Delete what killed writers left behind: files that nobody holds a lock on."""
    for path in folder.glob(f"*{_TEMPORARY}"):
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _write(file: int, data: memoryview, offset: int) -> None:
    while data:  # one call writes at most 2 GiB
        done = os.pwrite(file, data, offset)
        data, offset = data[done:], offset + done
