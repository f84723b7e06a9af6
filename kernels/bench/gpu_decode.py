"""Decode a whole model of random weights on a GPU: tokens per second by batch, and the kernels of one layer.

Weights are made on the device, in tiles, and routing is near uniform. Each batch reads 256 tokens of random keys and
values and goes on by the steps that `generate` runs, queued one behind the other.

    python kernels/bench/gpu_decode.py --batches 1,16,64 --profile 1,64

With --json, stdout is a report that plot_throughput.py draws, with the roofline of each batch: what reading the weights
of the experts that equal chances let expect, all other weights, and live keys and values would take.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import glob
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_options import numbers
from gpu_table import READ, device

from ferrum_jax.cache import DTYPES, KVCache, init_cache
from ferrum_jax.cli.bench_roofline import decode_bytes
from ferrum_jax.config import ModelConfig
from ferrum_jax.config_file import load_toml_config
from ferrum_jax.errors import ConfigError
from ferrum_jax.model import prefill
from ferrum_jax.params import abstract
from ferrum_jax.sampling import SamplerPlan, SamplingParams, init_sampler
from ferrum_jax.steps import decode_steps, going
from ferrum_kernels.bits import centred
from ferrum_kernels.tiles import TiledLinear, is_weight, tile_all

CONFIGS = Path(__file__).parents[2] / "configs"


def random_tiles(cfg: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """The parameters of a configuration in tiles, made on the device layer by layer."""

    def values(key: jax.Array, shape: tuple[int, ...], dtype: Any, parent: TiledLinear | None, name: str) -> jax.Array:
        if dtype == jnp.uint16:
            words = jax.random.bits(key, shape, jnp.uint16)
            return words if parent is None else centred(words, parent.bits)
        if parent is not None:
            spread = 2**parent.bits * parent.k**0.5 * 0.3
            return jax.random.uniform(key, shape, minval=0.5 / spread, maxval=1.5 / spread).astype(dtype)
        if "norm" in name:
            return jnp.ones(shape, dtype)
        fan_in = 1.0 if "embed" in name or len(shape) == 1 else shape[-2] ** 0.5
        return (jax.random.normal(key, shape) / fan_in).astype(dtype)

    @partial(jax.jit, static_argnums=(1, 2, 3, 4))
    def make(key: jax.Array, shape: tuple[int, ...], dtype: Any, parent: Any, name: str) -> jax.Array:
        if len(shape) < 3:
            return values(key, shape, dtype, parent, name)

        def fill(i: jax.Array, stack: jax.Array) -> jax.Array:
            return stack.at[i].set(values(jax.random.fold_in(key, i), shape[1:], dtype, parent, name))

        return jax.lax.fori_loop(0, shape[0], fill, jnp.zeros(shape, dtype))

    keys = iter(jax.random.split(jax.random.key(seed), 1000))

    def leaf(path: tuple, node: Any) -> Any:
        name = jax.tree_util.keystr(path)
        if not is_weight(node):
            return make(next(keys), node.shape, node.dtype, None, name)
        plain = dataclasses.replace(node, words=None, scales=None)
        return jax.tree.map(lambda array: make(next(keys), array.shape, array.dtype, plain, name), node)

    return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(tile_all, abstract(cfg)), is_leaf=is_weight)


def cache_of(cfg: ModelConfig, batch: int, context: int, slots: int, dtype: str | None = None) -> KVCache:
    """A cache that holds `context` tokens of random keys and values per row, the same in every layer."""

    def filled(empty: jax.Array) -> jax.Array:
        key, shape = jax.random.key(1), empty.shape[1:]
        if empty.dtype == jnp.int32:  # words of codes
            return jnp.broadcast_to(jax.random.bits(key, shape, jnp.uint32).astype(jnp.int32), empty.shape)
        return jnp.broadcast_to(jax.random.normal(key, shape).astype(empty.dtype), empty.shape)

    @jax.jit
    def make() -> KVCache:
        empty = init_cache(cfg, batch, slots, dtype)
        full = dataclasses.replace(empty, k=filled(empty.k), v=filled(empty.v))
        if empty.k_scale is not None:
            scale = jnp.full(empty.k_scale.shape, 1 / 64, jnp.float32)
            full = dataclasses.replace(full, k_scale=scale, v_scale=scale)
        return dataclasses.replace(full, lengths=jnp.full(batch, context, jnp.int32))

    return make()


@dataclasses.dataclass
class Queue:
    """Decode steps queued one behind the other."""

    compiled: Any
    params: Any
    count: int
    rows: Any
    cache: Any
    state: Any

    def run(self, dispatches: int) -> None:
        """Dispatch and wait for all."""
        keep = np.ones(self.rows.token.shape, np.int32)
        for _ in range(dispatches):
            _, self.rows, self.cache, self.state = self.compiled(
                params=self.params, going=self.rows, keep=keep, cache=self.cache, state=self.state
            )
        jax.block_until_ready(self.rows)

    def milliseconds(self, steps: int) -> float:
        """Median of a step over five runs of so many steps."""
        self.run(1)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            self.run(max(1, steps // self.count))
            times.append((time.perf_counter() - began) / max(1, steps // self.count) / self.count * 1e3)
        return statistics.median(times)


def kernels(run: Callable[[], None], steps: int) -> list[tuple[str, float, float]]:
    """(kernel, launches of a step, microseconds of a step) of a run of so many steps; the span and the sum first."""
    folder = tempfile.mkdtemp()
    with jax.profiler.trace(folder):
        run()
    [file] = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
    times: dict[str, list[float]] = collections.defaultdict(list)
    ends = []
    for plane in jax.profiler.ProfileData.from_file(file).planes:
        if "GPU" not in plane.name:
            continue
        for line in plane.lines:
            if "Stream" in line.name:
                for event in line.events:
                    times[re.sub(r"__\d+$", "", event.name)].append(event.duration_ns / 1e3)
                    ends.append((event.start_ns, event.start_ns + event.duration_ns))
    if not ends:
        return []
    span = (max(end for _, end in ends) - min(start for start, _ in ends)) / 1e3
    rows = [(name, len(v) / steps, sum(v) / steps) for name, v in times.items()]
    rows.sort(key=lambda row: -row[2])
    return [
        ("span", 0, span / steps),
        ("all kernels", sum(row[1] for row in rows), sum(row[2] for row in rows)),
        *rows,
    ]


def report_row(
    cfg: ModelConfig, params: Any, batch: int, context: int, live: float, milliseconds: float, dtype: str | None = None
) -> dict:
    """A line as that of `ferrum-jax bench`.

    Args:
      cfg: the model.
      params: concrete or abstract.
      batch: rows.
      context: tokens of a row at the first step.
      live: the same, a mean of the steps that were timed.
      milliseconds: of a step.
      dtype: of the cache.
    """
    read = decode_bytes(cfg, params, batch, live, cache_dtype=dtype)
    rate = READ.get(device())
    return {
        "batch": batch,
        "context": context,
        "fits": True,
        "tokens_per_second": batch / milliseconds * 1e3,
        "weight_bytes": read["weights"],
        "live_cache_bytes": read["cache"],
        "roofline_tokens_per_second": rate and batch * rate / sum(read.values()),
    }


def report(cfg: ModelConfig, config: Path, rows: list[dict], temperature: float) -> dict[str, Any]:
    """Lines and what they were measured on."""
    return {
        "model": config.stem,
        "layers": cfg.num_layers,
        "device": {"kind": jax.devices()[0].device_kind},
        "versions": {"jax": jax.__version__},
        "date": datetime.date.today().isoformat(),
        "temperature": temperature,
        "decode": rows,
    }


def print_kernels(found: list[tuple[str, float, float]], layers: int, file: Any = None) -> None:
    """A line for each of `kernels`, in shares of a layer."""
    for name, launches, microseconds in found:
        share = f"{launches / layers:6.2f} a layer {microseconds / layers:8.2f} us a layer"
        print(f"    {name[:60]:60} {share}", file=file)


def main() -> None:
    """Parse, compile every batch at once, measure one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIGS / "qwen3-30b-a3b.toml")
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--batches", type=numbers, default="1,4,16,64,256")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--slots", type=int, default=512)
    parser.add_argument("--cache-dtype", choices=DTYPES, default=None)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--profile", type=numbers, default="", help="batches whose kernels are listed")
    parser.add_argument("--rows", type=int, default=30, help="of a list of kernels")
    parser.add_argument("--lm-head-bits", type=int, default=None)
    parser.add_argument("--dispatch", type=numbers, default="1,8", help="steps of a dispatch")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--option", action="append", default=[], help="of the compiler, NAME=VALUE")
    parser.add_argument("--json", action="store_true", help="a report on stdout, and the text on stderr")
    args = parser.parse_args()
    cfg = sizes_of(parser, args.config)
    layers = args.layers or cfg.num_layers
    cfg = dataclasses.replace(cfg, num_layers=layers, moe_layers=(), sliding_windows=(), lm_head_bits=args.lm_head_bits)
    began = time.perf_counter()
    params = jax.block_until_ready(random_tiles(cfg))
    talk, rows = sys.stderr if args.json else sys.stdout, []
    seconds = time.perf_counter() - began
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; weights in {seconds:.1f} s", file=talk)
    options = dict(option.split("=", 1) for option in args.option)
    requests = SamplingParams(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=1)
    plan = SamplerPlan.of([requests])
    cases = [(batch, count) for batch in args.batches for count in args.dispatch]

    def inputs(batch: int, cache: Any) -> dict[str, Any]:
        token = jnp.arange(batch, dtype=jnp.int32) * 7 + 11
        rows = going(token, np.ones(batch), np.full(batch, 2**30), [()] * batch)
        state = init_sampler([requests] * batch, cfg.vocab_size, plan=plan)
        return {"going": jax.tree.map(jnp.asarray, rows), "cache": cache, "state": state}

    def compiled_for(case: tuple[int, int]) -> tuple[float, Any]:
        batch, count = case
        given = inputs(batch, jax.eval_shape(lambda: init_cache(cfg, batch, args.slots, args.cache_dtype)))
        function = partial(decode_steps, partial(prefill, cfg=cfg), plan, count)
        step = jax.jit(function, donate_argnames=("cache", "state"))
        began = time.perf_counter()
        lowered = step.lower(params=params, keep=jax.ShapeDtypeStruct((batch,), jnp.int32), **given)
        compiled = lowered.compile(compiler_options=options or None)
        return time.perf_counter() - began, compiled

    with ThreadPoolExecutor(8) as pool:
        programs = dict(zip(cases, pool.map(compiled_for, cases), strict=True))
    for (batch, count), (seconds, compiled) in programs.items():
        given = inputs(batch, cache_of(cfg, batch, args.context, args.slots, args.cache_dtype))
        queue = Queue(compiled, params, count, given["going"], given["cache"], given["state"])
        steps = min(args.steps, (args.slots - args.context) // 6 - 2 * count)
        milliseconds = queue.milliseconds(steps)
        # One dispatch comes before five runs that are timed.
        live = args.context + count + 2.5 * max(1, steps // count) * count
        rows.append(report_row(cfg, params, batch, args.context, live, milliseconds, args.cache_dtype))
        print(
            f"batch {batch:4}, {count} steps a dispatch: {milliseconds:7.3f} ms a step, "
            f"{batch / milliseconds * 1e3:8.0f} tok/s (compiled in {seconds:.1f} s)",
            file=talk,
            flush=True,
        )
        if batch in args.profile and count == args.dispatch[0]:
            print_kernels(kernels(partial(queue.run, 2), 2 * count)[: args.rows], layers, talk)
        del queue, given
    if args.json:
        print(json.dumps(report(cfg, args.config, rows, args.temperature)))


def sizes_of(parser: argparse.ArgumentParser, path: Path) -> ModelConfig:
    """The configuration of a TOML file; ends the program with a sentence where it cannot be read."""
    try:
        return load_toml_config(path)
    except ConfigError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
