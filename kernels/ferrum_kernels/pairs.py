"""What experts give for each pair of a token and an expert, before a token's pairs are added up.

Adding them up is a kernel of its own, and one more launch; the norm that comes next reads them as well.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Pairs:
    """A token's pairs, to be added up; `whole` does that.

    Attributes:
      values: any float [T * K, D], a row for each pair; nobody's rows may hold anything.
      live: int32 [T, K], the expert of each pair; outside [0, E) nobody's.
      weights: float32 [T, K], by which rows are still to be multiplied; None: they are.
      num_experts: E (static).
    """

    values: Any
    live: Any
    weights: Any
    num_experts: int

    def whole(self) -> jax.Array:
        """float32 [T, D], each token's pairs added up, nobody's as zero.

        >>> Pairs(jnp.ones((2, 3)), jnp.array([[0, 4]]), jnp.array([[0.5, 1.0]]), 4).whole().tolist()
        [[0.5, 0.5, 0.5]]
        """
        y = self.values.reshape(*self.live.shape, -1)
        real = (self.live >= 0) & (self.live < self.num_experts)

        def pair(k: int) -> jax.Array:
            one = y[:, k].astype(jnp.float32)
            one = one if self.weights is None else one * self.weights[:, k, None].astype(jnp.float32)
            return jnp.where(real[:, k, None], one, 0.0)

        # Not as a reduction, for which XLA reads one number at a time.
        return functools.reduce(jnp.add, map(pair, range(self.live.shape[1])))


jax.tree_util.register_dataclass(Pairs, data_fields=["values", "live", "weights"], meta_fields=["num_experts"])
