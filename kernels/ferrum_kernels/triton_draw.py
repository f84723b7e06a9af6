"""Draw a token of those that top-k and top-p keep, on the Triton backend: noise is made for them only.

A token's noise depends on its row's key and its id, as in `ferrum_jax.sampling_stages.gumbel`, so whoever draws gets
the same token. Groups whose best logit is below the cut are not read.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ferrum_kernels.triton_cut import Cuts
from ferrum_kernels.triton_logits import TILE, Refs, call_kernel, tokens

PART = 512  # tokens whose noise is made together
ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)


def draw(
    logits: jax.Array, scale: jax.Array, cuts: Cuts, keys: jax.Array, random: jax.Array, interpret: bool
) -> jax.Array:
    """Draw a token of each row.

    Args:
      logits: float32 [B, V].
      scale: float32 [B], what a row's logits are multiplied by first.
      cuts: of these logits.
      keys: uint32 [B, 2].
      random: bool [B]; other rows get their best token.
      interpret: run without a GPU.

    Returns:
      int32 [B]; of equals the smaller id.
    """
    rows, vocab = logits.shape
    tiles = -(-vocab // TILE)
    given = {"logits": logits, "scale": scale, **cuts._asdict(), "keys": keys, "random": random.astype(jnp.int32)}
    out = {
        "value": jax.ShapeDtypeStruct((rows, tiles), jnp.float32),
        "token": jax.ShapeDtypeStruct((rows, tiles), jnp.int32),
    }
    drawn = call_kernel(interpret, _draw_kernel, given, out, (rows, tiles), "cut_draw")
    first = lax.argmax(drawn["value"], 1, jnp.int32)[:, None]
    mine = lax.broadcasted_iota(jnp.int32, (rows, tiles), 1) == first
    return jnp.sum(jnp.where(mine, drawn["token"], 0), axis=1)


def _draw_kernel(interpret: bool, r: Refs, out: Refs, row: Any, tile: Any) -> None:
    """The best of a tile with its noise, and which it is."""
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
            noise = jnp.where(random, _gumbel(r["keys"][row, 0], r["keys"][row, 1], ids), 0.0)
            value = jnp.where(kept, x + noise, -jnp.inf)
            most = jnp.max(value)
            return most, jnp.min(jnp.where(value == most, ids, vocab - 1))

        here = jnp.max(jnp.where(kept, 1, 0)) > 0
        most, found = lax.cond(here, better, lambda best=best, token=token: (best, token))
        # Of equals the earlier one stays.
        best, token = jnp.where(most > best, most, best), jnp.where(most > best, found, token)
    out["value"][row, tile], out["token"][row, tile] = best, token


def _gumbel(high: Any, low: Any, counter: jax.Array) -> jax.Array:
    """Standard Gumbel noise of some token ids under a row's key: Threefry of 20 rounds, its first word.

    Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011).
    """
    keys = high, low, high ^ low ^ np.uint32(0x1BD11BDA)
    a, b = jnp.zeros(counter.shape, jnp.uint32) + high, counter.astype(jnp.uint32) + low
    for i in range(5):
        for turn in ROTATIONS[i % 2]:
            a = a + b
            b = a ^ ((b << np.uint32(turn)) | (b >> np.uint32(32 - turn)))
        a, b = a + keys[(i + 1) % 3], b + keys[(i + 2) % 3] + np.uint32(i + 1)
    uniform = ((a >> np.uint32(9)).astype(jnp.int32).astype(jnp.float32) + 0.5) * np.float32(2.0**-23)
    return -jnp.log(-jnp.log(uniform))
