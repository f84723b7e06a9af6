"""Parameters on a device with memory of its own: filled on the host part by part, placed into stacks that exist once.

A unit is one leaf of one layer, such as the gate and up words of all experts of layer 7. Several threads fill a unit
together, then send it in chunks; a chunk is laid out on the device and written into its stack, which is donated. The
next units are filled meanwhile, as many as IN_FLIGHT bytes allow.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, Protocol

import jax
import numpy as np

from ferrum_jax.kernels import MixedStack, PackedLinear
from ferrum_jax.params import fold_permutations, num_bytes
from ferrum_jax.plan import Plan
from ferrum_kernels.tiles import COLUMNS

CHUNK = 2**25  # bytes of one transfer; several at once fill the bus, one alone does not
IN_FLIGHT = 2**29  # bytes of units on the host; a larger unit goes alone
ON_DEVICE = 2**28  # bytes of chunks on the device beside the stacks, and no more than a layer of them
COPIES = 2  # of a chunk: as it was sent, and laid out
UNITS = 4  # at a time, at most
THREADS = 16  # that fill and send, at most

Job = Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Unit:
    """One leaf of one layer, or a leaf outside the layers.

    Attributes:
      node: its number among the leaves that a checkpoint fills at once.
      layer: its place in the stack, None outside the layers.
      leaf: abstract array, PackedLinear or MixedStack without the layer axis.
      arrays: the numbers of its arrays among `jax.tree.leaves` of the parameters, in the leaf's structure.
      source: what fills it in a checkpoint, None where that is not known.
    """

    node: int
    layer: int | None
    leaf: Any
    arrays: Any
    source: Any = None

    @property
    def nbytes(self) -> int:
        """Size on the host."""
        return num_bytes(self.leaf)


class Feed(Protocol):
    """Where the bytes come from. Jobs are run by several threads, in any order."""

    def fill(self, unit: Unit, host: Any) -> list[Job]:
        """Jobs that fill the arrays of a unit together."""
        ...

    def check(self, unit: Unit, host: Any) -> list[Job]:
        """Jobs on the filled arrays, beside their transfer; what they raise ends the load."""
        ...


def _is_leaf(node: Any) -> bool:
    return isinstance(node, PackedLinear | MixedStack)


def units_of(tree: Any, plan: Plan | None = None) -> list[Unit]:
    """Cut an abstract tree of parameters, in the order in which checkpoints hold it.

    Args:
      tree: as `Plan.tree`.
      plan: gives the sources of the units.

    Returns:
      Units; leaves outside the layers first.
    """
    numbers = jax.tree.unflatten(jax.tree.structure(tree), range(len(jax.tree.leaves(tree))))
    numbered = jax.tree.leaves(numbers, is_leaf=_is_leaf)
    top: list[Unit] = []
    stacked: list[tuple[int, Unit]] = []
    for node, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_leaf)):
        keys: list[Any] = [getattr(key, "key", getattr(key, "idx", None)) for key in path]
        if keys[0] != "layers":
            source = None if plan is None else plan.top_sources[keys[0]]
            top.append(Unit(node, None, leaf, numbered[node], source))
            continue
        run, names = keys[1], keys[2:]
        one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), leaf)
        start = sum(other["input_norm"].shape[0] for other in tree["layers"][:run])
        for layer in range(jax.tree.leaves(leaf)[0].shape[0]):
            source = None if plan is None else _at(plan.runs[run].sources[layer], names)
            stacked.append((start + layer, Unit(node, layer, one, numbered[node], source)))
    return top + [unit for _, unit in sorted(stacked, key=lambda pair: pair[0])]


def _at(tree: Any, keys: list[Any]) -> Any:
    return functools.reduce(lambda node, key: node[key], keys, tree)


def working_bytes(tree: Any, units: Iterable[Unit]) -> int:
    """Device memory that chunks take beside the parameters, as sent and laid out.

    Args:
      tree: as `Plan.tree`.
      units: cut from it.

    Returns:
      The bytes of a layer, at most ON_DEVICE; but what the largest chunk takes.
    """
    layers = sum(jax.tree.leaves(run)[0].shape[0] for run in tree["layers"])
    one = num_bytes(tree["layers"]) // max(1, layers)
    largest = max((num_bytes(part) for unit in units for part, _ in _chunks(unit.leaf)), default=0)
    return max(min(ON_DEVICE, one), COPIES * largest)


def place_all(tree: Any, units: list[Unit], feed: Feed, layout: Callable[[Any], Any]) -> Any:
    """Build the parameters on the default device.

    Args:
      tree: abstract, what the units are cut from.
      units: from units_of.
      feed: fills them.
      layout: how a leaf is laid out on the device, a traceable function that maps matrix by matrix.

    Returns:
      The parameters, laid out and their permutations folded; each stack is allocated once. The host holds IN_FLIGHT
      bytes of units, or the one that is larger.

    Raises:
      Whatever feed raises first; what has not begun by then is left undone.
    """
    nodes, structure = jax.tree.flatten(tree, is_leaf=_is_leaf)
    laid = [jax.eval_shape(layout, node) for node in nodes]
    stacks = _Stacks(laid, layout, _Room(working_bytes(tree, units)))
    room, buffers = _Room(IN_FLIGHT), _Buffers()
    with ThreadPoolExecutor(_threads()) as workers, ThreadPoolExecutor(UNITS) as outer:

        def one(unit: Unit) -> None:
            with room.of(unit.nbytes):
                host = jax.tree.map(buffers.take, unit.leaf)
                _all(workers, feed.fill(unit, host))
                parts = [functools.partial(stacks.put, unit, part, start) for part, start in _chunks(host)]
                _all(workers, [*parts, *feed.check(unit, host)])
                if unit.layer is not None:
                    jax.tree.map(buffers.give, host)

        work = [outer.submit(one, unit) for unit in units]
        try:
            for future in wait(work, return_when=FIRST_EXCEPTION).done:
                future.result()
        except BaseException:
            outer.shutdown(wait=False, cancel_futures=True)
            room.close()
            stacks.drop()  # the error keeps this frame alive, and what is loaded instead needs the memory
            raise
    return fold_permutations(jax.tree.unflatten(structure, stacks.finished()))


def _threads() -> int:
    return min(THREADS, 2 * (os.cpu_count() or 1))


def _all(workers: ThreadPoolExecutor, jobs: list[Job]) -> None:
    """Run jobs; the first error is raised after all have ended, as they share memory."""
    futures: list[Future[None]] = [workers.submit(job) for job in jobs]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise errors[0]


class _Stacks:
    """The laid out stacks while they are filled; one writer at a time for each."""

    def __init__(self, abstract: list[Any], layout: Callable[[Any], Any], room: _Room) -> None:
        self._layout, self._room = layout, room
        self._stacks = _zeros(abstract)
        self._locks = [threading.Lock() for _ in abstract]

    def put(self, unit: Unit, part: Any, start: int) -> None:
        """Send a chunk and write it to its place; returns when its memory on the host may be used again."""
        layer = np.int32(0 if unit.layer is None else unit.layer)
        with self._room.of(COPIES * num_bytes(part)):
            sent = jax.device_put(part)
            with self._locks[unit.node]:
                self._stacks[unit.node], done = _place(
                    self._stacks[unit.node], sent, layer, np.int32(start), self._layout, unit.layer is not None
                )
            done.block_until_ready()
            del sent

    def drop(self) -> None:
        """Free the stacks; chunks that come later go nowhere."""
        for node, lock in enumerate(self._locks):
            with lock:
                self._stacks[node] = None

    def finished(self) -> list[Any]:
        return jax.block_until_ready(self._stacks)


def _zeros(abstract: list[Any]) -> list[Any]:
    """All stacks by one program, which compiles faster than one for each."""
    leaves, structure = jax.tree.flatten(abstract)
    made = jax.jit(lambda: [jax.numpy.zeros(leaf.shape, leaf.dtype) for leaf in leaves])()
    return jax.tree.unflatten(structure, made)


@functools.partial(jax.jit, static_argnums=(4, 5), donate_argnums=0)
def _place(
    stack: Any, part: Any, layer: jax.Array, start: jax.Array, layout: Callable[[Any], Any], layered: bool
) -> tuple[Any, jax.Array]:
    """(the stack with a part laid out and written into it, a number that is known once that is done)."""

    def write(stack: jax.Array, laid: jax.Array) -> jax.Array:
        laid = laid[None] if layered else laid
        at: list[Any] = [0] * stack.ndim
        if layered:
            at[0] = layer
        for axis in range(int(layered), stack.ndim):
            if stack.shape[axis] != laid.shape[axis]:
                at[axis] = start
        return jax.lax.dynamic_update_slice(stack, laid, at)

    leaves, structure = jax.tree.flatten(stack)
    parts = jax.tree.leaves(layout(part))
    return jax.tree.unflatten(structure, list(map(write, leaves, parts))), layer + 1


def _chunks(leaf: Any) -> Iterator[tuple[Any, int]]:
    """The parts of a leaf that are sent one by one, each with its start along the axis that is cut."""
    arrays = jax.tree.leaves(leaf)
    nbytes = num_bytes(arrays)
    if nbytes <= CHUNK or isinstance(leaf, MixedStack):
        yield leaf, 0
    elif not isinstance(leaf, PackedLinear):
        for start, stop in _cuts(leaf.shape[0], nbytes):
            yield _cut(leaf, start, stop, 0), start
    elif leaf.lead:
        for start, stop in _cuts(leaf.num_experts, nbytes):
            yield jax.tree.map(lambda a, start=start, stop=stop: _cut(a, start, stop, 0), leaf), start
    elif leaf.qzeros is None and leaf.perm is None and leaf.bias is None and leaf.n_per_expert % COLUMNS == 0:
        for start, stop in _cuts(leaf.n_per_expert, nbytes, COLUMNS):
            columns = jax.tree.map(lambda a, start=start, stop=stop: _cut(a, start, stop, a.ndim - 1), leaf)
            yield dataclasses.replace(columns, shape=(leaf.k, stop - start)), start
    else:
        yield leaf, 0


def _cuts(count: int, nbytes: int, multiple: int = 1) -> list[tuple[int, int]]:
    """(start, stop) of about CHUNK bytes, all alike where a divisor is near, since each size is a program."""
    blocks = count // multiple
    most = max(1, blocks * CHUNK // nbytes)
    step = next((size for size in range(most, most // 2, -1) if blocks % size == 0), most) * multiple
    return [(start, min(start + step, count)) for start in range(0, count, step)]


def _cut(array: Any, start: int, stop: int, axis: int) -> Any:
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((*array.shape[:axis], stop - start, *array.shape[axis + 1 :]), array.dtype)
    return array[(*(slice(None),) * axis, slice(start, stop))]


class _Room:
    """Bytes that may be in use at a time; one larger than all of it waits until it is alone."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used, self._closed = limit, 0, False
        self._changed = threading.Condition()

    @contextmanager
    def of(self, nbytes: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._used or self._used + nbytes <= self._limit)
            if self._closed:
                raise RuntimeError("the load has ended")
            self._used += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._used -= nbytes
                self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class _Buffers:
    """Host arrays that are used again: memory that has been touched is filled twice as fast as new memory."""

    def __init__(self) -> None:
        self._free: dict[Any, list[np.ndarray]] = {}
        self._lock = threading.Lock()

    def take(self, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        with self._lock:
            free = self._free.get((leaf.shape, np.dtype(leaf.dtype)))
            if free:
                return free.pop()
        return np.empty(leaf.shape, np.dtype(leaf.dtype))

    def give(self, array: np.ndarray) -> None:
        with self._lock:
            self._free.setdefault((array.shape, array.dtype), []).append(array)
