"""Print what holding the output projection in 8 and 4 bits costs, on the reference checkpoints that are here.

    PYTHONPATH=. python tests/tools/lm_head_error.py [dtype]

It reads the held-out tokens of each checkpoint, which for the demo model are 201 windows of 512. Logits are compared
with those of the projection as the checkpoint has it, in the same dtype (float32 unless told otherwise).
"""

from __future__ import annotations

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np

import ferrum_jax as fj
from ferrum_jax.config import ModelConfig
from tests.support.goldens import FOLDERS, read_model, reference

WINDOW, BATCH = 512, 3
forward = jax.jit(fj.forward, static_argnames="cfg")


@jax.jit
def numbers(logits: jax.Array, expected: jax.Array, tokens: jax.Array) -> tuple[jax.Array, ...]:
    """Largest difference, sum of the squared ones, equal best tokens, summed negative log-likelihood."""
    off = logits - expected
    picked = jnp.take_along_axis(logits[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    loss = (jax.nn.logsumexp(logits[:, :-1], axis=-1) - picked).sum()
    return jnp.abs(off).max(), (off**2).sum(), (logits.argmax(-1) == expected.argmax(-1)).sum(), loss


def rows(name: str, dtype: str) -> list[str]:
    """The lines of one checkpoint: the projection as it is, in 8 and in 4 bits."""
    ids = reference(name)["heldout_ids"]
    windows = ids if ids.ndim == 2 else ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)
    models: dict[int | None, tuple[ModelConfig, dict]] = {
        bits: read_model(FOLDERS[name], lm_head_bits=bits, dtype=dtype) for bits in (None, 8, 4)
    }
    found = {bits: [] for bits in models}
    for start in range(0, len(windows), BATCH):
        tokens = jnp.asarray(windows[start : start + BATCH])
        expected = forward(models[None][1], tokens, cfg=models[None][0])
        for bits, (cfg, params) in models.items():
            found[bits].append([float(value) for value in numbers(forward(params, tokens, cfg=cfg), expected, tokens)])
    lines = []
    for bits, values in found.items():
        largest, (squares, same, loss) = max(v[0] for v in values), np.sum(values, axis=0)[1:]
        mean = math.sqrt(squares / windows.size / models[bits][0].vocab_size)
        perplexity = math.exp(loss / (windows.size - len(windows)))
        lines.append(
            f"{name:20} {bits or '-':>4} {largest:8.3f} {mean:8.4f} {same / windows.size:8.2%} {perplexity:9.3f}"
        )
    return lines


if __name__ == "__main__":
    print(f"{'checkpoint':20} bits  largest      rms     same perplexity")
    for name in [name for name, folder in FOLDERS.items() if folder.is_dir()]:
        print("\n".join(rows(name, *sys.argv[1:2] or ["float32"])), flush=True)
