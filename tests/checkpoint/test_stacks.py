"""Memory that JAX takes over without a copy: it is shared, it lives long enough, and nobody writes to it."""

from __future__ import annotations

import gc
import mmap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.checkpoint import load as loading
from ferrum_jax.checkpoint import stacks
from ferrum_jax.checkpoint.stacks import ALIGNMENT, Memory, aligned_empty, fill, to_jax
from ferrum_jax.errors import CheckpointError
from ferrum_jax.plan import make_plan
from tests.support.checkpoint_writer import TinySpec, write_checkpoint

SPEC = TinySpec(num_experts=4)


def address(array: jax.Array) -> int:
    return array.unsafe_buffer_pointer()


@pytest.mark.parametrize("dtype", ["uint32", "float16", "bfloat16", "float32", "int32"])
@pytest.mark.parametrize("shape", [(5,), (3, 7, 11), (128, 1024)])
def test_aligned_memory_becomes_an_array_without_a_copy(shape: tuple[int, ...], dtype: str) -> None:
    host = aligned_empty(shape, jnp.dtype(dtype))
    host[...] = 3
    assert (host.shape, host.dtype, host.ctypes.data % ALIGNMENT) == (shape, jnp.dtype(dtype), 0)
    array = jax.device_put(host)
    assert address(array) == host.ctypes.data
    np.testing.assert_array_equal(array, host)


def read_only_map(folder: Path) -> np.ndarray:
    (folder / "data").write_bytes(bytes(range(256)) * 64)
    with (folder / "data").open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint32).reshape(64, 64)


def test_a_donated_array_is_copied_before_it_is_written_to(tmp_path: Path) -> None:
    update = jax.jit(lambda x: x.at[0].set(jnp.uint32(7)) + jnp.uint32(1), donate_argnums=0)
    mapped = read_only_map(tmp_path)  # a write to it would end the process
    for host in (aligned_empty((64, 64), np.uint32), mapped):
        if host.flags.writeable:
            host[...] = mapped
        before = host.copy()
        donated = jax.device_put(host)
        assert address(donated) == host.ctypes.data
        new = update(donated)
        assert address(new) != host.ctypes.data and int(new[0, 0]) == 8
        np.testing.assert_array_equal(host, before)


def test_memory_lives_as_long_as_the_array(tmp_path: Path) -> None:
    expected = read_only_map(tmp_path).copy()
    host = aligned_empty((64, 64), np.uint32)
    host[...] = expected
    arrays = jax.device_put(host), jax.device_put(read_only_map(tmp_path))
    del host
    gc.collect()
    (tmp_path / "data").unlink()
    others = [aligned_empty((64, 64), np.uint32) for _ in range(50)]  # would take what had been freed
    for other in others:
        other[...] = 0
    for array in arrays:
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("weight_cache", [False, True])
def test_loaded_parameters_are_the_memory_that_was_filled(
    weight_cache: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FERRUM_JAX_WEIGHT_CACHE", str(tmp_path / "cache"))
    folder, filled = write_checkpoint(tmp_path / "tiny", SPEC), []

    def remember(tree: object, arrays: list[np.ndarray]) -> object:
        filled[:] = arrays
        return to_jax(tree, arrays)

    monkeypatch.setattr(loading, "to_jax", remember)
    for _ in range(2):  # the second is a warm start where there is a cache
        leaves = jax.tree.leaves(fj.load(folder, weight_cache=weight_cache, quiet=True).params)
        assert [address(leaf) for leaf in leaves] == [array.ctypes.data for array in filled]


def test_the_first_error_ends_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(fj.load("demo", quiet=True).cfg)
    monkeypatch.setattr(stacks, "THREADS", 1)
    seen: list[object] = []

    def read(source: object, out: object) -> None:
        seen.append(source)
        if len(seen) == 4:
            raise CheckpointError("damaged")
        time.sleep(0.02)

    with pytest.raises(CheckpointError, match="damaged"):
        fill(plan, read, Memory(jax.tree.leaves(plan.tree)))
    assert len(seen) < 20  # of 68


def test_every_layer_is_reported_once_it_is_read() -> None:
    plan = make_plan(fj.load("demo", quiet=True).cfg)
    done: list[object] = []
    fill(plan, lambda source, out: None, Memory(jax.tree.leaves(plan.tree)), done.append)
    assert done == [plan.top_sources, *(sources for run in plan.runs for sources in run.sources)]
