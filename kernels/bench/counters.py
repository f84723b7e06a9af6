"""What bounds each kernel of an expert layer, from NVIDIA's Nsight Compute: python kernels/bench/counters.py --help.

Runs itself under ncu, one layer for each number of tokens, with the caches emptied before every kernel as other layers
would do, and prints a row per kernel: time, memory read and its share of the peak, how busy the matrix units are,
occupancy, registers, and the three reasons for which warps wait most. Clocks are left as they are.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_options import numbers

ROOT = Path(__file__).parents[2]
STALLS = "smsp__average_warps_issue_stalled_"
METRICS = {
    "microseconds": "gpu__time_duration.sum",
    "dram_bytes": "dram__bytes_read.sum",
    "dram_bytes_written": "dram__bytes_write.sum",
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "tensor_percent": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "issue_percent": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
    "blocks": "launch__grid_size",
    "threads": "launch__block_size",
    "shared_bytes": "launch__shared_mem_per_block",
    "waves": "launch__waves_per_multiprocessor",
}
# ncu gives values with their units; these are the ones that it may choose, in ours.
UNITS = {
    **{"nsecond": 1e-3, "ns": 1e-3, "usecond": 1.0, "us": 1.0, "msecond": 1e3, "ms": 1e3},
    **{"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "byte/block": 1.0, "Kbyte/block": 1e3},
}


def command(ncu: str, tokens: int, config: Path, routing: str, implementation: str | None) -> list[str]:
    """ncu with this script as the program that it watches."""
    metrics = ",".join([*METRICS.values(), f"regex:{STALLS}.*_per_issue_active.ratio"])
    watch = [
        ncu,
        "--csv",
        "--page",
        "raw",
        "--metrics",
        metrics,
        "--clock-control",
        "none",
        "--profile-from-start",
        "off",
    ]
    child = [sys.executable, __file__, "--child", "--tokens", str(tokens), "--config", str(config)]
    named = ["--implementation", implementation] if implementation else []
    return [*watch, *child, "--routing", routing, *named]


def parse(text: str) -> list[dict[str, Any]]:
    """Rows of ncu's raw CSV, in our names and units; its own messages before the header are passed over.

    Raises:
      ValueError: there is no table in the text.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError("ncu printed no table")
    header, units, *rows = csv.reader(io.StringIO("\n".join(lines[start:])))
    found = []
    for cells in rows:
        if len(cells) != len(header):
            continue
        raw = dict(zip(header, zip(cells, units, strict=True), strict=True))
        row: dict[str, Any] = {"kernel": raw["Kernel Name"][0].split("(")[0]}
        for name, metric in METRICS.items():
            row[name] = _number(*raw[metric]) if metric in raw else None
        if row["dram_bytes"] is not None and row["microseconds"]:
            row["terabytes_per_second"] = row["dram_bytes"] / row["microseconds"] / 1e6
        stalls = {}
        for metric, cell in raw.items():
            if STALLS in metric:
                reason = metric.split(STALLS)[1].removesuffix("_per_issue_active.ratio")
                stalls[reason] = _number(*cell) or 0.0
        total = sum(stalls.values())
        order = sorted(stalls, key=lambda reason: -stalls[reason])
        row["stalls"] = {reason: round(stalls[reason] / total, 3) for reason in order if stalls[reason] > 0}
        found.append(row)
    return found


def _number(text: str, unit: str) -> float | None:
    try:
        return float(text.replace(",", "")) * UNITS.get(unit, 1.0)
    except ValueError:
        return None


# Title, field and format of a column.
COLUMNS = [
    ("us", "microseconds", "8.1f"),
    ("TB/s", "terabytes_per_second", "6.2f"),
    ("dram %", "dram_percent", "7.0f"),
    ("tensor %", "tensor_percent", "9.0f"),
    ("issue %", "issue_percent", "8.0f"),
    ("warps %", "occupancy_percent", "8.0f"),
    ("regs", "registers", "5.0f"),
    ("shared", "shared_bytes", "8.0f"),
    ("blocks", "blocks", "7.0f"),
    ("waves", "waves", "6.1f"),
]


def header() -> str:
    """The titles of the columns."""
    titles = (title.rjust(int(how.split(".")[0])) for title, _, how in COLUMNS)
    return "kernel".ljust(16) + "".join(titles) + "  waits for"


def line(row: dict[str, Any]) -> str:
    """A kernel as text."""
    cells = (
        "-".rjust(int(how.split(".")[0])) if row.get(field) is None else format(row[field], how)
        for _, field, how in COLUMNS
    )
    stalls = ", ".join(f"{reason} {share:.0%}" for reason, share in list(row["stalls"].items())[:3])
    return f"{row['kernel'][:16]:16}{''.join(cells)}  {stalls}"


def one_layer(tokens: int, config: Path, routing: str, implementation: str | None) -> None:
    """The program that ncu watches: a layer is run twice, the second time between the marks that start and end it."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from gpu_table import backend, random_stack, route_logits

    from ferrum_jax.config_file import load_toml_config

    cfg = load_toml_config(config)
    d, f, e = cfg.hidden_size, cfg.moe_intermediate_size or cfg.intermediate_size, cfg.num_experts
    stacks = random_stack(1, (1, e), d, 2 * f, 128), random_stack(2, (1, e), f, d, 128)
    rng = np.random.default_rng(tokens)
    logits = jnp.asarray(route_logits(rng, tokens, e, routing))
    x = jnp.asarray(rng.standard_normal((tokens, d)), jnp.bfloat16)

    @jax.jit
    def run(x: jax.Array, logits: jax.Array, stacks: Any, arrived: jax.Array) -> jax.Array:
        return backend(implementation).routed_experts(x, logits, None, cfg.top_k, True, *stacks, 0, arrived)[0]

    arrived = jnp.zeros(1, jnp.int32)
    jax.block_until_ready(run(x, logits, stacks, arrived))
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuProfilerStart()
    jax.block_until_ready(run(x, logits, stacks, arrived))
    driver.cuProfilerStop()


def main(arguments: Sequence[str] | None = None) -> int:
    """Watch, parse, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "qwen3-30b-a3b.toml")
    parser.add_argument(
        "--tokens", type=numbers, default="1,8,64,1024,4096", help="numbers of tokens, separated by commas"
    )
    parser.add_argument("--routing", default="uniform", choices=("uniform", "zipf", "one"))
    parser.add_argument("--implementation", default=None, help="triton or mosaic; without it the device's best")
    parser.add_argument("--ncu", default="ncu", help="the program")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        one_layer(options.tokens[0], options.config, options.routing, options.implementation)
        return 0
    if shutil.which(options.ncu) is None:
        print(f"error: {options.ncu} is not on the path; it comes with CUDA as Nsight Compute.", file=sys.stderr)
        return 3
    # Kernels of a CUDA graph are watched one by one only where there is no graph.
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer=",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    found = []
    for count in options.tokens:
        watched = command(options.ncu, count, options.config, options.routing, options.implementation)
        ended = subprocess.run(watched, env=environment, capture_output=True, text=True)
        try:
            rows = parse(ended.stdout)
        except ValueError as error:
            said = (ended.stdout + ended.stderr)[-1500:]
            print(f"error: {count} tokens: {error}; it ended with {ended.returncode}:\n{said}", file=sys.stderr)
            return 1
        found.append({"tokens": count, "kernels": rows})
        if not options.json:
            print(f"{count} tokens", header(), *map(line, rows), sep="\n", flush=True)
    if options.json:
        print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
