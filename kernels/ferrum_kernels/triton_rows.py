"""Products of some rows with one packed matrix on the Triton backend: the inputs are cut up, so that no sum is long.

A matrix of few outputs makes few programs, each with a long sum. So the inputs are cut too, in two ways. In a program,
the segments of one output lie in different rows of the matrix units' left operand, so that different warps add them up;
the right operand has a column per row and segment, and of the product only the entries of a segment with itself are
kept. That wastes products, so it is for few rows. Of more rows, parts of the inputs are programs of their own, and each
writes its part of the sum in float32; whoever reads the product next adds the parts up.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_kernels.tiles import PLANE, TiledLinear
from ferrum_kernels.triton_call import call
from ferrum_kernels.triton_decode import group_of, multiply_block, span_of
from ferrum_kernels.triton_matmul import LEAST_ROWS
from ferrum_kernels.triton_route import power

MOST = 16  # rows
SEGMENT = 4  # blocks of weights, about
COLUMNS = 64  # of the matrix units' right operand
FEW = 4  # rows, whose planes are better multiplied one by one
PROGRAMS = 132  # enough for as many multiprocessors
MOST_SEGMENTS = 16  # more would need more registers and shared memory than a program has


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a product of some rows is cut up.

    Attributes:
      n: outputs of a program, a power of two from 16 that divides them.
      splits: segments of a program's inputs, a power of two that divides its blocks.
      warps: of a program.
      stages: blocks of weights in flight.
      rows: of a program, a power of two; None: all.
      parts: of the inputs, each a program's; splits * step divides the blocks of each.
      step: blocks of a segment that one turn of the loop takes.
      merge: multiply planes that share a scale at once, which suits the instructions of a group of four warps.
    """

    n: int = 16
    splits: int = 4
    warps: int = 4
    stages: int = 4
    rows: int | None = None
    parts: int = 1
    step: int = 1
    merge: bool = False


