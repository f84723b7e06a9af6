"""Every Triton kernel once on small shapes, for NVIDIA's compute-sanitizer:

    export XLA_PYTHON_CLIENT_ALLOCATOR=platform XLA_FLAGS=--xla_gpu_enable_command_buffer=
    compute-sanitizer --tool memcheck python kernels/bench/small_shapes.py
    compute-sanitizer --tool racecheck python kernels/bench/small_shapes.py

The platform's allocator gives each array memory of its own, so that a read or write past its end is one past the end of
an allocation. Results are compared with numpy; the exit code is 1 where one is wrong. Weights are made and read on the
CPU, so that the GPU runs little else than the kernels under test.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ferrum_kernels import PackedLinear, dequantize, gptq_matmul, grouped_gptq_matmul, tile, triton
from ferrum_kernels.bits import words_for
from ferrum_kernels.blocks import dispatch, from_blocks, to_blocks

EXPERTS, TOP_K, D, F = 6, 2, 160, 96
LARGEST_ERROR = 6e-3  # of a layer in bfloat16 with few numbers to average over
DIALECTS = [  # bits, group size, symmetric, act-order
    (4, 32, True, False),
    (4, -1, False, False),
    (8, 32, False, False),
    (8, 64, True, True),
    (4, 32, False, True),
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
        together, *_ = triton.routed_experts(x, logits, mask, TOP_K, True, up, down, layer)
        return ids, weights, apart, together

    ids, weights, apart, together = run(
        x, logits, jax.device_put(mask), up.tiled, down.tiled, jax.device_put(np.int32(1))
    )
    ids = np.asarray(ids)
    gate_up = np.einsum("tk,tekn->ten", np.asarray(x, np.float32), up.dense[1][ids])
    gate, value = gate_up[..., :F], gate_up[..., F:]
    h = gate / (1 + np.exp(-gate)) * value
    expected = np.einsum("tef,tefd,te->td", h, down.dense[1][ids], np.asarray(weights) * mask[:, None])
    return max(error(apart, expected), error(together, expected))


def on_the_gpu(x: np.ndarray) -> jax.Array:
    """bfloat16, rounded on the CPU."""
    return jax.device_put(x.astype(jnp.bfloat16))


def error(actual: jax.Array, expected: np.ndarray) -> float:
    """||actual - expected|| / ||expected||."""
    return float(np.linalg.norm(np.asarray(actual).astype(np.float32) - expected) / max(np.linalg.norm(expected), 1e-9))


def cases() -> Iterator[tuple[Callable[[np.random.Generator, tuple, int], float], tuple, int]]:
    """What is run: each dialect with an odd number of rows, and a layer with few and with many pairs."""
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


def main() -> int:
    """Run all of them."""
    if problem := triton.unavailable():
        print(f"error: these are the kernels of an NVIDIA GPU: {problem}.", file=sys.stderr)
        return 3
    seed = np.random.SeedSequence().entropy
    rng = np.random.default_rng(seed)
    wrong = 0
    for run, dialect, rows in cases():
        found = run(rng, dialect, rows)
        good = found <= LARGEST_ERROR
        wrong += not good
        print(f"{'right' if good else 'WRONG'} {run.__name__} {dialect} {rows}: {found:.1e}", flush=True)
    print(f"{wrong} wrong; seed {seed}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
