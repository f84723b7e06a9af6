"""Attention on NVIDIA GPUs: head norms, rotary embedding, cache write and grouped-query attention over what is live.

One new token per row is one kernel, which writes the token's key and value and reads what came before. Where rows may
be long, programs share them by what they hold at that step, which only the device knows: each walks an even run of all
rows' tiles, a short row stays whole, and of a row in parts the last program to arrive adds them up, in the same order
always. More tokens are two kernels: one writes keys and values, one attends. The cache may be in pages and in int8; the
layer number is an operand and the cache is written in place, so a scan over layers copies nothing.

Source: streaming softmax arXiv 1805.02867; tiles arXiv 2205.14135; grouped queries arXiv 2305.13245; pages arXiv
2309.06180; int8 with a scale per token and head is this package's own choice.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from ferrum_kernels import triton
from ferrum_kernels.code_words import WORD
from ferrum_kernels.errors import ShapeError
from ferrum_kernels.triton_attend import decode_kernel, prefill_kernel, write_kernel
from ferrum_kernels.triton_attention_cuts import decode_cut, most_programs, prefill_cut
from ferrum_kernels.triton_call import call
from ferrum_kernels.triton_flash import Parts, Refs
from ferrum_kernels.triton_statics import Cut, Statics

HEADS = (16, 32, 64, 128, 256)  # sizes of a head
LEAST_OF_CODES = 64  # of a cache of int8: a matrix instruction takes 16 numbers, which is a quarter
DTYPES = (jnp.bfloat16, jnp.float16)
Pair = tuple[jax.Array, jax.Array]


def refuses(dtype: Any, head_dim: int, cache: Any, page: int | None = None) -> str | None:
    """Why these kernels do not attend, or None where they do.

    Args:
      dtype: of activations.
      head_dim: h.
      cache: dtype of the cache; int8 where its words hold codes.
      page: positions of a page, or None.

    >>> refuses(jnp.bfloat16, 128, jnp.int8, 16)
    >>> refuses(jnp.bfloat16, 96, jnp.bfloat16)
    'its attention takes heads of 16, 32, 64, 128 and 256; these are of 96'
    """
    dtype, cache = jnp.dtype(dtype), jnp.dtype(cache)
    if dtype not in DTYPES:
        return f"its attention takes bfloat16 and float16; activations are {dtype}"
    if head_dim not in HEADS:
        return f"its attention takes heads of 16, 32, 64, 128 and 256; these are of {head_dim}"
    if cache not in (dtype, jnp.int8):
        return f"its attention takes caches of the activations' dtype, {dtype}, and int8; this one is of {cache}"
    if cache == jnp.int8 and head_dim < LEAST_OF_CODES:
        return f"its attention takes caches of int8 for heads from {LEAST_OF_CODES}; these are of {head_dim}"
    if page is not None and (page < 16 or page & (page - 1)):
        return f"its attention takes pages of a power of two from 16; these are of {page}"
    return None


def arrivals(batch: int, kv_heads: int) -> jax.Array:
    """Counters of the programs that share a row, all zero: what `arrived` is before a step's first layer.

    >>> arrivals(2, 4).tolist()
    [0, 0, 0, 0, 0, 0, 0, 0]
    """
    return jnp.zeros(batch * kv_heads, jnp.int32)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    norms: Pair | None,
    eps: float,
    cosine: jax.Array,
    sine: jax.Array,
    pools: Pair,
    layer: Any,
    start: jax.Array,
    count: jax.Array,
    window: Any,
    table: jax.Array | None = None,
    scales: Pair | None = None,
    norm_layer: Any = None,
    arrived: jax.Array | None = None,
) -> tuple[jax.Array, Pair, Pair | None, jax.Array | None]:
    """Attention of some new tokens of each row over all that the row has read.

    Args:
      q: bfloat16 or float16 [B, T, H * h], as projected; k, v: [B, T, Kv * h].
      norms: weights of the RMS norms of query and key heads, each [h], or None.
      eps: of those norms.
      cosine, sine: float32 [B, T, h / 2] of each token's angles.
      pools: keys and values [L, B, S, Kv, h]; with a table [L, P, page, Kv, h]. Written in place where their buffers
        allow it. Of q's dtype, or with scales codes in words, int32 [..., h / 4].
      layer: index into the pools.
      start: int32 [B], tokens each row holds.
      count: int32 [B], real tokens of each row; the others write nothing and get zero.
      window: int32 scalar, keys a query sees, itself included.
      table: int32 [B, N], the page of each run of `page` positions; a page size is a power of two from 16. Where a row
        has nothing, any number may stand.
      scales: float32 [L, P, page, Kv] of keys and of values, for codes: value = code * scale.
      norm_layer: index into norms that are stacks [L', h]; None where each is one vector.
      arrived: zeros of `arrivals`, for T = 1; the kernel leaves zeros. None makes them, which is one more launch.

    Returns:
      ([B, T, H * h] in q.dtype, pools, scales, arrived). A token past the row's capacity is not written.

    Raises:
      ShapeError: arrays do not belong together.
    """
    h = pools[0].shape[-1] * (1 if scales is None else WORD)
    heads, kv_heads = q.shape[-1] // h, pools[0].shape[-2]
    if q.shape[-1] != heads * h or k.shape[-1] != kv_heads * h or v.shape != k.shape:
        raise ShapeError(
            f"queries are {list(q.shape)}, keys {list(k.shape)} and values {list(v.shape)}; with a cache of {kv_heads} "
            f"heads of {h} keys and values are [B, T, {kv_heads * h}] and queries a multiple of {h} wide."
        )
    rest = norms, eps, cosine, sine, pools, layer, start, count, window, table, scales, norm_layer, arrived
    return _attention({"q": q, "k": k, "v": v}, (heads, 0, 0, 0), *rest)


def attention_fused(
    qkv: jax.Array,
    norms: Pair | None,
    eps: float,
    cosine: jax.Array,
    sine: jax.Array,
    pools: Pair,
    layer: Any,
    start: jax.Array,
    count: jax.Array,
    window: Any,
    table: jax.Array | None = None,
    scales: Pair | None = None,
    norm_layer: Any = None,
    dtype: Any = None,
    arrived: jax.Array | None = None,
) -> tuple[jax.Array, Pair, Pair | None, jax.Array | None]:
    """The same with queries, keys and values of one product, [B, T, (H + 2 Kv) * h] in this order.

    Of one new token per row the product may be in parts, float32 [parts, B, 1, (H + 2 Kv) * h] to be added up; then
    `dtype` is that of the activations.
    """
    kv_heads, h = pools[0].shape[-2], pools[0].shape[-1] * (1 if scales is None else WORD)
    heads = qkv.shape[-1] // h - 2 * kv_heads
    if heads < 1 or qkv.shape[-1] % h or qkv.ndim > (4 if qkv.shape[-2] == 1 else 3):
        raise ShapeError(
            f"the product is {list(qkv.shape)}; with a cache of {kv_heads} heads of {h} it is "
            f"[B, T, (H + {2 * kv_heads}) * {h}]: queries, keys, values."
        )
    layout = (heads, 0, heads * h, (heads + kv_heads) * h)
    rest = norms, eps, cosine, sine, pools, layer, start, count, window, table, scales, norm_layer, arrived
    return _attention({"q": qkv}, layout, *rest, dtype)


def _attention(
    given: dict[str, jax.Array],
    layout: tuple[int, int, int, int],
    norms: Pair | None,
    eps: float,
    cosine: jax.Array,
    sine: jax.Array,
    pools: Pair,
    layer: Any,
    start: jax.Array,
    count: jax.Array,
    window: Any,
    table: jax.Array | None,
    scales: Pair | None,
    norm_layer: Any,
    arrived: jax.Array | None,
    dtype: Any = None,
) -> tuple[jax.Array, Pair, Pair | None, jax.Array | None]:
    batch, tokens = given["q"].shape[-3:-1]
    dtype = jnp.dtype(dtype or given["q"].dtype)
    heads, *columns = layout
    layers, pages, page, kv_heads, h = pools[0].shape
    h *= 1 if scales is None else WORD
    _check(batch, dtype, heads, pools, start, count, table, scales, arrived)
    s = Statics(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=h,
        columns=(columns[0], columns[1], columns[2]),
        eps=eps,
        page=page,
        capacity=page if table is None else page * table.shape[1],
        cut=Cut(),
        dtype=dtype if scales is None else jnp.dtype(jnp.float16),
        codes=scales is not None,
        interpret=triton.is_interpreted(),
    )
    s = dataclasses.replace(s, cut=decode_cut(s, batch) if tokens == 1 else prefill_cut(s, batch, tokens))
    scalars = {"layer": layer, "window": window}
    if norms is not None and norm_layer is not None:
        scalars["norm_layer"] = norm_layer
    named: dict[str, Any] = {name: jnp.reshape(jnp.asarray(x, jnp.int32), (1,)) for name, x in scalars.items()}
    named |= {"start": start, "count": count, "table": table, **given, "cosine": cosine, "sine": sine}
    named |= dict(zip(("q_norm", "k_norm"), norms or (None, None), strict=True))
    rows = (layers, pages * page // s.block, s.block, kv_heads)
    cache = {"keys": pools[0].reshape(*rows, s.strip), "values": pools[1].reshape(*rows, s.strip)}
    if scales is not None:
        cache |= {"key_scales": scales[0].reshape(rows), "value_scales": scales[1].reshape(rows)}
    named = {name: x for name, x in named.items() if x is not None}
    if tokens == 1:
        y, cache = _decode(s, dtype, named, cache, arrived)
        arrived = cache.pop("arrived", arrived)
    else:
        y, cache = _prefill(s, named, _write(s, named, cache))
    shaped = [x.reshape(old.shape) for x, old in zip(cache.values(), (*pools, *(scales or ())), strict=True)]
    scales = (shaped[2], shaped[3]) if scales else None
    return y.reshape(batch, tokens, heads * h), (shaped[0], shaped[1]), scales, arrived


def _check(
    batch: int,
    dtype: Any,
    heads: int,
    pools: Pair,
    start: jax.Array,
    count: jax.Array,
    table: Any,
    scales: Pair | None,
    arrived: jax.Array | None,
) -> None:
    _, pages, page, kv_heads, h = pools[0].shape
    h *= 1 if scales is None else WORD
    narrow = scales is not None and h < LEAST_OF_CODES
    if dtype not in DTYPES or h not in HEADS or heads % kv_heads or narrow:
        raise ShapeError(
            f"attention of {heads} heads on {kv_heads} of {h} in {dtype}: the Triton kernels take bfloat16 and "
            f"float16, heads of {HEADS}, from {LEAST_OF_CODES} in int8, and whole groups of heads. Use "
            f'implementation="xla" for it.'
        )
    if pools[0].shape != pools[1].shape or pools[0].dtype != pools[1].dtype or {start.shape, count.shape} != {(batch,)}:
        raise ShapeError(
            f"keys are {pools[0].dtype}{list(pools[0].shape)}, values {pools[1].dtype}{list(pools[1].shape)}, starts "
            f"{list(start.shape)} and counts {list(count.shape)} for {batch} rows; keys and values are alike, and "
            f"there is one start and one count per row."
        )
    if arrived is not None and (arrived.shape, arrived.dtype) != ((batch * kv_heads,), jnp.int32):
        raise ShapeError(
            f"arrived is {arrived.dtype}{list(arrived.shape)}; of {batch} rows and {kv_heads} key heads it is "
            f"int32[{batch * kv_heads}]: make it with arrivals({batch}, {kv_heads})."
        )
    expected = jnp.dtype(dtype if scales is None else jnp.int32)
    if pools[0].dtype != expected or (scales and any(x.shape != pools[0].shape[:-1] for x in scales)):
        raise ShapeError(
            f"a cache of {pools[0].dtype}{list(pools[0].shape)} with "
            f"{'no scales' if scales is None else 'scales of ' + str([list(x.shape) for x in scales])}: it is of "
            f"{dtype} without scales, or of int32, words of int8 codes, with two arrays of scales [L, P, page, Kv]."
        )
    if table is None and pages != batch:
        raise ShapeError(f"the cache has {pages} rows and there are {batch}; without a table they are the same.")
    if table is not None and (table.shape[:1] != (batch,) or page < 16 or page & (page - 1)):
        raise ShapeError(
            f"the table is {list(table.shape)} of pages of {page} positions; it has {batch} rows, and a page is a "
            f"power of two from 16."
        )


def _call(
    kernel: Any, s: Statics, given: Refs, out: Refs, grid: tuple[int, ...], name: str, aliases: dict[str, str], cut: Cut
) -> dict[str, jax.Array]:
    inputs, outputs = list(given), list(out)

    def run(*refs: Any) -> None:
        r, o = dict(zip(inputs, refs, strict=False)), dict(zip(outputs, refs[len(inputs) :], strict=True))
        if "q" in r:
            r["q"] = r["q"] if len(r["q"].shape) == 3 else Parts(r["q"])
            r = {"k": r["q"], "v": r["q"], **r}
        kernel(s, r, o)

    results = call(
        run,
        list(given.values()),
        tuple(out.values()),
        grid,
        name,
        warps=cut.warps,
        stages=cut.stages,
        aliases={inputs.index(a): outputs.index(b) for a, b in aliases.items()},
        interpret=s.interpret,
    )
    return dict(zip(outputs, results, strict=True))


def _shapes(arrays: dict[str, jax.Array]) -> Refs:
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}


def _same(names: Any) -> dict[str, str]:
    return {name: name for name in names}


def _decode(s: Statics, dtype: Any, named: Refs, cache: Refs, arrived: jax.Array | None) -> tuple[jax.Array, Refs]:
    batch = named["start"].shape[0]
    y = jax.ShapeDtypeStruct((batch, 1, s.heads, s.head_dim), dtype)
    programs, parts = batch, {}
    if s.cut.programs:
        programs = most_programs(s.capacity, s.cut, batch)
        slots = programs + batch
        parts = {
            "parts": jax.ShapeDtypeStruct((slots, s.heads, s.head_dim), jnp.float32),
            "sums": jax.ShapeDtypeStruct((slots, s.heads), jnp.float32),
        }
        cache = {**cache, "arrived": arrivals(batch, s.kv_heads) if arrived is None else arrived}
    out = {"y": y, **parts, **_shapes(cache)}
    found = _call(decode_kernel, s, {**named, **cache}, out, (s.kv_heads, programs), "attend_one", _same(cache), s.cut)
    return found["y"], {name: found[name] for name in cache}


def _write(s: Statics, named: Refs, cache: Refs) -> Refs:
    batch, tokens, _ = named["q"].shape
    block = min(16, 1 << (tokens - 1).bit_length())
    grid = (-(-tokens // block), s.kv_heads, batch)
    names = ("layer", "norm_layer", "start", "count", "table", "q", "k", "v", "k_norm", "cosine", "sine")
    given = {name: named[name] for name in names if name in named} | cache
    cut = Cut(warps=4, stages=1)
    kernel = functools.partial(write_kernel, block)
    return _call(kernel, s, given, _shapes(cache), grid, "attend_write", _same(cache), cut)


def _prefill(s: Statics, named: Refs, cache: Refs) -> tuple[jax.Array, Refs]:
    batch, tokens, _ = named["q"].shape
    y = jax.ShapeDtypeStruct((batch, tokens, s.heads, s.head_dim), named["q"].dtype)
    tiles = -(-tokens // s.cut.queries)
    given = {name: x for name, x in named.items() if name not in ("k", "v", "k_norm")} | cache
    kernel = functools.partial(prefill_kernel, tiles)
    # The cache passes through untouched: whoever writes it next has to wait, where XLA would make a copy of it.
    out = {"y": y, **_shapes(cache)}
    found = _call(kernel, s, given, out, (tiles * s.kv_heads, batch), "attend_many", _same(cache), s.cut)
    return found["y"], {name: found[name] for name in cache}
