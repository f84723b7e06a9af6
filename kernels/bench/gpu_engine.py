"""The engine on a GPU with a whole model of random weights: many requests at once, greedy.

Every request has a prompt of random tokens; they are submitted together. The first round compiles, the second is
measured: tokens per second over all, and the milliseconds of a step once all prompts are read.

    python kernels/bench/gpu_engine.py --requests 64 --prompt 256 --new 128
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from pathlib import Path

import jax
import numpy as np
from gpu_decode import CONFIGS, random_tiles
from textless import model_of

from ferrum_jax.buckets import Buckets
from ferrum_jax.config_file import load_toml_config
from ferrum_jax.engine import Engine
from ferrum_jax.sampling import SamplerPlan


def measure(engine: Engine, prompts: np.ndarray, new: int) -> dict[str, float]:
    """Serve all prompts; seconds, tokens and the median step after the last prompt was read."""
    began = time.perf_counter()
    ids = {engine.submit(prompt.tolist(), max_tokens=new, ignore_eos=True) for prompt in prompts}
    seen: set[int] = set()
    tokens, times, before = 0, [], began
    while not engine.idle:
        events = engine.step()
        now = time.perf_counter()
        tokens += len(events)
        if seen == ids and len(events) == len(ids):
            times.append(now - before)
        seen |= {id for id, _ in events}
        before = now
    seconds = time.perf_counter() - began
    step = statistics.median(times) if times else float("nan")
    return {"seconds": seconds, "tokens": tokens, "step_ms": step * 1e3, "decode": len(ids) / step}


def main() -> None:
    """Parse, make weights, run every way twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIGS / "qwen3-30b-a3b.toml")
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--read", type=int, default=4096, help="prompt tokens of a step, all rows together")
    parser.add_argument("--page", type=int, default=16)
    parser.add_argument("--caches", default="bfloat16", help="dtypes between commas")
    args = parser.parse_args()
    cfg = load_toml_config(args.config)
    layers = args.layers or cfg.num_layers
    cfg = dataclasses.replace(cfg, num_layers=layers, moe_layers=(), sliding_windows=())
    model = model_of(cfg, random_tiles(cfg))
    prompts = np.random.default_rng(0).integers(0, cfg.vocab_size, (args.requests, args.prompt))
    rows = max(1, args.read // args.prompt)
    length = 1 << (args.prompt + args.new - 1).bit_length()
    buckets = Buckets(
        batch=tuple(sorted({min(rows, args.requests), args.requests})),
        prefill=tuple(sorted({args.prompt, max(args.read, args.prompt)})),
        cache=(length,),
    )
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; {args.requests} requests, page {args.page}")
    for dtype in args.caches.split(","):
        for overlap in (False, True):
            engine = Engine(
                model,
                slots=args.requests,
                pages=args.requests * -(-(args.prompt + args.new) // args.page),
                page=args.page,
                buckets=buckets,
                cache_dtype=dtype,
                plans=(SamplerPlan(),),
                overlap=overlap,
            )
            compiling = sum(record.seconds for record in engine.records)
            measure(engine, prompts, 4)
            compiling = sum(record.seconds for record in engine.records) - compiling
            found = measure(engine, prompts, args.new)
            print(
                f"{dtype:9} overlap {overlap!s:5}: {found['tokens'] / found['seconds']:8.0f} tok/s in all, "
                f"{found['step_ms']:7.3f} ms a step, {found['decode']:8.0f} tok/s decoding "
                f"(compiled in {compiling:.1f} s)",
                flush=True,
            )
            del engine


if __name__ == "__main__":
    main()
