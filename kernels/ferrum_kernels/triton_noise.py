"""Noise for the kernels that draw tokens, the same as `ferrum_jax.sampling_stages.gumbel` makes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)


def gumbel(keys: Any, row: Any, counter: jax.Array) -> jax.Array:
    """Standard Gumbel noise of some token ids: Threefry of 20 rounds under a row's key, its first word.

    Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011).
    """
    return _noise(keys[row, 0], keys[row, 1], counter)


@jax.jit  # so that it is traced once, not in every kernel
def _noise(high: jax.Array, low: jax.Array, counter: jax.Array) -> jax.Array:
    schedule = high, low, high ^ low ^ np.uint32(0x1BD11BDA)
    a, b = jnp.zeros(counter.shape, jnp.uint32) + high, counter.astype(jnp.uint32) + low
    for i in range(5):
        for turn in ROTATIONS[i % 2]:
            a = a + b
            b = a ^ ((b << np.uint32(turn)) | (b >> np.uint32(32 - turn)))
        a, b = a + schedule[(i + 1) % 3], b + schedule[(i + 2) % 3] + np.uint32(i + 1)
    uniform = ((a >> np.uint32(9)).astype(jnp.int32).astype(jnp.float32) + 0.5) * np.float32(2.0**-23)
    return -jnp.log(-jnp.log(uniform))
