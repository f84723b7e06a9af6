"""The Triton backend of Pallas: products and whole expert layers on NVIDIA GPUs from compute capability 8.0 on.

Weights come as TiledLinear, which `tile` makes once at load. An expert layer is two to five kernels: routing
(triton_route), places of pairs where several share experts (triton_place), gate and up with silu(gate) * up, down with
the routing weight, and the sum over each token's experts. Nothing is sorted, sliced or copied, and dead experts are
not read.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from ferrum_kernels import triton_dialect, triton_few, triton_place, triton_route, triton_rows
from ferrum_kernels.blocks import max_blocks
from ferrum_kernels.errors import BackendError
from ferrum_kernels.packed import PackedLinear
from ferrum_kernels.pairs import Pairs
from ferrum_kernels.tiles import TiledLinear, cannot_tile
from ferrum_kernels.triton_few import Cut
from ferrum_kernels.triton_matmul import Rows, product
from ferrum_kernels.triton_route import count as count
from ferrum_kernels.triton_tiles import expert_tiles, few_cuts, fit, little_memory, row_tile

NAME = "triton"
MOST_ROWS = 64  # of a block of a Dispatch that one program takes
_interpret = contextvars.ContextVar("interpret", default=False)


@contextlib.contextmanager
def interpreted(yes: bool = True) -> Iterator[None]:
    """Run these kernels without a GPU, slowly, by Pallas's interpreter: for tests of what they compute."""
    token = _interpret.set(yes)
    try:
        yield
    finally:
        _interpret.reset(token)


def is_interpreted() -> bool:
    """Whether this is inside `interpreted`."""
    return _interpret.get()


def unavailable() -> str | None:
    """Why these kernels cannot run here, or None when they can."""
    if _interpret.get():
        return None
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    if device.platform != "gpu" or not capability.replace(".", "").isdigit():
        return f"it needs an NVIDIA GPU; the default device is {device.device_kind!r} of platform {device.platform!r}"
    if float(capability) < 8.0:
        return f"it needs compute capability 8.0 or later; {device.device_kind} has {capability}"
    if jax.__version_info__ < (0, 10, 2):
        return f"it needs jax 0.10.2 or later; this is {jax.__version__}"
    try:
        from jax.experimental.pallas import triton  # noqa: F401
    except ImportError:
        return f"jax {jax.__version__} has no Triton backend of Pallas any more"
    return None


def refuses(w: Any) -> str | None:
    """Why these kernels do not take a weight, or None when they do.

    >>> refuses(PackedLinear(None, None, bits=3, group_size=32, shape=(32, 8)))
    'tiles hold codes of 4 and 8 bits; this weight has 3. Use implementation="xla" for it'
    """
    if isinstance(w, TiledLinear):
        if w.zeros is not None and 2**31 < w.zeros.size <= 2**32:
            return (
                f"this stack has {w.zeros.size / 2**30:.1f} GiB of zero points; between 2 and 4 GiB the compiler's "
                'offsets of 32 bits do not reach. Use implementation="xla" for it'
            )
        return None
    if not isinstance(w, PackedLinear):
        return 'the Triton kernels take tiled weights; this one is a plain array. Use implementation="xla" for it'
    if problem := cannot_tile(w):
        return f'{problem}. Use implementation="xla" for it'
    return (
        "the Triton kernels take weights in tiles; this PackedLinear is laid out as in its file. Lay it out once with "
        "ferrum_kernels.tile, as ferrum_jax.load does on a GPU"
    )


def check(*weights: Any) -> None:
    """Raise BackendError where the kernels cannot run or do not take a weight."""
    if problem := unavailable():
        raise BackendError(
            f'implementation="{NAME}" cannot run: {problem}. Leave implementation out for the best one here, or use '
            f'"xla".'
        )
    for w in weights:
        if problem := refuses(w):
            raise BackendError(f"{problem}.")
    if not _interpret.get():
        triton_dialect.announce()


def check_dtype(x: jax.Array) -> None:
    """Raise BackendError unless activations have a dtype that the matrix units multiply."""
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise BackendError(
            f"the Triton kernels take bfloat16 and float16 activations; x is {x.dtype}. Cast it, load with "
            f'dtype="bfloat16", or use implementation="xla".'
        )


