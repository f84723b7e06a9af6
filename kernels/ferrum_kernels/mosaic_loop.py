"""The loop over groups of inputs of the Mosaic GPU kernel for few rows, in PTX: wait, load, decode, multiply, add up.

As one text it is lowered at once. Of an operation for each instruction, thousands of a layer, lowering took a quarter
of a second a program and more.

A warp's sums by `mma.sync` lie as those of a warp by `wgmma` do, so that layouts are a warpgroup's.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import jax.numpy as jnp
import numpy as np

from ferrum_kernels import mosaic_registers as pieces
from ferrum_kernels.mosaic_cut import Statics
from ferrum_kernels.mosaic_registers import GROUP, RUN

AHEAD = 16  # columns up to which a group is loaded before the last one is multiplied
PLANES = 4  # codes of a container
INPUTS = ("slot", "odd", "turns", "every", "words", "x0", "x1", "scales", "full", "empty")  # of the text, all int32
MULTIPLY = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
LOAD = "ldmatrix.sync.aligned.m8n8.x4.shared.b16"


def turns_of(groups: int, columns: int) -> int:
    """How often the loop turns for so many groups."""
    return groups // 2 if columns <= AHEAD else groups


def text_of(s: Statics, columns: int, scales: str) -> str:
    """The loop as PTX, whose operands are the sums, $0 and on, and then `INPUTS`.

    Args:
      s: statics.
      columns: of a block, at most 32.
      scales: their type, f16 or bf16.
    """
    return "\n".join(("{", *_lines(s, columns, scales), "}"))


def _lines(s: Statics, columns: int, scales: str) -> Iterator[str]:
    eights, parts = columns // 8, s.ring.parts
    count = 4 * parts * eights
    given = {name: f"${count + i}" for i, name in enumerate(INPUTS)}
    yield ".reg .pred lane, more, done, wraps, tells; .reg .b32 slot, odd, turns, at, other, empty; .reg .b16 none;"
    yield f".reg .b32 l<4>; .reg .f32 zero, scale<{2 * parts}>, c<{count}>;"
    for group in "ab":  # the registers of two groups
        yield f".reg .b32 {group}w<{8 * parts}>, {group}x<{4 * PLANES * eights}>; .reg .b16 {group}s<{2 * parts}>;"
    yield f"mov.b32 slot, {given['slot']}; mov.b32 odd, {given['odd']}; mov.b32 turns, {given['turns']};"
    yield "mov.b16 none, 0; mov.f32 zero, 0f00000000; mov.u32 at, %laneid; setp.eq.u32 lane, at, 0;"
    yield from (f"mov.f32 ${i}, 0f00000000;" for i in range(count))

    def load(group: str, when: str = "") -> Iterator[str]:
        yield from _load(s, eights, given, group, when)

    def tell() -> Iterator[str]:
        """That all of the warp have what was loaded last, so that its slot may be filled again: once for each group."""
        yield f"bar.warp.sync -1; @tells mbarrier.arrive.release.cta.shared::cta.b64 _, [empty], {given['every']};"

    def multiply(group: str) -> Iterator[str]:
        yield from _multiply(parts, eights, scales, group)

    if columns > AHEAD:
        yield "L${:uid}:"
        yield from (*load("a"), *tell(), *multiply("a"))
        yield "sub.s32 turns, turns, 1; setp.gt.s32 more, turns, 0; @more bra L${:uid};"
        return
    odd = s.groups % 2 == 1
    yield from (*load("a"), *tell())
    if s.groups > 1:
        # Two groups a turn: of one, the next group's registers would be moved to where the last one's were.
        yield "L${:uid}: setp.gt.s32 more, turns, 1;"
        yield from (*load("b"), *multiply("a"), *tell())
        yield from (*load("a", "" if odd else "@more "), *multiply("b"), *tell())
        yield "sub.s32 turns, turns, 1; @more bra L${:uid};"
    if odd:
        yield from multiply("a")


def _load(s: Statics, eights: int, given: dict[str, str], group: str, when: str) -> Iterator[str]:
    """Wait for a slot, load a thread's registers of it, and go on to the next; nothing where the predicate is false."""
    # Labels hold for what is in braces with them. With a predicate ptxas would have it sleep and look again.
    yield f"mad.lo.s32 at, slot, 8, {given['full']}; {{ {'@!more bra S${:uid};' if when else ''}"
    yield "W${:uid}: mbarrier.try_wait.parity.shared.b64 done, [at], odd, 10000000; @!done bra W${:uid}; S${:uid}: }"
    first = [run * s.other + part * s.size for part in range(s.ring.parts) for run in range(2)]  # output of each run
    yield f"mad.lo.s32 at, slot, {s.ring.outputs * 64}, {given['words']};"
    for i, output in enumerate(first):
        yield f"{when}{LOAD} {_four(group + 'w', i)}, [at+{output * 64}];"
    size = s.ring.block * 2 * GROUP
    yield f"mad.lo.s32 at, slot, {size}, {given['x0']}; mad.lo.s32 other, slot, {size}, {given['x1']};"
    for i, (plane, eight) in enumerate(product(range(PLANES), range(eights))):
        half = "other" if plane % 2 else "at"
        yield f"{when}{LOAD} {_four(group + 'x', i)}, [{half}+{plane // 2 * 1024 + eight * 2048}];"
    yield f"mad.lo.s32 at, slot, {s.ring.outputs * 2}, {given['scales']};"
    yield from (f"{when}ld.shared.b16 {group}s{i}, [at+{output * 2}];" for i, output in enumerate(first))
    yield f"mad.lo.s32 empty, slot, 8, {given['empty']}; and.pred tells, lane, {'more' if when else 'lane'};"
    yield f"add.s32 slot, slot, {given['every']}; setp.ge.s32 wraps, slot, {s.ring.stages};"
    yield f"@wraps sub.s32 slot, slot, {s.ring.stages}; @wraps xor.b32 odd, odd, 1;"


