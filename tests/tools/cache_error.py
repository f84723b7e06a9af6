"""Print what a cache in int8 costs: held-out tokens of the demo model, read one by one through the cache.

    PYTHONPATH=. python tests/tools/cache_error.py [windows]

Windows of 512 tokens side by side, each token a decode step; logits are compared with those of a float32 cache.
"""

from __future__ import annotations

import functools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np

import ferrum_jax as fj
from tests.support.goldens import DEMO, FOLDERS, read_model, reference

WINDOW, BATCH = 512, 67


@functools.partial(jax.jit, static_argnames="cfg")
def losses(params: dict, tokens: jax.Array, cfg: fj.ModelConfig) -> jax.Array:
    """Of one batch, int8 against float32: largest difference, sum of squares, equal best tokens, both losses."""
    steps = tokens.shape[1]
    exact, codes = (fj.init_cache(cfg, tokens.shape[0], steps, dtype=dtype) for dtype in ("float32", "int8"))

    def step(carry: tuple, at: jax.Array) -> tuple[tuple, jax.Array]:
        exact, codes = carry
        now, target = tokens[:, at], tokens[:, jnp.minimum(at + 1, steps - 1)]
        one, exact = fj.decode_step(params, now, exact, cfg)
        other, codes = fj.decode_step(params, now, codes, cfg)
        loss = [
            (jax.nn.logsumexp(x, axis=-1) - jnp.take_along_axis(x, target[:, None], axis=-1)[:, 0]).sum()
            * (at + 1 < steps)
            for x in (one, other)
        ]
        off = other - one
        same = (one.argmax(-1) == other.argmax(-1)).sum().astype(jnp.float32)
        return (exact, codes), jnp.stack([jnp.abs(off).max(), (off**2).sum(), same, *loss])

    _, numbers = jax.lax.scan(step, (exact, codes), jnp.arange(steps, dtype=jnp.int32))
    return jnp.concatenate([numbers[:, :1].max(axis=0), numbers[:, 1:].sum(axis=0)])


def main() -> None:
    """Measure and print."""
    ids = reference(DEMO)["heldout_ids"]
    windows = ids if ids.ndim == 2 else ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)
    windows = windows[: int(sys.argv[1]) if len(sys.argv) > 1 else len(windows)]
    cfg, params = read_model(FOLDERS[DEMO], dtype="float32", implementation="cpu-exact")
    found = [
        np.asarray(losses(params, jnp.asarray(windows[start : start + BATCH], jnp.int32), cfg), np.float64)
        for start in range(0, len(windows), BATCH)
    ]
    largest, (squares, same, exact, codes) = max(row[0] for row in found), np.sum(found, axis=0)[1:]
    scored = windows.size - len(windows)
    print(
        f"{len(windows)} windows: largest difference {largest:.3f}, rms "
        f"{math.sqrt(squares / windows.size / cfg.vocab_size):.4f}, same best token {same / windows.size:.2%}, "
        f"perplexity {math.exp(exact / scored):.4f} in float32, {math.exp(codes / scored):.4f} in int8"
    )


if __name__ == "__main__":
    main()
