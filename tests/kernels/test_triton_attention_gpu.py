"""Attention of the Triton backend on a GPU: any cache, ragged rows, the same bits each time, no copy of the cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_kernels import triton_attention
from ferrum_kernels.triton_attention_cuts import decode_cut
from ferrum_kernels.triton_statics import Cut, Statics
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
# More than 32 pairs of a row and a key head over more than 512 positions: of int8 the scores are turned.
TWELVE: dict[str, Any] = {
    "start": (0, 700, 17, 2047, 300, 2046, 1024, 1023, 1, 1500, 64, 900),
    "count": (1, 1, 0, *(1,) * 9),
    "capacity": 2048,
    "cache": "int8",
}
ONE_LAYER: dict[str, Any] = {"layers": 1, "layer": 0}
CASES = {
    "one": Case(**RAGGED),
    "one in a short row": Case(start=(0, 255, 100), count=(1, 1, 1), capacity=256, **QWEN),
    "one in pages of 16": Case(**RAGGED, page=16, dtype="float16"),
    "one in pages of 256 with a window": Case(**RAGGED, page=256, window=333),
    "one in int8": Case(**RAGGED, cache="int8"),
    "one in pages of int8": Case(**RAGGED, page=16, cache="int8", window=600),
    "one alone in parts": Case(start=(4095,), count=(1,), capacity=4096, **QWEN),
    "one of many rows in parts": Case(start=tuple(range(0, 4096, 61)), count=(1,) * 68, capacity=4096, **ONE_LAYER),
    "one in turned int8": Case(**TWELVE, **QWEN),
    "one in turned int8 in pages of 16 with a window": Case(**TWELVE, **QWEN, page=16, window=600, dtype="float16"),
    "one in turned int8 of a head each": Case(**TWELVE, heads=4, kv_heads=4, head_dim=64, norms=False),
    "one in turned int8 of wide heads": Case(**TWELVE, heads=64, kv_heads=4, head_dim=256),
    "one of many rows in turned int8": Case(
        start=tuple(range(0, 2048, 31)), count=(1,) * 67, capacity=2048, cache="int8", **QWEN, **ONE_LAYER
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


REPEATED = (
    *("one", "one in pages of int8", "one alone in parts", "one of many rows in parts"),
    *("one in turned int8 in pages of 16 with a window", "one of many rows in turned int8", "many in pages of 16"),
)


@pytest.mark.parametrize("name", [name for name in CASES if "turned" in name])
def test_scores_are_turned_where_cases_say_so(name):
    case = CASES[name]
    codes, page = case.cache == "int8", case.page or case.capacity
    shape = (case.heads, case.kv_heads, case.head_dim, (0, 0, 0), 1e-6, page, case.capacity)
    s = Statics(*shape, Cut(), jnp.float16, codes, False)
    assert dataclasses.replace(s, cut=decode_cut(s, len(case.start))).turned


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