def _multiply(parts: int, eights: int, scales: str, group: str) -> Iterator[str]:
    """Add a group's products to the sums."""
    begun = set()
    for plane, half, part in product(range(PLANES), range(2), range(parts)):
        # Eight inputs after eight, of each both runs' outputs; decoded here, between products.
        for i, (eight_inputs, run) in enumerate(product(range(2), range(2))):
            yield pieces.decode_text(plane, f"l{i}", f"{group}w{8 * part + 4 * run + 2 * half + eight_inputs}")
        for eight in range(eights):
            at, right = part * eights + eight, 4 * (plane * eights + eight) + 2 * half
            before = _four("c", at) if at in begun else "{zero, zero, zero, zero}"
            begun.add(at)
            yield f"{MULTIPLY} {_four('c', at)}, {_four('l', 0)}, {{{group}x{right}, {group}x{right + 1}}}, {before};"
    for i in range(2 * parts):
        yield f"cvt.f32.f16 scale{i}, {group}s{i};" if scales == "f16" else f"mov.b32 scale{i}, {{none, {group}s{i}}};"
    for i in range(4 * parts * eights):
        scale = i // (4 * eights) * 2 + i // 2 % 2  # of the part and the run
        yield f"fma.rn.f32 ${i}, c{i}, scale{scale}, ${i};"


def _four(name: str, at: int) -> str:
    return "{" + ", ".join(f"{name}{4 * at + i}" for i in range(4)) + "}"


def sums(s: Statics, columns: int) -> Any:
    """A function that adds up the products of a work's groups of inputs: each part's sums [64, columns].

    Its arguments are the rings of containers, activations and scales, the barriers of full and of empty slots, the
    first group's slot and whether the ring has gone round an odd number of times, `turns_of` the groups, and where
    turns are shared, every how many groups are the warpgroup's and whose outputs of a slot.
    """
    import jax.experimental.mosaic.gpu as mgpu
    from jax.experimental.mosaic.gpu import fragmented_array as fa
    from jax.experimental.mosaic.gpu import utils
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    parts, eights = s.ring.parts, columns // 8
    layout = pieces.layouts()[2]

    def body(_: Any, words: Any, x: Any, scales: Any, full: Any, empty: Any, *numbers: Any) -> list[Any]:
        i32, _, f32, one, _ = pieces.types()

        def c(n: int) -> Any:
            return mgpu.c(n, i32)

        def bytes_of(ref: Any, *more: Any) -> Any:
            at = llvm.ptrtoint(i32, utils.memref_ptr(ref))
            for term in more:
                at = arith.addi(at, term)
            return at

        warpgroup, warp, lane = pieces.place()
        slot, odd, turns, every, warpgroup = (*map(pieces.number, numbers), *(() if s.shares else (c(1), warpgroup)))
        output = arith.muli(warpgroup, c(parts * s.size))
        # Of eight rows a lane names row lane % 8, and of 64 inputs piece lane / 8 of eight, or that and 4: `gather` has
        # swapped the pieces by their row.
        row, piece = arith.andi(lane, c(7)), arith.shrui(lane, c(3))
        swapped = [arith.shli(arith.xori(arith.addi(piece, c(n)), row), c(4)) for n in (0, 4)]
        of_lane = arith.addi(arith.muli(warp, c(RUN // 4)), arith.shrui(lane, c(2)))
        given = (
            *(slot, odd, turns, every),
            bytes_of(words, arith.muli(output, c(64)), pieces.containers_of_lane(warp)),
            *(bytes_of(x, arith.muli(row, c(128)), inside) for inside in swapped),
            bytes_of(scales, arith.muli(arith.addi(output, of_lane), c(2))),
            *map(bytes_of, (full, empty)),
        )
        count = 4 * parts * eights
        results = ir.Type.parse(f"!llvm.struct<({', '.join(['f32'] * count)})>")
        text = text_of(s, columns, str(ir.MemRefType(scales.type).element_type))
        found = pieces.asm(results, text, ",".join(["=&f"] * count + ["r"] * len(given)), *given, effects=True)
        values = [vector.broadcast(one, llvm.extractvalue(f32, found, [i])) for i in range(count)]
        registers = np.empty((parts, *layout.to_mgpu().registers_shape((2 * RUN, columns))), dtype=object)
        registers.reshape(-1)[:] = values
        return [fa.FragmentedArray(_registers=part, _layout=layout.to_mgpu(), _is_signed=None) for part in registers]

    ring, ref, scalar = plgpu.RefType(pieces.transforms(64)), plgpu.RefType(), plgpu.Layout.WG_SPLAT(())
    result = plgpu.ShapeDtypeStruct((2 * RUN, columns), jnp.float32, layout=layout)
    arguments = (ring, ring, ref, ref, ref, *[scalar] * (5 if s.shares else 3))
    return plgpu.inline_mgpu(arg_types=arguments, return_type=[result] * parts)(body)
