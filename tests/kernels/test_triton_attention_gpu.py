"""Attention of the Triton backend on a GPU: any cache, ragged rows, the same bits each time, no copy of the cache."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_kernels import triton_attention
from tests.support.attention_cases import Case, build, check, fused
from tests.support.hlo import arrays_made
from tests.support.triton_cases import ignore_deprecation

pytestmark = [pytest.mark.gpu, ignore_deprecation]

QWEN: dict[str, Any] = {"heads": 32, "kv_heads": 4, "head_dim": 128}
RAGGED: dict[str, Any] = {"start": (0, 700, 17, 2047, 300), "count": (1, 1, 0, 1, 1), "capacity": 2048, **QWEN}
MANY: dict[str, Any] = {
    "start": (0, 700, 17, 900, 300),
    "count": (100, 77, 0, 100, 1),
    "tokens": 100,
    "capacity": 1024,
    **QWEN,
}
CASES = {
    "one": Case(**RAGGED),
    "one in a short row": Case(start=(0, 255, 100), count=(1, 1, 1), capacity=256, **QWEN),
    "one in pages of 16": Case(**RAGGED, page=16, dtype="float16"),
    "one in pages of 256 with a window": Case(**RAGGED, page=256, window=333),
    "one in int8": Case(**RAGGED, cache="int8"),
    "one in pages of int8": Case(**RAGGED, page=16, cache="int8", window=600),
    "one alone in pieces": Case(start=(4095,), count=(1,), capacity=4096, **QWEN),
    "one of many rows in pieces": Case(
        start=tuple(range(0, 4096, 61)), count=(1,) * 68, capacity=4096, layers=1, layer=0
    ),
    "one of narrow heads": Case(start=(90, 3), count=(1, 1), head_dim=16, heads=6, norms=False),
    "one of wide heads": Case(start=(90, 3), count=(1, 1), head_dim=256, page=32),
    "many": Case(**MANY),
    "many in pages of 16": Case(**MANY, page=16, dtype="float16"),
    "many in pages of 64 with a window": Case(**MANY, page=64, window=130),
    "many in pages of int8": Case(**MANY, page=32, cache="int8"),
    "many of wide heads": Case(start=(30, 3), count=(40, 2), tokens=40, head_dim=256, heads=8, kv_heads=1),
    "a few of narrow heads": Case(start=(90, 3), count=(3, 1), tokens=3, head_dim=16, heads=6, norms=False),
}


@pytest.mark.parametrize("name", CASES)
def test_attention_equals_plain_numpy(name):
    jax.block_until_ready(jnp.full((8, 1024, 4096), jnp.nan, jnp.float32)).delete()  # what the next outputs may get
    check(CASES[name], triton_attention.attention)


REPEATED = ("one", "one in pages of int8", "one alone in pieces", "one of many rows in pieces", "many in pages of 16")


@pytest.mark.parametrize("name", REPEATED)
def test_the_same_bits_at_every_run(name):
    args, _ = build(CASES[name])
    args["layer"], eps = jnp.int32(args["layer"]), args.pop("eps")
    attention = jax.jit(lambda **args: triton_attention.attention(eps=eps, **args))
    first = jax.tree.leaves(attention(**args))
    for _ in range(30):
        found = attention(**args)
        assert not np.any(found[-1])  # counters of arrivals: zero again for the next layer
        for one, other in zip(first, jax.tree.leaves(found), strict=True):
            np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


@pytest.mark.parametrize("name", ["one in pages of int8", "many in pages of 16"])
def test_a_scan_over_layers_copies_no_cache(name):
    args = fused(build(CASES[name])[0])
    eps, _ = args.pop("eps"), args.pop("layer")

    def run(pools, scales, rest):
        def body(state, layer):
            held = dict(zip(("pools", "scales", "arrived"), state, strict=True))
            y, *state = triton_attention.attention_fused(eps=eps, layer=layer, **held, **rest)
            return tuple(state), y

        arrived = triton_attention.arrivals(len(rest["start"]), pools[0].shape[-2])
        return jax.lax.scan(body, (pools, scales, arrived), jnp.arange(2, dtype=jnp.int32))

    pools, scales = args.pop("pools"), args.pop("scales")
    shape = pools[0].shape
    compiled = jax.jit(run, donate_argnums=(0, 1)).lower(pools, scales, args).compile()
    sizes = {shape, (shape[0], shape[1] * shape[2], *shape[3:])}
    made = [made for made in arrays_made(compiled.as_text() or "") if made.shape in sizes]
    assert not [m for m in made if m.operation not in ("custom-call",)]
    memory = compiled.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < pools[0].nbytes
