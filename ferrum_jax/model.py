"""The decoder as pure functions: forward without a cache, prefill and decode_step with one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ferrum_jax.config import ModelConfig
from ferrum_jax.errors import BackendError, CapacityError, RequestError, ShapeError
from ferrum_jax.layers import attention, implementation_of, linear, linear_parts, rms_norm, uses_cpu_kernels
from ferrum_jax.moe import Routing
from ferrum_jax.paged import Cache, PagedCache, put, room, rows
from ferrum_jax.rope import apply_rope, rope_frequencies, rope_tables
from ferrum_jax.stack import Attend, Params, Place, run_layers
from ferrum_kernels import cpu, mosaic, triton_attention
from ferrum_kernels.contract import einsum, is_traced

State = tuple[Cache, jax.Array | None]  # what attention carries from layer to layer: a cache, and counters or None


@dataclasses.dataclass(frozen=True)
class Aux:
    """What `forward(..., with_aux=True)` saw on the way.

    Attributes:
      hidden: [L + 1, B, T, D], the embedding and the residual stream after each layer (the last one after the norm).
      routing: one Routing per run of stacked layers, with leading axes [layers, B, T]; None for dense layers.
    """

    hidden: Any
    routing: tuple[Routing | None, ...]


jax.tree_util.register_dataclass(Aux, data_fields=["hidden", "routing"], meta_fields=[])


def forward(params: Params, tokens: Int[Array, "B T"], cfg: ModelConfig, *, with_aux: bool = False) -> Any:
    """Logits of every position, without a cache; attention is XLA's here, whatever the implementation.

    Args:
      params: the model's pytree.
      tokens: int32 [B, T].
      cfg: frozen configuration; pass it as a static argument of jit.
      with_aux: also return hidden states and routing.

    Returns:
      float32 [B, T, V], or (logits, Aux). A token id outside the vocabulary gives NaN when traced.

    Raises:
      RequestError: a concrete token id is outside the vocabulary.
      ShapeError: tokens is not an integer array [B, T].

    >>> import ferrum_jax as fj
    >>> model = fj.load("demo")
    >>> fj.forward(model.params, jnp.array([[11, 12, 13]]), model.cfg).shape
    (1, 3, 4096)
    """
    _check_tokens(tokens, 2, cfg)
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))

    angles = rope_frequencies(cfg.rope, cfg.head_dim, cfg.max_position, jnp.full(batch, length, jnp.int32))

    def attend(p: Params, x: jax.Array, state: None, at: Place) -> tuple[jax.Array, None]:
        q, k, v = _heads(_project(p, x, at, cfg), p, positions, angles, cfg)
        return attention(q, k, v, _visible(positions, positions, at.window)), state

    embedded = _embed(params, tokens, cfg)
    _, y, _, seen = run_layers(params, embedded, None, cfg, attend, None, with_aux)
    logits = _logits(params, y, cfg)
    if not with_aux:
        return logits
    hidden = jnp.concatenate([embedded[None], *(states for states, _ in seen)])
    return logits, Aux(hidden=hidden.at[-1].set(y), routing=tuple(routing for _, routing in seen))


def prefill(
    params: Params, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], cache: Cache, cfg: ModelConfig
) -> tuple[Float[Array, "B V"], Cache]:
    """Read prompts, or more of them, into the cache.

    Args:
      params: the model's pytree.
      tokens: int32 [B, T], right-padded.
      lengths: int32 [B], real tokens of each row; 0 leaves a row as it is.
      cache: what each row has read so far, contiguous or in pages; donate it to have it written in place.
      cfg: frozen configuration.

    Returns:
      (logits float32 [B, V] after each row's last real token, cache). A row whose length exceeds T or the cache's
      capacity gives NaN when traced.

    Raises:
      RequestError: a concrete token id is outside the vocabulary.
      CapacityError: concrete lengths exceed T or the cache.
      ShapeError: an argument has the wrong shape or dtype.

    >>> import ferrum_jax as fj
    >>> model = fj.load("demo")
    >>> cache = fj.init_cache(model.cfg, batch=2, length=16)
    >>> tokens = jnp.array([[11, 12, 13], [14, 0, 0]])
    >>> logits, cache = fj.prefill(model.params, tokens, jnp.array([3, 1]), cache, model.cfg)
    >>> logits.shape, cache.lengths.tolist()
    ((2, 4096), [3, 1])
    """
    _check_tokens(tokens, 2, cfg)
    return _extend(params, tokens, lengths, cache, cfg)


def decode_step(
    params: Params, token: Int[Array, " B"], cache: Cache, cfg: ModelConfig
) -> tuple[Float[Array, "B V"], Cache]:
    """Read one more token per row and give the logits of the next.

    Args:
      params: the model's pytree.
      token: int32 [B].
      cache: from prefill; donate it to have it written in place.
      cfg: frozen configuration.

    Returns:
      (logits float32 [B, V], cache with every row one longer). A full row gives NaN when traced.

    Raises:
      RequestError: a concrete token id is outside the vocabulary.
      CapacityError: a concrete row is full.
      ShapeError: an argument has the wrong shape or dtype.

    >>> import ferrum_jax as fj
    >>> model = fj.load("demo")
    >>> cache = fj.init_cache(model.cfg, batch=1, length=16)
    >>> logits, cache = fj.decode_step(model.params, jnp.array([11]), cache, model.cfg)
    >>> logits.shape, cache.lengths.tolist()
    ((1, 4096), [1])
    """
    _check_tokens(token, 1, cfg)
    return _extend(params, token[:, None], jnp.ones(token.shape, jnp.int32), cache, cfg)


def _extend(
    params: Params, tokens: jax.Array, lengths: jax.Array, cache: Cache, cfg: ModelConfig
) -> tuple[jax.Array, Cache]:
    length = tokens.shape[1]
    _check_room(tokens, lengths, cache)
    offsets = jnp.arange(length, dtype=jnp.int32)[None]
    positions = cache.lengths[:, None] + offsets
    total = cache.lengths + lengths
    angles = rope_frequencies(cfg.rope, cfg.head_dim, cfg.max_position, total)
    possible = (lengths >= 0) & (lengths <= length) & (total <= room(cache))
    # A row without room writes nothing: kernels trust that what a row holds has slots.
    live = jnp.where(possible, lengths, 0)
    attention_of = _attention_of(cfg, cache)
    attend = attention_of(positions, angles, cache.lengths, live, cfg)
    # Kernels that share a row count in here who is done; zeroed once a step, and by each layer for the next.
    arrived = None
    if attention_of is _attend_on_triton and length == 1:
        arrived = triton_attention.arrivals(tokens.shape[0], cfg.num_kv_heads)

    x = _embed(params, tokens, cfg)
    mask = offsets < lengths[:, None]
    _, y, (cache, _), _ = run_layers(params, x, mask, cfg, attend, (cache, arrived), False)
    if length > 1:
        y = jnp.take_along_axis(y, jnp.clip(lengths - 1, 0)[:, None, None], axis=1)
    logits = jnp.where(possible[:, None], _logits(params, y[:, 0], cfg), jnp.nan)
    return logits, dataclasses.replace(cache, lengths=total)


def _attend(
    positions: jax.Array, angles: tuple[jax.Array, float], start: jax.Array, count: jax.Array, cfg: ModelConfig
) -> Attend:
    """Attention over the cache in XLA's operations."""
    # jax-metal has no scatter; everywhere else it is what writes in place.
    scatter = implementation_of(cfg) != "apple"

    def attend(p: Params, x: jax.Array, state: State, at: Place) -> tuple[jax.Array, State]:
        cache, arrived = state
        q, *new = _heads(_project(p, x, at, cfg), p, positions, angles, cfg)
        cache = put(cache, (new[0], new[1]), at.layer, start, count, scatter)
        k, v = rows(cache, at.layer, q.dtype)
        batch, capacity = k.shape[:2]
        slots = jnp.broadcast_to(jnp.arange(capacity, dtype=jnp.int32)[None], (batch, capacity))
        # An unseen value weighs zero, and zero times a NaN that a slot once held would still be NaN.
        v = jnp.where((slots < (start + count)[:, None])[..., None, None], v, 0)
        return attention(q, k, v, _visible(positions, slots, at.window)), (cache, arrived)

    return attend


def _attend_on_cpu(
    positions: jax.Array, angles: tuple[jax.Array, float], start: jax.Array, count: jax.Array, cfg: ModelConfig
) -> Attend:
    """The same in one kernel, which reads what each row has read and no more."""
    cosine, sine = rope_tables(positions, *angles)

    def attend(p: Params, x: jax.Array, state: State, at: Place) -> tuple[jax.Array, State]:
        cache, arrived = state
        norms = (p["q_norm"], p["k_norm"]) if cfg.qk_norm else None
        q, k, v = _project(p, x, at, cfg)
        y, (keys, values) = cpu.attention(
            q, k, v, norms, cfg.rms_norm_eps, cosine, sine, (cache.k, cache.v), at.layer, start, count, at.window
        )
        return y, (dataclasses.replace(cache, k=keys, v=values), arrived)

    return attend


def _attend_on_triton(
    positions: jax.Array, angles: tuple[jax.Array, float], start: jax.Array, count: jax.Array, cfg: ModelConfig
) -> Attend:
    """The same in kernels for NVIDIA GPUs, which read what each row has read and no more."""
    cosine, sine = rope_tables(positions, *angles)

    def attend(p: Params, x: jax.Array, state: State, at: Place) -> tuple[jax.Array, State]:
        cache, arrived = state
        norms = (at.run["attn"]["q_norm"], at.run["attn"]["k_norm"]) if cfg.qk_norm else None
        scales = None if cache.k_scale is None else (cache.k_scale, cache.v_scale)
        table = cache.table if isinstance(cache, PagedCache) else None
        place = (cache.k, cache.v), at.layer, start, count, at.window, table, scales
        rest: tuple[Any, ...] = (norms, cfg.rms_norm_eps, cosine, sine, *place)
        if "qkv" in p:
            product = linear_parts if x.shape[1] == 1 else linear
            qkv = product(x, p["qkv"], cfg, p.get("qkv_bias"), layer=at.index)
            y, pools, scales, arrived = triton_attention.attention_fused(
                qkv, *rest, norm_layer=at.index, dtype=x.dtype, arrived=arrived
            )
        else:
            q, k, v = _project(p, x, at, cfg)
            y, pools, scales, arrived = triton_attention.attention(q, k, v, *rest, norm_layer=at.index, arrived=arrived)
        k_scale, v_scale = scales or (None, None)
        cache = dataclasses.replace(cache, k=pools[0], v=pools[1], k_scale=k_scale, v_scale=v_scale)
        return y, (cache, arrived)

    return attend


def _attention_of(cfg: ModelConfig, cache: Cache) -> Callable[..., Attend]:
    """Which of the three above reads this cache.

    A GPU backend that was named refuses what its kernels do not take; as the default it leaves that to XLA.
    """
    paged, codes = isinstance(cache, PagedCache), cache.k_scale is not None
    implementation = implementation_of(cfg)
    if paged and implementation == "apple":
        raise BackendError(
            "pages are written by scatter, which implementation='apple' does without; use init_cache, or another "
            "implementation."
        )
    if uses_cpu_kernels(cfg) and not paged and not codes and cfg.head_dim % 2 == 0 and cfg.head_dim <= cpu.MOST_HEAD:
        return _attend_on_cpu
    if implementation not in mosaic.NAMES:
        return _attend
    page = cache.page if isinstance(cache, PagedCache) else None
    problem = triton_attention.refuses(cfg.dtype, cfg.head_dim, cache.dtype, page)
    if problem is None:
        return _attend_on_triton
    if cfg.implementation is not None:
        raise BackendError(
            f'implementation="{implementation}" cannot read this cache: {problem}. Make another cache, or leave '
            f"implementation out: then XLA attends, and the products stay with the kernels."
        )
    return _attend


def _project(p: Params, x: jax.Array, at: Place, cfg: ModelConfig) -> tuple[jax.Array, ...]:
    """Queries, keys and values [B, T, heads * head_dim], before their norms and rotation."""
    if "qkv" in p:
        y = linear(x, p["qkv"], cfg, p.get("qkv_bias"), layer=at.index)
        queries, keys = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
        return tuple(jnp.split(y, (queries, queries + keys), axis=-1))
    return tuple(linear(x, p[name], cfg, p.get(f"{name}_bias"), layer=at.index) for name in ("q", "k", "v"))


def _heads(
    projected: tuple[jax.Array, ...],
    p: Params,
    positions: jax.Array,
    angles: tuple[jax.Array, float],
    cfg: ModelConfig,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v = (y.reshape(*y.shape[:2], -1, cfg.head_dim) for y in projected)
    if cfg.qk_norm:
        q, k = rms_norm(q, p["q_norm"], cfg.rms_norm_eps), rms_norm(k, p["k_norm"], cfg.rms_norm_eps)
    return apply_rope(q, positions, *angles), apply_rope(k, positions, *angles), v


def _visible(queries: jax.Array, keys: jax.Array, window: jax.Array) -> jax.Array:
    """bool [B, T, S]: keys at or before a query and less than `window` behind it."""
    distance = queries[:, :, None] - keys[:, None, :]
    return (distance >= 0) & (distance < window)


def _embed(params: Params, tokens: jax.Array, cfg: ModelConfig) -> jax.Array:
    # A negative index would count from the end; it is as unknown as one past it.
    ids = jnp.where(tokens < 0, cfg.vocab_size, tokens.astype(jnp.int32))
    return params["embed"].at[ids].get(mode="fill", fill_value=jnp.nan).astype(cfg.dtype)


def _logits(params: Params, x: jax.Array, cfg: ModelConfig) -> jax.Array:
    if "lm_head" in params:
        return linear(x, params["lm_head"], cfg, out_dtype=jnp.float32)
    return einsum("...d,vd->...v", x, params["embed"].astype(x.dtype))


def _check_tokens(tokens: jax.Array, ndim: int, cfg: ModelConfig) -> None:
    if tokens.ndim != ndim or not jnp.issubdtype(tokens.dtype, jnp.integer):
        shape = "[B, T]" if ndim == 2 else "[B]"
        raise ShapeError(f"tokens are {tokens.dtype}{list(tokens.shape)}; expected int32{shape}.")
    if is_traced(tokens) or tokens.size == 0:
        return
    host = np.asarray(tokens)  # not jnp: inside jit it would trace, also over a concrete array
    low, high = int(host.min()), int(host.max())
    if low < 0 or high >= cfg.vocab_size:
        raise RequestError(f"token ids span {low} to {high}; this model's vocabulary is 0 to {cfg.vocab_size - 1}.")


def _check_room(tokens: jax.Array, lengths: jax.Array, cache: Cache) -> None:
    batch, length = tokens.shape
    paged = isinstance(cache, PagedCache)
    held = cache.table.shape[0] if paged else cache.k.shape[1]
    if lengths.shape != (batch,) or held != batch:
        raise ShapeError(
            f"tokens have {batch} rows, lengths are {list(lengths.shape)} and the cache has {held} rows; "
            f"all three must agree."
        )
    if is_traced(lengths):
        return
    host = np.asarray(lengths)
    if (host < 0).any() or (host > length).any():
        raise CapacityError(f"lengths are {host.tolist()}; each must be between 0 and T={length}.")
    if is_traced(cache.lengths) or (paged and is_traced(cache.table)):
        return
    total, most = np.asarray(cache.lengths) + host, room(cache, np)
    if (total > most).any():
        row = int(np.argmax(total - most))
        fix = "Put more pages into its table" if paged else "Make it longer with init_cache(cfg, batch, length)"
        raise CapacityError(f"row {row} would hold {total[row]} tokens; the cache has room for {most[row]}. {fix}.")
