"""The best tokens of each row of logits on the Triton backend, until their weights reach a total; without a sort.

The logit at the cut is found four bits at a time. A pass gives, for each chunk of a row, the weights of the tokens
above 15 candidates; the next pass adds the chunks up and goes on from the digit found. Chunks depend on the vocabulary
alone, so a row gets the same sums in any batch.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

BITS, DIGITS = 4, 16
PASSES = 32 // BITS
CHUNKS = 32  # of a row
STEP = 512  # tokens that a turn of a loop takes
TOP = np.int32(-(2**31))  # the sign bit: numbers are compared as signed, digits are of unsigned ones


class Place(NamedTuple):
    """A program's chunk of a row: tokens from chunk * size on."""

    size: int
    interpret: bool
    row: Any
    chunk: Any


def keep_best(logits: jax.Array, total: jax.Array, likely: bool, interpret: bool) -> jax.Array:
    """Keep the best tokens, equal ones by token id, until their weights reach `total`.

    Args:
      logits: float32 [B, V].
      total: float32 [B]; infinity keeps all.
      likely: weights are softmax(logits); else each token weighs 1.
      interpret: run without a GPU.

    Returns:
      float32 [B, V], -inf for the tokens removed.
    """
    rows, vocab = logits.shape
    size = -(-vocab // (CHUNKS * STEP)) * STEP
    chunks = -(-vocab // size)
    given = [logits, total]
    if likely:
        best = jnp.max(logits, axis=-1)
        given += [best, jnp.sum(jnp.exp(logits - best[:, None]), axis=-1)]
    call = functools.partial(_call, likely, size, (rows, chunks), interpret)
    sums = jax.ShapeDtypeStruct((rows, chunks, DIGITS), jnp.float32)
    cuts = jax.ShapeDtypeStruct((rows,), jnp.int32)
    found: tuple[jax.Array, ...] = ()
    for i in range(PASSES):
        found = call(functools.partial(_digit_kernel, 32 - BITS * (i + 1)), (sums, cuts), "cut_digit", *given, *found)
    parts = jax.ShapeDtypeStruct((rows, chunks), jnp.float32), jax.ShapeDtypeStruct((rows, chunks), jnp.int32)
    above, equal, cut = call(_count_kernel, (*parts, cuts), "cut_count", *given, *found)
    return call(_keep_kernel, logits, "cut_keep", *given, above, equal, cut)


def _call(
    likely: bool, size: int, grid: tuple[int, int], interpret: bool, kernel: Any, out: Any, name: str, *given: jax.Array
) -> Any:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    inputs = 4 if likely else 2
    single = not isinstance(out, tuple)
    return pl.pallas_call(
        lambda *refs: kernel(Place(size, interpret, pl.program_id(0), pl.program_id(1)), refs[:inputs], *refs[inputs:]),
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype) if single else out,
        grid=grid,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name=name,
    )(*given)


def _tokens(place: Place, given: Any, i: Any) -> tuple[jax.Array, ...]:
    """(ids, whether they exist, logits, their order as int32, their weights) of one turn over the program's chunk."""
    from jax.experimental.pallas import triton as plgpu

    size, interpret, row, chunk = place
    logits, vocab = given[0], given[0].shape[1]
    token = chunk * size + i * STEP + jnp.arange(STEP, dtype=jnp.int32)
    here = token < vocab
    at = jnp.where(here, token, vocab) if interpret else token
    x = plgpu.load(logits.at[jnp.full(at.shape, row, jnp.int32), at], mask=here, other=-jnp.inf)
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)
    order = jnp.where(bits < 0, bits ^ np.int32(2**31 - 1), bits)
    weight = jnp.ones(x.shape, jnp.float32) if len(given) == 2 else jnp.exp(x - given[2][row]) / given[3][row]
    return at, here, x, order, jnp.where(here, weight, 0.0)


