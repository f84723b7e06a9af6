"""Whole stacks in host memory, filled in place by several threads, and handed to JAX without a copy.

JAX on the CPU computes on numpy memory as it is where that is aligned, so the arrays that are filled here are the
parameters. It never writes to them: a donated argument that it does not own is copied first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax
import numpy as np

from ferrum_jax.plan import Plan

ALIGNMENT = 64  # bytes; what JAX asks of memory that it takes over
THREADS = 8  # at most; more only wait for the same memory and disk


class Target(Protocol):
    """Where stacks come to lie; leaves go by their number in `jax.tree.leaves` of the plan's tree."""

    def open(self, leaf: int, layer: int | None) -> np.ndarray:
        """Memory for one layer of a leaf, or for all of a leaf without layers."""
        ...

    def close(self, leaf: int, layer: int | None, filled: np.ndarray) -> None:
        """Take what open has given, now filled."""
        ...


class Memory:
    """Stacks in memory of the process.

    Args:
      leaves: abstract leaves.
    """

    def __init__(self, leaves: list[jax.ShapeDtypeStruct]) -> None:
        self.arrays = [aligned_empty(leaf.shape, leaf.dtype) for leaf in leaves]

    def open(self, leaf: int, layer: int | None) -> np.ndarray:
        """A view of the stack."""
        return self.arrays[leaf] if layer is None else self.arrays[leaf][layer]

    def close(self, leaf: int, layer: int | None, filled: np.ndarray) -> None:
        """Nothing: it is in its place."""


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that JAX takes over without a copy.

    Args:
      shape: of the array.
      dtype: of the array.

    Returns:
      Uninitialised memory. numpy asks the system for large pages where the array is large.

    >>> aligned_empty((3, 5), np.float16).ctypes.data % ALIGNMENT
    0
    """
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape)) * dtype.itemsize
    room = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + nbytes].view(dtype).reshape(shape)


def shares_memory() -> bool:
    """Whether the default device computes on numpy memory as it is."""
    probe = aligned_empty((1024,), np.uint32)
    array = jax.device_put(probe)
    return next(iter(array.devices())).platform == "cpu" and array.unsafe_buffer_pointer() == probe.ctypes.data


def fill(
    plan: Plan, read: Callable[[Any, Any], None], target: Target, done: Callable[[Any], None] = lambda sources: None
) -> None:
    """Fill all stacks of a plan.

    Args:
      plan: what to fill.
      read: (source, leaf) fills one leaf of one layer in place; called from several threads.
      target: gives the memory.
      done: called with the sources of each layer, and with those outside the layers, when all of them have been read.

    Raises:
      Whatever read or target raise first; what has not begun by then is left undone.
    """
    tree = plan.tree
    numbers = jax.tree.unflatten(jax.tree.structure(tree), range(len(jax.tree.leaves(tree))))
    groups: list[tuple[Any, Any, int | None]] = [(plan.top_sources, {name: numbers[name] for name in plan.top}, None)]
    for run, stacks in zip(plan.runs, numbers["layers"], strict=True):
        groups += [(sources, stacks, layer) for layer, sources in enumerate(run.sources)]

    def job(source: Any, leaf: Any, layer: int | None) -> None:
        out = jax.tree.map(lambda number: target.open(number, layer), leaf)
        read(source, out)
        jax.tree.map(lambda number, filled: target.close(number, layer, filled), leaf, out)

    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        work = [
            (sources, [pool.submit(job, source, leaf, layer) for source, leaf in _pairs(sources, stacks)])
            for sources, stacks, layer in groups
        ]
        try:
            for sources, futures in work:
                for future in futures:
                    future.result()
                done(sources)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _pairs(source: Any, leaf: Any) -> Iterator[tuple[Any, Any]]:
    """Each source of a layer with its leaf."""
    if isinstance(source, dict):
        for key, child in source.items():
            yield from _pairs(child, leaf[key])
    else:
        yield source, leaf


def to_jax(tree: Any, arrays: list[np.ndarray]) -> Any:
    """Arrays as parameters on the default device; large ones are not copied where `shares_memory`.

    Args:
      tree: the abstract tree.
      arrays: its leaves, in order; nobody may write to them from now on.

    Returns:
      The parameters.
    """
    return jax.tree.unflatten(jax.tree.structure(tree), [jax.device_put(array) for array in arrays])
