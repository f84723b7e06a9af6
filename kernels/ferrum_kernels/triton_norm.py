"""Sums and norms between the branches of a layer on the Triton backend: one kernel where XLA makes several.

`add_norm` adds a branch's output to the residual stream and normalises the sum. `add_norm_route` gives the router's
logits of the normed sum too; for few tokens in the same kernel: its programs share the experts, and each normalises
the tokens again, which is cheaper than another kernel. Vectors and routers come as stacks with a layer number, so
nothing is sliced.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_kernels.triton_route import power

FEW = 4  # tokens up to which one kernel gives the router's logits too; more go to the matrix units
COLUMNS, FEW_WARPS = 4, 16  # experts and warps of a program of that kernel
PARTS_UP_TO = 256  # tokens whose logits come in parts: their programs would be few, with a long sum each
DTYPES = (jnp.bfloat16, jnp.float16)


def takes(x: jax.Array, *others: jax.Array) -> bool:
    """Whether these kernels take a stream and what is multiplied with it: 16-bit floats of one dtype, some tokens."""
    return x.dtype in DTYPES and x.size > 0 and all(other.dtype == x.dtype for other in others)


def _stack(array: jax.Array, layer: Any, rank: int) -> tuple[jax.Array, jax.Array]:
    """(stack, int32 [1] index) of an array with or without a layer axis."""
    stack = array[None] if array.ndim == rank else array
    return stack, jnp.reshape(jnp.asarray(0 if layer is None else layer, jnp.int32), (1,))


def add_norm(
    x: jax.Array, y: jax.Array, weight: jax.Array, layer: Any, eps: float, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """x + y in x.dtype, and its RMS norm computed from that in float32.

    Args:
      x: bfloat16 or float16 [T, D].
      y: any float [T, D], or parts [P, T, D] of a sum, as `triton_rows.product` leaves them.
      weight: [D], or [L, D] with `layer`.
      layer: index into the stack, or None.
      eps: added to the mean square.
      interpret: run without a GPU.

    Returns:
      (sum, norm), both [T, D] in x.dtype.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    tokens, d = x.shape
    stack, index = _stack(weight, layer, 1)
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(
        functools.partial(_norm_kernel, d, eps, interpret),
        out_shape=(out, out),
        grid=(tokens,),
        compiler_params=plgpu.CompilerParams(num_warps=_warps(d, y), num_stages=1),
        interpret=interpret,
        name="add_norm",
    )(x, y, stack, index)


