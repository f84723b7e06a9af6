"""The product kernel of the Triton backend: tiles of a packed expert times a block of activation rows.

One program takes BN outputs of one block's expert. The weights are the left operand of the matrix units, so that few
rows waste nothing: y.T [BN, rows] = W.T [BN, K] x.T [K, rows]. Codes become floats in registers by two bit operations
and one fused multiply-add for two of them; zero points are subtracted there, scales multiply a group's float32 sum.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_kernels.tiles import PLANE, TiledLinear
from ferrum_kernels.triton_call import call
from ferrum_kernels.triton_decode import group_of, multiply_block, span_of
from ferrum_kernels.triton_route import power

LEAST_ROWS = 8  # of a matrix instruction's right operand, as this backend builds it


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a product is cut up.

    Attributes:
      n: outputs of a program, a power of two from 16 that divides them.
      warps: of a program.
      stages: blocks of weights in flight.
      merge: multiply planes that share a scale at once, which suits the instructions of a group of four warps.
      step: blocks of weights that one turn of the loop takes; divides them.
    """

    n: int = 64
    warps: int = 4
    stages: int = 4
    merge: bool = False
    step: int = 1


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which rows a block of a product reads and writes.

    Attributes:
      block: rows of a block (static).
      experts: int32 [blocks], the expert of each; outside [0, E) nobody's. None: one matrix for all.
      starts, counts: int32 [blocks], each block's first place and how many it has; None: block * b and all of them.
      share: this product cuts each block of those tables into so many (static).
      order: int32 [places], the pair at each place; None: places are pairs.
      pairs_per_row: input rows are tokens of that many pairs; 0 where they are places (static).
      by_pair: write to the pair's row, else to the place's (static).
    """

    block: int
    experts: Any = None
    starts: Any = None
    counts: Any = None
    order: Any = None
    share: int = 1
    pairs_per_row: int = 0
    by_pair: bool = False


def product(
    x: jax.Array,
    w: TiledLinear,
    layer: jax.Array | None,
    rows: Rows,
    blocks: int,
    out_rows: int,
    tile: Tile,
    out_dtype: Any,
    *,
    gated: bool = False,
    weights: jax.Array | None = None,
    fill: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """Rows times their experts' weights.

    Args:
      x: [X, K'], padded to the weight's blocks.
      w: one matrix, a stack [E] or a stack [L, E] with `layer`.
      layer: int32 scalar or None.
      rows: which rows belong to which expert.
      blocks: how many blocks of rows there are, each of at most rows.block.
      out_rows: rows of the result.
      tile: how to cut.
      out_dtype: of the result.
      gated: the outputs are gate and up columns; write silu(gate) * up.
      weights: float32 [P], multiplied in by pair.
      fill: write zero rows for nobody's blocks.
      interpret: run without a GPU.

    Returns:
      [out_rows, N'] or [out_rows, N / 2]; rows that no block has are not written.
    """
    columns = w.n_per_expert // 2 if gated else w.words.shape[-2]
    layered = layer is not None
    index = jnp.reshape(jnp.asarray(0 if layer is None else layer, jnp.int32), (1,))
    named = {
        "layer": index if layered else None,
        "experts": rows.experts,
        "starts": rows.starts,
        "counts": rows.counts,
        "order": rows.order,
        "weights": weights,
        "x": x,
        "words": w.words,
        "scales": w.scales,
        "zeros": w.zeros,
    }
    given = {name: array for name, array in named.items() if array is not None}
    width = max(LEAST_ROWS, power(rows.block))
    statics = _Statics(
        rows=dataclasses.replace(rows, experts=None, starts=None, counts=None, order=None),
        width=width,
        tile=tile,
        bits=w.bits,
        group=w.group_size,
        groups=w.num_groups,
        blocks=w.num_blocks,
        num_experts=0 if rows.experts is None else w.num_experts,
        layered=layered,
        columns=columns,
        gated=gated,
        fill=fill,
        interpret=interpret,
    )
    return call(
        functools.partial(_kernel, statics, tuple(given)),
        list(given.values()),
        jax.ShapeDtypeStruct((out_rows, columns), out_dtype),
        (columns // tile.n, blocks),
        "gptq_gated" if gated else "gptq_product",
        warps=tile.warps,
        stages=tile.stages,
        interpret=interpret,
    )


@dataclasses.dataclass(frozen=True)
class _Statics:
    rows: Rows
    width: int
    tile: Tile
    bits: int
    group: int
    groups: int
    blocks: int
    num_experts: int
    layered: bool
    columns: int
    gated: bool
    fill: bool
    interpret: bool


def _kernel(s: _Statics, names: tuple[str, ...], *refs: Any) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    r = dict(zip(names, refs[:-1], strict=True))
    out = refs[-1]
    tile, rows = s.tile, s.rows
    first, block = pl.multiple_of(pl.program_id(0) * tile.n, tile.n), pl.program_id(1)
    lanes = jnp.arange(s.width, dtype=jnp.int32)
    whole, part = lax.div(block, rows.share), lax.rem(block, rows.share)
    expert = r["experts"][whole] if "experts" in r else None
    inside = part * rows.block
    if "counts" in r:
        start, count = r["starts"][whole] + inside, r["counts"][whole] - inside
    else:
        start = block * rows.block
        count = out.shape[-2] - start
    alive = lanes < lax.min(count, rows.block)
    places = jnp.where(alive, start + lanes, start)
    pairs = plgpu.load(r["order"].at[places], mask=alive, other=0) if "order" in r else places
    sources = places if rows.pairs_per_row == 0 else lax.div(pairs, rows.pairs_per_row)
    # The interpreter writes what a mask hides as well, so rows that are not there point past the end.
    targets = jnp.where(alive, pairs if rows.by_pair else places, out.shape[-2])
    cols = first + jnp.arange(tile.n, dtype=jnp.int32)
    seen = jnp.broadcast_to(alive[:, None], (s.width, tile.n))

    def write(values: jax.Array) -> None:
        at = (jnp.broadcast_to(targets[:, None], seen.shape), jnp.broadcast_to(cols[None, :], seen.shape))
        plgpu.store(out.at[at], values.astype(out.dtype), mask=seen)

    def compute() -> None:
        sums = _sums(s, r, expert, first, sources, alive)
        if s.gated:
            gate, up = sums
            y = gate * (1.0 / (1.0 + jnp.exp(-gate))) * up
        else:
            [y] = sums
        if "weights" in r:
            y = y * plgpu.load(r["weights"].at[pairs], mask=alive, other=0.0)[None, :]
        write(y.T)

    if expert is None:
        compute()
        return
    mine = (expert >= 0) & (expert < s.num_experts) & (count > 0)
    pl.when(mine)(compute)
    if s.fill:
        pl.when(~mine)(lambda: write(jnp.zeros(seen.shape, jnp.float32)))


def _sums(
    s: _Statics, r: dict[str, Any], expert: Any, first: Any, sources: jax.Array, alive: jax.Array
) -> list[jax.Array]:
    """float32 [BN, width] for the program's columns, twice where they are gate and up."""
    from jax.experimental import pallas as pl

    planes = 16 // s.bits
    run = planes * PLANE
    place = () if expert is None else (expert,)
    place = (r["layer"][0], *place) if s.layered else place
    starts = [first, s.columns + first] if s.gated else [first]
    # Planes that share a scale, and of them as many as one product takes.
    span = span_of(s.bits, s.group, s.groups)
    wide = span if s.tile.merge else 1

    def columns(ref: Any, group: Any, at: Any) -> jax.Array:
        return ref[(*place, group, pl.ds(at, s.tile.n))]

    def words(b: Any, at: Any) -> jax.Array:
        return r["words"][(*place, b, pl.ds(at, s.tile.n), slice(None))]

    def inputs(b: Any) -> list[jax.Array]:
        return [
            _activations(s, r["x"], b * run + j * PLANE, wide * PLANE, sources, alive) for j in range(0, planes, wide)
        ]

    def groups_of(b: Any) -> list[Any]:
        """The group of each run of planes in a block."""
        if s.groups == 1:
            return [0] * (planes // span)
        return [group_of(b, j, s.bits, s.group, s.groups) for j in range(0, planes, span)]

    def scales(b: Any, at: Any) -> list[jax.Array]:
        return [] if s.groups == 1 else [columns(r["scales"], group, at) for group in groups_of(b)]

    def zeros(b: Any, at: Any) -> list[jax.Array | None]:
        return [columns(r["zeros"], group, at) if "zeros" in r else None for group in groups_of(b)]

    turns = range(s.tile.step)

    def body(i: Any, carry: Any) -> Any:
        totals, now = carry
        b = i * s.tile.step
        loaded = [(inputs(b + u), [(words(b + u, at), zeros(b + u, at)) for at in starts]) for u in turns]
        # Scales come a turn ahead through registers: the compiler's own pipeline takes operands of products only.
        after = [[scales(lax.min(b + s.tile.step + u, s.blocks - 1), at) for at in starts] for u in turns]
        for (x, ones), scale in zip(loaded, now, strict=True):
            totals = [
                multiply_block(*one, sc, x, t, s.bits, s.interpret)
                for one, sc, t in zip(ones, scale, totals, strict=True)
            ]
        return totals, after

    totals = [jnp.zeros((s.tile.n, s.width), jnp.float32) for _ in starts]
    carry = totals, [[scales(u, at) for at in starts] for u in turns]
    totals, _ = lax.fori_loop(0, s.blocks // s.tile.step, body, carry)
    if s.groups == 1:
        totals = [
            t * columns(r["scales"], 0, at).astype(jnp.float32)[:, None] for t, at in zip(totals, starts, strict=True)
        ]
    return totals


def _activations(s: _Statics, x: Any, k: Any, size: int, sources: jax.Array, alive: jax.Array) -> jax.Array:
    """[width, size] in the dtype of the product, zero where no row is."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    seen = jnp.broadcast_to(alive[:, None], (s.width, size))

    index = (sources, pl.ds(k, size))
    if s.interpret:  # the interpreter takes no slice beside an array
        index = tuple(jnp.broadcast_arrays(sources[:, None], k + jnp.arange(size)[None, :]))
    return plgpu.load(x.at[index], mask=seen, other=0)
