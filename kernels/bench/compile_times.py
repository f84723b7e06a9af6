"""How long the programs of a decode step take to compile: first, from JAX's compile cache, and kept whole.

    python kernels/bench/moe_layer.py --compile-times

Three processes, one after the other, compile `decode_step` of the whole model for each batch; they share a cache folder
that is empty at first. The second traces and lowers and finds what is compiled, the third reads programs that the first
has kept whole (`ferrum_jax.keep_programs`). None has weights: programs are compiled for shapes. They compile together,
as those of `Engine.warm_up`: a batch's time is from its beginning to a program that is ready, and all of them take less
than the sum. Imports are left out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BATCHES = (1, 2, 4, 8, 16, 32, 64)
CACHE_LENGTH = 512
ROOT = Path(__file__).parents[2]


def measure(config: Path, batches: list[int], implementation: str | None) -> dict[str, Any]:
    """Seconds of each batch: with an empty cache, in a process after that, and in one that reads whole programs."""
    with tempfile.TemporaryDirectory(prefix="ferrum-jax-compile-") as folder:
        paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": folder,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": os.pathsep.join(paths),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        command = [sys.executable, __file__, str(config), ",".join(map(str, batches)), implementation or ""]
        found = []
        for keeps in (True, False, True):
            ended = subprocess.run([*command, str(int(keeps))], env=environment, capture_output=True, text=True)
            if ended.returncode:
                raise SystemExit(f"error: the process that compiles failed:\n{ended.stderr[-2000:]}")
            found.append(json.loads(ended.stdout.splitlines()[-1]))
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    (first, first_all, _), (cached, cached_all, _), (kept, kept_all, is_kept) = found
    return {
        "batches": batches,
        "first_seconds": first,
        "cached_seconds": cached,
        "kept_seconds": kept if is_kept else None,  # elsewhere than on a GPU no program is
        "first_all": first_all,
        "cached_all": cached_all,
        "kept_all": kept_all if is_kept else None,
        "cache_bytes": size,
    }


def text_of(found: dict[str, Any]) -> str:
    """A measurement for people."""
    whole = found["kept_seconds"] or [None] * len(found["batches"])
    rows = [*zip(found["batches"], found["first_seconds"], found["cached_seconds"], whole, strict=True)]
    rows.append(("all", found["first_all"], found["cached_all"], found["kept_all"]))
    lines = [
        f"{batch!s:5} {first:10.2f} {cached:18.2f} {'-' if kept is None else f'{kept:.2f}':>15}"
        for batch, first, cached, kept in rows
    ]
    return "\n".join(["batch   first, s   from the cache, s   kept whole, s", *lines])


def compile_all(
    config: Path, batches: list[int], implementation: str | None, keeps: bool = False
) -> tuple[list[float], float]:
    """Seconds that each batch's decode step takes to be ready, and that all of them take together."""
    import contextlib
    import dataclasses
    import functools

    import jax
    import jax.numpy as jnp

    import ferrum_jax as fj
    from ferrum_jax.buckets import BucketedStep, compile_together
    from ferrum_jax.config_file import load_toml_config
    from ferrum_jax.params import layout_for

    cfg = dataclasses.replace(load_toml_config(config), implementation=implementation)
    params = jax.eval_shape(layout_for(cfg), fj.abstract(cfg))
    caches = [jax.eval_shape(lambda batch=batch: fj.init_cache(cfg, batch, CACHE_LENGTH)) for batch in batches]
    jax.block_until_ready(jnp.zeros(1) + 1)  # the device is up, and so is its compiler
    fj.keep_programs(keeps)
    with contextlib.suppress(ImportError):
        from jax.experimental.pallas import triton  # noqa: F401  imports are not part of it, and this is one more
    decode_step = fj.decode_step  # imports the model
    function = functools.partial(decode_step, cfg=cfg)
    step = BucketedStep("decode", function, ("cache",), ("compile_times", cfg))

    def trace(batch: int, cache: Any) -> Any:
        return step.trace(batch, params=params, token=jax.ShapeDtypeStruct((batch,), jnp.int32), cache=cache)

    began = time.perf_counter()
    compile_together(map(trace, batches, caches))
    seconds = time.perf_counter() - began
    of = {record.bucket: record.seconds for record in step.records}
    return [of[batch] for batch in batches], seconds


if __name__ == "__main__":
    path, batches, name, keeps = sys.argv[1:]
    counts = [int(batch) for batch in batches.split(",")]
    seconds, whole = compile_all(Path(path), counts, name or None, keeps == "1")

    import jax

    from ferrum_jax import kept

    print(json.dumps([seconds, whole, jax.default_backend() in kept.PLATFORMS]))
