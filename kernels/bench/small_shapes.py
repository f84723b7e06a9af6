"""Every GPU kernel once on small shapes, for NVIDIA's compute-sanitizer:

    export XLA_PYTHON_CLIENT_ALLOCATOR=platform XLA_FLAGS=--xla_gpu_enable_command_buffer=
    compute-sanitizer --tool memcheck python kernels/bench/small_shapes.py
    compute-sanitizer --tool racecheck python kernels/bench/small_shapes.py

The platform's allocator gives each array memory of its own, so that a read or write past its end is one past the end of
an allocation. Results are compared with numpy; the exit code is 1 where one is wrong. Weights are made and read on the
CPU, so that the GPU runs little else than the kernels under test. The sanitizer is slow and uses one core: processes
that each take a share of the cases, --share 0/4 to 3/4, may run at the same time.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ferrum_jax.sampling_filters import keep_best
from ferrum_kernels import (
    PackedLinear,
    dequantize,
    gptq_matmul,
    grouped_gptq_matmul,
    mosaic,
    tile,
    triton,
    triton_attention,
    triton_norm,
    triton_rows,
)
from ferrum_kernels.bits import words_for
from ferrum_kernels.blocks import dispatch, from_blocks, to_blocks
from ferrum_kernels.code_words import to_words
from ferrum_kernels.mosaic_matmul import Ring
from ferrum_kernels.pairs import Pairs

EXPERTS, TOP_K, D, F = 6, 2, 160, 96
WIDTH, FEATURES = 256, 128  # the least that the Mosaic GPU kernels take: fewer groups of inputs than a ring has
SHARED = 512  # of both: the least whose turns are shared
LARGEST_ERROR = 6e-3  # of a layer in bfloat16 with few numbers to average over
DIALECTS = [  # bits, group size, symmetric, act-order
    (4, 32, True, False),
    (4, -1, False, False),
    (8, 32, False, False),
    (8, 64, True, True),
    (4, 32, False, True),
]
PLAIN = (4, 128, True, False)  # what the Mosaic GPU kernels take
# Four warpgroups and two, rows of one width and of several, one tile and two for a warpgroup, warps together and alone.
RINGS = [
    Ring((8,), parts=1, stages=6, lag=3, warpgroups=4),
    Ring((16, 24), parts=1, stages=8, lag=4, warpgroups=4),
    Ring((16, 32), stages=6),
    Ring((8, 16, 32), stages=5, alone=True),
    Ring((8, 16, 32), alone=True, shared=True),
]
CUTS = [  # of products in parts: of one block and of two, and with segments in the program
    triton_rows.Cut(64, 1, 4, 3, rows=16, parts=2, merge=True),
    triton_rows.Cut(32, 1, 4, 3, rows=32, parts=3),
    triton_rows.Cut(16, 2, 4, 3, rows=16, parts=2),
]
# int8 or not, positions of a page (0: no pages) and of a row, rows: with many positions several programs share a row,
# and with many rows of int8 besides, scores are turned.
CACHES = [
    *((False, 0, 96, 4), (False, 16, 96, 4), (True, 16, 96, 4), (False, 16, 1088, 4), (True, 0, 1088, 4)),
    *((True, 0, 640, 17), (True, 16, 640, 17)),
]


@dataclasses.dataclass(frozen=True)
class Weight:
    """A tiled weight on the GPU and float32 numbers for it."""

    tiled: Any
    dense: np.ndarray


def weight(rng: np.random.Generator, lead: tuple[int, ...], k: int, n: int, dialect: tuple) -> Weight:
    """Random words; laid out and dequantised on the CPU."""
    bits, group_size, sym, act_order = dialect
    group_size = k if group_size == -1 else group_size
    groups = -(-k // group_size)
    zeros = rng.integers(0, 2**32, (*lead, groups, words_for(n, bits)), np.uint32)
    perm = rng.permuted(np.broadcast_to(np.arange(k, dtype=np.int32), (*lead, k)), axis=-1)
    with jax.default_device(jax.devices("cpu")[0]):
        packed = PackedLinear(
            qweight=jnp.asarray(rng.integers(0, 2**32, (*lead, words_for(k, bits), n), np.uint32)),
            scales=jnp.asarray(rng.uniform(0.5, 1.5, (*lead, groups, n)) / (2**bits * k**0.5 * 0.3), jnp.float16),
            qzeros=None if sym else jnp.asarray(zeros),
            perm=jnp.asarray(perm) if act_order else None,
            bits=bits,
            group_size=group_size,
            shape=(k, n),
        )
        dense, tiled = np.asarray(dequantize(packed, jnp.float32)), tile(packed)
    return Weight(jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf), jax.devices()[0]), tiled), dense)


def product(rng: np.random.Generator, dialect: tuple, rows: int) -> float:
    """gptq_matmul of some rows."""
    w = weight(rng, (), D, F, dialect)
    x = on_the_gpu(rng.standard_normal((rows, D)))
    return error(gptq_matmul(x, w.tiled, implementation="triton"), np.asarray(x, np.float32) @ w.dense)


def grouped(rng: np.random.Generator, dialect: tuple, rows: int) -> float:
    """grouped_gptq_matmul of a dispatch; some rows are nobody's."""
    w = weight(rng, (EXPERTS,), D, F, dialect)
    ids = rng.integers(0, EXPERTS + 1, rows).astype(np.int32)
    x = on_the_gpu(rng.standard_normal((rows, D)))
    plan = dispatch(jnp.asarray(ids), EXPERTS, 4)
    y = from_blocks(grouped_gptq_matmul(to_blocks(x, plan), w.tiled, plan, implementation="triton"), plan)
    dense = np.concatenate([w.dense, np.zeros((1, D, F), np.float32)])[ids]
    return error(y, np.einsum("rk,rkn->rn", np.asarray(x, np.float32), dense))


