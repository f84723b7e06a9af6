"""What is known of an attention kernel of the Triton backend when it is compiled: its sizes, and how work is cut up."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from ferrum_kernels.code_words import WORD

LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Cut:
    """How attention is cut up.

    Attributes:
      tile: positions of the cache that one turn of the loop takes; a power of two from 16.
      warps: of a program.
      stages: tiles in flight.
      queries: tokens of a program.
      programs: among which all rows are shared, for each key head, at most; 0: each row has its own.
      least: units that a program takes of a row at least, where a row is cut; a tile is one.
      fresh: units that a row costs beside its tiles: to begin with it, and its new token.
      whole: tiles of a row that is not cut.
      parts: of one row at most, and one more for every 2 * parts units.
    """

    tile: int = 64
    warps: int = 4
    stages: int = 3
    queries: int = 1
    programs: int = 0
    least: int = 1
    fresh: int = 1
    whole: int = 0
    parts: int = 16

    def most_parts(self, units: Any) -> Any:
        """Of a row of so many units: one program adds them up, which bounds how many are worth their while."""
        return self.parts + units // (2 * self.parts)


@dataclasses.dataclass(frozen=True)
class Statics:
    """Everything of a kernel that is known when it is compiled.

    Attributes:
      heads, kv_heads, head_dim: H, Kv, h.
      columns: where queries, keys and values begin in their arrays.
      eps: of the head norms.
      page: positions of a page; rows of the cache without a table.
      capacity: positions that a row can hold.
      cut: how the work is cut up.
      dtype: of the products: that of the activations, and float16 for int8, which becomes that in two instructions.
      codes: the cache is int8 with scales.
      interpret: run without a GPU.
      origin: of lanes, zero; a number that only the turn of a loop knows keeps what is made of lanes out of the
        registers of all turns.
    """

    heads: int
    kv_heads: int
    head_dim: int
    columns: tuple[int, int, int]
    eps: float
    page: int
    capacity: int
    cut: Cut
    dtype: Any
    codes: bool
    interpret: bool
    origin: Any = 0

    def lanes(self, count: int) -> jax.Array:
        """int32 0, 1, ..., which differ from one thread to the next."""
        return jnp.arange(count, dtype=jnp.int32) + self.origin

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.heads // self.kv_heads

    @property
    def padded_group(self) -> int:
        """The same as a power of two."""
        return 1 << (self.group - 1).bit_length()

    @property
    def block(self) -> int:
        """Positions that every tile takes whole: a tile, where rows or pages hold whole tiles."""
        return math.gcd(self.page, self.cut.tile)

    @property
    def strips(self) -> int:
        """Strips of neighbouring channels that a head of the cache is read in: codes lie in words of one from each."""
        return WORD if self.codes else 1

    @property
    def strip(self) -> int:
        """Channels of a strip, and what the cache holds of a head: numbers, or words of codes."""
        return self.head_dim // self.strips

    @property
    def woven(self) -> bool:
        """Whether strips are woven into one tile: large products lose more by being cut than weaving costs."""
        return self.codes and self.cut.queries > 1

    @property
    def unit(self) -> float:
        """What makes a score a power of two."""
        return LOG2_E / math.sqrt(self.head_dim)

    @property
    def turned(self) -> bool:
        """Whether scores are [positions, queries]: few queries fill a matrix instruction's right operand, of 8.

        The left one, of 16, they leave half empty. Turned values are products of strips, too small for four warps.
        """
        return self.codes and self.cut.queries == 1 and self.cut.warps <= 2

    @property
    def places(self) -> int:
        """Positions of a tile whose scores lie in different threads: a matrix instruction has 8, turned 16, a warp."""
        return min(self.cut.tile, (16 if self.turned else 8) * self.cut.warps)

    @property
    def width(self) -> int:
        """Queries of a tile: of a matrix instruction's left operand at least 16, of its right one 8."""
        return max(8 if self.turned else 16, self.padded_group * self.cut.queries)
