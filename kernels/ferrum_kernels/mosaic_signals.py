"""What threads of the Mosaic GPU kernel for few rows tell each other: barriers, and what is written of each block.

Barriers lie in a program's shared memory. A count for each block lies in the GPU's: how much of gate and up is written,
and then how many tiles of down wait no more; it is zero before and after.
"""

from __future__ import annotations

import contextlib
from typing import Any

import jax.numpy as jnp

from ferrum_kernels import mosaic_registers as pieces

WEIGHTS, ROWS, COUNTS = 0, 1, 3  # warps of the copying warpgroup, of four, and what they do alone
LANE = ".reg .pred p, first; .reg .b32 n; mov.u32 n, %laneid; setp.eq.u32 first, n, 0;"
WAIT = "W${:uid}: mbarrier.try_wait.parity.shared.b64 p, [$0], $1, 10000000; @!p bra W${:uid};"


def address(barriers: Any, slot: Any) -> Any:
    """Of a slot's barrier of 64 bits in shared memory."""
    import jax.experimental.mosaic.gpu as mgpu
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir.dialects import arith, llvm

    i32 = pieces.types()[0]
    return arith.addi(llvm.ptrtoint(i32, utils.memref_ptr(barriers)), arith.muli(slot, mgpu.c(8, i32)))


def run_text(text: str, constraints: str, *args: Any) -> None:
    """Run PTX instructions without a result."""
    from jaxlib.mlir import ir

    pieces.asm(ir.Type.parse("!llvm.void"), text, constraints, *args, effects=True)


def init(count: int, arrivals: int) -> Any:
    """A function of a ref of so many barriers: make them ready, seen by all threads."""
    import jax.experimental.mosaic.gpu as mgpu
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def body(_: Any, barriers: Any) -> None:
        text = f"{{ .reg .pred p; setp.eq.s32 p, $1, 0; @p mbarrier.init.shared.b64 [$0], {arrivals}; }}"
        for slot in range(count):
            run_text(text, "r,r", address(barriers, mgpu.c(slot, pieces.types()[0])), mgpu.thread_idx())
        run_text("fence.mbarrier_init.release.cluster; bar.sync 0;", "")

    return plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(body)


def at_barrier(text: str, barriers: Any, slot: Any, *numbers: Any) -> None:
    """Run instructions with the address of a slot's barrier as $0 and the numbers as $1 and on."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def body(_: Any, barriers: Any, *numbers: Any) -> None:
        slot, *more = map(pieces.number, numbers)
        run_text(text, ",".join("r" * len(numbers)), address(barriers, slot), *more)

    scalars = [plgpu.Layout.WG_SPLAT(())] * (1 + len(numbers))
    plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *scalars))(body)(barriers, slot, *numbers)


def wait(barriers: Any, slot: Any, odd: Any, warps: int = 4) -> None:
    """Until the phase of that parity is over; only the first so many warps of the warpgroup wait."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def body(_: Any, barriers: Any, *numbers: Any) -> None:
        slot, odd = map(pieces.number, numbers)
        with contextlib.nullcontext() if warps == 4 else of_warps(0, warps):
            run_text(f"{{ .reg .pred p; {WAIT} }}", "r,r", address(barriers, slot), odd)

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[plgpu.Layout.WG_SPLAT(())] * 2))(body)(barriers, slot, odd)


def tell_when_gathered(barriers: Any, slot: Any) -> None:
    """Of each thread once, when all that it gathers so far is there."""
    at_barrier("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];", barriers, slot)


def of_warps(first: int, count: int = 1) -> Any:
    """A context whose instructions are those of so many warps of the warpgroup: the others branch over all of it."""
    import jax.experimental.mosaic.gpu as mgpu
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir.dialects import arith

    def c(n: int) -> Any:
        return mgpu.c(n, pieces.types()[0])

    warp = arith.subi(arith.andi(utils.warp_idx(sync=True), c(3)), c(first))
    return mgpu.when(arith.cmpi(arith.CmpIPredicate.ult, warp, c(count)))


def _count_of(written: Any, block: Any) -> Any:
    """The address of a block's count."""
    import jax.experimental.mosaic.gpu as mgpu
    from jaxlib.mlir.dialects import arith

    i64 = pieces.types()[1]
    return pieces.address(written, arith.muli(arith.extui(i64, block), mgpu.c(4, i64)))


def tell_written(done: Any) -> None:
    """Of each warp that multiplies: that it has written all it has of a tile."""
    text = f"{{ {LANE} bar.warp.sync -1; @first mbarrier.arrive.release.cta.shared::cta.b64 _, [$0]; }}"
    at_barrier(text, done, jnp.int32(0))


def count(done: Any, written: Any, odd: Any, block: Any, share: Any) -> None:
    """Wait for the warps that write a tile, and count it for its block.

    That what they wrote is seen everywhere before the count takes a microsecond, which they do not wait.
    """
    import jax.experimental.mosaic.gpu as mgpu
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def body(_: Any, done: Any, written: Any, *numbers: Any) -> None:
        odd, block, share = map(pieces.number, numbers)
        text = f"{{ {LANE} {WAIT} @first red.release.gpu.global.add.s32 [$2], $3; }}"
        with of_warps(COUNTS):
            barrier = address(done, mgpu.c(0, pieces.types()[0]))
            run_text(text, "r,r,l,r", barrier, odd, _count_of(written, block), share)

    ref, scalar = plgpu.RefType(), plgpu.Layout.WG_SPLAT(())
    plgpu.inline_mgpu(arg_types=(ref, ref, *[scalar] * 3))(body)(done, written, odd, block, share)


def wait_for_rows(count: int) -> Any:
    """A function of counts and a block: wait until its rows are written, to be read by copies."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def body(_: Any, written: Any, block: Any) -> None:
        text = "{ .reg .pred p; .reg .b32 n; W${:uid}: ld.acquire.gpu.global.b32 n, [$0]; "
        text += f"setp.lt.s32 p, n, {count}; @p bra W${{:uid}}; fence.proxy.async.global; }}"
        with of_warps(ROWS):
            run_text(text, "l", _count_of(written, pieces.number(block)))

    return plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())))(body)


def leave_rows(count: int) -> Any:
    """A function of counts and a block: count that a tile waits no more; the last of them leaves zero."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def body(_: Any, written: Any, block: Any) -> None:
        text = f"{{ {LANE} @first atom.relaxed.gpu.global.add.s32 n, [$0], 1; "
        text += f"setp.eq.and.s32 p, n, {count - 1}, first; @p st.relaxed.gpu.global.s32 [$0], 0; }}"
        with of_warps(ROWS):
            run_text(text, "l", _count_of(written, pieces.number(block)))

    return plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())))(body)