def _cut(place: Place, given: Any, shift: int, sums: Any, cuts: Any) -> jax.Array:
    """The cut so far, from the sums of the pass that looked for the digit at `shift`."""
    from jax.experimental.pallas import triton as plgpu

    row, chunks = place.row, sums.shape[1]
    at = jnp.broadcast_arrays(row, jnp.arange(CHUNKS)[:, None], jnp.arange(DIGITS)[None, :])
    parts = plgpu.load(sums.at[tuple(at)], mask=at[1] < chunks, other=0.0)
    digit = jnp.arange(DIGITS, dtype=jnp.int32)
    reached = (jnp.sum(parts, axis=0) >= given[1][row]) & (digit > 0)
    # A higher cut weighs less, so the digit is how many are reached.
    return cuts[row] | (jnp.sum(jnp.where(reached, 1, 0)) << shift)


def _digit_kernel(shift: int, place: Place, given: Any, *refs: Any) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    sums, cuts = refs[-2:]
    row, chunk = place.row, place.chunk
    cut = jnp.int32(0) if len(refs) == 2 else _cut(place, given, shift + BITS, *refs[:2])
    digit = jnp.arange(DIGITS, dtype=jnp.int32)
    candidates = (cut | (digit << shift)) ^ TOP

    def add(i: Any, total: jax.Array) -> jax.Array:
        _, _, _, order, weight = _tokens(place, given, i)
        return total + jnp.sum(jnp.where(order[:, None] >= candidates[None, :], weight[:, None], 0.0), axis=0)

    total = lax.fori_loop(0, place.size // STEP, add, jnp.zeros((DIGITS,), jnp.float32))
    plgpu.store(sums.at[row, chunk, pl.ds(0, DIGITS)], total)

    def note() -> None:
        cuts[row] = cut

    pl.when(chunk == 0)(note)


def _count_kernel(place: Place, given: Any, sums: Any, cuts: Any, *out: Any) -> None:
    """Weights above the cut and how many tokens are at it, of each chunk."""
    from jax.experimental import pallas as pl

    above, equal, final = out
    row, chunk = place.row, place.chunk
    cut = _cut(place, given, 0, sums, cuts)

    def add(i: Any, carry: tuple) -> tuple:
        _, here, _, order, weight = _tokens(place, given, i)
        better, same = order > cut ^ TOP, here & (order == cut ^ TOP)
        return carry[0] + jnp.sum(jnp.where(better, weight, 0.0)), carry[1] + jnp.sum(jnp.where(same, 1, 0))

    above[row, chunk], equal[row, chunk] = lax.fori_loop(0, place.size // STEP, add, (jnp.float32(0), jnp.int32(0)))

    def note() -> None:
        final[row] = cut

    pl.when(chunk == 0)(note)


def _keep_kernel(place: Place, given: Any, above: Any, equal: Any, cuts: Any, out: Any) -> None:
    from jax.experimental.pallas import triton as plgpu

    row, chunk, chunks = place.row, place.chunk, above.shape[1]
    lane = jnp.arange(CHUNKS, dtype=jnp.int32)
    at = jnp.full(lane.shape, row, jnp.int32), lane
    weight_above = jnp.sum(plgpu.load(above.at[at], mask=lane < chunks, other=0.0))
    earlier = jnp.sum(plgpu.load(equal.at[at], mask=lane < lax.min(chunk, chunks), other=0))
    cut, total = cuts[row] ^ TOP, given[1][row]

    def keep(i: Any, earlier: jax.Array) -> jax.Array:
        at, here, x, order, weight = _tokens(place, given, i)
        same = here & (order == cut)
        counted = jnp.where(same, 1, 0)
        rank = earlier + jnp.cumsum(counted) - 1
        kept = (order > cut) | (same & (weight_above + rank.astype(jnp.float32) * weight < total))
        plgpu.store(out.at[jnp.full(at.shape, row, jnp.int32), at], jnp.where(kept, x, -jnp.inf), mask=here)
        return earlier + jnp.sum(counted)

    lax.fori_loop(0, place.size // STEP, keep, earlier)
