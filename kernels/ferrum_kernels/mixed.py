"""MixedStack: experts of one layer that are not all packed the same way."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class MixedStack:
    """Expert stacks of different formats that make up one logical stack of E experts.

    GPTQModel's `dynamic` rules can leave some experts of a layer unquantised, or pack them with other bits.

    Attributes:
      parts: stacks of one format each, PackedLinear or plain arrays [..., E_i, K, N].
      experts: for each part, the expert ids it holds, in its order (static); together they are 0 .. E - 1.
    """

    parts: tuple[Any, ...]
    experts: tuple[tuple[int, ...], ...]

    @property
    def num_experts(self) -> int:
        """E."""
        return sum(len(ids) for ids in self.experts)

    def local_index(self, part: int) -> np.ndarray:
        """int32 [E + 1]: where each expert lies in a part, -1 for experts of other parts and for E (nobody)."""
        table = np.full(self.num_experts + 1, -1, np.int32)
        table[list(self.experts[part])] = np.arange(len(self.experts[part]))
        return table

    def __getitem__(self, index: Any) -> MixedStack:
        return jax.tree.map(lambda leaf: leaf[index], self)


jax.tree_util.register_dataclass(MixedStack, data_fields=["parts"], meta_fields=["experts"])
