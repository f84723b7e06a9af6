"""Time one mixture-of-experts layer from hidden states to output: python kernels/bench/moe_layer.py --help.

Random routing, random packed weights; several layers in rotation, so that no weight is read from a cache. Prints one
line per number of tokens: median and spread, live experts, bytes of weights read and the rate that implies. On an
NVIDIA GPU the times are the device's, beside those recorded of Marlin and the floor (gpu_table.py); --check compares
each with float32 first, --routing skews the load, --compile-times is about the whole model's decode step instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_options import numbers

from ferrum_jax.config_file import load_toml_config
from ferrum_jax.moe import moe_layer
from ferrum_jax.params import random_params
from ferrum_kernels import mosaic


def measure(layers: dict[str, Any], cfg: Any, tokens: int, repeats: int, seed: int) -> dict[str, Any]:
    """Seconds per layer for a number of tokens; the weights take turns."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((tokens, cfg.hidden_size)), cfg.dtype)
    began = time.perf_counter()
    step = jax.jit(lambda moe, x, layer: moe_layer(moe, x, cfg, layer=layer)).lower(layers, x, jnp.int32(0)).compile()
    compile_seconds = time.perf_counter() - began
    count = layers["experts"]["down"].lead[0]
    times = []
    for i in range(repeats + 2):
        began = time.perf_counter()
        _, routing = jax.block_until_ready(step(layers, x, jnp.int32(i % count)))
        times.append(time.perf_counter() - began)
    median = statistics.median(times[2:])
    live = len(np.unique(np.asarray(routing.experts)))
    nbytes = sum(stack.nbytes for stack in layers["experts"].values()) // count * live // cfg.num_experts
    return {
        "tokens": tokens,
        "milliseconds": median * 1e3,
        "least_milliseconds": min(times[2:]) * 1e3,
        "live_experts": live,
        "gigabytes_per_second": nbytes / median / 1e9,
        "temp_mib": step.memory_analysis().temp_size_in_bytes / 2**20,
        "compile_seconds": compile_seconds,
    }


def on_a_gpu(cfg: Any, options: argparse.Namespace, device: dict[str, Any]) -> None:
    """The table of gpu_table.py, as text or JSON."""
    import gpu_table

    found = []
    if not options.json:
        print(device, f"routing: {options.routing}", gpu_table.HEADER, sep="\n", flush=True)
    name, how = (
        options.config.stem,
        (options.layers, options.repeats, options.routing, options.check, options.implementation),
    )
    try:
        for row in gpu_table.rows(cfg, name, options.tokens, *how):
            found.append(row)
            if not options.json:
                print(gpu_table.line(row), flush=True)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    if options.json:
        print(json.dumps({**device, "routing": options.routing, "rows": found}))


def of_compiling(options: argparse.Namespace) -> None:
    """Seconds to compile the whole model's decode step for several batches, as text or JSON."""
    import compile_times

    batches = options.tokens or list(compile_times.BATCHES)
    # In processes of its own, before this one takes the device's memory.
    found = compile_times.measure(options.config, batches, options.implementation)
    print(json.dumps(found) if options.json else compile_times.text_of(found))


def main() -> None:
    """Parse, measure, print."""
    root = Path(__file__).parents[2]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=root / "configs" / "qwen3-30b-a3b.toml")
    parser.add_argument("--tokens", type=numbers, default=None, help="numbers of tokens, separated by commas")
    parser.add_argument("--layers", type=int, default=None, help="layers in rotation")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", default=None, help="float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--routing", default="uniform", choices=("uniform", "zipf", "one"), help="on a GPU")
    parser.add_argument("--implementation", default=None)
    parser.add_argument("--check", action="store_true", help="on a GPU: compare with float32 before timing")
    parser.add_argument("--compile-times", action="store_true", help="of decode steps, first and from the cache")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.compile_times:
        of_compiling(options)
        return
    cfg = load_toml_config(options.config)
    on_gpu = jax.default_backend() == "gpu" and options.implementation in (None, *mosaic.NAMES)
    options.layers = options.layers or (8 if on_gpu else 3)
    options.dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    options.tokens = options.tokens or ([1, 4, 8, 16, 64, 256, 1024, 4096] if on_gpu else [1, 4, 16, 64, 512])
    # The embedding is not part of the layer: a small vocabulary keeps it out of memory.
    cfg = dataclasses.replace(
        cfg,
        num_layers=options.layers,
        moe_layers=cfg.moe_layers[: options.layers],
        sliding_windows=cfg.sliding_windows[: options.layers],
        vocab_size=256,
        eos_token_ids=(),
        bos_token_id=None,
        pad_token_id=None,
        dtype=options.dtype,
        implementation=options.implementation,
    )
    device = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "config": options.config.name}
    if on_gpu:
        import gpu_state

        on_a_gpu(cfg, options, {**device, **gpu_state.versions()})
        return
    if options.check or options.routing != "uniform":
        parser.error("--check and --routing are for the kernels of an NVIDIA GPU")
    layers = random_params(cfg)["layers"][0]["moe"]
    rows = []
    for tokens in options.tokens:
        router = layers["router"]
        one = {"router": router[0], "experts": layers["experts"]}
        rows.append(measure(one, cfg, tokens, options.repeats, seed=tokens))
        row = rows[-1]
        if not options.json:
            print(
                f"T={tokens:<5} {row['milliseconds']:9.2f} ms (least {row['least_milliseconds']:.2f})  "
                f"{row['live_experts']:3} experts  {row['gigabytes_per_second']:6.2f} GB/s  "
                f"temp {row['temp_mib']:.0f} MiB  compile {row['compile_seconds']:.1f} s",
                flush=True,
            )
    print(json.dumps({**device, "rows": rows}) if options.json else device, file=sys.stdout)


if __name__ == "__main__":
    main()
