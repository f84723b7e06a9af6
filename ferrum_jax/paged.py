"""A key/value cache in pages: rows of any length share one pool, and a table says which pages are whose.

The table is a plain array that the host edits between steps: the compiled programs only read it. What holds of either
kind of cache is here too: writing new heads, reading a layer's, how much room a row has.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_jax.cache import KVCache, dequantise, dtype_of, empty_buffers, quantise, write
from ferrum_jax.config import ModelConfig
from ferrum_jax.errors import CapacityError

PAGE = 16  # slots of a page, where nobody says otherwise


@dataclasses.dataclass(frozen=True)
class PagedCache:
    """Keys and values of every layer, in pages.

    Attributes:
      k: [L, P, page, Kv, h] keys, rotated; slot s of row b is k[:, table[b, s // page], s % page]. Of int8 codes, in
        words, int32 [L, P, page, Kv, h / 4].
      v: the same of the values.
      table: int32 [B, pages per row]; an id outside 0 to P - 1 is no page: what would be written there is dropped.
      lengths: int32 [B], tokens each row holds.
      k_scale: float32 [L, P, page, Kv] where keys are codes, else None.
      v_scale: the same of the values.

    Source: pages as in PagedAttention, arXiv 2309.06180.
    """

    k: Any
    v: Any
    table: Any
    lengths: Any
    k_scale: Any = None
    v_scale: Any = None

    @property
    def pages(self) -> int:
        """P, pages of the pool."""
        return self.k.shape[1]

    @property
    def page(self) -> int:
        """Slots of a page."""
        return self.k.shape[2]

    @property
    def dtype(self) -> jnp.dtype:
        """Of keys and values: int8 where they are codes."""
        return dtype_of(self)

    @property
    def capacity(self) -> int:
        """Tokens a row can hold with its whole table filled."""
        return self.table.shape[1] * self.page


jax.tree_util.register_dataclass(
    PagedCache, data_fields=["k", "v", "table", "lengths", "k_scale", "v_scale"], meta_fields=[]
)

Cache = KVCache | PagedCache


def init_paged_cache(
    cfg: ModelConfig,
    batch: int,
    pages: int,
    page: int = PAGE,
    *,
    length: int | None = None,
    dtype: Any = None,
) -> PagedCache:
    """An empty cache in pages.

    Args:
      cfg: the model.
      batch: B, rows.
      pages: P, pages that the rows share.
      page: slots of a page; attention's GPU kernels take powers of two from 16.
      length: tokens a row can hold, at most cfg.max_position; None means what is left of the pool for each row. It
        is rounded up to whole pages.
      dtype: of keys and values, a float or "int8"; None means cfg.dtype.

    Returns:
      PagedCache of 2 * L * P * page * Kv * h values. As many pages as there are, row after row, are in the table; ids
      of P stand for no page.

    Raises:
      CapacityError: a size is not positive, or length exceeds the model's context.
      ConfigError: a cache has no such dtype, or not for such heads.

    >>> import ferrum_jax as fj
    >>> cache = fj.init_paged_cache(fj.load("demo").cfg, batch=2, pages=5, length=48)
    >>> cache.k.shape, cache.table.tolist()
    ((6, 5, 16, 4, 64), [[0, 1, 2], [3, 4, 5]])
    """
    if min(batch, pages, page) < 1 or (length is not None and length < 1):
        raise CapacityError(
            f"a cache of batch={batch}, pages={pages}, page={page} and length={length} holds nothing; each must be at "
            f"least 1."
        )
    if length is not None and length > cfg.max_position:
        raise CapacityError(
            f"length={length} exceeds this model's context of {cfg.max_position} positions; ask for less."
        )
    per_row = max(1, pages // batch) if length is None else -(-length // page)
    per_row = min(per_row, -(-cfg.max_position // page))
    ids = jnp.arange(batch * per_row, dtype=jnp.int32).reshape(batch, per_row)
    k, v, k_scale, v_scale = empty_buffers(cfg, (pages, page), dtype)
    return PagedCache(k, v, jnp.minimum(ids, pages), jnp.zeros(batch, jnp.int32), k_scale, v_scale)


def room(cache: Cache, numpy: Any = jnp) -> Any:
    """int32 [B], tokens each row has slots for: all of them, or those of the pages that its table begins with.

    Args:
      cache: of either kind.
      numpy: the library to compute with; numpy itself where the table is known on the host.
    """
    if isinstance(cache, KVCache):
        return numpy.full(cache.lengths.shape, cache.capacity, numpy.int32)
    table = numpy.asarray(cache.table)
    real = (table >= 0) & (table < cache.pages)
    return numpy.cumprod(real.astype(numpy.int32), axis=1).sum(axis=1, dtype=numpy.int32) * cache.page


def put(
    cache: Cache,
    heads: tuple[jax.Array, jax.Array],
    layer: jax.Array,
    start: jax.Array,
    count: jax.Array,
    scatter: bool = True,
) -> Cache:
    """Write a layer's new keys and values behind what each row holds; lengths stay as they are.

    Args:
      cache: of either kind.
      heads: keys and values, float [B, T, Kv, h]; the first count[b] tokens of row b are real.
      layer: int32 scalar.
      start: int32 [B], where row b begins to write.
      count: int32 [B]; tokens past it, positions past a row's room and pages that are none are dropped.
      scatter: write by scatter, in place; see `ferrum_jax.cache.write`. Pages can be written in no other way.

    Returns:
      The cache with the tokens written.
    """
    names, new = ("k", "v"), heads
    if cache.k_scale is not None:
        (k, k_scale), (v, v_scale) = quantise(heads[0]), quantise(heads[1])
        names, new = ("k", "v", "k_scale", "v_scale"), (k, v, k_scale, v_scale)
    if isinstance(cache, KVCache):
        written = {
            n: write(getattr(cache, n), a, layer, start, count, scatter) for n, a in zip(names, new, strict=True)
        }
        return dataclasses.replace(cache, **written)
    ids, slots = _places(cache, start, count, heads[0].shape[1])
    written = {}
    for name, array in zip(names, new, strict=True):
        pool = getattr(cache, name)
        written[name] = pool.at[layer, ids, slots].set(array.astype(pool.dtype), mode="drop")
    return dataclasses.replace(cache, **written)


def _places(cache: PagedCache, start: jax.Array, count: jax.Array, tokens: int) -> tuple[jax.Array, jax.Array]:
    """(page, slot in it) int32 [B, T] of tokens written behind `start`; page P where there is none."""
    offsets = jnp.arange(tokens, dtype=jnp.int32)[None]
    positions = start[:, None] + offsets
    real = (offsets < count[:, None]) & (positions < cache.capacity)
    column = jnp.where(real, positions // cache.page, 0)
    ids = jnp.take_along_axis(cache.table, column, axis=1)
    # A negative index would count from the end.
    return jnp.where(real & (ids >= 0), ids, cache.pages), positions % cache.page


def rows(cache: Cache, layer: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """A layer's keys and values [B, S, Kv, h] in `dtype`, slots in a row's order; pages that are none read as zero."""
    if isinstance(cache, KVCache):
        arrays = {n: _layer(getattr(cache, n), layer) for n in ("k", "v", "k_scale", "v_scale")}
    else:
        ids = jnp.where(cache.table < 0, cache.pages, cache.table)
        arrays = {n: _gather(getattr(cache, n), layer, ids) for n in ("k", "v", "k_scale", "v_scale")}
    if arrays["k_scale"] is None:
        return arrays["k"].astype(dtype), arrays["v"].astype(dtype)
    return dequantise(arrays["k"], arrays["k_scale"], dtype), dequantise(arrays["v"], arrays["v_scale"], dtype)


def _layer(buffer: Any, layer: jax.Array) -> Any:
    return None if buffer is None else lax.dynamic_index_in_dim(buffer, layer, 0, keepdims=False)


def _gather(pool: Any, layer: jax.Array, ids: jax.Array) -> Any:
    """Pages [B, n] of a pool [L, P, page, ...], joined to [B, n * page, ...]."""
    if pool is None:
        return None
    found = pool.at[layer, ids].get(mode="fill", fill_value=0)
    return found.reshape(ids.shape[0], ids.shape[1] * pool.shape[2], *pool.shape[3:])
