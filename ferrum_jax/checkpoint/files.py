"""A checkpoint folder as one table of tensors: single file or shards, headers only, every contradiction refused."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import ml_dtypes
import numpy as np

from ferrum_jax.checkpoint.content import refetch, unreadable
from ferrum_jax.checkpoint.headers import TensorInfo as TensorInfo
from ferrum_jax.checkpoint.headers import read_header
from ferrum_jax.checkpoint.json_files import read_json as read_json
from ferrum_jax.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_NAMES = {"BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8"}
_NAMES |= {"I64": "<i8", "F16": "<f2", "BF16": ml_dtypes.bfloat16, "F32": "<f4", "F64": "<f8", "C64": "<c8"}
DTYPES = {name: np.dtype(dtype) for name, dtype in _NAMES.items()}  # safetensors name -> numpy dtype
_OTHER_FORMATS = {
    ".gguf": "GGUF files are not supported",
    ".bin": "PyTorch .bin files are not read (a pickle can run code)",
    ".pt": "PyTorch .pt files are not read (a pickle can run code)",
    ".pth": "PyTorch .pth files are not read (a pickle can run code)",
    ".ckpt": "PyTorch .ckpt files are not read (a pickle can run code)",
}


@dataclass(frozen=True, eq=False)
class CheckpointFiles:
    """The tensors of a checkpoint folder, known from the headers alone.

    Args:
        folder: the checkpoint folder.
        tensors: tensor name to TensorInfo, over all shards.
        stamps: size and time of change of every file when its header was read.
        warnings: sentences about oddities that do not prevent loading, for example a file outside the index.
    """

    folder: Path
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    stamps: Mapping[Path, tuple[int, int]] = field(repr=False)
    warnings: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(info.nbytes for info in self.tensors.values())

    @contextmanager
    def reader(self, scattered: bool = False) -> Iterator[TensorReader]:
        """Open the files for reading tensors; leaving the block lets every file go.

        Args:
            scattered: only small tensors here and there will be read, so the system must not read on beyond them.

        Returns:
            A context manager that gives a TensorReader.

        >>> from ferrum_jax.checkpoint.hub import DEMO_FOLDER
        >>> files = open_checkpoint(DEMO_FOLDER)
        >>> with files.reader() as read:
        ...     read["model.norm.weight"].shape
        (256,)
        """
        reader = TensorReader(self, scattered)
        try:
            yield reader
        finally:
            reader.close()


class TensorReader:
    """Reads tensors by name into memory of the caller; several threads may read at once.

    Files are read, not mapped: pages of a map would count as memory of the process while it is open.
    """

    def __init__(self, files: CheckpointFiles, scattered: bool = False) -> None:
        """Prepare to read; nothing is opened yet. The arguments are those of CheckpointFiles.reader."""
        self._files, self._scattered = files, scattered
        self._handles: dict[Path, BinaryIO] = {}
        self._opening = threading.Lock()
        self._buffers = threading.local()

    def __getitem__(self, name: str) -> np.ndarray:
        """Read one tensor.

        Args:
            name: a key of `CheckpointFiles.tensors`.

        Returns:
            A copy in host memory; bfloat16 is `ml_dtypes.bfloat16`.

        Raises:
            CheckpointError: there is no such tensor, its elements are floats of 8 bits or fewer, or the file changed
                since its header was read.
        """
        info, dtype = self._find(name)
        out = np.empty(info.shape, dtype)
        self._fill(info, 0, out)
        return out

    def into(self, name: str, out: np.ndarray) -> None:
        """Read one tensor to where it belongs.

        Args:
            name: as above.
            out: contiguous, with the shape of the tensor and elements of the size of the stored ones.

        Raises:
            CheckpointError: as above.
        """
        info, _ = self._find(name)
        self._fill(info, 0, out)

    def blocks(
        self, name: str, limit: int = 2**20, rows: tuple[int, int] | None = None
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Read one tensor piece by piece.

        Args:
            name: as above.
            limit: bytes per block, as far as one row allows.
            rows: first row and the one after the last; None means all.

        Returns:
            Iterator of (rows, block): rows of the leading axis. A block is valid until the next one is taken by the
            same thread.

        Raises:
            CheckpointError: as above.
        """
        info, dtype = self._find(name)
        first, end = (0, info.shape[0]) if rows is None else rows
        row = info.nbytes // max(info.shape[0], 1)
        step = max(1, limit // max(row, 1))
        size = min(step, max(end - first, 0)) * row
        if len(getattr(self._buffers, "block", b"")) < size:
            self._buffers.block = np.empty(size, np.uint8)
        for start in range(first, end, step):
            count = min(step, end - start)
            block = self._buffers.block[: count * row].view(dtype).reshape(count, *info.shape[1:])
            self._fill(info, start * row, block)
            yield slice(start, start + count), block

    def prefetch(self, names: Iterable[str]) -> None:
        """Ask the system to read tensors in the background, many at a time.

        Args:
            names: tensors that will be read soon.
        """
        for info in map(self._files.tensors.__getitem__, names):
            _advise(self._open(info.file), info.offset, info.nbytes, "POSIX_FADV_WILLNEED")

    def forget(self, names: Iterable[str]) -> None:
        """Let the system drop tensors from its file cache, so that what is needed longer stays there.

        Args:
            names: tensors that lie side by side; what lies between them is dropped too.
        """
        spans: dict[Path, list[TensorInfo]] = {}
        for info in map(self._files.tensors.__getitem__, names):
            spans.setdefault(info.file, []).append(info)
        for path, infos in spans.items():
            start = min(info.offset for info in infos)
            length = max(info.offset + info.nbytes for info in infos) - start
            _advise(self._open(path), start, length, "POSIX_FADV_DONTNEED")

    def close(self) -> None:
        """Close all files."""
        for handle in self._handles.values():
            handle.close()
        self._handles.clear()

    def _find(self, name: str) -> tuple[TensorInfo, np.dtype]:
        info = self._files.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{self._files.folder} holds no tensor {name!r} (it holds {len(self._files.tensors)} others). "
                "Check that config.json belongs to these weights."
            )
        if info.dtype not in DTYPES:
            raise CheckpointError(
                f"{info.file} stores {name!r} as {info.dtype}, a type that is not supported. "
                "Use a GPTQ checkpoint with 32-bit packed words and F16, BF16 or F32 scales."
            )
        return info, DTYPES[info.dtype]

    def _fill(self, info: TensorInfo, start: int, out: np.ndarray) -> None:
        """Fill a contiguous array with the bytes of a tensor from `start` on."""
        if out.nbytes == 0:
            return
        target = out.reshape(-1).view(np.uint8).data
        try:
            file, done = self._open(info.file), 0
            while done < len(target):  # one call reads at most 2 GiB
                count = os.preadv(file.fileno(), [target[done:]], info.offset + start + done)
                if count == 0:
                    raise CheckpointError(f"{info.file} was cut short while it was read. {refetch(info.file)}")
                done += count
        except OSError as error:
            raise unreadable(info.file, error) from error

    def _open(self, path: Path) -> BinaryIO:
        with self._opening:
            if path not in self._handles:
                if _stamp(path) != self._files.stamps[path]:
                    raise CheckpointError(f"{path} changed after its header was read. Load the checkpoint again.")
                file = self._handles[path] = path.open("rb")
                if self._scattered:
                    _advise(file, 0, 0, "POSIX_FADV_RANDOM")
            return self._handles[path]


