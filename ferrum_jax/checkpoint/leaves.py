"""The leaves of one layer, read from a checkpoint straight into the arrays that hold them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

from ferrum_jax.checkpoint.dialect import Dialect
from ferrum_jax.checkpoint.files import CheckpointFiles, TensorReader
from ferrum_jax.errors import CheckpointError, ShapeError
from ferrum_jax.kernels import GptqTensors, MixedStack, PackedLinear, from_gptq
from ferrum_jax.progress import Progress
from ferrum_jax.sources import Experts, Joined, Linear, Vector
from ferrum_kernels.bits import pack, unpack
from ferrum_kernels.rounding import round_to_nearest

PIECE = 2**23  # bytes that one thread fills at a time
_AS_STORED = {"I32": np.uint32, "F16": np.float16}  # stored dtype -> what has the same bits


@dataclasses.dataclass(frozen=True)
class LeafReader:
    """Fills arrays from tensors that read_dialect has accepted; several threads may fill at once.

    Attributes:
      reader: of the files.
      files: the tensor table.
      dialect: the findings.
      progress: advanced by the bytes of each tensor.
    """

    reader: TensorReader
    files: CheckpointFiles
    dialect: Dialect
    progress: Progress

    def fill(self, source: Any, out: Any) -> None:
        """Read one leaf.

        Args:
          source: Vector, Joined, Linear or Experts.
          out: the leaf, an array, PackedLinear or MixedStack, with writable numpy arrays and no layer axis.

        Raises:
          CheckpointError: a file changed or cannot be read, or a module contradicts what read_dialect found.
        """
        if isinstance(source, Vector):
            self._vector(source.name, out, (0, out.shape[0]))
        elif isinstance(source, Joined):
            start = 0
            for part in source.parts:
                self._vector(part.name, out[start : start + part.shape[0]], (0, part.shape[0]))
                start += part.shape[0]
        elif isinstance(source, Linear):
            self._linear(source, out)
        else:
            assert isinstance(source, Experts)
            everyone = range(len(source.experts))
            stacks = zip(out.parts, out.experts, strict=True) if isinstance(out, MixedStack) else [(out, everyone)]
            for part, ids in stacks:
                for i, e in enumerate(ids):
                    self._linear(source.experts[e], part[i])

    def _experts(self, source: Experts, out: Any, ids: range) -> None:
        for e in ids:
            self._linear(source.experts[e], out[e])

    def jobs(self, source: Any, out: Any) -> list[Callable[[], None]]:
        """The work of `fill` in pieces that several threads can do at once.

        Args:
          source: as for fill.
          out: as for fill.

        Returns:
          Functions; the leaf is filled when all have been called. They raise what fill raises.
        """
        if isinstance(source, Vector):
            return [partial(self._vector, source.name, out, rows) for rows in _pieces(out.shape[0], out)]
        if isinstance(source, Experts):
            if isinstance(out, MixedStack):
                return [partial(self.fill, source, out)]
            pieces = _pieces(len(source.experts), out)
            return [partial(self._experts, source, out, range(start, stop)) for start, stop in pieces]
        if isinstance(source, Joined):
            return [partial(self.fill, source, out)]
        if not isinstance(out, PackedLinear):
            return [
                partial(self._dense, f"{module}.weight", out[:, columns], rows)
                for module, columns in _columns(source)
                for rows in _pieces(columns.stop - columns.start, out[:, columns])
            ]
        if source.round_to is not None:
            name = f"{source.modules[0]}.weight"
            return [partial(self._rounded, name, out, rows) for rows in _pieces(sum(source.n), out)]
        return [partial(self.fill, source, out)]

    def forget(self, sources: Any) -> None:
        """Let the system drop the tensors of a layer from its file cache.

        Args:
          sources: a tree of Vector, Joined, Linear and Experts.
        """
        self.reader.forget(self.dialect.names[name] for name in _names(sources) if name in self.dialect.names)

    def _linear(self, source: Linear, out: Any) -> None:
        if not isinstance(out, PackedLinear):
            for module, columns in _columns(source):
                self._dense(f"{module}.weight", out[:, columns], (0, columns.stop - columns.start))
        elif source.round_to is not None:
            self._rounded(f"{source.modules[0]}.weight", out, (0, sum(source.n)))
        elif out.qzeros is None and out.perm is None:
            for module, columns in _columns(source):
                self._words(f"{module}.qweight", out.qweight[:, columns])
                self._words(f"{module}.scales", out.scales[:, columns])
        else:
            one = self._decoded(source, out)
            for target, value in zip(jax.tree.leaves(out), jax.tree.leaves(one), strict=True):
                target[...] = value

    def _vector(self, name: str, out: np.ndarray, rows: tuple[int, int]) -> None:
        for at, block in self._blocks(name, rows):
            out[at] = block

    def _dense(self, name: str, out: np.ndarray, rows: tuple[int, int]) -> None:
        """Some rows of a weight that is stored [N, K] and held [K, N]."""
        for at, block in self._blocks(name, rows):
            out[:, at] = block.astype(out.dtype, copy=False).T

    def _rounded(self, name: str, out: PackedLinear, rows: tuple[int, int]) -> None:
        """A weight that is stored [N, K] and held packed; some of its N at a time, as rounding takes float32."""
        try:
            for at, block in self._blocks(name, rows):
                part = round_to_nearest(block.T, out.bits, out.group_size)
                out.qweight[:, at], out.scales[:, at] = part.qweight, part.scales
        except ShapeError as error:
            raise CheckpointError(f"{name}: {error}") from error

    def _blocks(self, name: str, rows: tuple[int, int]) -> Iterator[tuple[slice, np.ndarray]]:
        for at, block in self.reader.blocks(self.dialect.names[name], rows=rows):
            self.progress.advance(block.nbytes)
            yield at, block

    def _words(self, name: str, out: np.ndarray) -> None:
        """Words or scales as they are, to some columns of a wider matrix."""
        stored = self._stored(name)
        if out.flags.c_contiguous and _AS_STORED.get(self.files.tensors[stored].dtype) == out.dtype:
            self.reader.into(stored, out)
            return
        for rows, block in self.reader.blocks(stored):
            out[rows] = block

    def _decoded(self, source: Linear, out: PackedLinear) -> PackedLinear:
        """Modules side by side, with zero points or an order of their inputs."""
        parts = [self._packed(module, out) for module in source.modules]
        if len(parts) == 1:
            return parts[0]
        qzeros = None
        if out.qzeros is not None:
            zeros = [unpack(part.qzeros, part.bits, part.n_per_expert, axis=-1) for part in parts]
            qzeros = pack(np.concatenate(zeros, axis=-1), out.bits, axis=-1)
        return dataclasses.replace(
            parts[0],
            qweight=np.concatenate([part.qweight for part in parts], axis=-1),
            scales=np.concatenate([part.scales for part in parts], axis=-1),
            qzeros=qzeros,
            shape=out.shape,
        )

    def _packed(self, module: str, out: PackedLinear) -> PackedLinear:
        names = {field: f"{module}.{field}" for field in ("qweight", "qzeros", "scales", "g_idx")}
        g_idx = self._read(names["g_idx"]) if names["g_idx"] in self.dialect.names else None
        scales = self._read(names["scales"]).astype(np.float16, copy=False)
        tensors = GptqTensors(self._read(names["qweight"]), self._read(names["qzeros"]), scales, g_idx)
        try:
            return from_gptq(
                tensors,
                out.bits,
                out.group_size,
                self.dialect.version or "gptq",
                k=out.k,
                sym=out.qzeros is None,
                act_order=out.perm is not None,
            )
        except ShapeError as error:
            raise CheckpointError(f"{module}: {error}") from error

    def _read(self, name: str) -> np.ndarray:
        return self.reader[self._stored(name)]

    def _stored(self, name: str) -> str:
        stored = self.dialect.names[name]
        self.progress.advance(self.files.tensors[stored].nbytes)
        return stored


def _pieces(count: int, out: Any) -> list[tuple[int, int]]:
    """The rows of a leaf, or its experts, in pieces of about PIECE bytes."""
    nbytes = sum(array.nbytes for array in jax.tree.leaves(out))
    step = max(1, count * PIECE // max(nbytes, 1))
    return [(start, min(start + step, count)) for start in range(0, count, step)]


def _columns(source: Linear) -> Iterator[tuple[str, slice]]:
    """The modules of a linear with the output columns that each of them fills."""
    start = 0
    for module, n in zip(source.modules, source.n, strict=True):
        yield module, slice(start, start + n)
        start += n


def _names(sources: Any) -> Iterator[str]:
    """All tensors of some sources, whether the checkpoint has them or not."""
    if isinstance(sources, dict):
        for child in sources.values():
            yield from _names(child)
    elif isinstance(sources, Experts):
        for expert in sources.experts:
            yield from _names(expert)
    elif isinstance(sources, Joined):
        yield from (part.name for part in sources.parts)
    elif isinstance(sources, Linear):
        yield from (f"{module}.{field}" for module in sources.modules for field in ("weight", "qweight", "scales"))
    else:
        yield sources.name
