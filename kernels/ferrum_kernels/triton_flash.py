"""What the attention kernels of the Triton backend are made of: where a row lies in the cache, and a sweep over it.

A kernel sees the caches as [L, blocks, block, Kv, h], the pages one behind the other. All of it works on tiles: M
queries of one key head (its query heads, padded, times some tokens) by some positions of the cache, with the softmax
kept online.

Codes lie four to a word, and a word becomes four float16 in as many strips of a head: matrix instructions want two
positions of one channel in a register, which two words give four times over, where bytes would be read one by one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_kernels.code_words import WORD, unpacked
from ferrum_kernels.triton_statics import Statics

LEAST = -1e30  # the maximum before anything was seen; finite, so that nothing minus nothing is no NaN
# With scales of int8 values in them, weights would fall below what float16 holds: they are taken times 2 ** HEADROOM.
HEADROOM = 8.0
# By which codes are too large as they become float16 at least cost. A score loses float32 roundings of it times the
# sum of the query: less than the codes' own where channels have either sign.
SHIFT = 1152.0


Refs = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Parts:
    """An array that is the sum of another's first axis, for `read` to add up."""

    ref: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the sum."""
        return self.ref.shape[1:]


def flat(*indices: Any) -> tuple[Any, ...]:
    """Indices of a tile [n, m] from those of its rows [n, 1], its columns [1, m] and scalars."""
    shape = jnp.broadcast_shapes(*(jnp.shape(i) for i in indices))
    return tuple(jnp.broadcast_to(i, shape) if jnp.ndim(i) else i for i in indices)


def read(ref: Any, indices: tuple[Any, ...], mask: Any = None) -> jax.Array:
    """Elements of an array, zero where the mask is False."""
    from jax.experimental.pallas import triton as plgpu

    if isinstance(ref, Parts):
        parts = [read(ref.ref, (part, *indices), mask) for part in range(ref.ref.shape[0])]
        return functools.reduce(jnp.add, parts)
    indices = flat(*indices)
    if mask is None:
        return plgpu.load(ref.at[indices])
    shape = jnp.broadcast_shapes(*(jnp.shape(i) for i in indices))
    return plgpu.load(ref.at[indices], mask=jnp.broadcast_to(mask, shape), other=0)


def store(ref: Any, indices: tuple[Any, ...], value: jax.Array, mask: Any) -> None:
    """Write where the mask is True. The interpreter ignores masks: a row index must be out of range there."""
    from jax.experimental.pallas import triton as plgpu

    indices = tuple(jnp.broadcast_to(i, value.shape) for i in indices)
    plgpu.store(ref.at[indices], value.astype(ref.dtype), mask=jnp.broadcast_to(mask, value.shape))


def store_strips(s: Statics, ref: Any, indices: tuple[Any, ...], strips: tuple[jax.Array, ...], mask: Any) -> None:
    """Write strips side by side along the last axis."""
    column = 0
    for x in strips:
        store(ref, (*indices, column + s.lanes(x.shape[-1])[None, :]), x, mask)
        column += x.shape[-1]


def product(x: jax.Array, y: jax.Array, dims: tuple[int, int], interpret: bool) -> jax.Array:
    """x and y contracted over one axis of each, in float32."""
    if interpret:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return lax.dot_general(x, y, (((dims[0],), (dims[1],)), ((), ())), preferred_element_type=jnp.float32)


def power(x: jax.Array, interpret: bool) -> jax.Array:
    """2 ** x as the hardware does it."""
    if interpret:
        return jnp.exp2(x)
    from jax.experimental.pallas import triton as plgpu

    out = [jax.ShapeDtypeStruct(x.shape, jnp.float32)]
    [y] = plgpu.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;", args=[x], constraints="=f,f", pack=1, result_shape_dtypes=out
    )
    return y


def weave(s: Statics, strips: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Four strips [n, h / 4] as one tile [n, h], channels in the order of words, where tiles are woven."""
    if not s.woven:
        return strips
    halves = jnp.stack(strips[::2], -1), jnp.stack(strips[1::2], -1)
    return (jnp.stack(halves, -1).reshape(-1, s.head_dim),)


