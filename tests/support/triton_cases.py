"""Expert layers in plain numpy, and CUDA lowering without a GPU, for the tests of the Triton kernels."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

# Pallas announces at each use that its Triton backend will go away.
ignore_deprecation = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def expert_layer(
    x: np.ndarray,
    ids: np.ndarray,
    weights: np.ndarray,
    gate_up: np.ndarray,
    down: np.ndarray,
    between: Any = np.float64,
) -> np.ndarray:
    """float64 [T, D]: every pair on its own; ids outside the experts are skipped.

    What lies between the two products is rounded to a dtype. Where weights have a mean that is not zero, sums cancel,
    and that rounding weighs more than any bound for it would allow.
    """
    out = np.zeros(x.shape)
    features = down.shape[1]
    for t, k in np.ndindex(*ids.shape):
        if 0 <= (e := ids[t, k]) < len(down):
            y = x[t].astype(np.float64) @ gate_up[e]
            hidden = (silu(y[:features]) * y[features:]).astype(between).astype(np.float64)
            out[t] += weights[t, k] * hidden @ down[e]
    return out


def check_places(places: Any, live: np.ndarray, experts: int, sizes: tuple[int, ...]) -> None:
    """Hold what `triton_place.place` gives against a stable sort, cut into blocks of which the largest come first."""
    order, *tables, zeros = map(np.asarray, places)
    flat = live.reshape(-1)
    real = int((flat < experts).sum())
    np.testing.assert_array_equal(order[:real], np.argsort(flat, kind="stable")[:real])
    blocks, at = [], 0
    for expert, rows in enumerate(np.bincount(flat, minlength=experts + 1)[:experts]):
        blocks += [(expert, at + start, min(rows - start, sizes[-1])) for start in range(0, rows, sizes[-1])]
        at += rows
    classes = [min(size for size in sizes if rows <= size) for _, _, rows in blocks]
    expected = [blocks[i] for i in np.argsort(-np.array(classes), kind="stable")]
    expected += [(experts, len(expected), 0)] * (len(tables[0]) - len(expected))
    assert zeros.shape == tables[0].shape and not zeros.any()
    np.testing.assert_array_equal(np.stack(tables, 1), np.array(expected).reshape(-1, 3))


def relative(actual: Any, expected: np.ndarray) -> float:
    """||actual - expected|| / ||expected||; NaN anywhere gives NaN, which no bound passes."""
    return float(np.linalg.norm(np.asarray(actual, np.float64) - expected) / max(np.linalg.norm(expected), 1e-30))


def lower_for_cuda(function: Callable[..., Any], *args: Any) -> str:
    """The StableHLO of a function for an NVIDIA GPU, made without one."""
    with contextlib.ExitStack() as stack:
        if hasattr(jax.sharding, "AbstractDevice"):
            device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
            mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
            with contextlib.suppress(AttributeError):
                stack.enter_context(jax.sharding.use_abstract_mesh(mesh))
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@functools.cache
def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
