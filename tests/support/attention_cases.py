"""Attention over a cache in plain numpy, one head of one token at a time, and cases for the tests of its kernels."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from tests.support.triton_cases import relative


@dataclasses.dataclass(frozen=True)
class Case:
    """Attention of new tokens; positions before `start` are in the cache."""

    start: tuple[int, ...]
    count: tuple[int, ...]
    tokens: int = 1
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    capacity: int = 96
    page: int = 0  # none: contiguous
    window: int = 2**31 - 1
    dtype: str = "bfloat16"
    cache: str = ""  # dtype of the cache where it is another: int8
    norms: bool = True
    layers: int = 2
    layer: int = 1
    seed: int = 0


def quantised(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes and a float32 scale per token and head: symmetric, the largest of a head is 127, halves up."""
    most = np.abs(x).max(-1)
    scale = np.where(most == 0, 1, most / 127).astype(np.float32)
    return np.floor(x / scale[..., None] + np.float32(0.5)).astype(np.int8), scale


def in_words(codes: np.ndarray) -> np.ndarray:
    """int32 [..., h / 4] of int8 codes: byte b of word i is that of channel i + b * h / 4, 128 larger."""
    quarters = codes.reshape(*codes.shape[:-1], 4, -1)
    octets = np.ascontiguousarray((np.moveaxis(quarters, -2, -1).astype(np.int32) + 128).astype(np.uint8))
    return octets.view("<i4")[..., 0]


def out_of_words(words: np.ndarray) -> np.ndarray:
    """int32 codes [..., h] of what `in_words` made."""
    octets = np.ascontiguousarray(words)[..., None].view(np.uint8).astype(np.int32) - 128
    return np.moveaxis(octets, -1, -2).reshape(*words.shape[:-1], -1)


