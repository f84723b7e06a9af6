"""The cut of one row of logits on the Triton backend, exactly: bit by bit, from tokens that are left or from all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_kernels.triton_logits import LIST, REST, TILE, TOP, Refs, float_of, order, read
from ferrum_kernels.triton_noise import gumbel

SHORT = 512  # tokens of a list that is soon added up

# (f, init) -> the last of f(carry, places in the order of logits, weights, token ids) over some tokens.
Fold = Callable[[Callable[..., Any], Any], Any]
# Makes one from (places, logits, token ids) -> weights.
Tokens = Callable[[Callable[..., jax.Array]], Fold]


def counts(interpret: bool, r: Refs, row: Any, before: Any) -> tuple[Any, Any, Any]:
    """How many tokens the list has, how many of them before a tile, and whether those above the cell are in it."""
    tiles = r["above"].shape[1]
    lane = jnp.arange(1 << (tiles - 1).bit_length(), dtype=jnp.int32)
    above, inside = (read(r[name], row, lane, lane < tiles, 0, interpret) for name in ("above", "inside"))
    everything = jnp.sum(above) + jnp.sum(inside) <= LIST
    listed = inside + jnp.where(everything, above, 0)
    return jnp.sum(listed), jnp.sum(jnp.where(lane < before, listed, 0)), everything


def find_kernel(interpret: bool, r: Refs, out: Refs, row: Any) -> None:
    """The cut of a row, from its list or, where that does not do, from all of the row; and a token of a whole list."""
    from jax.experimental import pallas as pl

    least, total, high = r["facts"][row, 1], r["facts"][row, 2], r["cell"][row, 1]
    count, _, everything = counts(interpret, r, row, 0)
    both = (r["k"][row] > 0) & (r["p"][row] < 1)
    some = (total < jnp.inf) & ((high > least) | both)
    listed = some & (count <= LIST) & (everything | jnp.logical_not(both))
    vocab = r["logits"].shape[1]
    out["token"][row] = jnp.int32(-1)

    def keep_all() -> None:
        out["logit"][row], out["last"][row] = jnp.where(some, high, -jnp.inf), jnp.where(some, 0, vocab)

    def put(cut: Any, last: Any) -> None:
        out["logit"][row], out["last"][row] = float_of(cut), last

    def draw(x: jax.Array, places: jax.Array, ids: jax.Array, here: jax.Array, cut: Any, last: Any) -> None:
        kept = here & ((places > cut) | ((places == cut) & (ids <= last)))
        value = jnp.where(kept, x + jnp.where(r["random"][row] > 0, gumbel(r["keys"], row, ids), 0.0), -jnp.inf)
        out["token"][row] = jnp.min(jnp.where(kept & (value == jnp.max(value)), ids, vocab - 1))

    def from_list(size: int) -> None:
        lane = jnp.arange(size, dtype=jnp.int32)
        here = lane < count
        x = read(r["left"], row, lane, here, -jnp.inf, interpret)
        ids = read(r["ids"], row, lane, here, vocab, interpret)
        places = jnp.where(here, order(x), REST)

        def tokens(weigh: Callable[..., jax.Array]) -> Fold:
            weights = jnp.where(here, weigh(places, x, ids), 0.0)
            return lambda f, init: f(init, places, weights, ids)

        cut, last = _cuts(r, row, tokens, jnp.where(everything, 0.0, r["cell"][row, 2]))
        put(cut, last)
        if "keys" in r:
            pl.when(everything)(lambda: draw(x, places, ids, here, cut, last))

    def from_row() -> None:
        def tokens(weigh: Callable[..., jax.Array]) -> Fold:
            def fold(f: Callable[..., Any], init: Any) -> Any:
                def body(i: Any, carry: Any) -> Any:
                    ids = i * TILE + jnp.arange(TILE, dtype=jnp.int32)
                    x = read(r["logits"], row, ids, ids < vocab, -jnp.inf, interpret) * r["scale"][row]
                    places = jnp.where(ids < vocab, order(x), REST)
                    return f(carry, places, jnp.where(ids < vocab, weigh(places, x, ids), 0.0), ids)

                return lax.fori_loop(0, -(-vocab // TILE), body, init)

            return fold

        put(*_cuts(r, row, tokens, jnp.float32(0.0)))

    pl.when(jnp.logical_not(some))(keep_all)
    pl.when(listed & (count <= SHORT))(lambda: from_list(SHORT))
    pl.when(listed & (count > SHORT))(lambda: from_list(LIST))
    pl.when(some & jnp.logical_not(listed))(from_row)


def _cuts(r: Refs, row: Any, tokens: Tokens, above: Any) -> tuple[Any, Any]:
    """A row's cut, as `_cut` gives it, by one limit or both.

    Args:
      r: the kernel's arrays.
      row: of the batch.
      tokens: that are left.
      above: what the tokens weigh that are better than these; 0 where a row has both limits.
    """
    k, p, most, total = r["k"][row], r["p"][row], r["facts"][row, 0], r["facts"][row, 2]

    def ones(places: jax.Array, x: jax.Array, ids: jax.Array) -> jax.Array:
        return jnp.ones(x.shape, jnp.float32)

    def worst(carry: Any, places: jax.Array, weights: jax.Array, ids: jax.Array) -> Any:
        return lax.min(carry, jnp.min(places))

    everything = tokens(ones)(worst, order(r["cell"][row, 1])), jnp.int32(0) + r["logits"].shape[1]

    def from_p(first: tuple[Any, Any]) -> tuple[Any, Any]:
        def likely(places: jax.Array, x: jax.Array, ids: jax.Array) -> jax.Array:
            kept = (places > first[0]) | ((places == first[0]) & (ids <= first[1]))
            return jnp.where(kept, jnp.exp(x - most), 0.0)

        fold = tokens(likely)
        both = fold(lambda carry, places, weights, ids: carry + jnp.sum(weights), jnp.float32(0.0))
        return _cut(fold, jnp.where(k > 0, p * both, total), above, first)

    first = lax.cond(k > 0, lambda: _cut(tokens(ones), total, above, everything), lambda: everything)
    return lax.cond(p < 1, lambda: from_p(first), lambda: first)


def _cut(fold: Fold, total: Any, above: Any, otherwise: tuple[Any, Any]) -> tuple[Any, Any]:
    """The place of the logit at the cut and the last token id at it that stays; `otherwise` if all weigh too little."""

    def added(reaches: Callable[[jax.Array], jax.Array]) -> Any:
        def add(carry: Any, places: jax.Array, weights: jax.Array, ids: jax.Array) -> Any:
            return carry + jnp.sum(jnp.where(reaches(places), weights, 0.0))

        return above + fold(add, jnp.float32(0.0))

    def bit(i: Any, cut: Any) -> Any:
        higher = cut | (jnp.int32(1) << (31 - i))
        return jnp.where(added(lambda places: places >= higher ^ TOP) >= total, higher, cut)

    cut = lax.fori_loop(0, 32, bit, jnp.int32(0)) ^ TOP
    before = added(lambda places: places > cut)

    def stay(carry: tuple[Any, Any], places: jax.Array, weights: jax.Array, ids: jax.Array) -> tuple[Any, Any]:
        same = (places == cut) & (weights > 0)
        counted = jnp.where(same, 1, 0)
        rank = carry[0] + jnp.cumsum(counted) - 1
        kept = same & (before + rank.astype(jnp.float32) * weights < total)
        return carry[0] + jnp.sum(counted), lax.max(carry[1], jnp.max(jnp.where(kept, ids, -1)))

    last = fold(stay, (jnp.int32(0), jnp.int32(-1)))[1]
    return jnp.where(cut > TOP, cut, otherwise[0]), jnp.where(cut > TOP, last, otherwise[1])