def layer(rng: np.random.Generator, dialect: tuple, tokens: int) -> float:
    """A layer as a model runs it, and in the steps that also stand alone, with a mask and a layer number."""
    up, down = weight(rng, (2, EXPERTS), D, 2 * F, dialect), weight(rng, (2, EXPERTS), F, D, dialect)
    x, mask = on_the_gpu(rng.standard_normal((tokens, D))), rng.random(tokens) < 0.8
    logits = jax.device_put(rng.standard_normal((tokens, EXPERTS)).astype(np.float32))

    @jax.jit
    def run(x: jax.Array, logits: jax.Array, mask: jax.Array, up: Any, down: Any, layer: jax.Array) -> Any:
        ids, weights, live, counts = triton.route(logits, mask, TOP_K, True)
        apart = triton.experts(x, live, weights, counts, up, down, layer)
        zero = jnp.zeros(1, jnp.int32)
        together, *_ = triton.routed_experts(x, logits, mask, TOP_K, True, up, down, layer, zero)
        return ids, weights, apart, together

    ids, weights, apart, together = run(
        x, logits, jax.device_put(mask), up.tiled, down.tiled, jax.device_put(np.int32(1))
    )
    expected = layer_in_numpy(x, ids, np.asarray(weights) * mask[:, None], up.dense[1], down.dense[1])
    return max(error(apart, expected), error(together, expected))


