"""Edits that damage the tensors of a checkpoint before it is written, one kind of damage each.

Every function returns an edit for `write_checkpoint(folder, spec, edits=[...])`. `module` names one quantised linear,
such as `model.layers.0.self_attn.q_proj`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike

from tests.support.checkpoint_writer import MINUS_ONE, Edit, Tensors


def drop(name: str) -> Edit:
    """Leave one tensor out."""

    def edit(tensors: Tensors) -> None:
        del tensors[name]

    return edit


def rename(old: str, new: str) -> Edit:
    """Store one tensor under another name."""

    def edit(tensors: Tensors) -> None:
        tensors[new] = tensors.pop(old)

    return edit


def add(name: str, tensor: np.ndarray) -> Edit:
    """Add a tensor, or replace the one of that name."""

    def edit(tensors: Tensors) -> None:
        tensors[name] = tensor

    return edit


def cast(name: str, dtype: DTypeLike) -> Edit:
    """Store one tensor in another dtype."""

    def edit(tensors: Tensors) -> None:
        tensors[name] = tensors[name].astype(dtype)

    return edit


def cut(name: str, axis: int = 0) -> Edit:
    """Leave out the last slice of one tensor along `axis`."""

    def edit(tensors: Tensors) -> None:
        tensors[name] = np.ascontiguousarray(np.delete(tensors[name], -1, axis))

    return edit


def set_value(name: str, index: tuple[int, ...] | int, value: float) -> Edit:
    """Change one element: a NaN, infinite, zero or negative scale, or a group number that does not exist."""

    def edit(tensors: Tensors) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name][index] = value

    return edit


def unbalance_groups(module: str) -> Edit:
    """Move one row of g_idx from the last group to the first, so groups are no longer of one size."""

    def edit(tensors: Tensors) -> None:
        g_idx = tensors[f"{module}.g_idx"].copy()
        g_idx[np.flatnonzero(g_idx == g_idx.max())[0]] = 0
        tensors[f"{module}.g_idx"] = g_idx

    return edit


def shift_zeros(bits: int, modules: int | None = None) -> Edit:
    """Rewrite v1 zero words as v2 (2, 4 or 8 bits): of every module, or only of the first `modules` by name.

    All modules makes a v2 checkpoint that still calls itself v1; some of them makes one that contradicts itself.
    """

    def edit(tensors: Tensors) -> None:
        names = sorted(name for name in tensors if name.endswith(".qzeros"))
        for name in names[:modules]:
            tensors[name] = (tensors[name].view(np.uint32) + np.uint32(MINUS_ONE[bits])).view(np.int32)

    return edit
