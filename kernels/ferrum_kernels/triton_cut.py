"""Where top-k and top-p cut each row of logits on the Triton backend: an exact search that reads a row a few times.

One pass notes the best logit and the weight of each group of tokens. A row's groups alone bound where its cut lies; two
more passes weigh what is above 16 logits between those bounds. The tokens that are left are put into a list, and one
program per row finds the cut in it. Groups without a token above the lower bound are not read again. How a row is cut
up depends on the vocabulary alone, so it gets the same sums in any batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

GROUP = 64  # tokens
TILE = 4096  # tokens of a program
STEP = 512  # of them at a time
LIST = 4096  # tokens that are left at most; a row with more is read whole, bit by bit
BOUNDS = 16  # logits that a pass weighs
COARSE = 16  # bits that the bounds of a row have
TOP = np.int32(-(2**31))  # the sign bit: numbers are compared as signed, bits are found of unsigned ones
REST = np.int32(2**31 - 1)

Refs = dict[str, Any]
Fold = Callable[[Callable[..., Any], Any], Any]


class Cuts(NamedTuple):
    """Where rows are cut: the tokens above the logit stay, and those at it up to the id.

    Attributes:
      logit: float32 [B].
      last: int32 [B].
      best: float32 [B, groups], the best logit of each GROUP tokens.
    """

    logit: jax.Array
    last: jax.Array
    best: jax.Array


def find(logits: jax.Array, k: jax.Array, p: jax.Array, interpret: bool) -> Cuts:
    """Where the k best tokens end, and of those the best that reach probability p.

    Args:
      logits: float32 [B, V].
      k: int32 [B]; 0 for all.
      p: float32 [B]; 1 or more for all.
      interpret: run without a GPU.

    """
    rows, vocab = logits.shape
    groups, tiles = -(-vocab // GROUP), -(-vocab // TILE)
    call = functools.partial(call_kernel, interpret)
    given = {"logits": logits, "k": k, "p": p}
    numbers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    whole = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    stats = {name: numbers((rows, groups)) for name in ("best", "weight", "worst")}
    given |= call(_group_kernel, {"logits": logits}, stats, (rows, tiles), "cut_groups")
    best = given["best"]
    given |= call(_bound_kernel, given, {"facts": numbers((rows, 3)), "cell": numbers((rows, 2))}, (rows,), "cut_bound")
    given = {name: given[name] for name in ("logits", "k", "p", "best", "facts", "cell")}
    weighed = {"bounds": numbers((rows, BOUNDS)), "sums": numbers((rows, tiles, BOUNDS))}
    for _ in range(2):
        given |= call(_weigh_kernel, given, weighed, (rows, tiles), "cut_weigh")
    counted = {"cell": numbers((rows, 3)), "above": whole((rows, tiles)), "inside": whole((rows, tiles))}
    given |= call(_count_kernel, given, counted, (rows, tiles), "cut_count")
    given = {name: x for name, x in given.items() if name not in weighed}
    left = {"left": numbers((rows, LIST)), "ids": whole((rows, LIST))}
    given |= call(_list_kernel, given, left, (rows, tiles), "cut_list")
    given.pop("best")
    found = call(_find_kernel, given, {"cut": numbers((rows,)), "last": whole((rows,))}, (rows,), "cut_find", warps=8)
    return Cuts(found["cut"], found["last"], best)


def call_kernel(
    interpret: bool, kernel: Any, given: Refs, out: Refs, grid: tuple[int, ...], name: str, warps: int = 4
) -> dict[str, jax.Array]:
    """Run kernel(interpret, inputs, outputs, *program ids); gives its outputs."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    def run(*refs: Any) -> None:
        r = dict(zip(given, refs, strict=False))
        o = dict(zip(out, refs[len(given) :], strict=True))
        kernel(interpret, r, o, *(pl.program_id(i) for i in range(len(grid))))

    results = pl.pallas_call(
        run,
        out_shape=tuple(out.values()),
        grid=grid,
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name=name,
    )(*given.values())
    return dict(zip(out, results, strict=True))


def read(ref: Any, row: Any, at: jax.Array, mask: jax.Array, other: Any, interpret: bool) -> jax.Array:
    """Elements of a row, `other` where the mask is False."""
    from jax.experimental.pallas import triton as plgpu

    at = jnp.where(mask, at, 0) if interpret else at
    x = plgpu.load(ref.at[jnp.full(at.shape, row, jnp.int32), at], mask=mask, other=other)
    return jnp.where(mask, x, other) if interpret else x


