"""Sums and norms between the branches of a layer on the Triton backend: one kernel where XLA makes several.

`add_norm` adds a branch's output to the residual stream and normalises the sum; the output may come in parts or, of
experts, in pairs. `add_norm_route` gives the router's logits of the normed sum too; for few tokens in the same kernel:
its programs share the experts, and each normalises the tokens again, which is cheaper than another kernel. Vectors and
routers come as stacks with a layer number, so nothing is sliced.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_kernels.pairs import Pairs
from ferrum_kernels.triton_call import call
from ferrum_kernels.triton_route import power

FEW = 4  # tokens up to which one kernel gives the router's logits too; more go to the matrix units
COLUMNS = 4  # experts of a program of that kernel
DTYPES = (jnp.bfloat16, jnp.float16)
NUMBER = jax.ShapeDtypeStruct((1,), jnp.int32)


def takes(x: jax.Array, *others: jax.Array) -> bool:
    """Whether these kernels take a stream and what is multiplied with it: 16-bit floats of one dtype, some tokens."""
    return x.dtype in DTYPES and x.size > 0 and all(other.dtype == x.dtype for other in others)


def _stack(array: jax.Array, layer: Any, rank: int) -> tuple[jax.Array, jax.Array]:
    """(stack, int32 [1] index) of an array with or without a layer axis."""
    stack = array[None] if array.ndim == rank else array
    return stack, jnp.reshape(jnp.asarray(0 if layer is None else layer, jnp.int32), (1,))


def add_norm(
    x: jax.Array, y: jax.Array | Pairs, weight: jax.Array, layer: Any, eps: float, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x + y in x.dtype, and its RMS norm computed from that in float32.

    Args:
      x: bfloat16 or float16 [T, D].
      y: any float [T, D], parts [P, T, D] of a sum, as `triton_rows.product` leaves them, or pairs of experts.
      weight: [D], or [L, D] with `layer`.
      layer: index into the stack, or None.
      eps: added to the mean square.
      interpret: run without a GPU.

    Returns:
      (sum, norm), both [T, D] in x.dtype, and int32 [1], the number of the layer after this one: made here it is no
      launch of its own.
    """

    tokens, d = x.shape
    stack, index = _stack(weight, layer, 1)
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    # Of parts a thread has so few numbers that their loads are all under way at once.
    many = isinstance(y, Pairs) or y.ndim > 2
    warps = 4 if d <= 1024 else 16 if many else 8
    branch, tree = jax.tree.flatten(y)
    kernel = functools.partial(_norm_kernel, d, eps, interpret, tree)
    given = (x, stack, index, *branch)
    return call(kernel, given, (out, out, NUMBER), (tokens,), "add_norm", warps=warps, interpret=interpret)


def _norm_kernel(d: int, eps: float, interpret: bool, tree: Any, x: Any, weight: Any, layer: Any, *refs: Any) -> None:
    from jax.experimental import pallas as pl

    *branch, total, normed, after = refs
    row = pl.program_id(0)
    lane, here = _some(0, power(d), d, interpret)
    w = _load(weight, (layer[0], lane), here)  # first, as a load is not moved across the sum's barriers
    summed = _sum(x, jax.tree.unflatten(tree, branch), row, lane, here)
    scale = lax.rsqrt(jnp.sum(summed * summed) / d + eps)
    _store(total, (row, lane), summed, here)
    _store(normed, (row, lane), summed * scale * w, here)
    pl.when(row == 0)(lambda: _set(after, layer[0] + 1))