def _warps(d: int, y: jax.Array) -> int:
    """Warps of a program: with many parts so many that a thread has few numbers, whose loads then are all under way."""
    parts = y.shape[0] if y.ndim == 3 else 1
    return max(8 if d > 1024 else 4, min(32, power(d) * power(parts) // 512))


def _norm_kernel(
    d: int, eps: float, interpret: bool, x: Any, y: Any, weight: Any, layer: Any, total: Any, normed: Any
) -> None:
    from jax.experimental import pallas as pl

    row = pl.program_id(0)
    lane, here = _some(0, power(d), d, interpret)
    w = _load(weight, (layer[0], lane), here)  # first, as a load is not moved across the sum's barriers
    summed = _sum(x, y, row, lane, here)
    scale = lax.rsqrt(jnp.sum(summed * summed) / d + eps)
    _store(total, (row, lane), summed, here)
    _store(normed, (row, lane), summed * scale * w, here)


def add_norm_route(
    x: jax.Array, y: jax.Array, weight: jax.Array, router: jax.Array, layer: Any, eps: float, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As add_norm, and the logits of a router: one kernel for few tokens, two for more.

    Args:
      x, y, weight, layer, eps, interpret: as add_norm; weight [D] or [L, D].
      router: of x's dtype [E, D], or [L, E, D] with `layer`.

    Returns:
      (sum [T, D], norm [T, D], logits float32 [T, E] or, where `logit_parts` is more than 1, [parts, T, E] to be added
      up). Products of two 16-bit floats are exact in the float32 sum.
    """
    if x.shape[0] > FEW:
        total, norm = add_norm(x, y, weight, layer, eps, interpret)
        return total, norm, _route(norm, router, layer, interpret)
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    tokens, d = x.shape
    experts = router.shape[-2]
    weights, index = _stack(weight, layer, 1)
    routers, _ = _stack(router, layer, 2)
    stream = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(
        functools.partial(_few_kernel, d, experts, tokens, eps, interpret),
        out_shape=(stream, stream, jax.ShapeDtypeStruct((tokens, experts), jnp.float32)),
        grid=(-(-experts // COLUMNS),),
        compiler_params=plgpu.CompilerParams(num_warps=FEW_WARPS, num_stages=1),
        interpret=interpret,
        name="add_norm_route",
    )(x, y, weights, routers, index)


def _few_kernel(d: int, experts: int, rows: int, eps: float, interpret: bool, *refs: Any) -> None:
    """All inputs of some experts at once, a token after the other."""
    from jax.experimental import pallas as pl

    x, y, weight, router, layer, total, normed, logits = refs
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


def logit_parts(tokens: int) -> int:
    """In how many parts the logits of some tokens come."""
    return 1 if tokens <= FEW else _router_cut(tokens)[3]


def _router_cut(tokens: int) -> tuple[int, int, int, int]:
    """Tokens, experts and segments of the inputs of a program, and parts of the inputs, each a program's."""
    return (16, 16, 2, 8) if tokens <= PARTS_UP_TO else (64, 64, 1, 1)


def _route(x: jax.Array, router: jax.Array, layer: Any, interpret: bool) -> jax.Array:
    """float32 x [T, D] @ router.T on the matrix units; not XLA's product, which would make the router float32 first."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    tokens, experts = x.shape[0], router.shape[-2]
    routers, index = _stack(router, layer, 2)
    # Few programs wait for memory: each reads several segments of the inputs at a time.
    rows, columns, segments, parts = _router_cut(tokens)
    logits = pl.pallas_call(
        functools.partial(_route_kernel, rows, columns, segments, interpret),
        out_shape=jax.ShapeDtypeStruct((parts, tokens, experts), jnp.float32),
        grid=(-(-experts // columns), -(-tokens // rows), parts),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3 if segments > 1 else 4),
        interpret=interpret,
        name="router",
    )(x, routers, index)
    return logits[0] if parts == 1 else logits


def _route_kernel(
    rows: int, columns: int, segments: int, interpret: bool, x: Any, router: Any, layer: Any, logits: Any
) -> None:
    """Rows of all segments times columns of all segments, in one product; those of one segment count."""
    from jax.experimental import pallas as pl

    (tokens, d), experts, parts = x.shape, router.shape[-2], logits.shape[0]
    each, part = -(-d // (segments * parts)), pl.program_id(2)
    line, place = jnp.arange(segments * rows, dtype=jnp.int32), jnp.arange(columns * segments, dtype=jnp.int32)
    row, column = pl.program_id(1) * rows + line % rows, pl.program_id(0) * columns + place // segments
    size = min(128, max(16, power(each)))
    dtype, index = jnp.float32 if interpret else None, layer[0]

    def read(ref: Any, lead: tuple, line: jax.Array, limit: int, segment: jax.Array, lane: jax.Array) -> jax.Array:
        start = (part * segments + segment) * each
        at = jnp.broadcast_arrays(line[:, None], start[:, None] + lane[None, :])
        seen = (at[0] < limit) & (lane < each)[None, :] & (at[1] < d)
        return _load(ref, (*lead, *at), seen, dtype)

    def multiply(i: Any, sums: jax.Array) -> jax.Array:
        lane = i * size + jnp.arange(size, dtype=jnp.int32)
        stream = read(x, (), row, tokens, line // rows, lane)
        matrix = read(router, (index,), column, experts, place % segments, lane)
        return sums + lax.dot_general(stream, matrix, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    sums = lax.fori_loop(0, -(-each // size), multiply, jnp.zeros((line.shape[0], place.shape[0]), jnp.float32))
    own = (line // rows)[:, None] == (place % segments)[None, :]
    sums = jnp.sum(jnp.where(own, sums, 0.0).reshape(segments, rows, place.shape[0]), axis=0)
    sums = jnp.sum(sums.reshape(rows, columns, segments), axis=2)
    token, seen = _some(pl.program_id(1) * rows, rows, tokens, interpret)
    expert, real = _some(pl.program_id(0) * columns, columns, experts, interpret)
    at = tuple(jnp.broadcast_arrays(token[:, None], expert[None, :]))
    _store(logits, (part, *at), sums, seen[:, None] & real[None, :])


def _some(start: Any, size: int, limit: int, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """(indices, which of them exist)."""
    index = start + jnp.arange(size, dtype=jnp.int32)
    # The interpreter writes what a mask hides as well. Compiled, a changed index would cost the wide loads.
    return (jnp.where(index < limit, index, limit) if interpret else index), index < limit


def _sum(x: Any, y: Any, row: Any, lane: Any, mask: jax.Array) -> jax.Array:
    """float32 values of x + y as x.dtype holds them; parts of y are added up one after the other first."""
    if len(y.shape) == 2:
        branch = _load(y, (row, lane), mask)
    else:
        branch = functools.reduce(jnp.add, [_load(y, (part, row, lane), mask) for part in range(y.shape[0])])
    return (_load(x, (row, lane), mask) + branch).astype(x.dtype).astype(jnp.float32)


def _load(ref: Any, index: tuple, mask: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    from jax.experimental.pallas import triton as plgpu

    index = tuple(jnp.broadcast_to(jnp.asarray(i, jnp.int32), mask.shape) for i in index)
    values = plgpu.load(ref.at[index], mask=mask, other=0)
    return values if dtype is None else values.astype(dtype)


def _store(ref: Any, index: tuple, values: jax.Array, mask: jax.Array) -> None:
    from jax.experimental.pallas import triton as plgpu

    index = tuple(jnp.broadcast_to(jnp.asarray(i, jnp.int32), mask.shape) for i in index)
    plgpu.store(ref.at[index], values.astype(ref.dtype), mask=mask)