def store(ref: Any, row: Any, at: jax.Array, value: jax.Array, mask: jax.Array) -> None:
    """Write elements of a row where the mask is True."""
    from jax.experimental.pallas import triton as plgpu

    at = jnp.where(mask, at, ref.shape[1])  # the interpreter ignores masks, and drops what is out of range
    plgpu.store(ref.at[jnp.full(at.shape, row, jnp.int32), at], value, mask=mask)


def _order(x: jax.Array) -> jax.Array:
    """int32 numbers in the order of floats, with -0 equal to 0."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)
    return jnp.where(bits < 0, bits ^ REST, bits)


def _float(order: jax.Array) -> jax.Array:
    """The float of such a number."""
    return lax.bitcast_convert_type(jnp.where(order < 0, order ^ REST, order), jnp.float32)


def _group_kernel(interpret: bool, r: Refs, out: Refs, row: Any, tile: Any) -> None:
    """Of each group the best and the worst logit, and exp(logit - best) added up; -inf is not there."""
    vocab, groups = r["logits"].shape[1], out["best"].shape[1]
    group = tile * (TILE // GROUP) + jnp.arange(TILE // GROUP, dtype=jnp.int32)
    token = group[:, None] * GROUP + jnp.arange(GROUP, dtype=jnp.int32)[None, :]
    x = read(r["logits"], row, token, token < vocab, -jnp.inf, interpret)
    there = x > -jnp.inf
    best = jnp.max(x, axis=1)
    weight = jnp.sum(jnp.where(there, jnp.exp(x - best[:, None]), 0.0), axis=1)
    worst = jnp.min(jnp.where(there, x, jnp.inf), axis=1)
    for name, value in (("best", best), ("weight", weight), ("worst", worst)):
        store(out[name], row, group, value, group < groups)


def _bound_kernel(interpret: bool, r: Refs, out: Refs, row: Any) -> None:
    """The row's best logit, its worst and what tokens are to weigh together; and logits between which its cut is.

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
    all_of = jnp.where(k > 0, float(GROUP), all_of)
    order = jnp.where(best > -jnp.inf, _order(best), TOP)

    def bit(i: Any, cuts: tuple) -> tuple:
        found = []
        for cut, weights in zip(cuts, (one, all_of), strict=True):
            higher = cut | (jnp.int32(1) << (31 - i))
            reached = jnp.sum(jnp.where(order >= higher ^ TOP, weights, 0.0)) >= total
            found.append(jnp.where(reached, higher, cut))
        return tuple(found)

    low, high = lax.fori_loop(0, COARSE, bit, (jnp.int32(0), jnp.int32(0)))
    high = (high | np.int32(2 ** (32 - COARSE) - 1)) ^ TOP  # the cut is not above
    out["facts"][row, 0], out["facts"][row, 1], out["facts"][row, 2] = most, least, total
    out["cell"][row, 0] = _float(lax.max(low ^ TOP, _order(least)))
    out["cell"][row, 1] = jnp.where(high >= _order(most), jnp.inf, _float(high + 1))


def _cell(r: Refs, row: Any) -> tuple[Any, ...]:
    """Logits from and below which the cut is, and after a pass what weighs more."""
    if "sums" not in r:
        return tuple(r["cell"][row, i] for i in range(r["cell"].shape[1]))
    from jax.experimental.pallas import triton as plgpu

    tiles, total = r["sums"].shape[1], r["facts"][row, 2]
    lanes = jnp.arange(1 << (tiles - 1).bit_length(), dtype=jnp.int32)[:, None]
    bound = jnp.arange(BOUNDS, dtype=jnp.int32)
    at = jnp.broadcast_arrays(row, jnp.where(lanes < tiles, lanes, 0), bound[None, :])
    weights = jnp.sum(jnp.where(lanes < tiles, plgpu.load(r["sums"].at[tuple(at)]), 0.0), axis=0)
    bounds = plgpu.load(r["bounds"].at[jnp.full(bound.shape, row, jnp.int32), bound])
    low = jnp.max(jnp.where(weights >= total, bounds, -jnp.inf))
    high = jnp.min(jnp.where(weights >= total, jnp.inf, bounds))
    return low, high, jnp.max(jnp.where(weights >= total, 0.0, weights))