def add_norm_route(
    x: jax.Array, y: jax.Array, weight: jax.Array, router: jax.Array, layer: Any, eps: float, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """As add_norm, and the logits of a router: one kernel for few tokens, two for more.

    Args:
      x, weight, layer, eps, interpret: as add_norm; weight [D] or [L, D].
      y: any float [T, D] or parts [P, T, D] of a sum.
      router: of x's dtype [E, D], or [L, E, D] with `layer`.

    Returns:
      (sum [T, D], norm [T, D], logits float32 [T, E] or, where `logit_parts` is more than 1, [parts, T, E] to be added
      up, and int32 [1], zero, for `triton_place.route_and_place`: made here it is no launch of its own). Products of
      two 16-bit floats are exact in the float32 sum.
    """
    if x.shape[0] > FEW:
        total, norm, _ = add_norm(x, y, weight, layer, eps, interpret)
        return total, norm, *_route(norm, router, layer, interpret)

    tokens, d = x.shape
    experts = router.shape[-2]
    weights, index = _stack(weight, layer, 1)
    routers, _ = _stack(router, layer, 2)
    stream = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return call(
        functools.partial(_few_kernel, d, experts, tokens, eps, interpret),
        (x, y, weights, routers, index),
        (stream, stream, jax.ShapeDtypeStruct((tokens, experts), jnp.float32), NUMBER),
        (-(-experts // COLUMNS),),
        "add_norm_route",
        warps=_few_warps(d),
        interpret=interpret,
    )


def _few_warps(d: int) -> int:
    """So many that a thread has few numbers, whose loads are all under way at once."""
    return min(32, max(4, power(d) // 64))


def _few_kernel(d: int, experts: int, rows: int, eps: float, interpret: bool, *refs: Any) -> None:
    """All inputs of some experts at once, a token after the other."""
    from jax.experimental import pallas as pl

    x, y, weight, router, layer, total, normed, logits, arrived = refs
    first = pl.program_id(0)
    lane, here = _some(0, power(d), d, interpret)
    column, real = _some(first * COLUMNS, COLUMNS, experts, interpret)
    at = jnp.broadcast_arrays(column[:, None], lane[None, :])
    matrix = _load(router, (layer[0], *at), real[:, None] & here[None, :])
    w = _load(weight, (layer[0], lane), here)
    for row in range(rows):
        summed = _sum(x, y, row, lane, here)
        scale = lax.rsqrt(jnp.sum(summed * summed) / d + eps)
        norm = (summed * scale * w).astype(normed.dtype)
        _store(logits, (row, column), jnp.sum(matrix * norm.astype(jnp.float32)[None, :], axis=1), real)

        def keep(row: int = row, summed: jax.Array = summed, norm: jax.Array = norm) -> None:
            _store(total, (row, lane), summed, here)
            _store(normed, (row, lane), norm, here)

        pl.when(first == 0)(keep)
    pl.when(first == 0)(lambda: _set(arrived, 0))


def _set(number: Any, value: Any) -> None:
    number[0] = jnp.int32(value)


def logit_parts(tokens: int) -> int:
    """In how many parts the logits of some tokens come."""
    return 1 if tokens <= FEW else _router_cut(tokens)[1]


def _router_cut(tokens: int) -> tuple[int, int]:
    """Tokens, and as many experts, of a program; parts that the inputs are cut into, as few programs have long sums."""
    return (16, 8) if tokens <= 256 else (64, 1)


def _route(x: jax.Array, router: jax.Array, layer: Any, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """float32 x [T, D] @ router.T on the matrix units; not XLA's product, which would make the router float32 first."""

    tokens, experts = x.shape[0], router.shape[-2]
    routers, index = _stack(router, layer, 2)
    size, parts = _router_cut(tokens)
    logits, arrived = call(
        functools.partial(_route_kernel, size, interpret),
        (x, routers, index),
        (jax.ShapeDtypeStruct((parts, tokens, experts), jnp.float32), NUMBER),
        (-(-experts // size), -(-tokens // size), parts),
        "router",
        warps=4,
        stages=4,
        interpret=interpret,
    )
    return (logits[0] if parts == 1 else logits), arrived


def _route_kernel(size: int, interpret: bool, x: Any, router: Any, layer: Any, logits: Any, arrived: Any) -> None:
    from jax.experimental import pallas as pl

    (parts, tokens, experts), d = logits.shape, x.shape[1]
    index, part, each = layer[0], pl.program_id(2), -(-d // parts)
    token, seen = _some(pl.program_id(1) * size, size, tokens, interpret)
    expert, real = _some(pl.program_id(0) * size, size, experts, interpret)
    width = min(128, max(16, power(each)))
    dtype = jnp.float32 if interpret else None

    def multiply(i: Any, sums: jax.Array) -> jax.Array:
        inside = i * width + jnp.arange(width, dtype=jnp.int32)
        lane = part * each + inside
        here = ((inside < each) & (lane < d))[None, :]
        stream = _load(x, (token[:, None], lane[None, :]), seen[:, None] & here, dtype)
        matrix = _load(router, (index, expert[:, None], lane[None, :]), real[:, None] & here, dtype)
        return sums + lax.dot_general(stream, matrix, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    sums = lax.fori_loop(0, -(-each // width), multiply, jnp.zeros((size, size), jnp.float32))
    _store(logits, (part, token[:, None], expert[None, :]), sums, seen[:, None] & real[None, :])
    pl.when((pl.program_id(0) == 0) & (pl.program_id(1) == 0) & (part == 0))(lambda: _set(arrived, 0))


def _some(start: Any, size: int, limit: int, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """(indices, which of them exist)."""
    index = start + jnp.arange(size, dtype=jnp.int32)
    # The interpreter writes what a mask hides as well. Compiled, a changed index would cost the wide loads.
    return (jnp.where(index < limit, index, limit) if interpret else index), index < limit


def _sum(x: Any, y: Any, row: Any, lane: Any, mask: jax.Array) -> jax.Array:
    """float32 values of x + y as x.dtype holds them; parts or pairs of y are added up one after the other first."""
    if isinstance(y, Pairs):
        branch = functools.reduce(jnp.add, [_pair(y, row, k, lane, mask) for k in range(y.live.shape[1])])
    elif len(y.shape) == 2:
        branch = _load(y, (row, lane), mask)
    else:
        branch = functools.reduce(jnp.add, [_load(y, (part, row, lane), mask) for part in range(y.shape[0])])
    return (_load(x, (row, lane), mask) + branch).astype(x.dtype).astype(jnp.float32)


def _pair(y: Pairs, row: Any, k: int, lane: Any, mask: jax.Array) -> jax.Array:
    """One pair of a token; nobody's is read as well, so that reading does not wait for whose it is."""
    value, expert = _load(y.values, (row * y.live.shape[1] + k, lane), mask), y.live[row, k]
    value = value if y.weights is None else value * y.weights[row, k]
    return jnp.where((expert >= 0) & (expert < y.num_experts), value, 0.0)


def _load(ref: Any, index: tuple, mask: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    from jax.experimental.pallas import triton as plgpu

    index = tuple(jnp.broadcast_to(jnp.asarray(i, jnp.int32), mask.shape) for i in index)
    values = plgpu.load(ref.at[index], mask=mask, other=0)
    return values if dtype is None else values.astype(dtype)


def _store(ref: Any, index: tuple, values: jax.Array, mask: jax.Array) -> None:
    from jax.experimental.pallas import triton as plgpu

    index = tuple(jnp.broadcast_to(jnp.asarray(i, jnp.int32), mask.shape) for i in index)
    plgpu.store(ref.at[index], values.astype(ref.dtype), mask=mask)
