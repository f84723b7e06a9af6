"""Time attention of a layer on an NVIDIA GPU: python kernels/bench/attention.py --help.

From the product of queries, keys and values to what the output projection takes: head norms, rotation, cache write and
attention, one new token per row (decode) or a prompt (prefill). A call loops over so many layers of the cache that
nothing is read from the GPU's own cache; times are of calls queued behind each other, divided by the turns. Where a
turn is short, launching it is half of it. Bytes are those of the live cache, keys, values and scales, read once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_table
import jax
import jax.numpy as jnp
import numpy as np

from ferrum_jax.config_file import load_toml_config
from ferrum_kernels.code_words import WORD
from ferrum_kernels.triton_attention import arrivals, attention_fused

NO_WINDOW = 2**31 - 1
HEADER = "phase    batch  tokens  context  cache     page        us (least)     TB/s   of read  TFLOP/s  compile"


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement: new tokens per row, what each row holds, and how it is held."""

    batch: int
    tokens: int
    context: int
    dtype: str
    page: int

    @property
    def capacity(self) -> int:
        """Positions of a row: room for some more."""
        return -(-(self.context + self.tokens) // 256) * 256 + 256

    def layers(self, cfg: Any) -> int:
        """Layers in rotation, at least four: what they hold is several times what a GPU's own cache does."""
        if self.tokens > 1:
            return 4
        live = (
            self.batch * (self.context + 1) * 2 * cfg.num_kv_heads * cfg.head_dim * (1 if self.dtype == "int8" else 2)
        )
        return max(4, min(256, -(-(200 * 2**20) // live)))


def cache_of(cfg: Any, case: Case, layers: int) -> tuple[Any, Any, Any]:
    """Random pools made on the device, scales and a table in random order (None where there are none)."""
    rows, page = (case.batch * case.capacity // case.page, case.page) if case.page else (case.batch, case.capacity)
    shape = (layers, rows, page, cfg.num_kv_heads, cfg.head_dim)

    @jax.jit
    def make(key: jax.Array) -> jax.Array:
        if case.dtype == "int8":
            words = jax.random.bits(key, (*shape[:-1], shape[-1] // WORD), jnp.uint32)
            return jax.lax.bitcast_convert_type(words, jnp.int32)
        # Any 16 bits whose exponent says that the value is between 2**-31 and 2.
        words = jax.random.bits(key, shape, jnp.uint16) & 0xBFFF | 0x3000
        return jax.lax.bitcast_convert_type(words, jnp.bfloat16)

    pools = tuple(make(jax.random.key(i)) for i in range(2))
    scales = tuple(jnp.full(shape[:-1], 0.01, jnp.float32) for _ in "kv") if case.dtype == "int8" else None
    order = np.random.default_rng(0).permutation(rows).reshape(case.batch, -1)
    return pools, scales, jnp.asarray(order, jnp.int32) if case.page else None


def measure(cfg: Any, case: Case, layers: int, repeats: int) -> dict[str, Any]:
    """Microseconds of one layer, and the rates that they mean."""
    rng, h = np.random.default_rng(1), cfg.head_dim
    width = (cfg.num_heads + 2 * cfg.num_kv_heads) * h
    qkv = jnp.asarray(rng.standard_normal((case.batch, case.tokens, width)), jnp.bfloat16)
    angles = rng.uniform(0, 6, (case.batch, case.tokens, h // 2))
    cosine, sine = (jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))
    norms = (jnp.ones(h, jnp.bfloat16),) * 2 if cfg.qk_norm else None
    start, count = (jnp.full(case.batch, n, jnp.int32) for n in (case.context, case.tokens))
    pools, scales, table = cache_of(cfg, case, layers)
    arrived = arrivals(case.batch, cfg.num_kv_heads) if case.tokens == 1 else None
    # Enough turns for a call to be long beside its start.
    turns = layers * max(1, min(64, 2**32 // (layers * case.batch * case.capacity * 1024)))

    def run(state: Any, qkv: Any, start: Any, count: Any, table: Any) -> Any:
        def body(i: Any, state: Any) -> Any:
            (pools, scales, arrived), _ = state
            rest = (i % layers, start, count, jnp.int32(NO_WINDOW), table, scales)
            y, *held = attention_fused(qkv, norms, cfg.rms_norm_eps, cosine, sine, pools, *rest, arrived=arrived)
            return tuple(held), y

        y = jnp.zeros((case.batch, case.tokens, cfg.num_heads * h), jnp.bfloat16)
        return jax.lax.fori_loop(0, turns, body, (state, y))

    arguments = (qkv, start, count, table)
    began = time.perf_counter()
    step = jax.jit(run, donate_argnums=0).lower((pools, scales, arrived), *arguments).compile()
    compile_seconds = time.perf_counter() - began
    state, _ = step((pools, scales, arrived), *arguments)
    del pools, scales
    took = []
    for _ in range(repeats):
        began, calls = time.perf_counter(), 3
        for _ in range(calls):
            state, y = step(state, *arguments)
        jax.block_until_ready(y)
        took.append((time.perf_counter() - began) / calls / turns)
    seconds = statistics.median(took)
    per_token = 2 * cfg.num_kv_heads * (h + 4 if case.dtype == "int8" else 2 * h)
    nbytes = case.batch * (case.context + case.tokens) * per_token
    seen = case.tokens * case.context + case.tokens * (case.tokens + 1) // 2
    flops = 4 * cfg.num_heads * h * case.batch * seen
    return {
        **dataclasses.asdict(case),
        "microseconds": seconds * 1e6,
        "least_microseconds": min(took) * 1e6,
        "terabytes_per_second": nbytes / seconds / 1e12,
        "of_read": nbytes / seconds / gpu_table.READ.get(gpu_table.device(), float("nan")),
        "teraflops": flops / seconds / 1e12,
        "compile_seconds": compile_seconds,
    }


def line(row: dict[str, Any]) -> str:
    """A measurement as text."""
    phase, page = "decode" if row["tokens"] == 1 else "prefill", row["page"] or "none"
    return (
        f"{phase:8} {row['batch']:5} {row['tokens']:7} {row['context']:8}  {row['dtype']:9} {page!s:>4} "
        f"{row['microseconds']:9.1f} ({row['least_microseconds']:.1f})".ljust(67)
        + f"{row['terabytes_per_second']:6.2f} {row['of_read']:8.0%} {row['teraflops']:8.0f} "
        f"{row['compile_seconds']:6.1f} s"
    )


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """All asked-for combinations."""
    numbers = lambda text: [int(n) for n in text.split(",") if n]  # noqa: E731
    for dtype in options.cache.split(","):
        for page in numbers(options.pages):
            for context in numbers(options.contexts):
                for batch in numbers(options.batches):
                    yield Case(batch, 1, context, dtype, page)
            for tokens in numbers(options.prompts):
                yield Case(1, tokens, 0, dtype, page)


def main() -> None:
    """Parse, measure, print."""
    root = Path(__file__).parents[2]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=root / "configs" / "qwen3-30b-a3b.toml")
    parser.add_argument("--batches", default="1,4,16,64,256", help="rows of a decode step; nothing: none")
    parser.add_argument("--contexts", default="256,8192", help="tokens that each row holds")
    parser.add_argument("--prompts", default="128,512,1024,4096,8192", help="tokens of a prompt; nothing: none")
    parser.add_argument("--cache", default="bfloat16,int8", help="dtypes of the cache")
    parser.add_argument("--pages", default="0,16,64", help="positions of a page; 0: no pages")
    parser.add_argument("--layers", type=int, default=0, help="layers in rotation; 0: so many that none is in L2")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--most-gib", type=float, default=48, help="leave out caches that are larger")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    cfg = load_toml_config(options.config)
    device = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "config": options.config.name}
    rows = []
    if not options.json:
        print(device, HEADER, sep="\n", flush=True)
    for case in cases(options):
        layers = options.layers or case.layers(cfg)
        size = 2 * layers * case.batch * case.capacity * cfg.num_kv_heads * cfg.head_dim
        if size * (1 if case.dtype == "int8" else 2) > options.most_gib * 2**30:
            continue
        rows.append(measure(cfg, case, layers, options.repeats))
        if not options.json:
            print(line(rows[-1]), flush=True)
    if options.json:
        print(json.dumps({**device, "rows": rows}))


if __name__ == "__main__":
    main()