def tokens(interpret: bool, r: Refs, row: Any, token: jax.Array, low: Any) -> tuple[jax.Array, jax.Array]:
    """(ids, logits) of some tokens; -inf in groups with nothing from `low` on."""
    vocab, groups = r["logits"].shape[1], r["best"].shape[1]
    best = read(r["best"], row, token // GROUP, token // GROUP < groups, -jnp.inf, interpret)
    return token, read(r["logits"], row, token, (token < vocab) & (best >= low), -jnp.inf, interpret)


def _tile(tile: Any) -> jax.Array:
    return tile * TILE + jnp.arange(TILE, dtype=jnp.int32)


def _weigh_kernel(interpret: bool, r: Refs, out: Refs, row: Any, tile: Any) -> None:
    """Of a tile the weights from each of some logits on, which lie evenly where the cut is."""
    from jax.experimental import pallas as pl

    cell = _cell(r, row)
    most, least, total = (r["facts"][row, i] for i in range(3))

    def weigh() -> None:
        low, high = lax.max(cell[0], least), lax.min(cell[1], most)
        apart = high / (BOUNDS - 1) - low / (BOUNDS - 1)
        bounds = [lax.min(low + apart * i, high) for i in range(BOUNDS - 1)] + [high]
        step = TILE if interpret else STEP
        sums = [jnp.zeros((step,), jnp.float32)] * BOUNDS
        for i in range(TILE // step):
            _, x = tokens(interpret, r, row, tile * TILE + i * step + jnp.arange(step, dtype=jnp.int32), low)
            weights = jnp.where(r["k"][row] > 0, 1.0, jnp.exp(x - most))
            sums = [_plus(total, x, bound, weights, interpret) for total, bound in zip(sums, bounds, strict=True)]
        for i, total in enumerate(sums):
            out["sums"][row, tile, i] = jnp.sum(total)

        def note() -> None:
            for i, bound in enumerate(bounds):
                out["bounds"][row, i] = bound

        pl.when(tile == 0)(note)

    pl.when(total < jnp.inf)(weigh)


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
        _, x = tokens(interpret, r, row, _tile(tile), cell[0])
        above, inside = x >= cell[1], (x >= cell[0]) & (x < cell[1]) & (x > -jnp.inf)
        out["above"][row, tile] = jnp.sum(jnp.where(above, 1, 0))
        out["inside"][row, tile] = jnp.sum(jnp.where(inside, 1, 0))

    pl.when(tile == 0)(note)
    pl.when(r["facts"][row, 2] < jnp.inf)(count)


def _counts(interpret: bool, r: Refs, row: Any, before: Any) -> tuple[Any, Any, Any]:
    """How many tokens the list has, how many of them before a tile, and whether those above the cell are in it."""
    tiles = r["above"].shape[1]
    lane = jnp.arange(1 << (tiles - 1).bit_length(), dtype=jnp.int32)
    above, inside = (read(r[name], row, lane, lane < tiles, 0, interpret) for name in ("above", "inside"))
    everything = jnp.sum(above) + jnp.sum(inside) <= LIST
    counts = inside + jnp.where(everything, above, 0)
    return jnp.sum(counts), jnp.sum(jnp.where(lane < before, counts, 0)), everything


def _list_kernel(interpret: bool, r: Refs, out: Refs, row: Any, tile: Any) -> None:
    """Put the tokens that are left into the row's list."""
    from jax.experimental import pallas as pl

    low, high, *_ = _cell(r, row)

    def put() -> None:
        count, before, everything = _counts(interpret, r, row, tile)

        def write() -> None:
            token, x = tokens(interpret, r, row, _tile(tile), low)
            mine = (x >= low) & (x > -jnp.inf) & ((x < high) | everything)
            place = before + jnp.cumsum(jnp.where(mine, 1, 0)) - 1
            store(out["left"], row, place, x, mine)
            store(out["ids"], row, place, token, mine)

        pl.when(count <= LIST)(write)

    pl.when(r["facts"][row, 2] < jnp.inf)(put)


def _find_kernel(interpret: bool, r: Refs, out: Refs, row: Any) -> None:
    """The cut of a row, from its list or, where that does not do, from all of the row."""
    from jax.experimental import pallas as pl

    least, total, high = r["facts"][row, 1], r["facts"][row, 2], r["cell"][row, 1]
    count, _, everything = _counts(interpret, r, row, 0)
    both = (r["k"][row] > 0) & (r["p"][row] < 1)
    some = (total < jnp.inf) & (high > least)
    listed = (count <= LIST) & (everything | jnp.logical_not(both))
    vocab = r["logits"].shape[1]

    def keep_all() -> None:
        out["cut"][row], out["last"][row] = jnp.where(some, high, -jnp.inf), jnp.where(some, 0, vocab)

    def from_list() -> None:
        lane = jnp.arange(LIST, dtype=jnp.int32)
        x = read(r["left"], row, lane, lane < count, -jnp.inf, interpret)
        ids = read(r["ids"], row, lane, lane < count, 0, interpret)
        _put(r, out, row, lambda f, init: f(init, x, ids, lane < count), jnp.where(everything, 0.0, r["cell"][row, 2]))

    def from_row() -> None:
        def fold(f: Callable[..., Any], init: Any) -> Any:
            def body(i: Any, carry: Any) -> Any:
                ids = i * TILE + jnp.arange(TILE, dtype=jnp.int32)
                x = read(r["logits"], row, ids, ids < vocab, -jnp.inf, interpret)
                return f(carry, x, ids, ids < vocab)

            return lax.fori_loop(0, -(-vocab // TILE), body, init)

        _put(r, out, row, fold, jnp.float32(0.0))

    pl.when(jnp.logical_not(some))(keep_all)
    pl.when(some & listed)(from_list)
    pl.when(some & jnp.logical_not(listed))(from_row)


def _put(r: Refs, out: Refs, row: Any, fold: Fold, above: Any) -> None:
    """Find a row's cut.

    Args:
      r: the kernel's arrays.
      out: those that it writes.
      row: of the batch.
      fold: (f, init) -> the last of f(carry, logits, ids, whether they exist) over all tokens that are left.
      above: what the tokens weigh that are better than these; 0 where a row has both limits.
    """
    k, p, most, total = r["k"][row], r["p"][row], r["facts"][row, 0], r["facts"][row, 2]

    def worst(carry: Any, x: jax.Array, ids: jax.Array, here: jax.Array) -> Any:
        return lax.min(carry, jnp.min(jnp.where(here, _order(x), REST)))

    everything = fold(worst, _order(r["cell"][row, 1])), jnp.int32(0) + r["logits"].shape[1]

    def from_k() -> tuple[Any, Any]:
        ones = lambda x, ids: jnp.ones(x.shape, jnp.float32)  # noqa: E731
        return _cut(fold, ones, total, above, everything)

    def from_p(first: tuple[Any, Any]) -> tuple[Any, Any]:
        def likely(x: jax.Array, ids: jax.Array) -> jax.Array:
            order = _order(x)
            kept = (order > first[0]) | ((order == first[0]) & (ids <= first[1]))
            return jnp.where(kept, jnp.exp(x - most), 0.0)

        both = fold(lambda carry, x, ids, here: carry + jnp.sum(jnp.where(here, likely(x, ids), 0.0)), jnp.float32(0.0))
        return _cut(fold, likely, jnp.where(k > 0, p * both, total), above, first)

    first = lax.cond(k > 0, from_k, lambda: everything)
    cut, last = lax.cond(p < 1, lambda: from_p(first), lambda: first)
    out["cut"][row], out["last"][row] = _float(cut), last


def _cut(
    fold: Fold, weigh: Callable[..., jax.Array], total: Any, above: Any, otherwise: tuple[Any, Any]
) -> tuple[Any, Any]:
    """The order of the logit at the cut and the last token id at it that stays; `otherwise` if all weigh too little."""

    def added(mask: Callable[[jax.Array], jax.Array]) -> Any:
        def add(carry: Any, x: jax.Array, ids: jax.Array, here: jax.Array) -> Any:
            return carry + jnp.sum(jnp.where(here & mask(_order(x)), weigh(x, ids), 0.0))

        return above + fold(add, jnp.float32(0.0))

    def bit(i: Any, cut: Any) -> Any:
        higher = cut | (jnp.int32(1) << (31 - i))
        return jnp.where(added(lambda order: order >= higher ^ TOP) >= total, higher, cut)

    cut = lax.fori_loop(0, 32, bit, jnp.int32(0)) ^ TOP
    before = added(lambda order: order > cut)

    def stay(carry: tuple[Any, Any], x: jax.Array, ids: jax.Array, here: jax.Array) -> tuple[Any, Any]:
        weights = weigh(x, ids)
        same = here & (_order(x) == cut) & (weights > 0)
        counted = jnp.where(same, 1, 0)
        rank = carry[0] + jnp.cumsum(counted) - 1
        kept = same & (before + rank.astype(jnp.float32) * weights < total)
        return carry[0] + jnp.sum(counted), lax.max(carry[1], jnp.max(jnp.where(kept, ids, -1)))

    last = fold(stay, (jnp.int32(0), jnp.int32(-1)))[1]
    return jnp.where(cut > TOP, cut, otherwise[0]), jnp.where(cut > TOP, last, otherwise[1])
