"""Where top-k and top-p cut each row of logits on the Triton backend: an exact search that reads a row a few times.

One pass notes the best logit and the weight of each group of tokens. They alone bound where a row's cut lies; where
many groups are left, two passes weigh what is above 16 logits between the bounds. The tokens that are left are put into
a list, in which one program per row finds the cut. Groups without a token above the lower bound are not read again. How
a row is cut up depends on the vocabulary alone, so it gets the same sums in any batch.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ferrum_kernels.triton_cut_row import counts, find_kernel
from ferrum_kernels.triton_logits import (
    GROUP,
    LIST,
    TILE,
    TOP,
    Refs,
    call_kernel,
    float_of,
    order,
    over_parts,
    part_size,
    read,
    store,
    tokens,
)

STEP = 512  # tokens that are weighed at a time
BOUNDS = 16  # logits that a pass weighs
COARSE = 16  # bits that the bounds of a row have
FEW = LIST // 8  # groups whose tokens from the lower bound on are taken to fit the list


class Cuts(NamedTuple):
    """Where rows are cut: the tokens above the logit stay, and those at it up to the id.

    Attributes:
      logit: float32 [B].
      last: int32 [B].
      best: float32 [B, groups], the best logit of each GROUP tokens.
      token: int32 [B], drawn of those that stay, or -1 where that is left to do.
    """

    logit: jax.Array
    last: jax.Array
    best: jax.Array
    token: jax.Array


def find(
    logits: jax.Array,
    scale: jax.Array,
    k: jax.Array,
    p: jax.Array,
    interpret: bool,
    noise: tuple[jax.Array, jax.Array] | None = None,
) -> Cuts:
    """Where the k best tokens end, and of those the best that reach probability p.

    Args:
      logits, scale: float32 [B, V] and [B], what a row's logits are multiplied by first: 1 / temperature.
      k, p: int32 [B], 0 for all, and float32 [B], above 0; 1 or more for all.
      interpret: run without a GPU.
      noise: keys uint32 [B, 2] and, int32 [B], where there is some: with them tokens are drawn from lists.

    Returns:
      The cuts of all rows.
    """
    rows, vocab = logits.shape
    groups, tiles = -(-vocab // GROUP), -(-vocab // TILE)
    call = functools.partial(call_kernel, interpret)
    given = {"logits": logits, "scale": scale, "k": k, "p": p}
    numbers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    whole = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    stats = {name: numbers((rows, groups)) for name in ("best", "weight", "worst")}
    given |= call(_group_kernel, {"logits": logits, "scale": scale}, stats, (rows, tiles), "cut_groups")
    best = given["best"]
    given |= call(
        _bound_kernel, given, {"facts": numbers((rows, 4)), "cell": numbers((rows, 2))}, (rows,), "cut_bound", 8
    )
    given = {name: given[name] for name in ("logits", "scale", "k", "p", "best", "facts", "cell")}
    weighed = {"bounds": numbers((rows, BOUNDS)), "sums": numbers((rows, tiles, BOUNDS))}
    for _ in range(2):
        given |= call(_weigh_kernel, given, weighed, (rows, tiles), "cut_weigh")
    counted = {"cell": numbers((rows, 3)), "above": whole((rows, tiles)), "inside": whole((rows, tiles))}
    given |= call(_count_kernel, given, counted, (rows, tiles), "cut_count")
    given = {name: x for name, x in given.items() if name not in weighed}
    left = {"left": numbers((rows, LIST)), "ids": whole((rows, LIST))}
    given |= call(_list_kernel, given, left, (rows, tiles), "cut_list")
    given.pop("best")
    if noise is not None:
        given["keys"], given["random"] = noise
    out = {"logit": numbers((rows,)), "last": whole((rows,)), "token": whole((rows,))}
    found = call(find_kernel, given, out, (rows,), "cut_find", warps=8)
    return Cuts(best=best, **found)


def _group_kernel(interpret: bool, r: Refs, out: Refs, row: Any, tile: Any) -> None:
    """Of each group the best and the worst logit, and exp(logit - best) added up; -inf is not there."""
    vocab, groups = r["logits"].shape[1], out["best"].shape[1]
    group = tile * (TILE // GROUP) + jnp.arange(TILE // GROUP, dtype=jnp.int32)
    token = group[:, None] * GROUP + jnp.arange(GROUP, dtype=jnp.int32)[None, :]
    x = read(r["logits"], row, token, token < vocab, -jnp.inf, interpret) * r["scale"][row]
    there = x > -jnp.inf
    best = jnp.max(x, axis=1)
    weight = jnp.sum(jnp.where(there, jnp.exp(x - best[:, None]), 0.0), axis=1)
    worst = jnp.min(jnp.where(there, x, jnp.inf), axis=1)
    for name, value in (("best", best), ("weight", weight), ("worst", worst)):
        store(out[name], row, group, value, group < groups)


def _bound_kernel(interpret: bool, r: Refs, out: Refs, row: Any) -> None:
    """Facts of a row, and logits between which its cut is.

    Facts are its best and its worst logit, what its tokens are to weigh together, and whether few groups have any from
    the lower bound on, so that no pass is needed.

    At least a group's best token is above a logit where the best is, and at most all of the group.
    """
    groups = r["best"].shape[1]
    lane = jnp.arange(1 << (groups - 1).bit_length(), dtype=jnp.int32)
    there = lane < groups
    best = read(r["best"], row, lane, there, -jnp.inf, interpret)
    most = jnp.max(best)
    least = jnp.min(read(r["worst"], row, lane, there, jnp.inf, interpret))
    one = jnp.where(best > -jnp.inf, jnp.exp(best - most), 0.0)
    all_of = one * read(r["weight"], row, lane, there, 0.0, interpret)
    weight = jnp.sum(all_of)
    k, p = r["k"][row], r["p"][row]
    total = jnp.where(k > 0, k.astype(jnp.float32), jnp.where(p < 1, p * weight, jnp.inf))
    one = jnp.where(k > 0, 1.0, one)
    places = jnp.where(best > -jnp.inf, order(best), TOP)

    def search(weights: jax.Array) -> Any:
        def bit(i: Any, cut: Any) -> Any:
            higher = cut | (jnp.int32(1) << (31 - i))
            return jnp.where(jnp.sum(jnp.where(places >= higher ^ TOP, weights, 0.0)) >= total, higher, cut)

        return lax.fori_loop(0, COARSE, bit, jnp.int32(0))

    low = search(one)
    # Of counted tokens a group says little: any may have as many as stay.
    high = lax.cond(k > 0, lambda: order(most) ^ TOP, lambda: search(all_of))
    high = (high | np.int32(2 ** (32 - COARSE) - 1)) ^ TOP  # the cut is not above
    low = lax.max(low ^ TOP, order(least))
    few = jnp.sum(jnp.where(places >= low, 1, 0)) <= FEW
    for i, fact in enumerate((most, least, total, jnp.where(few, 1.0, 0.0))):
        out["facts"][row, i] = fact
    out["cell"][row, 0] = float_of(low)
    out["cell"][row, 1] = jnp.where(few | (high >= order(most)), jnp.inf, float_of(high + 1))


def _cell(r: Refs, row: Any) -> tuple[Any, ...]:
    """Logits from and below which the cut is, and after a pass what weighs more."""
    known = r["cell"][row, 0], r["cell"][row, 1], jnp.float32(0.0)
    if "sums" not in r:
        return known
    from jax.experimental.pallas import triton as plgpu

    tiles, total = r["sums"].shape[1], r["facts"][row, 2]
    lanes = jnp.arange(1 << (tiles - 1).bit_length(), dtype=jnp.int32)[:, None]
    bound = jnp.arange(BOUNDS, dtype=jnp.int32)
    at = jnp.broadcast_arrays(row, jnp.where(lanes < tiles, lanes, 0), bound[None, :])
    weights = jnp.sum(jnp.where(lanes < tiles, plgpu.load(r["sums"].at[tuple(at)]), 0.0), axis=0)
    bounds = plgpu.load(r["bounds"].at[jnp.full(bound.shape, row, jnp.int32), bound])
    low = jnp.max(jnp.where(weights >= total, bounds, -jnp.inf))
    high = jnp.min(jnp.where(weights >= total, jnp.inf, bounds))
    passed = low, high, jnp.max(jnp.where(weights >= total, 0.0, weights))
    return tuple(jnp.where(r["facts"][row, 3] > 0, a, b) for a, b in zip(known, passed, strict=True))


def _weigh_kernel(interpret: bool, r: Refs, out: Refs, row: Any, tile: Any) -> None:
    """Of a tile the weights from each of some logits on, which lie evenly where the cut is."""
    from jax.experimental import pallas as pl

    cell = _cell(r, row)
    most, least, total, few = (r["facts"][row, i] for i in range(4))

    def weigh() -> None:
        low, high = lax.max(cell[0], least), lax.min(cell[1], most)
        apart = high / (BOUNDS - 1) - low / (BOUNDS - 1)
        bounds = [lax.min(low + apart * i, high) for i in range(BOUNDS - 1)] + [high]
        step = min(STEP, part_size(interpret))

        def add(first: Any, sums: list[jax.Array]) -> list[jax.Array]:
            steps = range(0, part_size(interpret), step)
            ids = [first + i + jnp.arange(step, dtype=jnp.int32) for i in steps]
            for x in [tokens(interpret, r, row, some, low) for some in ids]:
                weights = jnp.where(r["k"][row] > 0, 1.0, jnp.exp(x - most))
                sums = [_plus(total, x, bound, weights, interpret) for total, bound in zip(sums, bounds, strict=True)]
            return sums

        sums = over_parts(interpret, r, row, tile, low, add, [jnp.zeros((step,), jnp.float32)] * BOUNDS)
        for i, total in enumerate(sums):
            out["sums"][row, tile, i] = jnp.sum(total)

        def note() -> None:
            for i, bound in enumerate(bounds):
                out["bounds"][row, i] = bound

        pl.when(tile == 0)(note)

    pl.when((total < jnp.inf) & (few == 0))(weigh)


def _plus(total: jax.Array, x: jax.Array, bound: Any, weights: jax.Array, interpret: bool) -> jax.Array:
    """total, and the weights where x reaches the bound, in two instructions."""
    if interpret:
        return total + jnp.where(x >= bound, weights, 0.0)
    from jax.experimental.pallas import triton as plgpu

    asm = "{ .reg .pred q; setp.ge.f32 q, $2, $3; mov.f32 $0, $1; @q add.f32 $0, $0, $4; }"
    out = [jax.ShapeDtypeStruct(x.shape, jnp.float32)]
    given = [total, x, jnp.broadcast_to(bound, x.shape), weights]
    [y] = plgpu.elementwise_inline_asm(asm, args=given, constraints="=&f,f,f,f,f", pack=1, result_shape_dtypes=out)
    return y


def _count_kernel(interpret: bool, r: Refs, out: Refs, row: Any, tile: Any) -> None:
    """How many tokens of a tile are above the cell, and how many in it."""
    from jax.experimental import pallas as pl

    cell = _cell(r, row)

    def note() -> None:
        for i in range(3):
            out["cell"][row, i] = cell[i]

    def count() -> None:
        def add(first: Any, found: tuple[Any, Any]) -> tuple[Any, Any]:
            above, inside = found
            ids = first + jnp.arange(part_size(interpret), dtype=jnp.int32)
            x = tokens(interpret, r, row, ids, cell[0])
            above += jnp.sum(jnp.where(x >= cell[1], 1, 0))
            return above, inside + jnp.sum(jnp.where((x >= cell[0]) & (x < cell[1]) & (x > -jnp.inf), 1, 0))

        found = over_parts(interpret, r, row, tile, cell[0], add, (jnp.int32(0), jnp.int32(0)))
        out["above"][row, tile], out["inside"][row, tile] = found

    pl.when(tile == 0)(note)
    pl.when(r["facts"][row, 2] < jnp.inf)(count)


def _list_kernel(interpret: bool, r: Refs, out: Refs, row: Any, tile: Any) -> None:
    """Put the tokens that are left into the row's list."""
    from jax.experimental import pallas as pl

    low, high = r["cell"][row, 0], r["cell"][row, 1]

    def put() -> None:
        count, before, everything = counts(interpret, r, row, tile)
        pl.when(count <= LIST)(lambda: write(before, everything))

    def write(before: Any, everything: Any) -> None:
        def add(first: Any, before: Any) -> Any:
            ids = first + jnp.arange(part_size(interpret), dtype=jnp.int32)
            x = tokens(interpret, r, row, ids, low)
            mine = (x >= low) & (x > -jnp.inf) & ((x < high) | everything)
            place = before + jnp.cumsum(jnp.where(mine, 1, 0)) - 1
            store(out["left"], row, place, x, mine)
            store(out["ids"], row, place, ids, mine)
            return before + jnp.sum(jnp.where(mine, 1, 0))

        over_parts(interpret, r, row, tile, low, add, before)

    pl.when(r["facts"][row, 2] < jnp.inf)(put)
