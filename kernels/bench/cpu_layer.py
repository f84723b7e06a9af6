"""Time one layer of Qwen3-30B-A3B on the CPU, in turns with llama.cpp: python kernels/bench/cpu_layer.py --help.

Both sides run models of random weights with a small vocabulary, ours in GPTQ 4-bit, llama.cpp's in Q4_0, output
projection included. Each round runs every row once on each side, one after the other; a ratio is llama.cpp's time
divided by ours in the same round. Milliseconds per layer are

  layer T=1     64 tokens decoded one by one by four layers, cache bucket 128, divided by 64 * 4.
  layer T=n     (prefill of n tokens by four layers - by one layer) / 3. llama.cpp runs the experts of its last layer
                for the last token only, so dividing by four would count three layers of experts as four.
  experts T=1   ours: moe_layer with its router, another token and another layer at every step of a scan.
                llama.cpp's: (8 experts per token - 1 expert per token) / 4 layers * 8 / 7, so without its router.

The share of DRAM read bandwidth counts the packed bytes of a token's experts once. llama.cpp's threads wait by
spinning, so other work on the machine slows it most of all: look at the load average and the ranges.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_options import numbers
from llama_rival import build_of, llama_bench, write_gguf

from ferrum_jax.config import ModelConfig
from ferrum_jax.config_file import load_toml_config
from ferrum_jax.errors import FerrumError

CONFIG = Path(__file__).parents[2] / "configs" / "qwen3-30b-a3b.toml"
LAYERS = 4
STEPS = 64  # tokens of one measurement at T=1
EXPERTS = "experts T=1"

Test = Callable[[], float]  # one measurement, in milliseconds per layer


def sized(cfg: ModelConfig, layers: int, **changes: Any) -> ModelConfig:
    """The configuration with a few layers and a small vocabulary, whose projection is quantised as in Q4_0 files."""
    return dataclasses.replace(
        cfg,
        num_layers=layers,
        moe_layers=(),
        sliding_windows=(),
        vocab_size=1024,
        eos_token_ids=(),
        bos_token_id=None,
        pad_token_id=None,
        quant=dataclasses.replace(cfg.quant, lm_head=True),
        **changes,
    )


def our_tests(
    cfg: ModelConfig, tokens: list[int], dtypes: list[str], implementation: str | None
) -> dict[tuple[str, str], Test]:
    """A test per row and dtype; the packed weights are shared. A test's first run compiles, outside the clock."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from ferrum_jax.cache import init_cache
    from ferrum_jax.model import decode_step, prefill
    from ferrum_jax.moe import moe_layer
    from ferrum_jax.params import random_params

    rng = np.random.default_rng(0)
    decode = jax.jit(decode_step, static_argnames="cfg", donate_argnames="cache")
    read = jax.jit(prefill, static_argnames="cfg", donate_argnames="cache")

    def random_tokens(*shape: int) -> jax.Array:
        return jnp.asarray(rng.integers(0, sized(cfg, 1).vocab_size, shape), jnp.int32)

    def timed(run: Callable[..., Any], *args: Any) -> tuple[float, Any]:
        began = time.perf_counter()
        result = jax.block_until_ready(run(*args))
        return (time.perf_counter() - began) * 1e3, result

    def model(layers: int) -> Any:
        return random_params(sized(cfg, layers, dtype="float32"))

    def cast(params: Any, dtype: str) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.dtype == jnp.float32 else leaf, params)

    def decoding(params: Any, cfg: ModelConfig) -> Test:
        def test() -> float:
            first, *rest = random_tokens(STEPS + 1, 1)
            _, cache = decode(params, first, init_cache(cfg, 1, 128), cfg)
            total = 0.0
            for token in rest:
                milliseconds, (_, cache) = timed(decode, params, token, cache, cfg)
                total += milliseconds
            return total / STEPS / LAYERS

        return test

    def reading(params: Any, cfg: ModelConfig, count: int) -> Test:
        def test() -> float:
            prompt, lengths = random_tokens(1, count), jnp.array([count], jnp.int32)
            caches = jax.block_until_ready([init_cache(cfg, 1, max(128, count)) for _ in range(2)])
            return [timed(read, params, prompt, lengths, cache, cfg)[0] for cache in caches][1]

        return test

    def experts(moe: Any, cfg: ModelConfig) -> Test:
        layers = jnp.arange(STEPS, dtype=jnp.int32) % LAYERS

        @jax.jit
        def run(moe: Any, xs: jax.Array) -> jax.Array:
            def step(_: None, at: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
                x, layer = at
                one = {"router": moe["router"][layer], "experts": moe["experts"]}
                # Kept as float32: on CPU XLA converts a whole bfloat16 array to write one row of it.
                return None, moe_layer(one, x, cfg, layer=layer)[0].astype(jnp.float32)

            return jax.lax.scan(step, None, (xs, layers))[1]

        def test() -> float:
            xs = jnp.asarray(rng.standard_normal((STEPS, 1, cfg.hidden_size)), cfg.dtype)
            return [timed(run, moe, xs)[0] for _ in range(2)][1] / STEPS

        return test

    def difference(four: Test, one: Test) -> Test:
        return lambda: (four() - one()) / (LAYERS - 1)

    say("making random weights")
    deep, shallow = model(LAYERS), model(1)
    tests: dict[tuple[str, str], Test] = {}
    for dtype in dtypes:
        four, one = cast(deep, dtype), cast(shallow, dtype)
        cfg4, cfg1 = (sized(cfg, n, dtype=dtype, implementation=implementation) for n in (LAYERS, 1))
        for count in tokens:
            tests[f"layer T={count}", dtype] = (
                decoding(four, cfg4)
                if count == 1
                else difference(reading(four, cfg4, count), reading(one, cfg1, count))
            )
        tests[EXPERTS, dtype] = experts(four["layers"][0]["moe"], cfg4)
    return tests


def their_tests(cfg: ModelConfig, tokens: list[int], binary: Path, folder: Path, threads: int) -> dict[str, Test]:
    """A test per row of llama.cpp, on model files written to `folder`."""
    say("writing llama.cpp's model files")
    full, one_layer, one_expert = (folder / f"{name}.gguf" for name in ("full", "one-layer", "one-expert"))
    write_gguf(full, sized(cfg, LAYERS))
    write_gguf(one_layer, sized(cfg, 1))
    write_gguf(one_expert, sized(cfg, LAYERS, top_k=1))

    def decoding(file: Path) -> float:
        return llama_bench(binary, file, 0, STEPS, threads) / STEPS / LAYERS

    def layer(count: int) -> float:
        four, one = (llama_bench(binary, file, count, 0, threads) for file in (full, one_layer))
        return (four - one) / (LAYERS - 1)

    def experts() -> float:
        return (decoding(full) - decoding(one_expert)) * cfg.top_k / (cfg.top_k - 1)

    tests: dict[str, Test] = {
        f"layer T={count}": (lambda: decoding(full)) if count == 1 else (lambda count=count: layer(count))
        for count in tokens
    }
    return {**tests, EXPERTS: experts}


def live_bytes(cfg: ModelConfig) -> int:
    """Packed bytes of one token's experts in one layer, scales included."""
    from ferrum_jax.params import abstract, num_bytes

    return num_bytes(abstract(sized(cfg, 1))["layers"][0]["moe"]["experts"]) * cfg.top_k // cfg.num_experts


def read_bandwidth() -> float | None:
    """DRAM read bandwidth in GB/s by the threads of our kernels, or None where they are not built."""
    from ferrum_kernels.cpu_library import library, unavailable

    if unavailable():
        return None
    measure = library().ferrum_cpu_read_bandwidth
    measure.argtypes, measure.restype = [ctypes.c_uint64], ctypes.c_double
    return measure(2**30)


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure.

    Args:
      options: of the command line.
      folder: for llama.cpp's model files.

    Returns:
      {"device", "rows"}; a row lists the numbers of every round.
    """
    cfg = load_toml_config(CONFIG)
    report: dict[str, Any] = {"device": device(options, cfg)}
    if (load := report["device"]["load_before"]) > 0.5:
        say(f"warning: the load average is {load:.1f}; wait until nothing else runs, or trust the least times only.")
    tokens, dtypes = options.tokens, options.dtypes.split(",")
    theirs = their_tests(cfg, tokens, options.llama_bench, folder, options.threads) if options.llama_bench else {}
    ours = our_tests(cfg, tokens, dtypes, options.implementation)
    rows: dict[tuple[str, str], dict[str, Any]] = {
        (name, dtype): {"row": name, "dtype": dtype, "ours_ms": [], "llama_ms": [], "ratio": [], "read_share": []}
        for name, dtype in ours
    }
    for i in range(options.rounds):
        for name in dict.fromkeys(name for name, _ in rows):
            say(f"round {i + 1} of {options.rounds}: {name}")
            rival = theirs[name]() if theirs else None
            bandwidth = read_bandwidth() if name == EXPERTS else None
            for dtype in dtypes:
                row, milliseconds = rows[name, dtype], ours[name, dtype]()
                row["ours_ms"].append(milliseconds)
                if rival is not None:
                    row["llama_ms"].append(rival)
                    row["ratio"].append(rival / milliseconds)
                if bandwidth:
                    row["read_share"].append(report["device"]["expert_bytes"] / milliseconds / 1e6 / bandwidth)
    return {**report, "rows": list(rows.values())}


def device(options: argparse.Namespace, cfg: ModelConfig) -> dict[str, Any]:
    """What the numbers are measured on and with."""
    import jax

    import ferrum_jax
    from ferrum_kernels.cpu_library import describe, unavailable

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "jax": jax.__version__,
        "ferrum_jax": ferrum_jax.__version__,
        "implementation": options.implementation or "default",
        "isa": None if unavailable() else describe().isa,
        "llama.cpp": build_of(options.llama_bench) if options.llama_bench else None,
        "rounds": options.rounds,
        "expert_bytes": live_bytes(cfg),
    }


def text_of(report: dict[str, Any]) -> str:
    """The report as a table of medians and ranges."""

    def cell(values: list[float], form: str = ".2f") -> str:
        if not values:
            return "-"
        return f"{statistics.median(values):{form}} [{min(values):{form}}..{max(values):{form}}]"

    lines = [f"{key}: {value}" for key, value in report["device"].items()]
    lines.append(f"\n{'':13}{'dtype':10}{'ours, ms':>26}{'llama.cpp, ms':>26}{'ratio':>21}{'of DRAM read, %':>18}")
    for row in report["rows"]:
        percent = cell([100 * share for share in row["read_share"]], ".0f")
        lines.append(
            f"{row['row']:13}{row['dtype']:10}{cell(row['ours_ms']):>26}{cell(row['llama_ms']):>26}"
            f"{cell(row['ratio']):>21}{percent:>18}"
        )
    return "\n".join(lines)


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-bench", type=Path, help="llama.cpp's binary of that name; without it, ours only")
    parser.add_argument("--tokens", type=numbers, default="1,64,512")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="of our activations")
    parser.add_argument("--implementation", default=None, help="of our kernels; left out, the device's best")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of llama.cpp and of our kernels, not XLA")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print every round's numbers")
    options = parser.parse_args()
    os.environ["FERRUM_JAX_THREADS"] = str(options.threads)
    try:
        # Three model files, 3.2 GB together; the environment's TMPDIR says where.
        with tempfile.TemporaryDirectory() as folder:
            report = run(options, Path(folder))
    except FerrumError as problem:
        say(f"error: {problem}")
        return 1
    print(json.dumps(report) if options.json else text_of(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
