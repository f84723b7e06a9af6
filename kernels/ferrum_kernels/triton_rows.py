"""Products of few rows with one packed matrix on the Triton backend: no long sum, all warps busy.

With few rows a product is over before a long sum is. A program's inputs are cut into segments, and the segments of one
output lie in different rows of the matrix units' left operand, so that different warps add them up. The right operand
has a column per row and segment; of the product only the entries of a segment with itself are kept.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_kernels.tiles import PLANE, TiledLinear
from ferrum_kernels.triton_decode import multiply_block, span_of
from ferrum_kernels.triton_matmul import LEAST_ROWS
from ferrum_kernels.triton_route import power

MOST = 16  # rows
SEGMENT = 4  # blocks of weights, about
COLUMNS = 64  # of the matrix units' right operand
MOST_SEGMENTS = 16  # more would need more registers and shared memory than a program has


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a product of few rows is cut up.

    Attributes:
      n: outputs of a program, a power of two from 16 that divides them.
      splits: segments of the inputs, a power of two that divides the weight's blocks.
      warps: of a program.
      stages: blocks of weights in flight.
    """

    n: int = 16
    splits: int = 4
    warps: int = 4
    stages: int = 4


def cut_for(rows: int, blocks: int, little_memory: bool = False) -> Cut:
    """How a product is cut up: segments of about SEGMENT blocks, as many as COLUMNS has room for.

    Args:
      rows: of the activations.
      blocks: of the weight.
      little_memory: a program has less than 100 KiB of shared memory.

    >>> cut_for(1, 32).splits, cut_for(16, 32).splits, cut_for(1, 12).splits
    (8, 4, 2)
    """
    splits, padded = 1, power(rows)
    most = min(MOST_SEGMENTS, COLUMNS // padded)
    while blocks % (2 * splits) == 0 and blocks >= 2 * splits * SEGMENT and 2 * splits <= most:
        splits *= 2
    return Cut(splits=splits, warps=min(4, splits), stages=2 if little_memory else 4)


@dataclasses.dataclass(frozen=True)
class _Statics:
    cut: Cut
    tokens: int
    bits: int
    group: int
    groups: int
    blocks: int
    interpret: bool


def product(x: jax.Array, w: TiledLinear, layer: Any, cut: Cut, out_dtype: Any, interpret: bool) -> jax.Array:
    """x @ W for at most MOST rows.

    Args:
      x: bfloat16 or float16 [M, K'], padded to the weight's blocks.
      w: one matrix, or a stack [L] of them with `layer`.
      layer: index into the stack, or None.
      cut: how to cut; see `cut_for`.
      out_dtype: of the result.
      interpret: run without a GPU.

    Returns:
      [M, N'].
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    columns = w.words.shape[-2]
    s = _Statics(cut, x.shape[0], w.bits, w.group_size, w.num_groups, w.num_blocks, interpret)
    stacks = {"words": w.words, "scales": w.scales, "zeros": w.zeros}
    if layer is None:
        stacks = {name: None if array is None else array[None] for name, array in stacks.items()}
    index = jnp.reshape(jnp.asarray(0 if layer is None else layer, jnp.int32), (1,))
    given = {name: array for name, array in {"layer": index, "x": x, **stacks}.items() if array is not None}
    return pl.pallas_call(
        functools.partial(_kernel, s, tuple(given)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], columns), out_dtype),
        grid=(columns // cut.n,),
        compiler_params=plgpu.CompilerParams(num_warps=cut.warps, num_stages=cut.stages),
        interpret=interpret,
        name="gptq_rows",
    )(*given.values())


def _kernel(s: _Statics, names: tuple[str, ...], *refs: Any) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    r, out = dict(zip(names, refs[:-1], strict=True)), refs[-1]
    cut, planes = s.cut, 16 // s.bits
    tokens = power(s.tokens)
    run, rows, width = planes * PLANE, cut.splits * cut.n, max(LEAST_ROWS, cut.splits * tokens)
    each = s.blocks // cut.splits  # blocks of a segment
    row, column = jnp.arange(rows, dtype=jnp.int32), jnp.arange(width, dtype=jnp.int32)
    block0, output = row // cut.n * each, pl.program_id(0) * cut.n + row % cut.n
    token, input0 = column // cut.splits, column % cut.splits * each * run
    span = span_of(s.bits, s.group, s.groups)
    lane = jnp.arange(PLANE, dtype=jnp.int32)
    layer = r["layer"][0]

    def words(b: Any) -> jax.Array:
        at = jnp.broadcast_arrays(layer, (block0 + b)[:, None], output[:, None], lane[None, :])
        return plgpu.load(r["words"].at[tuple(at)])

    def per_group(ref: Any, b: Any, j: int) -> jax.Array:
        group = lax.min(((block0 + b) * run + j * PLANE) // s.group, s.groups - 1) if s.groups > 1 else 0 * block0
        return plgpu.load(ref.at[tuple(jnp.broadcast_arrays(layer, group, output))])

    def scales(b: Any) -> list[jax.Array]:
        return [] if s.groups == 1 else [per_group(r["scales"], b, j) for j in range(0, planes, span)]

    def inputs(b: Any, j: int) -> jax.Array:
        at = jnp.broadcast_arrays(token[:, None], (input0 + b * run + j * PLANE)[:, None] + lane[None, :])
        seen = jnp.broadcast_to((token < s.tokens)[:, None], at[0].shape)
        return plgpu.load(r["x"].at[jnp.where(seen, at[0], 0), at[1]], mask=seen, other=0)

    def body(b: Any, carry: Any) -> Any:
        total, scale = carry
        word, x = words(b), [inputs(b, j) for j in range(planes)]
        zero = [per_group(r["zeros"], b, j) if "zeros" in r else None for j in range(0, planes, span)]
        # A turn ahead, through registers: the compiler's own pipeline takes operands of products only.
        after = scales(lax.min(b + 1, each - 1))
        return multiply_block(word, zero, scale, x, total, s.bits, s.interpret), after

    total, _ = lax.fori_loop(0, each, body, (jnp.zeros((rows, width), jnp.float32), scales(0)))
    if s.groups == 1:
        total = total * per_group(r["scales"], 0, 0).astype(jnp.float32)[:, None]
    own = (row // cut.n)[:, None] == (column % cut.splits)[None, :]
    y = jnp.sum(jnp.where(own, total, 0.0).reshape(cut.splits, cut.n, width), axis=0)
    y = jnp.sum(y.reshape(cut.n, width // cut.splits, cut.splits), axis=2)
    first, to = pl.program_id(0) * cut.n, jnp.arange(width // cut.splits, dtype=jnp.int32)
    at = jnp.broadcast_arrays(to[None, :], (first + jnp.arange(cut.n, dtype=jnp.int32))[:, None])
    seen = at[0] < s.tokens
    plgpu.store(out.at[jnp.where(seen, at[0], s.tokens), at[1]], y.astype(out.dtype), mask=seen)