def unweave(s: Statics, tiles: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Channels as they are counted, of what was woven."""
    if not s.woven:
        return tiles
    [tile] = tiles
    return (jnp.transpose(tile.reshape(-1, s.strip, WORD), (0, 2, 1)).reshape(-1, s.head_dim),)


def floats(s: Statics, x: jax.Array, shift: float = 0.0) -> tuple[jax.Array, ...]:
    """A tile of the cache in the dtype of the products, by strips or woven.

    Codes are exact in float16, and cost an instruction less where they are taken SHIFT larger.
    """
    if not s.codes:
        return (x.astype(s.dtype),)
    if s.interpret:
        return weave(s, tuple((codes + int(shift)).astype(s.dtype) for codes in unpacked(x)))
    from jax.experimental.pallas import triton as plgpu

    def strip(byte: int) -> jax.Array:
        """A byte of each of two words: 0x6400 | code + 128 is 1024 + code + 128 in float16."""
        pair, half = ("0x5140", "0x7362")[byte // 2], ("0x4140", "0x4342")[byte % 2]
        # Grids of two axes have no third: %ctaid.z is zero, which the compiler does not know. As a plain constant, 0x64
        # would sit in the instruction, and the selector be moved to a register each time.
        asm = (
            f"{{ .reg .b32 t, c; mov.u32 c, %ctaid.z; or.b32 c, c, 0x64646464; "
            f"prmt.b32 t, $1, $2, {pair}; prmt.b32 $0, t, c, {half}; "
        )
        asm += "}" if shift else "mov.b32 t, 0x64806480; sub.f16x2 $0, $0, t; }"
        out = [jax.ShapeDtypeStruct(x.shape, jnp.float16)]
        [y] = plgpu.elementwise_inline_asm(asm, args=[x], constraints="=&r,r,r", pack=2, result_shape_dtypes=out)
        return y

    return weave(s, tuple(strip(byte) for byte in range(WORD)))


Slots = tuple[Any, jax.Array]  # blocks of the cache, int32 [n] or one number, and int32 [n] places in them


def cache_slots(s: Statics, r: Refs, row: Any, positions: jax.Array, alive: jax.Array) -> Slots:
    """Where positions int32 [n] of a row lie in the cache; anything where they do not live."""
    if "table" in r:
        pages = read(r["table"], (row, positions // s.page), alive)
    else:
        pages = row
    return pages * (s.page // s.block) + positions % s.page // s.block, positions % s.page % s.block


def pages_of(s: Statics, r: Refs, row: Any, first: Any) -> Any:
    """What a table says of a tile: int32 [tile], or one number where one page holds it. None without a table."""
    if "table" not in r:
        return None
    if s.cut.tile <= s.page:
        return r["table"][row, lax.min(first, s.capacity - 1) // s.page]
    positions = lax.min(first + jnp.arange(s.cut.tile, dtype=jnp.int32), s.capacity - 1)
    return read(r["table"], (row, positions // s.page))


def tile_slots(s: Statics, row: Any, first: Any, pages: Any) -> Slots:
    """Where the positions of a tile lie in the cache, by what `pages_of` says of it."""
    offsets = jnp.arange(s.cut.tile, dtype=jnp.int32)
    if pages is not None and s.cut.tile > s.page:
        return pages, offsets % s.page  # a tile begins where a page does
    # What is one number for all of a tile stays one: addresses are then that and what no turn of the loop changes.
    per_page = s.page // s.block
    begin = row * per_page + first // s.block if pages is None else pages * per_page + first % s.page // s.block
    return (begin, offsets) if s.block == s.cut.tile else (begin + offsets // s.block, offsets % s.block)


# float32 maxima [M] in units of log2; float32 sums [M], or for one token [M, places], turned [places, M], those of each
# thread, since adding them up costs time; float32 weighted values [M, h], by strips or woven.
State = tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]


def nothing(s: Statics) -> State:
    """The state before any position was seen."""
    one = (s.places, s.width) if s.turned else (s.width, s.places)
    sums = (s.width,) if s.cut.queries > 1 else one
    most, total = (jnp.zeros(shape, jnp.float32) for shape in ((s.width,), sums))
    return most + LEAST, total, weave(s, (jnp.zeros((s.width, s.strip), jnp.float32),) * s.strips)


def summed(s: Statics, total: jax.Array) -> jax.Array:
    """float32 [M]: the sums of a state."""
    return total if total.ndim == 1 else jnp.sum(total, axis=0 if s.turned else 1)


def sweep(
    s: Statics,
    r: Refs,
    q: tuple[jax.Array, ...],
    row: Any,
    head: Any,
    turns: tuple[Any, Any],
    tile_of: Callable[[Any], Any],
    visible: Callable[[jax.Array], jax.Array] | None,
    end: Any,
    state: State,
) -> State:
    """See some tiles of the cache.

    Args:
      s: statics.
      r: the kernel's arrays.
      q: [M, h], by strips or woven.
      row: row of the batch.
      head: key head.
      turns: first turn of the loop, and the one after its last.
      tile_of: the tile of a turn.
      visible: from positions [1, n] to bool [M, n] or [1, n], of a turned tile from [n, 1]; None where all of a tile
        is visible and lives.
      end: the position after the last that lives.
      state: what was seen before.

    Returns:
      The state after them.
    """
    layer, tile = r["layer"][0], s.cut.tile
    along = 0 if s.turned else 1  # the axis of scores that has positions
    lane = jnp.arange(s.strip, dtype=jnp.int32)
    scale = 1.0 if s.codes else s.unit  # of codes, q has the unit in it

    def by_query(x: jax.Array) -> jax.Array:
        return jnp.expand_dims(x, along)

    def by_place(x: jax.Array) -> jax.Array:
        return jnp.expand_dims(x, 1 - along)

    def multiply(x: jax.Array, y: jax.Array, dims: tuple[int, int]) -> jax.Array:
        return product(*((y, x) if s.turned else (x, y)), dims, s.interpret)

    # What keys are too large by, times the sum of a query, is where its scores begin: no more than a zero would cost.
    shift = SHIFT if s.codes and not s.woven else 0.0
    shifted = []
    if shift:
        sums = functools.reduce(jnp.add, [jnp.sum(x.astype(jnp.float32), axis=1) for x in q])
        shifted = [jnp.broadcast_to(by_query(sums * -shift), (tile, s.width) if s.turned else (s.width, tile))]

    def body(i: Any, carry: Any) -> Any:
        (most, total, values), pages = carry
        first = tile_of(i) * tile
        positions = first + jnp.arange(tile, dtype=jnp.int32)
        alive = positions < end
        block, slot = tile_slots(s, row, first, pages)
        # A turn ahead, because keys and values wait for it.
        pages = pages_of(s, r, row, tile_of(i + 1) * tile)
        # What does not live is read as zero: zero times a NaN that a slot once held would still be NaN. Codes are
        # always numbers: tiles that lie whole in the cache are read whole.
        masked = not (visible is None or (s.codes and s.block == tile))

        def held(name: str, axis: int, larger: float = 0.0) -> tuple[jax.Array, ...]:
            """A tile with positions along an axis, by strips."""
            there, column, mask = (jnp.expand_dims(x, 1 - axis) if jnp.ndim(x) else x for x in (slot, block, alive))
            at = (layer, column, there, head, jnp.expand_dims(lane, axis))
            return floats(s, read(r[name], at, mask if masked else None), larger)

        parts = [multiply(*x, (1, 1)) for x in zip(weave(s, q), held("keys", 0, shift), strict=True)]
        scores = functools.reduce(jnp.add, shifted + parts)
        if s.codes:
            scores = scores * by_place(read(r["key_scales"], (layer, block, slot, head), alive))
        if visible is not None:
            scores = jnp.where(visible(by_place(positions)) & by_place(alive), scores, -jnp.inf)
        now = lax.max(most, jnp.max(scores, axis=along) * scale - (HEADROOM if s.codes else 0.0))
        weights = power(scores * scale - by_query(now), s.interpret)
        fade = power(most - now, s.interpret)
        if total.ndim == 1:
            total = total * fade + jnp.sum(weights, axis=along)
        else:
            apart = (-1, s.places, s.width) if s.turned else (s.width, -1, s.places)
            total = total * by_query(fade) + jnp.sum(weights.reshape(apart), axis=along)
        if s.codes:
            weights = weights * by_place(read(r["value_scales"], (layer, block, slot, head), alive))
        weights = weights.astype(s.dtype)
        # Products of turned values begin with these, so they are read as their left operand lies.
        seen = [multiply(weights, v, (1, 0)) for v in held("values", 1 - along)]
        values = tuple(old * by_query(fade) + x for old, x in zip(values, seen, strict=True))
        return (now, total, values), pages

    def turn(values: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(x.T for x in values) if s.turned else values

    begin = ((*state[:2], turn(state[2])), pages_of(s, r, row, tile_of(turns[0]) * tile))
    (most, total, values), _ = lax.fori_loop(turns[0], turns[1], body, begin)
    return most, total, turn(values)