def build(case: Case) -> tuple[dict[str, Any], tuple[np.ndarray, np.ndarray]]:
    """Arguments of `attention`, and the keys and values [B, capacity, Kv, h] that its cache means."""
    rng = np.random.default_rng(case.seed)
    batch, h = len(case.start), case.head_dim
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    q = jnp.asarray(normal(batch, case.tokens, case.heads * h), case.dtype)
    k, v = (jnp.asarray(normal(batch, case.tokens, case.kv_heads * h), case.dtype) for _ in "kv")
    norms = tuple(jnp.asarray(1 + 0.1 * normal(h), case.dtype) for _ in "qk") if case.norms else None
    angles = (np.array(case.start)[:, None] + np.arange(case.tokens))[..., None] * 50.0 ** -np.linspace(0, 1, h // 2)
    page = case.page or case.capacity
    per_row = case.capacity // page
    spare = 3 if case.page else 0
    order = rng.permutation(batch * per_row + spare)[: batch * per_row].reshape(batch, per_row)
    order = order if case.page else np.arange(batch)[:, None]
    pools, scales, dense = [], [], []
    for _ in "kv":
        held = np.asarray(jnp.asarray(normal(batch, case.capacity, case.kv_heads, h), case.dtype), np.float32)
        shape = (case.layers, batch * per_row + spare, page, case.kv_heads, h)
        pool, scale = np.full(shape, np.nan, np.float32), np.full(shape[:-1], np.nan, np.float32)
        live = np.arange(case.capacity) < np.array(case.start)[:, None]
        if case.cache == "int8":
            pool = np.full(shape, 77, np.int8)
            codes, factors = quantised(held)
            held = codes * factors[..., None]
            paged = factors.reshape(batch, per_row, page, case.kv_heads)
            scale[case.layer, order] = np.where(live.reshape(batch, per_row, page)[..., None], paged, np.nan)
        else:
            codes = held
        paged = codes.reshape(batch, per_row, page, case.kv_heads, h)
        dead = pool[case.layer, order]
        pool[case.layer, order] = np.where(live.reshape(batch, per_row, page)[..., None, None], paged, dead)
        pools.append(jnp.asarray(in_words(pool)) if case.cache == "int8" else jnp.asarray(pool, case.dtype))
        scales.append(jnp.asarray(scale))
        dense.append(held)
    return {
        "q": q,
        "k": k,
        "v": v,
        "norms": norms,
        "eps": 1e-6,
        "cosine": jnp.asarray(np.cos(angles), jnp.float32),
        "sine": jnp.asarray(np.sin(angles), jnp.float32),
        "pools": tuple(pools),
        "layer": case.layer,
        "start": jnp.asarray(case.start, jnp.int32),
        "count": jnp.asarray(case.count, jnp.int32),
        "window": jnp.int32(case.window),
        "table": jnp.asarray(order, jnp.int32) if case.page else None,
        "scales": tuple(scales) if case.cache == "int8" else None,
    }, tuple(dense)


def _turn(x: np.ndarray, norm: Any, eps: float, cosine: Any, sine: Any) -> np.ndarray:
    """Head norm and rotation of [B, T, heads, h] in float64."""
    if norm is not None:
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * np.asarray(norm, np.float64)
    first, second = np.split(x, 2, -1)
    c, s = (np.asarray(a, np.float64)[:, :, None] for a in (cosine, sine))
    return np.concatenate([first * c - second * s, second * c + first * s], -1)


def expected(case: Case, args: dict[str, Any], dense: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, ...]:
    """float64 y [B, T, H * h], and keys and values [B, capacity, Kv, h] with the new ones (NaN where nothing lives)."""
    batch, tokens, h = len(case.start), case.tokens, case.head_dim
    q, k, v = (np.asarray(args[n], np.float64).reshape(batch, tokens, -1, h) for n in "qkv")
    norms = args["norms"] or (None, None)
    q = _turn(q, norms[0], args["eps"], args["cosine"], args["sine"])
    k = _turn(k, norms[1], args["eps"], args["cosine"], args["sine"])
    keys, values = (np.full(d.shape, np.nan) for d in dense)
    y = np.zeros((batch, tokens, case.heads, h))
    for b, (start, count) in enumerate(zip(case.start, case.count, strict=True)):
        keys[b, :start], values[b, :start] = dense[0][b, :start], dense[1][b, :start]
        for t in range(count):
            keys[b, start + t], values[b, start + t] = k[b, t], v[b, t]
            if case.cache == "int8":
                for held in (keys, values):
                    codes, scale = quantised(held[b, start + t])
                    held[b, start + t] = codes * scale[..., None].astype(np.float64)
            low = max(0, start + t + 1 - case.window)
            for head in range(case.heads):
                one = head // (case.heads // case.kv_heads)
                scores = keys[b, low : start + t + 1, one] @ q[b, t, head] / np.sqrt(h)
                weights = np.exp(scores - scores.max())
                y[b, t, head] = weights @ values[b, low : start + t + 1, one] / weights.sum()
    return y.reshape(batch, tokens, -1), keys, values


def gather(case: Case, args: dict[str, Any], pools: Any, scales: Any) -> tuple[np.ndarray, ...]:
    """Keys and values float64 [B, capacity, Kv, h] of the layer as the cache means them."""
    found = []
    for i in range(2):
        pool = np.asarray(pools[i])[case.layer]
        pool = (pool if scales is None else out_of_words(pool)).astype(np.float64)
        if scales is not None:
            pool = pool * np.asarray(scales[i], np.float64)[case.layer][..., None]
        pages = np.asarray(args["table"]) if args["table"] is not None else np.arange(len(case.start))[:, None]
        found.append(pool[pages].reshape(len(case.start), case.capacity, case.kv_heads, case.head_dim))
    return tuple(found)


def fused(args: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `attention_fused` from those of `attention`."""
    rest = {name: x for name, x in args.items() if name not in "qkv"}
    return {"qkv": jnp.concatenate([args[name] for name in "qkv"], -1), **rest}


ROUNDED = {"bfloat16": 4e-3, "float16": 5e-4}  # of queries, weights and result; int8 codes are exact in both


def check(case: Case, attention: Any) -> None:
    """Run a case and hold result and cache against plain numpy."""
    args, dense = build(case)
    y, pools, scales, _ = attention(**args)
    result, keys, values = expected(case, args, dense)
    assert y.dtype == case.dtype and y.shape == result.shape
    assert relative(y, result) < ROUNDED[case.dtype]
    for t in range(case.tokens):
        for b, count in enumerate(case.count):
            if t >= count:
                assert (np.asarray(y[b, t], np.float32) == 0).all()
    for found, means in zip(gather(case, args, pools, scales), (keys, values), strict=True):
        live = ~np.isnan(means)
        # A new key may fall on the other side of a half.
        step = 2 / 127 if case.cache else ROUNDED[case.dtype]
        np.testing.assert_allclose(found[live], means[live], atol=step * np.abs(means[live]).max())
        assert relative(found[live], means[live]) < ROUNDED[case.dtype]
        if not case.cache:
            assert np.isnan(found[~live]).all()
    for before, after in zip(args["pools"], pools, strict=True):
        wide = jnp.int32 if case.cache == "int8" else jnp.float32
        others = np.delete(np.asarray(before, wide), case.layer, 0)
        np.testing.assert_array_equal(np.delete(np.asarray(after, wide), case.layer, 0), others)
