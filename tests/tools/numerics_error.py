"""Print what each numerics of the CPU kernels costs, and an output projection in 8 or 4 bits.

    PYTHONPATH=. python tests/tools/numerics_error.py [checkpoint ...]

Held-out tokens of the reference checkpoints that are here; for the demo model these are 201 windows of 512. Logits are
compared with those of the same checkpoint in exact float32.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ferrum_jax as fj
from tests.support.goldens import FOLDERS, read_model, reference

WINDOW, BATCH = 512, 3
EXACT = {"dtype": "float32", "implementation": "cpu-exact"}
VARIANTS: dict[str, dict[str, Any]] = {
    "float32, exact": EXACT,
    "float32, int8": {"dtype": "float32", "implementation": "cpu-int8"},
    "bfloat16, exact": {"dtype": "bfloat16", "implementation": "cpu-exact"},
    "bfloat16, int8": {"dtype": "bfloat16", "implementation": "cpu"},
    "bfloat16, int8, head 8": {"dtype": "bfloat16", "implementation": "cpu", "lm_head_bits": 8},
    "float32, head 8": {**EXACT, "lm_head_bits": 8},
    "float32, head 4": {**EXACT, "lm_head_bits": 4},
}
forward = jax.jit(fj.forward, static_argnames="cfg")


@jax.jit
def numbers(logits: jax.Array, expected: jax.Array, tokens: jax.Array) -> tuple[jax.Array, ...]:
    """Largest difference, sum of the squared ones, equal best tokens, summed negative log-likelihood."""
    off = logits - expected
    picked = jnp.take_along_axis(logits[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    loss = (jax.nn.logsumexp(logits[:, :-1], axis=-1) - picked).sum()
    return jnp.abs(off).max(), (off**2).sum(), (logits.argmax(-1) == expected.argmax(-1)).sum(), loss


def rows(name: str) -> list[str]:
    """The lines of one checkpoint."""
    ids = reference(name)["heldout_ids"]
    windows = ids if ids.ndim == 2 else ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)
    models = {variant: read_model(FOLDERS[name], **changes) for variant, changes in VARIANTS.items()}
    found: dict[str, list[list[float]]] = {variant: [] for variant in models}
    cfg, params = models["float32, exact"]
    for start in range(0, len(windows), BATCH):
        tokens = jnp.asarray(windows[start : start + BATCH])
        expected = forward(params, tokens, cfg=cfg)
        for variant, (other_cfg, other) in models.items():
            logits = forward(other, tokens, cfg=other_cfg)
            found[variant].append([float(value) for value in numbers(logits, expected, tokens)])
    lines = []
    for variant, values in found.items():
        largest, (squares, same, loss) = max(v[0] for v in values), np.sum(values, axis=0)[1:]
        mean = math.sqrt(squares / windows.size / cfg.vocab_size)
        perplexity = math.exp(loss / (windows.size - len(windows)))
        lines.append(f"{name:20} {variant:23} {largest:8.3f} {mean:8.4f} {same / windows.size:8.2%} {perplexity:9.3f}")
    return lines


if __name__ == "__main__":
    print(f"{'checkpoint':20} {'numerics':23}  largest      rms     same perplexity")
    for name in sys.argv[1:] or [name for name, folder in FOLDERS.items() if folder.is_dir()]:
        print("\n".join(rows(name)), flush=True)
