"""Random routing for tune.py, and the places of its pairs as plain numpy finds them."""

from __future__ import annotations

import numpy as np


def tokens_share(pairs: int, top_k: int) -> int:
    """Experts of a token: top_k, or as many less as make the pairs those of whole tokens."""
    return max(k for k in range(1, top_k + 1) if pairs % k == 0)


def routing(seed: int, pairs: int, experts: int, top_k: int) -> np.ndarray:
    """int32 [P]: each token chooses different experts at random."""
    share = tokens_share(pairs, top_k)
    scores = np.random.default_rng(seed).random((pairs // share, experts))
    return np.argsort(scores, axis=1)[:, :share].astype(np.int32).reshape(-1)


def places(ids: np.ndarray, experts: int, sizes: tuple[int, ...], blocks: int) -> tuple[np.ndarray, ...]:
    """int32 [blocks] expert, first place and number of places of each block, and int32 [P] the pair at each place.

    As `triton_place.place` has them.
    """
    block = sizes[-1]
    counts = np.bincount(ids, minlength=experts)
    needed = -(-counts // block)
    inside = np.concatenate([np.arange(n) for n in needed]) * block
    expert = np.repeat(np.arange(experts), needed)
    starts = (np.cumsum(counts) - counts)[expert] + inside
    rows = np.minimum(counts[expert] - inside, block)
    by_size = np.argsort(-np.searchsorted(sizes, rows), kind="stable")
    spare = (0, blocks - len(expert))
    return (
        np.pad(expert[by_size], spare, constant_values=experts).astype(np.int32),
        np.pad(starts[by_size], spare, constant_values=len(expert)).astype(np.int32),
        np.pad(rows[by_size], spare).astype(np.int32),
        np.argsort(ids, kind="stable").astype(np.int32),
    )
