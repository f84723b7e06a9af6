"""Draw a token of those that top-k and top-p keep, on the Triton backend: noise is made for them only.

A row whose list has all that stay has been drawn with its cut. A token's noise depends on its row's key and its id, as
in `ferrum_jax.sampling_stages.gumbel`, whoever draws. Groups whose best logit is below the cut are not read.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_kernels.triton_cut import find
from ferrum_kernels.triton_logits import TILE, Refs, call_kernel, tokens
from ferrum_kernels.triton_noise import gumbel

PART = 1024  # tokens whose noise is made together


def draw(
    logits: jax.Array, scale: jax.Array, k: jax.Array, p: jax.Array, keys: jax.Array, random: jax.Array, interpret: bool
) -> jax.Array:
    """Draw a token of each row.

    Args:
      logits, scale, k, p, interpret: as in `find`.
      keys: uint32 [B, 2].
      random: int32 [B]; where it is 0 a row gets its best token.

    Returns:
      int32 [B]; of equals the smaller id.
    """
    rows, vocab = logits.shape
    tiles = -(-vocab // TILE)
    cuts = find(logits, scale, k, p, interpret, (keys, random))
    given = {"logits": logits, "scale": scale, **cuts._asdict(), "keys": keys, "random": random}
    out = {
        "value": jax.ShapeDtypeStruct((rows, tiles), jnp.float32),
        "place": jax.ShapeDtypeStruct((rows, tiles), jnp.int32),
    }
    drawn = call_kernel(interpret, _draw_kernel, given, out, (rows, tiles), "cut_draw")
    first = lax.argmax(drawn["value"], 1, jnp.int32)[:, None]
    mine = lax.broadcasted_iota(jnp.int32, (rows, tiles), 1) == first
    return jnp.where(cuts.token < 0, jnp.sum(jnp.where(mine, drawn["place"], 0), axis=1), cuts.token)


def _draw_kernel(interpret: bool, r: Refs, out: Refs, row: Any, tile: Any) -> None:
    """The best of a tile with its noise, and which it is; nothing where the row's token was drawn from its list."""
    from jax.experimental import pallas as pl

    pl.when(r["token"][row] < 0)(lambda: _best_of_tile(interpret, r, out, row, tile))


def _best_of_tile(interpret: bool, r: Refs, out: Refs, row: Any, tile: Any) -> None:
    vocab, step = r["logits"].shape[1], TILE if interpret else PART
    cut, last, random = r["logit"][row], r["last"][row], r["random"][row] > 0
    # All parts are read before the first is looked at.
    ids = [tile * TILE + i * step + jnp.arange(step, dtype=jnp.int32) for i in range(TILE // step)]
    parts = [(some, tokens(interpret, r, row, some, cut)) for some in ids]
    # Pallas does not lower a branch that returns a constant, so these are computed.
    best, token = lax.min(cut, -jnp.inf), lax.clamp(vocab - 1, last, vocab - 1)
    for ids, x in parts:
        kept = ((x > cut) | ((x == cut) & (ids <= last))) & (x > -jnp.inf)

        def better(kept: jax.Array = kept, ids: jax.Array = ids, x: jax.Array = x) -> tuple[Any, Any]:
            noise = jnp.where(random, gumbel(r["keys"], row, ids), 0.0)
            value = jnp.where(kept, x + noise, -jnp.inf)
            most = jnp.max(value)
            return most, jnp.min(jnp.where(value == most, ids, vocab - 1))

        here = jnp.max(jnp.where(kept, 1, 0)) > 0
        most, found = lax.cond(here, better, lambda best=best, token=token: (best, token))
        # Of equals the earlier one stays.
        best, token = jnp.where(most > best, most, best), jnp.where(most > best, found, token)
    out["value"][row, tile], out["place"][row, tile] = best, token
