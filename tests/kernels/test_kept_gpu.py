"""Programs kept whole on a GPU: a process that reads them traces nothing and says the same tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
# Two layers of Qwen3-30B-A3B: 16 rows decode by Mosaic kernels on Hopper, one by Triton's, prompts by both.
CODE = """
import dataclasses, json, sys
import ferrum_jax as fj
from ferrum_jax.buckets import BucketedStep
from ferrum_jax.config_file import load_toml_config
from ferrum_jax.generation import stream_batch
from ferrum_jax.steps import Ahead
from gpu_decode import CONFIGS, random_tiles
from textless import model_of

lower, lowered = BucketedStep._lower, []
BucketedStep._lower = lambda step, arguments: lowered.append(step.name) or lower(step, arguments)
Ahead.SECONDS = float("inf")  # else how many steps a dispatch is follows from how long they take
fj.keep_programs(sys.argv[1] == "keep")
cfg = load_toml_config(CONFIGS / "qwen3-30b-a3b.toml")
cfg = dataclasses.replace(cfg, num_layers=2, moe_layers=(), sliding_windows=())
model = model_of(cfg, random_tiles(cfg))
tokens = []
for rows in (1, 16):
    prompts = [[row + 1, 2, 3, 4, 5] for row in range(rows)]
    steps = stream_batch(model, prompts, None, max_tokens=12, ignore_eos=True)
    tokens.append(sorted((step.row, step.stats.generated_tokens, step.token) for step in steps))
engine = fj.Engine(model, slots=16, pages=32, page=16)
ids = [engine.submit(prompt, max_tokens=6, ignore_eos=True) for prompt in prompts]
while not engine.idle:
    tokens.append(sorted((id, step.token) for id, step in engine.step()))
print(json.dumps({"lowered": lowered, "tokens": tokens}))
"""


def run(cache: Path, how: str) -> dict[str, Any]:
    folders = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "kernels" / "bench"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, folders)),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    ended = subprocess.run([sys.executable, "-c", CODE, how], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "is no program that can be used" not in ended.stderr and "was not written" not in ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("first", ["keep", "trace"])
def test_a_process_that_reads_programs_says_what_the_one_said_that_compiled_them(first: str, tmp_path: Path) -> None:
    """Also where what is kept comes out of JAX's own cache, which a process before has filled."""
    compiled = run(tmp_path, first)
    if first == "trace":
        assert run(tmp_path, "keep") == compiled
    read = run(tmp_path, "keep")
    assert read["lowered"] == [] and read["tokens"] == compiled["tokens"]
    assert len(set(compiled["lowered"])) >= 5
