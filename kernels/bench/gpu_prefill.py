"""Read a prompt with a whole model of random weights on a GPU: tokens per second by length, and a layer's kernels.

Weights are made on the device, in tiles, and routing is near uniform. A prompt is read as `generate` reads it, in
pieces of the largest bucket, each queued behind the last; the first token is sampled greedily. With --generate, the
first token of `generate` itself is timed too: what comes beside the programs is the host's.

    python kernels/bench/gpu_prefill.py --prompts 128,4096 --profile 128,4096
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_options import numbers
from gpu_decode import CONFIGS, kernels, print_kernels, random_tiles, sizes_of

from ferrum_jax.budget import buckets_for
from ferrum_jax.cache import KVCache, init_cache
from ferrum_jax.config import ModelConfig
from ferrum_jax.model import prefill


def read(cfg: ModelConfig, params: Any, tokens: jax.Array, lengths: jax.Array, cache: KVCache) -> tuple[Any, KVCache]:
    """One piece: the token with the largest logit, and the cache."""
    logits, cache = prefill(params, tokens, lengths, cache, cfg)
    return jnp.argmax(logits, axis=-1), cache


class Reader:
    """Reads one prompt of random tokens, again at each call, in pieces of (program, width, tokens)."""

    def __init__(self, params: Any, pieces: list[tuple[Any, int, int]], cache: KVCache, vocab: int) -> None:
        self.params, self.pieces, self.cache = params, pieces, cache
        rng = np.random.default_rng(len(pieces))
        self.tokens = [rng.integers(vocab, size=(1, width)).astype(np.int32) for _, width, _ in pieces]

    def __call__(self) -> None:
        """Read and wait for the first token."""
        cache, token = dataclasses.replace(self.cache, lengths=np.zeros(1, np.int32)), None
        for (program, _, count), tokens in zip(self.pieces, self.tokens, strict=True):
            given = {"tokens": tokens, "lengths": np.array([count], np.int32)}
            token, cache = program(params=self.params, cache=cache, **given)
        self.cache = cache
        np.asarray(token)


def through_generate(cfg: ModelConfig, params: Any, length: int, repeats: int) -> float:
    """Milliseconds to the first token of a prompt by `generate`, as it says itself: the median of some calls."""
    # The loader and what it needs are for this only.
    from textless import model_of

    from ferrum_jax.generation import stream_generate

    model = model_of(cfg, params)
    tokens = np.random.default_rng(length).integers(cfg.vocab_size, size=length).tolist()
    times = [next(stream_generate(model, tokens, max_tokens=2)).stats.first_token_seconds for _ in range(repeats + 2)]
    return statistics.median(times[2:]) * 1e3


def main() -> None:
    """Parse, compile every length at once, measure one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIGS / "qwen3-30b-a3b.toml")
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--prompts", type=numbers, default="128,512,1024,2048,4096,8192")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--implementation", default=None)
    parser.add_argument("--profile", type=numbers, default="", help="lengths whose kernels are listed")
    parser.add_argument("--generate", action="store_true", help="time the first token of `generate` too")
    parser.add_argument("--rows", type=int, default=24, help="of a list of kernels")
    args = parser.parse_args()
    cfg = sizes_of(parser, args.config)
    layers = args.layers or cfg.num_layers
    cfg = dataclasses.replace(
        cfg, num_layers=layers, moe_layers=(), sliding_windows=(), implementation=args.implementation
    )
    params = jax.block_until_ready(random_tiles(cfg))
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, implementation {args.implementation or 'by default'}"
    )
    buckets = buckets_for(cfg, None)
    widest = buckets.widest(1)

    def program(shape: tuple[int, int]) -> tuple[float, Any]:
        width, slots = shape
        cache = jax.eval_shape(lambda: init_cache(cfg, 1, slots))
        tokens, lengths = jax.ShapeDtypeStruct((1, width), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
        began = time.perf_counter()
        step = jax.jit(partial(read, cfg), donate_argnames="cache")
        compiled = step.lower(params=params, tokens=tokens, lengths=lengths, cache=cache).compile()
        return time.perf_counter() - began, compiled

    def pieces(length: int) -> list[tuple[int, int]]:
        """(width, tokens) of each piece."""
        counts = [min(widest, length - start) for start in range(0, length, widest)]
        return [(buckets.fit("prefill", count), count) for count in counts]

    lengths = args.prompts
    slots = {length: buckets.fit("cache", length + 1) for length in lengths}
    shapes = list(dict.fromkeys((width, slots[length]) for length in lengths for width, _ in pieces(length)))
    with ThreadPoolExecutor(8) as pool:
        programs = dict(zip(shapes, pool.map(program, shapes), strict=True))

    for length in lengths:
        parts = [(programs[width, slots[length]][1], width, count) for width, count in pieces(length)]
        run = Reader(params, parts, init_cache(cfg, 1, slots[length]), cfg.vocab_size)
        run()
        times = []
        for _ in range(args.repeats):
            began = time.perf_counter()
            run()
            times.append((time.perf_counter() - began) * 1e3)
        compile_seconds = sum(programs[shape][0] for shape in {(width, slots[length]) for width, _ in pieces(length)})
        print(
            f"prompt of {length:5}: {statistics.median(times):8.2f} ms, {length / statistics.median(times) * 1e3:8.0f} "
            f"tok/s (compiled in {compile_seconds:.1f} s)",
            flush=True,
        )
        if length in args.profile:
            print_kernels(kernels(run, 1)[: args.rows], layers)
        del run
        if args.generate:
            first = through_generate(cfg, params, length, args.repeats)
            print(f"    first token through generate: {first:8.2f} ms", flush=True)


if __name__ == "__main__":
    main()
