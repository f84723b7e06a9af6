"""The product kernel of the Triton backend: tiles of a packed expert times a block of activation rows.

One program takes BN outputs of one block's expert. The weights are the left operand of the matrix units, so that few
rows waste nothing: y.T [BN, rows] = W.T [BN, K] x.T [K, rows]. Codes become floats in registers by two bit operations
and one fused multiply-add for two of them; zero points are subtracted there, scales multiply a group's float32 sum.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_kernels.tiles import PLANE, TiledLinear

LEAST_ROWS = 8  # of a matrix instruction's right operand, as this backend builds it


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a product is cut up.

    Attributes:
      n: outputs of a program, a power of two from 16 that divides them.
      warps: of a program.
      stages: blocks of weights in flight.
      merge: multiply planes that share a scale at once, which suits the instructions of a group of four warps.
      step: blocks of weights that one turn of the loop takes; divides them.
    """

    n: int = 64
    warps: int = 4
    stages: int = 4
    merge: bool = False
    step: int = 1


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which rows a block of a product reads and writes.

    Attributes:
      block: rows of a block (static).
      experts: int32 [blocks], the expert of each; outside [0, E) nobody's. None: one matrix for all.
      starts, counts: int32 [blocks], each block's first place and how many it has; None: block * b and all of them.
      share: this product cuts each block of those tables into so many (static).
      order: int32 [places], the pair at each place; None: places are pairs.
      live: int32 [T, K], the experts of tokens: block e is expert e, its rows are the tokens that chose it; in place of
        experts, starts, counts and order, where T is at most `block`.
      pairs_per_row: input rows are tokens of that many pairs; 0 where they are places (static).
      by_pair: write to the pair's row, else to the place's (static).
    """

    block: int
    experts: Any = None
    starts: Any = None
    counts: Any = None
    order: Any = None
    live: Any = None
    share: int = 1
    pairs_per_row: int = 0
    by_pair: bool = False


def product(
    x: jax.Array,
    w: TiledLinear,
    layer: jax.Array | None,
    rows: Rows,
    blocks: int,
    out_rows: int,
    tile: Tile,
    out_dtype: Any,
    *,
    gated: bool = False,
    weights: jax.Array | None = None,
    fill: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """Rows times their experts' weights.

    Args:
      x: [X, K'], padded to the weight's blocks.
      w: one matrix, a stack [E] or a stack [L, E] with `layer`.
      layer: int32 scalar or None.
      rows: which rows belong to which expert.
      blocks: how many blocks of rows there are, each of at most rows.block.
      out_rows: rows of the result.
      tile: how to cut.
      out_dtype: of the result.
      gated: the outputs are gate and up columns; write silu(gate) * up.
      weights: float32 [P], multiplied in by pair.
      fill: write zero rows for nobody's blocks.
      interpret: run without a GPU.

    Returns:
      [out_rows, N'] or [out_rows, N / 2]; rows that no block has are not written.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    columns = w.n_per_expert // 2 if gated else w.words.shape[-2]
    layered = layer is not None
    index = jnp.reshape(jnp.asarray(0 if layer is None else layer, jnp.int32), (1,))
    named = {
        "layer": index if layered else None,
        "experts": rows.experts,
        "starts": rows.starts,
        "counts": rows.counts,
        "order": rows.order,
        "live": rows.live,
        "weights": weights,
        "x": x,
        "words": w.words,
        "scales": w.scales,
        "zeros": w.zeros,
    }
    given = {name: array for name, array in named.items() if array is not None}
    width = max(LEAST_ROWS, 1 << (rows.block - 1).bit_length())
    statics = _Statics(
        rows=dataclasses.replace(rows, experts=None, starts=None, counts=None, order=None, live=None),
        width=width,
        tile=tile,
        bits=w.bits,
        group=w.group_size,
        groups=w.num_groups,
        blocks=w.num_blocks,
        num_experts=0 if rows.experts is None and rows.live is None else w.num_experts,
        layered=layered,
        columns=columns,
        gated=gated,
        fill=fill,
        dtype=jnp.dtype(x.dtype),
        interpret=interpret,
    )
    call = pl.pallas_call(
        functools.partial(_kernel, statics, tuple(given)),
        out_shape=jax.ShapeDtypeStruct((out_rows, columns), out_dtype),
        grid=(columns // tile.n, blocks),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="gptq_gated" if gated else "gptq_product",
    )
    return call(*given.values())


@dataclasses.dataclass(frozen=True)
class _Statics:
    rows: Rows
    width: int
    tile: Tile
    bits: int
    group: int
    groups: int
    blocks: int
    num_experts: int
    layered: bool
    columns: int
    gated: bool
    fill: bool
    dtype: Any
    interpret: bool


def _kernel(s: _Statics, names: tuple[str, ...], *refs: Any) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    r = dict(zip(names, refs[:-1], strict=True))
    out = refs[-1]
    tile, rows = s.tile, s.rows
    first, block = pl.multiple_of(pl.program_id(0) * tile.n, tile.n), pl.program_id(1)
    lanes = jnp.arange(s.width, dtype=jnp.int32)
    if "live" in r:
        expert = block
        pairs, alive = _choosers(r["live"], expert, lanes)
        places, count = lanes, jnp.sum(jnp.where(alive, 1, 0))
    else:
        expert = r["experts"][block // rows.share] if "experts" in r else None
        inside = (block % rows.share) * rows.block
        if "counts" in r:
            start, count = r["starts"][block // rows.share] + inside, r["counts"][block // rows.share] - inside
        else:
            start = block * rows.block
            count = out.shape[-2] - start
        alive = lanes < lax.min(count, rows.block)
        places = jnp.where(alive, start + lanes, start)
        pairs = plgpu.load(r["order"].at[places], mask=alive, other=0) if "order" in r else places
    sources = places if rows.pairs_per_row == 0 else pairs // rows.pairs_per_row
    # The interpreter writes what a mask hides as well, so rows that are not there point past the end.
    targets = jnp.where(alive, pairs if rows.by_pair else places, out.shape[-2])
    cols = first + jnp.arange(tile.n, dtype=jnp.int32)
    seen = jnp.broadcast_to(alive[:, None], (s.width, tile.n))

    def write(values: jax.Array) -> None:
        at = (jnp.broadcast_to(targets[:, None], seen.shape), jnp.broadcast_to(cols[None, :], seen.shape))
        plgpu.store(out.at[at], values.astype(out.dtype), mask=seen)

    def compute() -> None:
        sums = _sums(s, r, expert, first, sources, alive)
        if s.gated:
            gate, up = sums
            y = gate * (1.0 / (1.0 + jnp.exp(-gate))) * up
        else:
            [y] = sums
        if "weights" in r:
            y = y * plgpu.load(r["weights"].at[pairs], mask=alive, other=0.0)[None, :]
        write(y.T)

    if expert is None:
        compute()
        return
    mine = (expert >= 0) & (expert < s.num_experts) & (count > 0)
    pl.when(mine)(compute)
    if s.fill:
        pl.when(~mine)(lambda: write(jnp.zeros(seen.shape, jnp.float32)))


def _choosers(live: Any, expert: Any, token: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The pair of each token with an expert, and whether it has chosen it."""
    from jax.experimental.pallas import triton as plgpu

    tokens, top_k = live.shape
    slot = jnp.arange(1 << (top_k - 1).bit_length(), dtype=jnp.int32)
    here = (token < tokens)[:, None] & (slot < top_k)[None, :]
    at = jnp.broadcast_arrays(token[:, None], slot[None, :])
    hit = here & (plgpu.load(live.at[at[0], at[1]], mask=here, other=-1) == expert)
    pair = token * top_k + jnp.sum(jnp.where(hit, slot[None, :], 0), axis=1)
    return pair, jnp.sum(jnp.where(hit, 1, 0), axis=1) > 0


def _sums(
    s: _Statics, r: dict[str, Any], expert: Any, first: Any, sources: jax.Array, alive: jax.Array
) -> list[jax.Array]:
    """float32 [BN, width] for the program's columns, twice where they are gate and up."""
    from jax.experimental import pallas as pl

    planes = 16 // s.bits
    run = planes * PLANE
    place = () if expert is None else (expert,)
    place = (r["layer"][0], *place) if s.layered else place
    starts = [first, s.columns + first] if s.gated else [first]
    # Planes that share a scale, and of them as many as one product takes.
    span = next(p for p in (planes, planes // 2, 1) if s.groups == 1 or s.group % (p * PLANE) == 0)
    wide = span if s.tile.merge else 1

    def columns(ref: Any, group: Any, at: Any) -> jax.Array:
        return ref[(*place, group, pl.ds(at, s.tile.n))]

    def words(b: Any, at: Any) -> jax.Array:
        return r["words"][(*place, b, pl.ds(at, s.tile.n), slice(None))]

    def inputs(b: Any) -> list[jax.Array]:
        return [
            _activations(s, r["x"], b * run + j * PLANE, wide * PLANE, sources, alive) for j in range(0, planes, wide)
        ]

    def groups_of(b: Any) -> list[Any]:
        """The group of each run of planes in a block."""
        if s.groups == 1:
            return [0] * (planes // span)
        return [lax.min((b * run + j * PLANE) // s.group, s.groups - 1) for j in range(0, planes, span)]

    def scales(b: Any, at: Any) -> list[jax.Array]:
        return [] if s.groups == 1 else [columns(r["scales"], group, at) for group in groups_of(b)]

    def zeros(b: Any, at: Any) -> list[jax.Array | None]:
        return [columns(r["zeros"], group, at) if "zeros" in r else None for group in groups_of(b)]

    def multiply(word: jax.Array, zero: Any, scale: Any, x: list[jax.Array], total: jax.Array) -> jax.Array:
        for j in range(0, planes, span):
            part: Any = total if s.groups == 1 else None
            for i in range(j, j + span, wide):
                floats = [decode(word, i + p, s.bits, zero[j // span], s.dtype, s.interpret) for p in range(wide)]
                d = dot(side_by_side(floats), x[i // wide], s.interpret)
                part = d if part is None else part + d
            total = part if s.groups == 1 else total + part * scale[j // span].astype(jnp.float32)[:, None]
        return total

    turns = range(s.tile.step)

    def body(i: Any, carry: Any) -> Any:
        totals, now = carry
        b = i * s.tile.step
        loaded = [(inputs(b + u), [(words(b + u, at), zeros(b + u, at)) for at in starts]) for u in turns]
        # Scales come a turn ahead through registers: the compiler's own pipeline takes operands of products only.
        after = [[scales(lax.min(b + s.tile.step + u, s.blocks - 1), at) for at in starts] for u in turns]
        for (x, ones), scale in zip(loaded, now, strict=True):
            totals = [multiply(*one, sc, x, t) for one, sc, t in zip(ones, scale, totals, strict=True)]
        return totals, after

    totals = [jnp.zeros((s.tile.n, s.width), jnp.float32) for _ in starts]
    carry = totals, [[scales(u, at) for at in starts] for u in turns]
    totals, _ = lax.fori_loop(0, s.blocks // s.tile.step, body, carry)
    if s.groups == 1:
        totals = [
            t * columns(r["scales"], 0, at).astype(jnp.float32)[:, None] for t, at in zip(totals, starts, strict=True)
        ]
    return totals


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


def _activations(s: _Statics, x: Any, k: Any, size: int, sources: jax.Array, alive: jax.Array) -> jax.Array:
    """[width, size] in the dtype of the product, zero where no row is."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    seen = jnp.broadcast_to(alive[:, None], (s.width, size))

    index = (sources, pl.ds(k, size))
    if s.interpret:  # the interpreter takes no slice beside an array
        index = tuple(jnp.broadcast_arrays(sources[:, None], k + jnp.arange(size)[None, :]))
    return plgpu.load(x.at[index], mask=seen, other=0)


def dot(weights: jax.Array, x: jax.Array, interpret: bool) -> jax.Array:
    """weights [n, k] times x [rows, k], transposed: float32 [n, rows]."""
    if interpret:
        weights, x = weights.astype(jnp.float32), x.astype(jnp.float32)
    return lax.dot_general(weights, x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


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