def _advise(file: BinaryIO, offset: int, length: int, advice: str) -> None:
    if hasattr(os, "posix_fadvise"):  # macOS has none
        os.posix_fadvise(file.fileno(), offset, length, getattr(os, advice))


def open_checkpoint(folder: str | Path) -> CheckpointFiles:
    """Read the headers of a checkpoint folder and check that they agree.

    Args:
        folder: holds `model.safetensors`, or shards named by `model.safetensors.index.json`. A single .safetensors
            file of another name is taken too.

    Returns:
        The table of tensors. No weight is read.

    Raises:
        CheckpointError: the folder or a shard is missing, a file is damaged or of another format, the index and the
            shards disagree, or a path leaves the folder.

    >>> from ferrum_jax.checkpoint.hub import DEMO_FOLDER
    >>> files = open_checkpoint(DEMO_FOLDER)
    >>> files.tensors["model.norm.weight"].shape
    (256,)
    """
    folder = check_folder(folder)
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise unreadable(folder, error) from error
    present = [path for path in entries if path.suffix == ".safetensors"]
    index_path = folder / INDEX
    if index_path.exists():
        weight_map = _read_index(index_path)
        shards = sorted(folder / name for name in set(weight_map.values()))
    else:
        weight_map, shards = None, [_single(folder, present, entries)]
    _check_present(folder, shards, weight_map)
    stamps = {path: _stamp(path) for path in shards}
    tensors = _merge(shards)
    warnings = []
    if extra := [path.name for path in present if path not in shards]:
        warnings.append(f"{folder} also holds {_some(extra)}, outside its weights; not read. Remove what is stale.")
    if weight_map is not None:
        _check_index(index_path, weight_map, tensors)
        if unlisted := [name for name in tensors if name not in weight_map]:
            warnings.append(f"{index_path} does not list {_some(unlisted)}, found in its shards; read anyway.")
    return CheckpointFiles(folder, MappingProxyType(tensors), MappingProxyType(stamps), tuple(warnings))


