"""Codes made floats in registers, and their product: what all product kernels of the Triton backend share."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_kernels.tiles import PLANE


def dot(weights: jax.Array, x: jax.Array, interpret: bool) -> jax.Array:
    """weights [n, k] times x [rows, k], transposed: float32 [n, rows]."""
    if interpret:
        weights, x = weights.astype(jnp.float32), x.astype(jnp.float32)
    return lax.dot_general(weights, x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def side_by_side(planes: list[jax.Array]) -> jax.Array:
    """[n, 32 * planes] of one, two or four planes: a change of names, no data moves between threads."""
    if len(planes) == 1:
        return planes[0]
    n = planes[0].shape[0]
    if len(planes) == 2:
        return jnp.transpose(jnp.stack(planes, -1), (0, 2, 1)).reshape(n, 2 * PLANE)
    a, b, c, d = planes
    four = jnp.stack([jnp.stack([a, b], -1), jnp.stack([c, d], -1)], -1)
    return jnp.transpose(four, (0, 3, 2, 1)).reshape(n, 4 * PLANE)


def span_of(bits: int, group: int, groups: int) -> int:
    """Planes of a block that share a scale.

    >>> span_of(4, 128, 16), span_of(4, 64, 32), span_of(8, 32, 64), span_of(4, 2048, 1)
    (4, 2, 1, 4)
    """
    planes = 16 // bits
    return next(p for p in (planes, planes // 2, 1) if groups == 1 or group % (p * PLANE) == 0)


def group_of(block: Any, plane: int, bits: int, group: int, groups: int) -> Any:
    """The group of a plane of a block; blocks that are padding have the last's.

    Args:
      block: of the weight, from 0.
      plane: of the block.
      bits: 4 or 8.
      group: inputs of a group.
      groups: of the weight.

    >>> [int(group_of(5, plane, 4, 64, 16)) for plane in range(4)], int(group_of(5, 3, 4, 512, 16))
    ([10, 10, 11, 11], 1)
    """
    run = 16 // bits * PLANE
    if run % group == 0:
        found = block * (run // group) + plane * PLANE // group
    else:
        found = lax.div(block * run + plane * PLANE, group)
    return lax.min(found, groups - 1)


@functools.partial(jax.jit, static_argnames=("bits", "interpret"))  # so that it is traced once for its shapes
def multiply_block(
    words: jax.Array,
    zeros: list[jax.Array | None],
    scales: list[jax.Array],
    x: list[jax.Array],
    total: jax.Array,
    bits: int,
    interpret: bool,
) -> jax.Array:
    """A sum and the product of one block of weights.

    Args:
      words: uint16 [n, 32].
      zeros: uint8 [n] or None for each run of planes that share a scale.
      scales: [n] for each of those runs; nothing where all blocks share one, which multiplies the sum at its end.
      x: [rows, 32 * p] for each p planes, which are multiplied at once.
      total: float32 [n, rows].
      bits: 4 or 8.
      interpret: use plain operations.

    Returns:
      float32 [n, rows].
    """
    planes = 16 // bits
    span, wide = planes // len(zeros), planes // len(x)
    for j in range(0, planes, span):
        part: Any = None if scales else total
        for i in range(j, j + span, wide):
            plane = [decode(words, i + p, bits, zeros[j // span], x[0].dtype, interpret) for p in range(wide)]
            d = dot(side_by_side(plane), x[i // wide], interpret)
            part = d if part is None else part + d
        total = total + part * scales[j // span].astype(jnp.float32)[:, None] if scales else part
    return total


def decode(words: jax.Array, j: int, bits: int, zero: jax.Array | None, dtype: Any, interpret: bool) -> jax.Array:
    """Plane j of containers [n, 32] as code - zero, exact in `dtype`.

    Args:
      words: uint16 [n, 32].
      j: plane.
      bits: 4 or 8.
      zero: uint8 [n], or None for 2**(bits - 1).
      dtype: bfloat16 or float16.
      interpret: use plain operations.

    Returns:
      [n, 32].
    """
    if interpret:
        code = (words.astype(jnp.int32) >> (bits * j)) & (2**bits - 1)
        return (code - (2 ** (bits - 1) if zero is None else zero.astype(jnp.int32)[:, None])).astype(dtype)
    from jax.experimental.pallas import triton as plgpu

    if jnp.dtype(dtype) == jnp.bfloat16 and bits == 8:
        asm, base = _wide_asm(j, zero is not None), 0.0
    else:
        asm, base = _narrow_asm(j, bits, jnp.dtype(dtype) == jnp.bfloat16, zero is not None)
    args, constraints = [words], "=r,r"
    if zero is not None:
        minus = (-base - zero.astype(jnp.float32)).astype(dtype)
        args, constraints = [words, jnp.broadcast_to(minus[:, None], words.shape)], "=r,r,r"
    [value] = plgpu.elementwise_inline_asm(
        asm, args=args, constraints=constraints, pack=2, result_shape_dtypes=[jax.ShapeDtypeStruct(words.shape, dtype)]
    )
    return value


def _narrow_asm(j: int, bits: int, bfloat: bool, zero: bool) -> tuple[str, float]:
    """PTX for two containers, and what the code has been added to: a float whose last bit is worth one.

    `(x >> shift) & mask | base` is base + code in both halves of a register; a fused multiply-add takes base + zero
    away. Exact: all of these are integers that the dtype holds.
    """
    base, bits_of_base, kind = (128.0, 0x4300, "bf16x2") if bfloat else (1024.0, 0x6400, "f16x2")
    one = 0x3F803F80 if bfloat else 0x3C003C00
    mask = 2**bits - 1
    # -(base + middle): the middle is added to the last places of base's bits, and the sign is the top one.
    minus = 0x8000 | (bits_of_base + 2 ** (bits - 1))
    subtract = "$2" if zero else "m"
    constant = "" if zero else f"mov.b32 m, 0x{minus:04x}{minus:04x}; "
    shift = f"shr.b32 t, $1, {bits * j}; lop3.b32 t, t, " if j else "lop3.b32 t, $1, "
    asm = (
        "{ .reg .b32 t, m, u; " + constant + f"mov.b32 u, 0x{one:08x}; "
        f"{shift}0x{mask:04x}{mask:04x}, 0x{bits_of_base:04x}{bits_of_base:04x}, 0xea; "
        f"fma.rn.{kind} $0, t, u, {subtract}; }}"
    )
    return asm, base


def _wide_asm(j: int, zero: bool) -> str:
    """PTX for two containers of 8-bit codes to bfloat16, which has too few places for the trick: by way of float32."""
    low, high = 0x7440 | j, 0x7440 | (2 + j)
    middle = "mov.b32 z, 0xc3000000; mov.b32 y, 0xc3000000; "  # -128.0
    if zero:
        middle = "shl.b32 z, $2, 16; and.b32 y, $2, 0xffff0000; "
    return (
        "{ .reg .b32 a, b; .reg .f32 z, y, c, d; " + middle + f"prmt.b32 a, $1, 0x4b000000, 0x{low:04x}; "
        f"prmt.b32 b, $1, 0x4b000000, 0x{high:04x}; "
        "mov.b32 c, a; mov.b32 d, b; sub.f32 c, c, 0f4B000000; sub.f32 d, d, 0f4B000000; "
        "add.f32 c, c, z; add.f32 d, d, y; cvt.rn.bf16x2.f32 $0, d, c; }"
    )
