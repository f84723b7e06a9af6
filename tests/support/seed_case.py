"""The parity case of ferrum-infer-rs for bucketed expert products, drawn from its generator in plain Python integers.

Source: `crates/ferrum-models/tests/moe_bucketed_parity_test.rs` of sizzlecar/ferrum-infer-rs. A linear congruential
generator modulo 2**64 gives its state's top 31 bits. Each expert draws its words, then its scales, then its zero
points, one per draw; activations and router logits share a third stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

HIDDEN, INTER, EXPERTS, TOP_K, BATCH, GROUP = 64, 32, 4, 2, 5, 32
GATE_UP_SEED, DOWN_SEED, INPUT_SEED = 0xA, 0xB, 0xC0FFEE
MULTIPLIER, INCREMENT = 6364136223846793005, 1442695040888963407


def draws(seed: int) -> Iterator[int]:
    """Integers in [0, 2**31)."""
    state = seed
    while True:
        state = (state * MULTIPLIER + INCREMENT) % 2**64
        yield state >> 33


def uniform(stream: Iterator[int], count: int, low: float, high: float) -> np.ndarray:
    """float32 [count] in [low, high): the low 24 bits of a draw as a fraction, every step rounded to float32."""
    fraction = np.array([next(stream) % 2**24 for _ in range(count)], np.float32) / np.float32(2**24)
    return np.float32(low) + fraction * (np.float32(high) - np.float32(low))


@dataclass(frozen=True)
class SeedTensors:
    """One expert's matrix as drawn: qweight int32 [K/8, N], scales float32 [G, N], qzeros int32 [G, N/8]."""

    qweight: np.ndarray
    scales: np.ndarray
    qzeros: np.ndarray


def draw_matrix(k: int, n: int, seed: int) -> SeedTensors:
    """One expert's packed matrix."""
    stream, groups = draws(seed), k // GROUP
    qweight = np.array([next(stream) for _ in range(k // 8 * n)], np.uint32)
    scales = uniform(stream, groups * n, 0.01, 0.1)
    zeros = np.array([next(stream) % 16 for _ in range(groups * n)], np.uint32).reshape(-1, 8)
    words = (zeros << np.arange(0, 32, 4, dtype=np.uint32)).sum(1, dtype=np.uint32)
    return SeedTensors(
        qweight=qweight.view(np.int32).reshape(k // 8, n),
        scales=scales.reshape(groups, n),
        qzeros=words.view(np.int32).reshape(groups, n // 8),
    )


@dataclass(frozen=True)
class SeedCase:
    """gate_up [E] of [64, 2 * 32], down [E] of [32, 64], x float32 [5, 64], logits float32 [5, 4]."""

    gate_up: tuple[SeedTensors, ...]
    down: tuple[SeedTensors, ...]
    x: np.ndarray
    logits: np.ndarray


def draw_case() -> SeedCase:
    """The whole case."""
    stream = draws(INPUT_SEED)
    return SeedCase(
        gate_up=tuple(draw_matrix(HIDDEN, 2 * INTER, GATE_UP_SEED + e) for e in range(EXPERTS)),
        down=tuple(draw_matrix(INTER, HIDDEN, DOWN_SEED + e) for e in range(EXPERTS)),
        x=uniform(stream, BATCH * HIDDEN, -1.0, 1.0).reshape(BATCH, HIDDEN),
        logits=uniform(stream, BATCH * EXPERTS, -2.0, 2.0).reshape(BATCH, EXPERTS),
    )