def cut_for(rows: int, columns: int, blocks: int, little_memory: bool = False) -> Cut:
    """How a whole product is cut up: segments of about SEGMENT blocks, as many as COLUMNS has room for.

    Args:
      rows: of the activations.
      columns: outputs of the weight.
      blocks: of the weight.
      little_memory: a program has less than 100 KiB of shared memory.

    >>> cut_for(1, 2048, 32).splits, cut_for(16, 2048, 32).splits, cut_for(1, 2048, 12).splits
    (8, 4, 2)
    """
    splits, padded = 1, power(rows)
    most = min(MOST_SEGMENTS, COLUMNS // padded)
    while blocks % (2 * splits) == 0 and blocks >= 2 * splits * SEGMENT and 2 * splits <= most:
        splits *= 2
    n = 32 if rows > 8 and columns % 32 == 0 and columns >= 32 * PROGRAMS else 16
    warps, stages = min(4, splits), 2 if little_memory else 3 if n == 32 else 4
    return Cut(n, splits, warps, stages, merge=warps == 4 and rows > FEW)


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
    """x @ W, or parts of that sum.

    Args:
      x: bfloat16 or float16 [M, K'], padded to the weight's blocks.
      w: one matrix, or a stack [L] of them with `layer`.
      layer: index into the stack, or None.
      cut: how to cut; see `cut_for`.
      out_dtype: of the result.
      interpret: run without a GPU.

    Returns:
      [M, N']; with more than one part [parts, M, N'], to be added up.
    """
    columns, tokens = w.words.shape[-2], x.shape[0]
    s = _Statics(cut, tokens, w.bits, w.group_size, w.num_groups, w.num_blocks, interpret)
    stacks = {"words": w.words, "scales": w.scales, "zeros": w.zeros}
    if layer is None:
        stacks = {name: None if array is None else array[None] for name, array in stacks.items()}
    index = jnp.reshape(jnp.asarray(0 if layer is None else layer, jnp.int32), (1,))
    given = {name: array for name, array in {"layer": index, "x": x, **stacks}.items() if array is not None}
    y = call(
        functools.partial(_kernel, s, tuple(given)),
        list(given.values()),
        jax.ShapeDtypeStruct((cut.parts, tokens, columns), out_dtype),
        (columns // cut.n, cut.parts, -(-tokens // (cut.rows or power(tokens)))),
        "gptq_rows",
        warps=cut.warps,
        stages=cut.stages,
        interpret=interpret,
    )
    return y[0] if cut.parts == 1 else y


def _kernel(s: _Statics, names: tuple[str, ...], *refs: Any) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    r, out = dict(zip(names, refs[:-1], strict=True)), refs[-1]
    cut, planes = s.cut, 16 // s.bits
    tokens = cut.rows or power(s.tokens)
    run, rows, width = planes * PLANE, cut.splits * cut.n, max(LEAST_ROWS, cut.splits * tokens)
    part, row0 = pl.program_id(1), pl.program_id(2) * tokens
    # Parts may have unlike numbers of turns, and a segment of a part has as many blocks as it has turns and steps.
    whole = s.blocks // (cut.splits * cut.step)
    if whole % cut.parts == 0:
        begin, turns = part * (whole // cut.parts), whole // cut.parts
    else:
        begin = lax.div(part * whole, cut.parts)
        turns = lax.div((part + 1) * whole, cut.parts) - begin
    each = turns * cut.step  # blocks of a segment
    row, column = jnp.arange(rows, dtype=jnp.int32), jnp.arange(width, dtype=jnp.int32)
    first = pl.multiple_of(pl.program_id(0) * cut.n, cut.n)
    start = begin * (cut.splits * cut.step)
    if cut.splits == 1:
        block0, output, nth = start, first + row, column
        input0 = jnp.broadcast_to(start * run, (width,))
    else:
        block0, output = start + lax.div(row, cut.n) * each, first + lax.rem(row, cut.n)
        nth, segment = lax.div(column, cut.splits), lax.rem(column, cut.splits)
        input0 = (start + segment * each) * run
    token = row0 + nth
    alive = (nth < tokens) & (token < s.tokens)
    source = jnp.where(alive, token, 0)
    span = span_of(s.bits, s.group, s.groups)
    wide = span if cut.merge else 1
    lane = jnp.arange(PLANE, dtype=jnp.int32)
    layer = r["layer"][0]

    def words(b: Any) -> jax.Array:
        block = jnp.broadcast_to(block0 + b, (rows,))
        at = jnp.broadcast_arrays(layer, block[:, None], output[:, None], lane[None, :])
        return plgpu.load(r["words"].at[tuple(at)])

    def per_group(ref: Any, b: Any, j: int) -> jax.Array:
        group = group_of(block0 + b, j, s.bits, s.group, s.groups) if s.groups > 1 else 0 * block0
        return plgpu.load(ref.at[tuple(jnp.broadcast_arrays(layer, group, output))])

    def scales(b: Any) -> list[jax.Array]:
        return [] if s.groups == 1 else [per_group(r["scales"], b, j) for j in range(0, planes, span)]

    def inputs(b: Any, j: int) -> jax.Array:
        lanes = jnp.arange(wide * PLANE, dtype=jnp.int32)
        at = jnp.broadcast_arrays(source[:, None], (input0 + b * run + j * PLANE)[:, None] + lanes[None, :])
        return plgpu.load(r["x"].at[tuple(at)], mask=jnp.broadcast_to(alive[:, None], at[0].shape), other=0)

    def zeros(b: Any) -> list[jax.Array | None]:
        return [per_group(r["zeros"], b, j) if "zeros" in r else None for j in range(0, planes, span)]

    def body(i: Any, carry: Any) -> Any:
        total, now = carry
        b = [i * cut.step + u for u in range(cut.step)]
        loaded = [(words(u), zeros(u), [inputs(u, j) for j in range(0, planes, wide)]) for u in b]
        # A turn ahead, through registers: the compiler's own pipeline takes operands of products only.
        after = [scales(lax.min(u + cut.step, each - 1)) for u in b]
        for (word, zero, x), scale in zip(loaded, now, strict=True):
            total = multiply_block(word, zero, scale, x, total, s.bits, s.interpret)
        return total, after

    carry = jnp.zeros((rows, width), jnp.float32), [scales(u) for u in range(cut.step)]
    total, _ = lax.fori_loop(0, turns, body, carry)
    if s.groups == 1:
        total = total * per_group(r["scales"], 0, 0).astype(jnp.float32)[:, None]
    if cut.splits > 1:
        own = lax.div(row, cut.n)[:, None] == lax.rem(column, cut.splits)[None, :]
        total = jnp.sum(jnp.where(own, total, 0.0).reshape(cut.splits, cut.n, width), axis=0)
        total = jnp.sum(total.reshape(cut.n, width // cut.splits, cut.splits), axis=2)
    to = jnp.arange(width // cut.splits, dtype=jnp.int32)
    seen = (to < tokens) & (row0 + to < s.tokens)
    to = jnp.where(seen, row0 + to, s.tokens)
    y = total.astype(out.dtype).T
    at = jnp.broadcast_arrays(part, to[:, None], (first + jnp.arange(cut.n, dtype=jnp.int32))[None, :])
    plgpu.store(out.at[tuple(at)], y, mask=jnp.broadcast_to(seen[:, None], y.shape))
