"""Expert layers of few tokens on the Triton backend: two kernels, and no two programs share a sum.

With few tokens a layer is over before a long sum is: each program's inputs are cut into segments, and the segments of
one output lie in different rows of the matrix units' left operand, so that different warps add them up. The right
operand has one column per segment; of the product only the entries of a segment with itself are kept. In the down
kernel a token's experts are segments too, so the sum over them needs no kernel of its own. The gate and up kernel
finds its expert itself, and each of its warps on its own.
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
from ferrum_kernels.triton_matmul import LEAST_ROWS
from ferrum_kernels.triton_route import find_best, load_logits, power

MOST_LANES = 128  # experts that each program chooses from by itself


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a product of few rows is cut up.

    Attributes:
      n: outputs of a program, a power of two from 16 that divides them.
      splits: segments of an expert's inputs, a power of two that divides the weight's blocks.
      warps: of a program.
      stages: blocks of weights in flight.
      step: blocks that one turn of the loop takes; divides a segment's.
      merge: multiply planes that share a scale at once.
    """

    n: int = 16
    splits: int = 4
    warps: int = 4
    stages: int = 3
    step: int = 1
    merge: bool = False


@dataclasses.dataclass(frozen=True)
class _Statics:
    cut: Cut
    members: int  # experts that a program adds up, a power of two
    top_k: int
    per_row: int  # pairs that share a row of the input
    bits: int
    group: int
    groups: int
    blocks: int
    num_experts: int
    layered: bool
    columns: int
    norm: bool
    interpret: bool

    @property
    def segments(self) -> int:
        return self.members * self.cut.splits


def _statics(w: TiledLinear, cut: Cut, layer: Any, **more: Any) -> _Statics:
    return _Statics(
        cut=cut,
        bits=w.bits,
        group=w.group_size,
        groups=w.num_groups,
        blocks=w.num_blocks,
        num_experts=w.num_experts,
        layered=layer is not None,
        **more,
    )


def _arrays(w: TiledLinear, layer: Any) -> dict[str, Any]:
    index = None if layer is None else jnp.reshape(jnp.asarray(layer, jnp.int32), (1,))
    return {"layer": index, "words": w.words, "scales": w.scales, "zeros": w.zeros}