def check_folder(path: str | Path) -> Path:
    """Return the path of an existing checkpoint folder.

    Args:
        path: what the user gave.

    Returns:
        The same as a Path.

    Raises:
        CheckpointError: it does not exist, or is a file; a file is named by its format.
    """
    path = Path(path)
    if path.is_dir():
        return path
    if not path.exists():
        raise CheckpointError(f"There is no folder {path}. Check the path, or give a Hugging Face id (OWNER/NAME).")
    known = _OTHER_FORMATS.get(path.suffix.lower())
    detail = f" ({known})" if known else ""
    raise CheckpointError(
        f"{path} is a file{detail}; a checkpoint is a folder with config.json and .safetensors files. "
        "Give the folder of a GPTQ checkpoint."
    )


def _single(folder: Path, present: list[Path], entries: list[Path]) -> Path:
    if len(present) == 1 or folder / SINGLE in present:
        return folder / SINGLE if folder / SINGLE in present else present[0]
    if present:
        raise CheckpointError(
            f"{folder} holds {_some([path.name for path in present])} but no {INDEX} that says which tensor is "
            f"where. {refetch(folder / INDEX)}"
        )
    found = [path.name for path in entries]
    reasons = sorted(
        {_OTHER_FORMATS[end] for end in (Path(name).suffix.lower() for name in found) if end in _OTHER_FORMATS}
    )
    raise CheckpointError(
        f"{folder} holds no .safetensors file; it holds {_some(found) if found else 'nothing'}. "
        + "".join(f"{reason}. " for reason in reasons)
        + f"A checkpoint needs {SINGLE}, or shards with {INDEX}."
    )


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path, "the map from tensors to shards").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map (tensor name to file name). {refetch(path)}")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name.isprintable() or "/" in name or "\\" in name:
            raise CheckpointError(
                f"{path} places tensor {tensor!r} in {name!r}; only plain file names inside the folder are accepted. "
                "Do not trust this index: take the checkpoint from its publisher."
            )
        if not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{path} places tensor {tensor!r} in {name!r}; only .safetensors files are read. "
                "Convert the weights to safetensors, or take a GPTQ checkpoint that has them."
            )
    return weight_map


def _check_present(folder: Path, shards: list[Path], weight_map: Mapping[str, str] | None) -> None:
    if missing := [path for path in shards if not path.is_file()]:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of its {len(shards)} weight files: "
            f"{_some([path.name for path in missing])}. {refetch(missing[0])}"
        )
    if weight_map is not None and (folder / SINGLE).exists() and folder / SINGLE not in shards:
        raise CheckpointError(
            f"{folder} holds both {SINGLE} and an index of other shards, two sets of weights. Remove the stale one."
        )
    root = folder.resolve()
    # A Hugging Face snapshot links into the blobs of its repository, or into the store shared by the whole cache.
    cached = root.parent.name == "snapshots" and root.parents[1].name.startswith("models--")
    homes = (root, root.parents[1] / "blobs", root.parents[2] / "blobs") if cached else (root,)
    for path in shards:
        real = path.resolve()
        if not any(real.is_relative_to(home) for home in homes):
            raise CheckpointError(
                f"{path} links to {real}, outside the checkpoint folder. Copy the file into the folder, "
                "or give the folder that really holds it."
            )


def _merge(shards: Iterable[Path]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for path in shards:
        header = read_header(path)
        if twice := tensors.keys() & header.keys():
            name = min(twice)
            raise CheckpointError(
                f"Tensor {name!r} is in both {tensors[name].file.name} and {path.name} ({len(twice)} such tensors) of "
                f"{path.parent}. Remove the stale shard, or download the checkpoint again."
            )
        tensors |= header
    if not tensors:
        raise CheckpointError(f"{', '.join(map(str, shards))} holds no tensors. Download the checkpoint again.")
    return tensors


def _check_index(path: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    if absent := [name for name in weight_map if name not in tensors]:
        raise CheckpointError(
            f"{path} lists {_some(absent)}, which no shard holds (the first should be in {weight_map[absent[0]]}). "
            f"{refetch(path.with_name(weight_map[absent[0]]))}"
        )
    if moved := [name for name, file in weight_map.items() if tensors[name].file.name != file]:
        name = moved[0]
        raise CheckpointError(
            f"{path} places tensor {name!r} in {weight_map[name]}, but it is in {tensors[name].file.name} "
            f"({len(moved)} such tensors). Index and shards are from different checkpoints: download both again."
        )


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    return status.st_size, status.st_mtime_ns


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