def layer_in_numpy(x: jax.Array, ids: jax.Array, weights: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """float32 [T, D]: every pair on its own."""
    ids = np.asarray(ids)
    gate_up = np.einsum("tk,tekn->ten", np.asarray(x, np.float32), up[ids])
    gate, value = np.split(gate_up, 2, axis=-1)
    return np.einsum("tef,tefd,te->td", gate / (1 + np.exp(-gate)) * value, down[ids], weights)


def ring(rng: np.random.Generator, kind: tuple, tokens: int) -> float:
    """A layer by the Mosaic GPU kernels, with a mask and a layer number; odd tokens: as if all went to two experts."""
    d, f = (SHARED, SHARED) if kind[0].shared else (WIDTH, FEATURES)
    up, down = weight(rng, (2, EXPERTS), d, 2 * f, PLAIN), weight(rng, (2, EXPERTS), f, d, PLAIN)
    x, mask = on_the_gpu(rng.standard_normal((tokens, d))), rng.random(tokens) < 0.8
    logits = rng.standard_normal((tokens, EXPERTS)) + (tokens % 2) * 100 * (np.arange(EXPERTS) < TOP_K)

    @jax.jit
    def run(x: jax.Array, logits: jax.Array, mask: jax.Array, up: Any, down: Any, layer: jax.Array) -> Any:
        ids, weights, live, counts = triton.route(logits, mask, TOP_K, True)
        return ids, weights, mosaic.run_experts(x, live, weights, counts, up, down, layer, *kind, *kind)

    given = x, jax.device_put(logits.astype(np.float32)), jax.device_put(mask), up.tiled, down.tiled
    ids, weights, y = run(*given, jax.device_put(np.int32(1)))
    return error(y, layer_in_numpy(x, ids, np.asarray(weights) * mask[:, None], up.dense[1], down.dense[1]))


def matrix(rng: np.random.Generator, kind: tuple, rows: int) -> float:
    """A product of many rows with one matrix by the Mosaic GPU kernels; the second of two layers."""
    del kind
    w = weight(rng, (2,), WIDTH, 2 * FEATURES, PLAIN)
    x = on_the_gpu(rng.standard_normal((rows, WIDTH)))
    y = jax.jit(lambda x, w, layer: mosaic.gptq_matmul(x, w, layer, jnp.bfloat16))(x, w.tiled, np.int32(1))
    return error(y, np.asarray(x, np.float32) @ w.dense[1])


def parts(rng: np.random.Generator, kind: tuple, rows: int) -> float:
    """A product left in parts, and the sum with its norm that adds them up."""
    w = weight(rng, (2,), 4 * 128, 192, PLAIN)
    x, stream = (on_the_gpu(rng.standard_normal((rows, size))) for size in w.dense.shape[1:])

    @jax.jit
    def run(x: jax.Array, stream: jax.Array, w: Any, layer: jax.Array) -> Any:
        y = triton_rows.product(x, w, layer, *kind, jnp.float32, triton.is_interpreted())
        weight = jnp.ones((2, stream.shape[1]), stream.dtype)
        return triton_norm.add_norm(stream, y, weight, layer, 1e-6, triton.is_interpreted())[:2]

    total, norm = run(x, stream, w.tiled, jax.device_put(np.int32(1)))
    total32 = np.asarray(total, np.float32)
    expected = np.asarray(stream, np.float32) + np.asarray(x, np.float32) @ w.dense[1]
    return max(error(total, expected), error(norm, total32 / np.sqrt((total32**2).mean(-1, keepdims=True) + 1e-6)))


def sums(rng: np.random.Generator, kind: tuple, tokens: int) -> float:
    """A sum of two branches, its norm and the router's logits; the second of two layers."""
    del kind
    x, y, scale, router = (
        on_the_gpu(rng.standard_normal(shape)) for shape in ((tokens, D), (tokens, D), (2, D), (2, EXPERTS, D))
    )
    total, norm, logits, _ = triton_norm.add_norm_route(x, y, scale, router, 1, 1e-6, triton.is_interpreted())
    a, b, total32, norm32, factor, matrix = (
        np.asarray(z, np.float32) for z in (x, y, total, norm, scale[1], router[1])
    )
    expected = total32 / np.sqrt((total32**2).mean(-1, keepdims=True) + 1e-6) * factor
    found = np.asarray(logits).reshape(-1, tokens, EXPERTS).sum(0)  # of many tokens they come in parts
    return max(error(total, a + b), error(norm, expected), error(found, norm32 @ matrix.T))


def pairs(rng: np.random.Generator, kind: tuple, tokens: int) -> float:
    """A sum that adds up what experts leave of each pair, and its norm; some pairs are nobody's and hold NaN."""
    (weighted,) = kind
    x, scale = on_the_gpu(rng.standard_normal((tokens, D))), on_the_gpu(rng.standard_normal(D))
    live = rng.integers(0, EXPERTS + 1, (tokens, TOP_K)).astype(np.int32)
    values = rng.standard_normal((tokens, TOP_K, D)).astype(jnp.bfloat16)
    weights = rng.random((tokens, TOP_K)).astype(np.float32) if weighted else np.ones((tokens, TOP_K), np.float32)
    held = np.where(live[..., None] < EXPERTS, values.astype(np.float32), 0) * weights[..., None]
    values[live == EXPERTS] = np.nan
    rows = jax.device_put(values.reshape(-1, D)), jax.device_put(live)
    left = Pairs(*rows, jax.device_put(weights) if weighted else None, EXPERTS)
    total, norm, _ = triton_norm.add_norm(x, left, scale, None, 1e-6, triton.is_interpreted())
    total32, factor = np.asarray(total, np.float32), np.asarray(scale, np.float32)
    expected = total32 / np.sqrt((total32**2).mean(-1, keepdims=True) + 1e-6) * factor
    return max(error(total, np.asarray(x, np.float32) + held.sum(1)), error(norm, expected))


def filters(rng: np.random.Generator, kind: tuple, rows: int) -> float:
    """How far what top-k or top-p keeps is from its limit; infinite where others than the best are kept."""
    likely, vocab = kind == ("top-p",), 20_001  # one row of equal logits is more than a list holds
    logits = (3 * rng.standard_normal((rows, vocab))).astype(np.float32)
    logits[:, 100:180] = 9.0
    logits[0] = 0.25
    limits = (rng.uniform(0.05, 0.95, rows) if likely else rng.integers(1, 300, rows)).astype(np.float32)
    given = (None, jax.device_put(limits)) if likely else (jax.device_put(limits.astype(np.int32)), None)
    kept = keep_best(jax.device_put(logits), *given, implementation="triton")
    worst = 0.0
    for row, mask, limit in zip(logits.astype(np.float64), np.asarray(kept) > -np.inf, limits, strict=True):
        order, count = np.argsort(-row, kind="stable"), int(mask.sum())
        if not count or not mask[order[:count]].all():
            return float("inf")
        weights = np.exp(row[order] - row.max())
        reached = np.cumsum(weights) / weights.sum()
        before = reached[count - 2] if count > 1 else 0.0
        worst = max(worst, max(limit - reached[count - 1], before - limit) if likely else abs(count - limit))
    return float(worst)


def attention(rng: np.random.Generator, kind: tuple, tokens: int) -> float:
    """New tokens of some rows, one without any and one up to its last position, over a cache with NaN around it."""
    codes, page, capacity, batch = kind
    heads, kv_heads, h, layers = 6, 2, 64 if codes else 32, 2
    start, count = rng.integers(20, capacity - tokens, batch), np.full(batch, tokens)
    start[0], count[1] = capacity - tokens, 0
    turns = capacity // page if page else 1
    order = (rng.permutation(batch * turns) if page else np.arange(batch)).reshape(batch, turns)
    shape, size = (layers, batch * turns, capacity // turns, kv_heads, h), (batch, capacity, kv_heads)
    live = np.arange(capacity) < start[:, None]
    pools, scales, held = [], [], []
    for _ in "kv":
        values = (rng.integers(-127, 128, (*size, h)) if codes else rng.standard_normal((*size, h))).astype(
            jnp.bfloat16
        )
        factors = rng.uniform(0.005, 0.01, size).astype(np.float32) if codes else np.ones(size, np.float32)
        held.append(values.astype(np.float32) * factors[..., None])
        pool, scale = np.full(shape, 77 if codes else np.nan, np.float32), np.full(shape[:-1], np.nan, np.float32)
        pool[1, order] = np.where(live[..., None, None], values, pool[1, 0, 0, 0, 0]).reshape(batch, turns, *shape[2:])
        scale[1, order] = np.where(live[..., None], factors, np.nan).reshape(batch, turns, *shape[2:-1])
        pools.append(to_words(jax.device_put(pool.astype(np.int32))) if codes else on_the_gpu(pool))
        scales.append(jax.device_put(scale))
    q, k, v = (on_the_gpu(rng.standard_normal((batch, tokens, n * h))) for n in (heads, kv_heads, kv_heads))
    angles = rng.uniform(0, 6, (batch, tokens, h // 2))
    cosine, sine = (jax.device_put(part(angles).astype(np.float32)) for part in (np.cos, np.sin))
    numbers = (jax.device_put(a.astype(np.int32)) for a in (start, count))
    table = jax.device_put(order.astype(np.int32)) if page else None
    given = (tuple(pools), 1, *numbers, 2**31 - 1, table, tuple(scales) if codes else None)
    y, *_ = triton_attention.attention(q, k, v, None, 1e-6, cosine, sine, *given)
    found = [y]
    if tokens == 1:  # its product may be in parts
        half = np.concatenate([np.asarray(part, np.float32) for part in (q, k, v)], -1) / 2
        halves = jax.device_put(np.stack([half, half]))
        fused = triton_attention.attention_fused(
            halves, None, 1e-6, cosine, sine, *given, dtype=jnp.dtype(jnp.bfloat16)
        )
        found.append(fused[0])

    def turned(x: jax.Array, n: int) -> np.ndarray:
        first, second = np.split(np.asarray(x, np.float32).reshape(batch, tokens, n, h), 2, -1)
        c, s = np.cos(angles)[:, :, None], np.sin(angles)[:, :, None]
        return np.concatenate([first * c - second * s, second * c + first * s], -1)

    queries, new = (
        turned(q, heads),
        (turned(k, kv_heads), np.asarray(v, np.float32).reshape(batch, tokens, kv_heads, h)),
    )
    expected = np.zeros((batch, tokens, heads, h))
    for row, t in np.argwhere(np.arange(tokens) < count[:, None]):
        keys, values = (np.concatenate([a[row, : start[row]], b[row, : t + 1]]) for a, b in zip(held, new, strict=True))
        keys, values = (np.repeat(a, heads // kv_heads, axis=1) for a in (keys, values))
        scores = np.einsum("hd,shd->hs", queries[row, t], keys) / h**0.5
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        expected[row, t] = np.einsum("hs,shd->hd", weights / weights.sum(-1, keepdims=True), values)
    return max(error(y, expected.reshape(batch, tokens, -1)) for y in found)


def on_the_gpu(x: np.ndarray) -> jax.Array:
    """bfloat16, rounded on the CPU."""
    return jax.device_put(x.astype(jnp.bfloat16))


def error(actual: jax.Array | np.ndarray, expected: np.ndarray) -> float:
    """||actual - expected|| / ||expected||."""
    return float(np.linalg.norm(np.asarray(actual).astype(np.float32) - expected) / max(np.linalg.norm(expected), 1e-9))


def cases() -> Iterator[tuple[Callable[[np.random.Generator, tuple, int], float], tuple, int]]:
    """What is run: each dialect with an odd number of rows, a layer with few and with many pairs, and all the rest."""
    for dialect in DIALECTS:
        yield product, dialect, 5
        yield layer, dialect, 3
        yield layer, dialect, 13
    yield product, DIALECTS[0], 37
    yield product, DIALECTS[0], 70
    yield grouped, DIALECTS[0], 9
    yield layer, DIALECTS[0], 1
    yield layer, DIALECTS[0], 70
    yield layer, DIALECTS[0], 300
    for tokens in (3, 37):
        yield sums, (), tokens
    for kind in ((True,), (False,)):
        yield pairs, kind, 5
    for kind in (("top-k",), ("top-p",)):
        yield filters, kind, 3
    for kind in CACHES:
        yield attention, kind, 1
        if kind[-1] == 4:
            yield attention, kind, 5
    for cut in CUTS:
        yield parts, (cut,), 21
    if mosaic.unavailable():
        print(f"The Mosaic GPU kernels are left out: {mosaic.unavailable()}.", file=sys.stderr)
        return
    for how in RINGS:
        yield ring, (how,), 12
        yield ring, (how,), 77
    yield matrix, (), mosaic.LEAST_ROWS + 9


def share_of(text: str) -> slice:
    """Of the cases, which are dealt out in turn.

    >>> share_of("1/4")
    slice(1, None, 4)
    """
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and int(number) < int(of)):
        raise argparse.ArgumentTypeError(f"{text} is no share; give I/N with I from 0 to N - 1, such as 0/4")
    return slice(int(number), None, int(of))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all of them, or a share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=share_of, default="0/1", help="I/N: the I-th of N, from 0")
    options = parser.parse_args(arguments)
    if problem := triton.unavailable():
        print(f"error: these are the kernels of an NVIDIA GPU: {problem}.", file=sys.stderr)
        return 3
    seed = np.random.SeedSequence().entropy
    rng = np.random.default_rng(seed)
    wrong = 0
    for run, kind, rows in list(cases())[options.share]:
        found = run(rng, kind, rows)
        good = found <= LARGEST_ERROR
        wrong += not good
        print(f"{'right' if good else 'WRONG'} {run.__name__} {kind} {rows}: {found:.1e}", flush=True)
    print(f"{wrong} wrong; seed {seed}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