def gptq_matmul(x: jax.Array, w: TiledLinear, layer: Any, out_dtype: Any) -> jax.Array:
    """x [M, K] @ W [K, N] without the bias.

    Args:
      x: bfloat16 or float16 [M, K], M at least 1.
      w: one matrix, or a stack [L] of them with `layer`.
      layer: index into the stack, or None.
      out_dtype: of the result.

    Returns:
      [M, N].
    """
    index = None if layer is None else jnp.asarray(layer, jnp.int32)
    m = x.shape[0]
    x = padded(in_order(x, w, index), w)
    if m <= triton_rows.MOST:
        cut = triton_rows.cut_for(m, w.words.shape[-2], w.num_blocks, little_memory())
        return triton_rows.product(x, w, index, cut, out_dtype, _interpret.get())[:, : w.n_per_expert]
    block, tile = row_tile(m)
    tile = fit(tile, w.words.shape[-2], w.num_blocks)
    y = product(x, w, index, Rows(block), -(-m // block), m, tile, out_dtype, interpret=_interpret.get())
    return y[:, : w.n_per_expert]


def in_order(x: jax.Array, w: TiledLinear, layer: Any) -> jax.Array:
    """Inputs [M, K] in the order of the packed rows of one matrix."""
    if w.perm is None:
        return x
    return jnp.take(x, w.perm if layer is None else w.perm[layer], axis=-1)


def grouped_matmul(
    x: jax.Array, w: TiledLinear, block_expert: jax.Array, block: int, layer: Any, out_dtype: Any
) -> jax.Array:
    """Rows in the block layout of a Dispatch times their experts' weights.

    Args:
      x: bfloat16 or float16 [R, K].
      w: [E, K, N], or [L, E, K, N] with `layer`.
      block_expert: int32 [R // block]; outside [0, E) means nobody's.
      block: rows per block.
      layer: index into the stack, or None.
      out_dtype: of the result.

    Returns:
      [R, N], zero in nobody's rows.
    """
    index = None if layer is None else jnp.asarray(layer, jnp.int32)
    if w.perm is not None:
        x = _permuted(x, w, index, jnp.repeat(block_expert, block))
    part = max(p for p in range(1, min(block, MOST_ROWS) + 1) if block % p == 0)
    _, tile = row_tile(part)
    y = product(
        padded(x, w),
        w,
        index,
        Rows(part, block_expert, share=block // part),
        x.shape[0] // part,
        x.shape[0],
        fit(tile, w.words.shape[-2], w.num_blocks),
        out_dtype,
        fill=True,
        interpret=_interpret.get(),
    )
    return y[:, : w.n_per_expert]


def route(
    logits: jax.Array, mask: jax.Array | None, top_k: int, norm: bool
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """See triton_route.route."""
    return triton_route.route(logits, mask, top_k, norm, _interpret.get())


def experts(
    x: jax.Array,
    live: jax.Array,
    weights: jax.Array,
    counts: jax.Array | None,
    gate_up: TiledLinear,
    down: TiledLinear,
    layer: Any,
) -> jax.Array:
    """The gated MLP of each token's experts, weighted and added up.

    Args:
      x: bfloat16 or float16 [T, D], T at least 1.
      live: int32 [T, K]; an id outside [0, E) is skipped.
      weights: float32 [T, K].
      counts: of `route`, or None.
      gate_up: [E, D, 2 F], gate columns first; [L, E, D, 2 F] with `layer`.
      down: [E, F, D], or [L, E, F, D].
      layer: index into the stacks, or None.

    Returns:
      [T, D] in x.dtype. silu(gate) * up is rounded to x.dtype; a pair's output is kept in float32 unless there are
      MANY_PAIRS of them, then in x.dtype; sums are float32.
    """
    if cuts := few_cuts(live.size, live.shape[1], down.num_experts, gate_up, down):
        flat, top_k = live.reshape(-1), live.shape[1]
        source = padded(x, gate_up)
        if gate_up.perm is not None:
            source = _permuted(x[jnp.arange(flat.shape[0]) // top_k], gate_up, layer, flat)
        [h] = triton_few.gated(source, gate_up, layer, cuts[0], top_k, live=live, interpret=_interpret.get())
        return _down_of_few(h, live, weights, down, layer, cuts[1])
    counts = count(live, down.num_experts) if counts is None else counts
    sizes, blocks = _blocks(live.size, down.num_experts)
    places = triton_place.place(live, counts, down.num_experts, sizes, blocks, _interpret.get())
    return _experts_in_blocks(x, live, weights, places, gate_up, down, layer).whole().astype(x.dtype)


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
    """`route` and `experts` in one: with few tokens the first kernel of the experts chooses them.

    Args:
      x: bfloat16 or float16 [T, D], T at least 1.
      logits: float [T, E], or parts [parts, T, E] to be added up.
      mask: bool [T], False for tokens that go nowhere; None: none.
      top_k: K.
      norm: rescale the K weights to sum to one.
      gate_up, down, layer: as in `experts`.
      arrived: int32 [1], zero, with which some tokens are routed and placed by one kernel; None: by two.
      whole: add a token's pairs up; else they may come as Pairs.

    Returns:
      [T, D] in x.dtype or Pairs, experts int32 [T, K], weights float32 [T, K], and arrived, zero again.
    """
    cuts = few_cuts(x.shape[0] * top_k, top_k, down.num_experts, gate_up, down)
    if cuts is None:
        how = top_k, norm, *_blocks(x.shape[0] * top_k, down.num_experts), _interpret.get()
        chosen, weights, live, places, arrived = triton_place.route_and_place(logits, mask, arrived, *how)
        y = _experts_in_blocks(x, live, weights, places, gate_up, down, layer)
        return (y.whole().astype(x.dtype) if whole else y), chosen, weights, arrived
    if gate_up.perm is not None or gate_up.num_experts > triton_few.MOST_LANES:
        chosen, weights, live, counts = route(logits, mask, top_k, norm)
        return experts(x, live, weights, counts, gate_up, down, layer), chosen, weights, arrived
    h, chosen, weights, live = triton_few.gated(
        padded(x, gate_up),
        gate_up,
        layer,
        cuts[0],
        top_k,
        logits=logits,
        mask=mask,
        norm=norm,
        interpret=_interpret.get(),
    )
    return _down_of_few(h, live, weights, down, layer, cuts[1]), chosen, weights, arrived


def _down_of_few(
    h: jax.Array, live: jax.Array, weights: jax.Array, down: TiledLinear, layer: Any, cut: Cut
) -> jax.Array:
    h = padded(h, down) if down.perm is None else _permuted(h, down, layer, live.reshape(-1))
    y = triton_few.down(h, live, weights.astype(jnp.float32), down, layer, cut, interpret=_interpret.get())
    return y[:, : down.n_per_expert]


def _blocks(pairs: int, num_experts: int) -> tuple[tuple[int, ...], int]:
    """Sizes and number of the blocks that a layer's pairs are cut into."""
    up_block, _, down_block, _ = expert_tiles(pairs, num_experts)
    block = max(up_block, down_block)
    return (block,), max_blocks(pairs, num_experts, block)


def _experts_in_blocks(
    x: jax.Array,
    live: jax.Array,
    weights: jax.Array,
    places: tuple[jax.Array, ...],
    gate_up: TiledLinear,
    down: TiledLinear,
    layer: Any,
) -> Pairs:
    """`experts` by blocks of an expert's pairs, of which `triton_place.place` gives the places."""
    interpret = _interpret.get()
    tokens, top_k = live.shape
    pairs, features, num_experts = tokens * top_k, down.k, down.num_experts
    index = None if layer is None else jnp.asarray(layer, jnp.int32)
    flat = live.reshape(-1)
    up_block, up_tile, down_block, down_tile = expert_tiles(pairs, num_experts)
    fused = 2 * features == gate_up.words.shape[-2] and features % 16 == 0
    up_tile = fit(up_tile, features if fused else gate_up.words.shape[-2], gate_up.num_blocks)
    down_tile = fit(down_tile, down.words.shape[-2], down.num_blocks)
    (table,), blocks = _blocks(pairs, num_experts)
    order, *tables = places
    rows = Rows(table, experts=tables[0], starts=tables[1], counts=tables[2], order=order)

    def run(x: jax.Array, w: TiledLinear, block: int, tile: Any, out: Any, **how: Any) -> jax.Array:
        shared = {"gated": how.pop("gated", False), "weights": how.pop("weights", None), "interpret": interpret}
        these = dataclasses.replace(rows, block=block, share=table // block, **how)
        return product(x, w, index, these, blocks * (table // block), pairs, tile, out, **shared)

    # A permutation is its expert's own, so permuted rows are one per pair.
    by_pair = down.perm is not None
    source, per_row = padded(x, gate_up), top_k
    if gate_up.perm is not None:
        source, per_row = _permuted(x[jnp.arange(pairs) // top_k], gate_up, index, flat), 1
    dtype = x.dtype if fused else jnp.float32
    h = run(source, gate_up, up_block, up_tile, dtype, gated=fused, pairs_per_row=per_row, by_pair=by_pair)
    if not fused:
        h = (jax.nn.silu(h[:, :features]) * h[:, features : 2 * features]).astype(x.dtype)
    h = padded(h, down) if down.perm is None else _permuted(h, down, index, flat)
    dtype = x.dtype if pairs >= MANY_PAIRS else jnp.float32
    weight = weights.astype(jnp.float32).reshape(-1)
    y = run(h, down, down_block, down_tile, dtype, weights=weight, pairs_per_row=int(by_pair), by_pair=True)
    return Pairs(y[:, : down.n_per_expert], live, None, num_experts)


MANY_PAIRS = 4096  # from here on a pair's output is written in 16 bits: writing it would take a tenth of the time


def padded(x: jax.Array, w: TiledLinear) -> jax.Array:
    """x with zeros up to the inputs that the weight's blocks cover."""
    return x if x.shape[-1] == w.padded_k else jnp.pad(x, ((0, 0), (0, w.padded_k - x.shape[-1])))


def _permuted(x: jax.Array, w: TiledLinear, layer: Any, expert: jax.Array) -> jax.Array:
    """Each row's inputs in the packed order of its expert."""
    perm = w.perm if layer is None else jax.lax.dynamic_index_in_dim(w.perm, layer, 0, keepdims=False)
    return padded(jnp.take_along_axis(x, perm[jnp.clip(expert, 0, perm.shape[0] - 1)], axis=1), w)
