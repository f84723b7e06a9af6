"""Assembled weights on disk: written while a checkpoint is loaded, mapped into memory by the next start.

One file per checkpoint, dtype and lm_head_bits, in a folder of the user; weight_file says what is in it. A file that
is not exactly what this version would write for the same checkpoint is never used.

On the CPU the page cache holds the only copy of the weights: the load writes them to the file and then maps it, as the
next start does, so processes share them and the system may drop and read them again. Other devices get them in large
transfers: laying out for the GPU kernels takes the device less time than the transfer, so the file holds the order of
the checkpoint, depends on no layout and serves both.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from ferrum_jax.checkpoint.device import Job, Unit
from ferrum_jax.checkpoint.files import INDEX
from ferrum_jax.checkpoint.headers import MAX_HEADER_BYTES
from ferrum_jax.checkpoint.weight_file import (
    Layout,
    Piece,
    check,
    checksum,
    layout_of,
    map_bytes,
    metadata_of,
    read,
    views,
    write,
)
from ferrum_jax.config import ModelConfig
from ferrum_jax.errors import CheckpointError
from ferrum_jax.params import abstract
from ferrum_jax.tree_text import abstract_from, describe

VERSION = 1  # a change of what words mean needs a new one; other shapes are noticed without
BLOCK = 2**24  # bytes that one thread reads at a time
LEAST = 2**28  # bytes of weights from which a checkpoint is worth keeping
SPARE_DISK = 2 * 2**30  # bytes that stay free
_FORMAT = "ferrum_jax weights"
_TEMPORARY = ".incomplete"


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
    found = _open(entry)
    if found is None:
        return None
    file, facts, tree, layout = found
    with file, _naming(entry):
        mapped = map_bytes(file.fileno(), layout.size)
        check(mapped, layout, advance)
        return facts, tree, views(mapped, layout, tree)


@contextmanager
def reading(entry: Entry, advance: Callable[[int], None] = lambda done: None) -> Iterator[Reader | None]:
    """Read the weights of an entry piece by piece, for a device with memory of its own.

    Args:
      entry: from find_entry.
      advance: called with the bytes of each piece read, from several threads.

    Returns:
      A context manager that gives a Reader, or None where nothing is kept for this state of the checkpoint.

    Raises:
      CheckpointError: the file is damaged or was written by something else; also from within the block.
    """
    found = _open(entry)
    if found is None:
        yield None
        return
    with found[0]:
        yield Reader(entry, *found, advance)


def _open(entry: Entry) -> tuple[BinaryIO, Facts, Any, Layout] | None:
    """(open file, facts, tree, layout) once header and size are right; None where there is no such entry."""
    with _naming(entry):
        if not entry.path.exists():
            return None
        file = entry.path.open("rb")
        try:
            metadata = metadata_of(file)
            if metadata["key"] != entry.key:
                file.close()
                return None
            tree = abstract_from(json.loads(metadata["params"]))
            layout = layout_of(tree, metadata)
            file.seek(0)
            if file.read(len(layout.header)) != layout.header or os.fstat(file.fileno()).st_size != layout.size:
                raise ValueError("its size or its header is not what belongs to its description")
            facts = json.loads(metadata["facts"])
            return file, Facts(**{**facts, "warnings": tuple(facts["warnings"])}), tree, layout
        except BaseException:
            file.close()
            raise


@contextmanager
def _naming(entry: Entry) -> Iterator[None]:
    """Say which file it was that could not be read, or is no such file."""
    try:
        yield
    except OSError as problem:
        raise CheckpointError(f"{entry.path} cannot be read ({problem.strerror})") from problem
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise CheckpointError(f"{entry.path} is damaged or not a file of weights ({problem})") from problem


class Reader:
    """The weights of an entry as a `device.Feed`; every byte is checked while it is sent. Made by `reading`.

    Attributes:
      facts: what the load that wrote them found out.
      tree: abstract.
    """

    def __init__(
        self, entry: Entry, file: BinaryIO, facts: Facts, tree: Any, layout: Layout, advance: Callable[[int], None]
    ) -> None:
        self.facts, self.tree = facts, tree
        self._entry, self._file, self._layout, self._advance = entry, file.fileno(), layout, advance
        stored = np.empty(len(layout.pieces), np.uint64)
        with _naming(entry):
            read(self._file, stored.view(np.uint8).data, layout.checksums)
        self._checksums = dict(zip(layout.pieces, stored.tolist(), strict=True))

    def fill(self, unit: Unit, host: Any) -> list[Job]:
        """Reads of some megabytes each."""
        jobs: list[Job] = []
        for number, array in zip(jax.tree.leaves(unit.arrays), jax.tree.leaves(host), strict=True):
            start, _ = self._layout.pieces[number, unit.layer]
            data = array.reshape(-1).view(np.uint8).data
            for at in range(0, len(data), BLOCK):
                jobs.append(partial(self._read, data[at : at + BLOCK], start + at))
        return jobs

    def check(self, unit: Unit, host: Any) -> list[Job]:
        """One checksum for each array."""
        pairs = zip(jax.tree.leaves(unit.arrays), jax.tree.leaves(host), strict=True)
        return [partial(self._check, (number, unit.layer), array) for number, array in pairs]

    def _read(self, out: memoryview, offset: int) -> None:
        with _naming(self._entry):
            read(self._file, out, offset)
        self._advance(len(out))

    def _check(self, piece: Piece, array: np.ndarray) -> None:
        with _naming(self._entry):
            if checksum(array.reshape(-1).view(np.uint8).data) != self._checksums[piece]:
                raise ValueError("its weights do not match their checksums")


class Writer:
    """Stacks in a file of the cache, a Target of `stacks.fill`; made by `writing`."""

    def __init__(self, file: int, layout: Layout, tree: Any) -> None:
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
        write(self._file, data, self._layout.pieces[leaf, layer][0])
        self._checksums[leaf, layer] = checksum(data)

    def finish(self) -> list[np.ndarray]:
        """The leaves of the tree as read-only views of the complete file."""
        layout = self._layout
        checksums = [*(self._checksums[piece] for piece in layout.pieces), checksum(layout.header)]
        write(self._file, np.array(checksums, np.uint64).view(np.uint8).data, layout.checksums)
        write(self._file, memoryview(layout.header), 0)
        return views(map_bytes(self._file, layout.size), layout, self._tree)


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
    layout = layout_of(tree, metadata)
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
    file, name = _locked_file(folder)
    try:
        yield Writer(file, layout, tree)
        os.replace(name, entry.path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
    finally:
        os.close(file)


def _locked_file(folder: Path) -> tuple[int, str]:
    """(descriptor, name) of a new file that is locked as long as this process lives."""
    while True:
        file, name = tempfile.mkstemp(_TEMPORARY, dir=folder)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.path.exists(name):
                return file, name
            os.close(file)  # before it was locked another process took it for an orphan
        except BaseException:
            os.close(file)
            with suppress(OSError):
                os.unlink(name)
            raise


def _remove_orphans(folder: Path) -> None:
    """Delete what killed writers left behind: files that nobody holds a lock on."""
    for path in folder.glob(f"*{_TEMPORARY}"):
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