def gated(
    x: jax.Array,
    w: TiledLinear,
    layer: Any,
    cut: Cut,
    top_k: int,
    *,
    live: Any = None,
    logits: Any = None,
    mask: jax.Array | None = None,
    norm: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """silu(gate) * up of each pair, and the routing too where logits are given in place of `live`.

    Args:
      x: [T, K'] or, where experts have their own order of inputs, [T * top_k, K'].
      w: [E, D, 2 F], or [L, E, D, 2 F] with `layer`; F a multiple of 16 and 2 F of 64.
      layer: int32 scalar or None.
      cut: how to cut, of F columns.
      top_k: pairs of a token.
      live: int32 [T, top_k]; outside [0, E) nobody's.
      logits: float [T, E], or parts [parts, T, E] to be added up; at most MOST_LANES experts.
      mask: bool [T], False for tokens that go nowhere; None: none.
      norm: rescale a token's weights to sum to one.
      interpret: run without a GPU.

    Returns:
      (h [P, F],), nobody's rows not written; with logits also experts, weights and live as `triton_route.route`.
    """
    routes = logits is not None
    tokens = logits.shape[-2] if routes else live.shape[0]
    pairs = tokens * top_k
    s = _statics(
        w,
        cut,
        layer,
        members=1,
        top_k=top_k,
        per_row=pairs // x.shape[0],
        columns=w.n_per_expert // 2,
        norm=norm,
        interpret=interpret,
    )
    named = {
        "live": None if live is None else live.reshape(-1),
        "logits": logits,
        "mask": None if mask is None else mask.astype(jnp.int32),
        "x": x,
        **_arrays(w, layer),
    }
    given = {name: array for name, array in named.items() if array is not None}
    ids = jax.ShapeDtypeStruct((pairs,), jnp.int32)
    shapes = [jax.ShapeDtypeStruct((pairs, s.columns), x.dtype)]
    shapes += [ids, jax.ShapeDtypeStruct((pairs,), jnp.float32), ids] if routes else []
    out = call(
        functools.partial(_gated_kernel, s, tuple(given)),
        list(given.values()),
        shapes,
        (pairs, s.columns // cut.n),
        "gptq_gated_few",
        warps=cut.warps,
        stages=cut.stages,
        interpret=interpret,
    )
    return (out[0], *(part.reshape(tokens, top_k) for part in out[1:]))


def _gated_kernel(s: _Statics, names: tuple[str, ...], *refs: Any) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    r = dict(zip(names, refs, strict=False))
    out, *routing = refs[len(names) :]
    layer = _layer(s, r)
    pair, tile = pl.program_id(0), pl.program_id(1)
    first = pl.multiple_of(tile * s.cut.n, s.cut.n)
    if routing:
        token = lax.div(pair, s.top_k)
        seen = r["mask"][token] != 0 if "mask" in r else True
        expert, weight = _choose(s, r["logits"], token, lax.rem(pair, s.top_k))
        taken = jnp.where(seen, expert, s.num_experts)

        def note() -> None:
            chosen, weights, live = routing
            chosen[pair], weights[pair], live[pair] = expert, weight, taken

        pl.when(tile == 0)(note)
        expert = taken
    else:
        expert = r["live"][pair]

    def compute() -> None:
        rows = s.segments * s.cut.n
        experts = jnp.broadcast_to(expert, (rows,))
        gate, up = _sums(s, r, layer, experts, None, first, [0, s.columns], lambda _: lax.div(pair, s.per_row))
        gate, up = (_added(s, total, None) for total in (gate, up))
        y = gate * (1.0 / (1.0 + jnp.exp(-gate))) * up
        plgpu.store(out.at[pair, pl.ds(first, s.cut.n)], y.astype(out.dtype))

    pl.when((expert >= 0) & (expert < s.num_experts))(compute)


def _choose(s: _Statics, logits: Any, token: Any, slot: Any) -> tuple[Any, Any]:
    """The expert of rank `slot` and its weight, as `triton_route.route` chooses them."""
    # Each warp has all of the token's experts in a row of its own, so that none waits for another.
    first = jnp.arange(s.cut.warps, dtype=jnp.int32) == 0
    lane = jnp.arange(max(16, power(s.num_experts)), dtype=jnp.int32)
    lane = jnp.broadcast_to(lane[None, :], (s.cut.warps, lane.shape[0]))
    real = lane < s.num_experts
    x = load_logits(logits, jnp.full(lane.shape, token, jnp.int32), lane, real)
    expert, weight = _ranked(jnp.where(real, x, -jnp.inf), slot, s.num_experts, s.top_k, s.norm)
    return jnp.sum(jnp.where(first, expert, 0)), jnp.sum(jnp.where(first, weight, 0.0))


@functools.partial(jax.jit, static_argnums=(2, 3, 4))  # so that it is traced once, not for each number of tokens
def _ranked(x: jax.Array, slot: jax.Array, experts: int, top_k: int, norm: bool) -> tuple[jax.Array, jax.Array]:
    """Of each row the expert of rank `slot`, and its weight."""
    best, kept, _ = find_best(x, experts, top_k)
    expert, weight = best[0], kept[0]
    for k in range(1, top_k):
        here = slot == k
        expert, weight = jnp.where(here, best[k], expert), jnp.where(here, kept[k], weight)
    return expert, weight / functools.reduce(jnp.add, kept) if norm else weight


def down(
    h: jax.Array,
    live: jax.Array,
    weights: jax.Array,
    w: TiledLinear,
    layer: Any,
    cut: Cut,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Each token's experts on its rows, weighted and added up in float32.

    Args:
      h: [P, F'], a row per pair; nobody's rows may hold anything.
      live: int32 [T, top_k]; outside [0, E) nobody's.
      weights: float32 [T, top_k].
      w: [E, F, D], or [L, E, F, D] with `layer`.
      layer: int32 scalar or None.
      cut: how to cut, of the columns of a tiled expert.
      interpret: run without a GPU.

    Returns:
      [T, D'] in h.dtype, zero where a token has no expert.
    """
    tokens, top_k = live.shape
    s = _statics(
        w,
        cut,
        layer,
        members=power(top_k),
        top_k=top_k,
        per_row=1,
        columns=w.words.shape[-2],
        norm=False,
        interpret=interpret,
    )
    named = {"live": live.reshape(-1), "weights": weights.reshape(-1), "x": h, **_arrays(w, layer)}
    given = {name: array for name, array in named.items() if array is not None}
    return call(
        functools.partial(_down_kernel, s, tuple(given)),
        list(given.values()),
        jax.ShapeDtypeStruct((tokens, s.columns), h.dtype),
        (tokens, s.columns // cut.n),
        "gptq_down_few",
        warps=cut.warps,
        stages=cut.stages,
        interpret=interpret,
    )


def _down_kernel(s: _Statics, names: tuple[str, ...], *refs: Any) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    r, out = dict(zip(names, refs[:-1], strict=True)), refs[-1]
    layer = _layer(s, r)
    token = pl.program_id(0)
    first = pl.multiple_of(pl.program_id(1) * s.cut.n, s.cut.n)

    def member(segment: jax.Array) -> tuple[jax.Array, jax.Array]:
        slot = lax.div(segment, s.cut.splits)
        return token * s.top_k + slot, slot < s.top_k

    def alive(segment: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        pair, real = member(segment)
        expert = plgpu.load(r["live"].at[pair], mask=real, other=-1)
        real = (expert >= 0) & (expert < s.num_experts)
        return pair, jnp.where(real, expert, 0), real

    segment = lax.div(jnp.arange(s.segments * s.cut.n, dtype=jnp.int32), s.cut.n)
    pair, valid = member(segment)
    weight = plgpu.load(r["weights"].at[pair], mask=valid, other=0.0)
    _, experts, real = alive(segment)
    [total] = _sums(s, r, layer, experts, real, first, [0], alive)
    y = _added(s, total, jnp.where(real, weight, 0.0))
    plgpu.store(out.at[token, pl.ds(first, s.cut.n)], y.astype(out.dtype))


def _layer(s: _Statics, r: dict[str, Any]) -> tuple[Any, ...]:
    """The index of the layer, if there is one; read first, as all reading of weights waits for it."""
    return (r["layer"][0],) if s.layered else ()


@functools.partial(jax.jit, static_argnums=0)  # so that it is traced once for gate and up
def _added(s: _Statics, total: jax.Array, weight: jax.Array | None) -> jax.Array:
    """float32 [n]: of [segments * n, width] each segment's own column, weighted, summed over segments."""
    rows, width = total.shape
    own = lax.div(jnp.arange(rows, dtype=jnp.int32), s.cut.n)[:, None] == jnp.arange(width, dtype=jnp.int32)[None, :]
    y = jnp.sum(jnp.where(own, total, 0.0), axis=1)
    if weight is not None:
        y = y * weight
    return jnp.sum(y.reshape(s.segments, s.cut.n), axis=0)


def _sums(
    s: _Statics,
    r: dict[str, Any],
    layer: tuple[Any, ...],
    experts: jax.Array,
    real: Any,
    first: Any,
    starts: list[int],
    source: Any,
) -> list[jax.Array]:
    """float32 [segments * n, width] for each start: rows are outputs of a segment, columns are segments.

    Args:
      s: static sizes.
      r: refs by name.
      layer: of `_layer`.
      experts: int32 [segments * n], a valid expert for each row.
      real: bool [segments * n], rows that count; None: all.
      first: the program's first column.
      starts: column offsets, one for each sum.
      source: of an int32 [width] of segments, the row of x: a scalar, or (rows, expert, whether it counts).
    """
    from jax.experimental.pallas import triton as plgpu

    cut, planes = s.cut, 16 // s.bits
    run, rows, width = planes * PLANE, s.segments * cut.n, max(LEAST_ROWS, power(s.segments))
    each = s.blocks // cut.splits  # blocks of a segment
    row = jnp.arange(rows, dtype=jnp.int32)
    block0, output = lax.rem(lax.div(row, cut.n), cut.splits) * each, first + lax.rem(row, cut.n)
    span = span_of(s.bits, s.group, s.groups)
    wide = span if cut.merge else 1

    column = jnp.arange(width, dtype=jnp.int32)
    found = source(column)
    filled = column < s.segments
    from_row, filled = (found, filled) if not isinstance(found, tuple) else (found[0], filled & found[2])
    from_row = jnp.where(filled, from_row, 0)
    input0 = lax.rem(column, cut.splits) * (each * run)

    lead = tuple(jnp.broadcast_to(index, (rows,)) for index in layer)

    def words(b: Any, start: int) -> jax.Array:
        lane = jnp.arange(PLANE, dtype=jnp.int32)[None, :]
        at = (*lead, experts, block0 + b, start + output)
        at = jnp.broadcast_arrays(*(index[:, None] for index in at), lane)
        mask = None if real is None else jnp.broadcast_to(real[:, None], (rows, PLANE))
        return plgpu.load(r["words"].at[tuple(at)], mask=mask, other=None if mask is None else 0)

    def per_group(ref: Any, b: Any, j: int, start: int) -> jax.Array:
        group = group_of(block0 + b, j, s.bits, s.group, s.groups) if s.groups > 1 else jnp.zeros_like(block0)
        at = (*lead, experts, group, start + output)
        return plgpu.load(ref.at[at], mask=real, other=None if real is None else 0)

    def inputs(b: Any) -> list[jax.Array]:
        loaded = []
        for j in range(0, planes, wide):
            k = input0[:, None] + (b * run + j * PLANE + jnp.arange(wide * PLANE, dtype=jnp.int32))[None, :]
            at = tuple(jnp.broadcast_arrays(from_row[:, None], k))
            loaded.append(plgpu.load(r["x"].at[at], mask=jnp.broadcast_to(filled[:, None], k.shape), other=0))
        return loaded

    def scales(b: Any, start: int) -> list[jax.Array]:
        return [] if s.groups == 1 else [per_group(r["scales"], b, j, start) for j in range(0, planes, span)]

    def zeros(b: Any, start: int) -> list[jax.Array | None]:
        return [per_group(r["zeros"], b, j, start) if "zeros" in r else None for j in range(0, planes, span)]

    turns = range(cut.step)

    def body(i: Any, carry: Any) -> Any:
        totals, now = carry
        b = i * cut.step
        loaded = [(inputs(b + u), [(words(b + u, at), zeros(b + u, at)) for at in starts]) for u in turns]
        after = [[scales(lax.min(b + cut.step + u, each - 1), at) for at in starts] for u in turns]
        for (x, ones), scale in zip(loaded, now, strict=True):
            totals = [
                multiply_block(*one, sc, x, t, s.bits, s.interpret)
                for one, sc, t in zip(ones, scale, totals, strict=True)
            ]
        return totals, after

    totals = [jnp.zeros((rows, width), jnp.float32) for _ in starts]
    carry = totals, [[scales(u, at) for at in starts] for u in turns]
    totals, _ = lax.fori_loop(0, each // cut.step, body, carry)
    if s.groups == 1:
        scaled = [per_group(r["scales"], 0, 0, at).astype(jnp.float32)[:, None] for at in starts]
        totals = [total * scale for total, scale in zip(totals, scaled, strict=True)]
    return totals
