"""Rows of logits as the sampling kernels of the Triton backend see them: tiles of groups whose best token is known.

How a row is cut up depends on the vocabulary alone, so it gets the same sums in any batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ferrum_kernels.triton_call import call

GROUP = 64  # tokens
TILE = 4096  # tokens of a program
PART = 1024  # of them that are left out together
LIST = 4096  # tokens that are left at most; a row with more is read whole, bit by bit
TOP = np.int32(-(2**31))  # the sign bit: numbers are compared as signed, bits are found of unsigned ones
REST = np.int32(2**31 - 1)

Refs = dict[str, Any]


def call_kernel(
    interpret: bool,
    kernel: Any,
    given: Refs,
    out: Refs,
    grid: tuple[int, ...],
    name: str,
    warps: int = 4,
) -> dict[str, jax.Array]:
    """Run kernel(interpret, inputs, outputs, *program ids); gives its outputs."""
    from jax.experimental import pallas as pl

    def run(*refs: Any) -> None:
        r = dict(zip(given, refs, strict=False))
        o = dict(zip(out, refs[len(given) :], strict=True))
        kernel(interpret, r, o, *(pl.program_id(i) for i in range(len(grid))))

    shapes = tuple(out.values())
    results = call(run, list(given.values()), shapes, grid, name, warps=warps, interpret=interpret)
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


def order(x: jax.Array) -> jax.Array:
    """int32 numbers in the order of floats, with -0 equal to 0."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)
    return jnp.where(bits < 0, bits ^ REST, bits)


def float_of(order: jax.Array) -> jax.Array:
    """The float of such a number."""
    return lax.bitcast_convert_type(jnp.where(order < 0, order ^ REST, order), jnp.float32)


def tokens(interpret: bool, r: Refs, row: Any, token: jax.Array, low: Any) -> jax.Array:
    """The logits of some token ids, scaled; -inf in groups with nothing from `low` on."""
    vocab, groups = r["logits"].shape[1], r["best"].shape[1]
    group = lax.div(token, GROUP)
    best = read(r["best"], row, group, group < groups, -jnp.inf, interpret)
    return read(r["logits"], row, token, (token < vocab) & (best >= low), -jnp.inf, interpret) * r["scale"][row]


def over_parts(interpret: bool, r: Refs, row: Any, tile: Any, low: Any, f: Callable[[Any, Any], Any], init: Any) -> Any:
    """The last of f(first token, carry) over the parts of a tile that have a token from `low` on."""
    size = part_size(interpret)
    lane = jnp.arange(TILE // GROUP, dtype=jnp.int32)
    group = tile * (TILE // GROUP) + lane
    best = read(r["best"], row, group, group < r["best"].shape[1], -jnp.inf, interpret)
    part = lax.div(lane, size // GROUP)

    def one(i: Any, carry: Any) -> Any:
        some = jnp.max(jnp.where(part == i, best, -jnp.inf)) >= low
        return lax.cond(some, lambda: f(tile * TILE + i * size, carry), lambda: carry)

    return lax.fori_loop(0, TILE // size, one, init)


def part_size(interpret: bool) -> int:
    """Tokens of a part; without a GPU nothing is left out."""
    return TILE if interpret else PART
