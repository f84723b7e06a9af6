"""The Mosaic GPU backend of Pallas: expert layers and products of many rows on Hopper GPUs (compute capability 9.0).

The name stands for both GPU backends: a layer, or a product with one matrix, goes to these kernels where they take
its weights and were measured to be faster, and to the Triton kernels otherwise.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from typing import Any

import jax
import jax.numpy as jnp

from ferrum_kernels import mosaic_few, triton, triton_dialect, triton_place, triton_tiles
from ferrum_kernels.blocks import max_blocks
from ferrum_kernels.errors import BackendError
from ferrum_kernels.mosaic_matmul import Ring, multiprocessors, product
from ferrum_kernels.pairs import Pairs
from ferrum_kernels.tiles import TiledLinear
from ferrum_kernels.triton_matmul import Rows

NAME = "mosaic"
NAMES = (triton.NAME, NAME)  # which take weights in tiles
SIDE_BY_SIDE = re.compile(r"--xla_gpu_command_buffer_scheduling_mode=(?:CONCURRENT|1)\b")


def unavailable() -> str | None:
    """Why these kernels cannot run here, or None when they can."""
    if problem := triton.unavailable():
        return problem
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    if capability != "9.0":
        return f"it needs a Hopper GPU, compute capability 9.0; {device.device_kind} has {capability}"
    if jax.__version_info__ < (0, 11, 0):
        return f"it needs jax 0.11 or later; this is {jax.__version__}"
    # Programs of mosaic_few wait for each other: two such kernels, each with half of its programs, never end.
    whole = "and programs of its kernels wait for each other, so that they need the whole GPU"
    if SIDE_BY_SIDE.search(os.environ.get("XLA_FLAGS", "")):
        flag = "xla_gpu_command_buffer_scheduling_mode=CONCURRENT"
        return f"XLA_FLAGS lets kernels run side by side ({flag}), {whole}; leave that flag out"
    if shared := sorted(name for name in os.environ if name.startswith("CUDA_MPS_")):
        return f"{shared[0]} lets processes share the GPU, {whole}; unset it where this process is alone"
    try:
        from jax.experimental.pallas import mosaic_gpu  # noqa: F401
    except ImportError:
        return f"jax {jax.__version__} has no Mosaic GPU backend of Pallas"
    return None


def check(*weights: Any) -> None:
    """Raise BackendError where the kernels cannot run or neither GPU backend takes a weight."""
    if problem := unavailable():
        others = '"xla"' if triton.unavailable() else '"triton" or "xla"'
        raise BackendError(
            f'implementation="{NAME}" cannot run: {problem}. Leave implementation out for the best one here, or use '
            f"{others}."
        )
    for w in weights:
        if problem := triton.refuses(w):
            raise BackendError(f"{problem}.")
    triton_dialect.announce()


def takes(x: jax.Array, gate_up: TiledLinear, down: TiledLinear) -> bool:
    """Whether these kernels can multiply by the weights of a layer.

    They hold 4 bits in symmetric groups of 128 with scales of 16 bits, in input order; 128 divides both widths of an
    expert.
    """
    features = down.k
    sizes = features % 128 == 0 and gate_up.k % 128 == 0 and down.n_per_expert % 256 == 0
    plain = _is_plain(gate_up) and _is_plain(down)
    reached = x.size < 2**31  # offsets of gathered rows are 32 bits, in bytes
    return sizes and plain and reached and gate_up.n_per_expert == 2 * features and x.dtype == jnp.bfloat16


def _is_plain(w: TiledLinear) -> bool:
    """Whether a weight holds what the kernels decode; scales of more than 16 bits would not fit the shared memory."""
    narrow = jnp.dtype(w.scales.dtype).itemsize == 2
    return w.bits == 4 and w.group_size == 128 and w.zeros is None and w.perm is None and narrow


@functools.cache
def table(device_kind: str) -> dict[str, Any]:
    """The measured table for a kind of device, its family's, or else that of an H100.

    >>> sorted(table("NVIDIA H200"))
    ['date', 'device', 'experts', 'note', 'shapes']
    """
    file = triton_tiles.file_of(NAME, device_kind) or triton_tiles.FOLDER / "mosaic-h100.json"
    return json.loads(file.read_text(encoding="utf-8"))


def rings(pairs: int, num_experts: int) -> tuple[Ring, Ring] | None:
    """How both products of a layer are cut up, or None where the Triton kernels were as fast.

    >>> rings(8 * 8, 128) is None
    True
    >>> rings(8 * 4096, 128)[0].columns[-1]
    128
    """
    load = pairs / num_experts
    rows = table(jax.devices()[0].device_kind)["experts"]
    row = next(row for row in rows if row["load"] is None or load <= row["load"])
    if row["up"] is None:
        return None
    up, down = ({**ring, "columns": tuple(ring["columns"])} for ring in (row["up"], row["down"]))
    return Ring(**up), Ring(**down)


def routed_experts(
    x: jax.Array,
    logits: jax.Array,
    mask: jax.Array | None,
    top_k: int,
    norm: bool,
    gate_up: TiledLinear,
    down: TiledLinear,
    layer: Any,
    arrived: jax.Array | None = None,
    whole: bool = True,
) -> tuple[Any, jax.Array, jax.Array, jax.Array | None]:
    """A whole layer, as `triton.routed_experts`.

    Args:
      x: bfloat16 or float16 [T, D], T at least 1.
      logits: float [T, E], or parts [parts, T, E] to be added up.
      mask: bool [T], False for tokens that go nowhere; None: none.
      top_k: K.
      norm: rescale the K weights to sum to one.
      gate_up: [E, D, 2 F], gate columns first; [L, E, D, 2 F] with `layer`.
      down: [E, F, D], or [L, E, F, D].
      layer: index into the stacks, or None.
      arrived: int32 [1], zero, with which some tokens are routed and placed by one kernel; None: by two.
      whole: add a token's pairs up; else they may come as Pairs.

    Returns:
      [T, D] in x.dtype or Pairs, experts int32 [T, K], weights float32 [T, K], and arrived, zero again. silu(gate) * up
      and a pair's output are rounded to x.dtype; sums are float32.
    """
    how = rings(x.shape[0] * top_k, down.num_experts) if takes(x, gate_up, down) else None
    if how is None:
        return triton.routed_experts(x, logits, mask, top_k, norm, gate_up, down, layer, arrived, whole)
    blocks = max_blocks(x.shape[0] * top_k, down.num_experts, how[0].block)
    chosen, weights, live, places, arrived = triton_place.route_and_place(
        logits, mask, arrived, top_k, norm, how[0].columns, blocks, False
    )
    y = _run(x, live, weights, places, gate_up, down, layer, *how)
    return (y.whole().astype(x.dtype) if whole else y), chosen, weights, arrived


def run_experts(
    x: jax.Array,
    live: jax.Array,
    weights: jax.Array,
    counts: jax.Array | None,
    gate_up: TiledLinear,
    down: TiledLinear,
    layer: Any,
    up_ring: Ring,
    down_ring: Ring,
) -> jax.Array:
    """`triton.experts` with these kernels; both rings have one block of rows, and are one where warps are alone."""
    num_experts = down.num_experts
    blocks = max_blocks(live.size, num_experts, up_ring.block)
    counts = triton.count(live, num_experts) if counts is None else counts
    places = triton_place.place(live, counts, num_experts, up_ring.columns, blocks, False)
    return _run(x, live, weights, places, gate_up, down, layer, up_ring, down_ring).whole().astype(x.dtype)


def _run(
    x: jax.Array,
    live: jax.Array,
    weights: jax.Array,
    places: tuple[jax.Array, ...],
    gate_up: TiledLinear,
    down: TiledLinear,
    layer: Any,
    up_ring: Ring,
    down_ring: Ring,
) -> Pairs:
    index = None if layer is None else jnp.asarray(layer, jnp.int32)
    if up_ring.alone:
        y = mosaic_few.experts(x, gate_up, down, index, places, live.shape[1], live.size, up_ring)
        return Pairs(y, live, weights, down.num_experts)
    order, *tables, _ = places
    block = up_ring.block
    rows = Rows(block, *tables, order=order)
    # Between the products a block's rows begin at a multiple of the block: a tile copied at once begins at no other.
    h = product(x, gate_up, index, rows, tables[0].shape[0] * block, up_ring, gated=True, pairs_per_row=live.shape[1])
    y = product(h, down, index, rows, live.size, down_ring, by_pair=True)
    return Pairs(y, live, weights, down.num_experts)


LEAST_ROWS = 512  # of a product with one matrix; fewer stay with Triton
MATRIX_RINGS = Ring((128,)), Ring((128,), parts=1), Ring((64,), stages=6), Ring((64,), parts=1, stages=6)


def matrix_ring(rows: int, outputs: int, programs: int) -> Ring:
    """How a product with one matrix is cut: the largest tiles of those that keep the programs about as busy.

    >>> matrix_ring(4096, 2048, 132).outputs, matrix_ring(1024, 2048, 132).outputs
    (256, 128)
    """

    def time(ring: Ring) -> float:
        turns = -(-(-(-rows // ring.block) * (outputs // ring.outputs)) // programs)
        # A smaller tile does less for what it copies and decodes: fitted to times on an H100.
        return turns * (ring.block * ring.outputs + 64 * 64)

    return min((ring for ring in MATRIX_RINGS if outputs % ring.outputs == 0), key=time)


def gptq_matmul(x: jax.Array, w: TiledLinear, layer: Any, out_dtype: Any) -> jax.Array:
    """`triton.gptq_matmul`, of many rows with these kernels.

    Args:
      x: bfloat16 or float16 [M, K], M at least 1.
      w: one matrix, or a stack [L] of them with `layer`.
      layer: index into the stack, or None.
      out_dtype: of the result.

    Returns:
      [M, N].
    """
    rows, outputs = x.shape[0], w.n_per_expert
    sizes = rows >= LEAST_ROWS and w.k % 128 == 0 and outputs % 128 == 0
    if not (_is_plain(w) and sizes and x.dtype == out_dtype == jnp.bfloat16):
        return triton.gptq_matmul(x, w, layer, out_dtype)
    ring = matrix_ring(rows, outputs, multiprocessors())
    starts = jnp.arange(0, rows, ring.block, dtype=jnp.int32)
    table = Rows(ring.block, jnp.zeros_like(starts), starts, jnp.minimum(rows - starts, ring.block), order=starts)
    x = jnp.pad(x, ((0, -rows % 8), (0, 0)))  # shared memory holds them by eight
    # The matrix is the only expert of its layer.
    words, scales = (a[None] if layer is None else a[:, None] for a in (w.words, w.scales))
    one = dataclasses.replace(w, words=words, scales=scales)
    return product(x, one, None if layer is None else jnp.asarray(layer, jnp.int32), table, rows, ring)
