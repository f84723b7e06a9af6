"""Seconds from a process that begins to the first token, by phase: python kernels/bench/cold_start.py MODEL.

Each start is a process of its own: the first with empty caches in a temporary folder, the second with what the first
has left there, the third from the checkpoint with compiled programs kept and no weights kept, the fourth from kept
weights and JAX's compile cache alone, so that it traces every program.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CHILD = """
import json, resource, sys, time
began = time.time()
import jax
import ferrum_jax as fj
from ferrum_jax.generation import steps_for
imported = time.time()
device = jax.devices()[0]
jax.block_until_ready(jax.device_put(1.0))
started = time.time()
def most():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
before = most()
options = json.loads(sys.argv[2])
fj.keep_programs(options.pop("keep_programs", True))
model = fj.load(sys.argv[1], **options)
jax.block_until_ready(model.params)
loaded = time.time()
stats = lambda key: (device.memory_stats() or {}).get(key)
peak = stats("peak_bytes_in_use")
rss = most()
step = next(fj.stream_generate(model, [11] * 128, max_tokens=2, ignore_eos=True))
done = time.time()
print(json.dumps({
    "from_cache": model.report.from_cache,
    "import": imported - began,
    "device": started - imported,
    "check": model.report.check_seconds,
    "read": loaded - started - model.report.check_seconds,
    "compile": step.stats.compile_seconds,
    "first_token": done - loaded - step.stats.compile_seconds,
    "total": done - began,
    "host_peak_bytes": rss,
    "host_before_bytes": before,
    "device_peak_bytes": peak,
    "parameter_bytes": model.report.bytes_held,
    "device_kind": device.device_kind,
    "jax": jax.__version__,
}))
"""
PHASES = ("import", "device", "check", "read", "compile", "first_token", "total")


def start(model: str, caches: Path, **options: object) -> dict:
    """One process; returns what it printed."""
    environ = os.environ | {
        "FERRUM_JAX_WEIGHT_CACHE": str(caches / "weights"),
        "FERRUM_JAX_COMPILE_CACHE": str(caches / "xla"),
    }
    command = [sys.executable, "-c", CHILD, model, json.dumps(options)]
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"error: a process that starts {model} failed; what it said is above.")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Start four times, print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--caches", type=Path, help="keep the caches in this folder; without it they are temporary")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        caches = options.caches or Path(temporary)
        rows = {
            "first": start(options.model, caches, weight_cache=True),
            "second": start(options.model, caches, weight_cache=True),
            "second, weights not kept": start(options.model, caches, weight_cache=False),
            "second, programs traced": start(options.model, caches, weight_cache=True, keep_programs=False),
        }
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print(
        f"{'start':26}" + "".join(f"{name:>12}" for name in PHASES) + f"{'host GiB':>10}{'before':>8}{'device GiB':>12}"
    )
    for name, row in rows.items():
        peaks = [(row[key] or 0) / 2**30 for key in ("host_peak_bytes", "host_before_bytes", "device_peak_bytes")]
        seconds = "".join(f"{row[phase]:12.2f}" for phase in PHASES)
        print(f"{name:26}{seconds}{peaks[0]:10.2f}{peaks[1]:8.2f}{peaks[2]:12.2f}")
    print(f"parameters {row['parameter_bytes'] / 2**30:.2f} GiB, {row['device_kind']}, jax {row['jax']}")


if __name__ == "__main__":
    main()
