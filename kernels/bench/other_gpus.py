"""Whether the Triton kernels of a model compile for GPUs that are not here, and fit them.

    pip install triton
    python kernels/bench/other_gpus.py --capability 8.0,8.9,12.0

Decode steps, prompts and draws are lowered as on a GPU of that compute capability, with the Triton kernels alone, and
Triton's own compiler makes machine code of each kernel; that needs no GPU. XLA compiles with a Triton of its own, so
what runs may differ a little from what is counted here: shared memory of a program, registers of a thread and bytes of
its stack, where registers are spilled to. Nothing is said of speed. The exit code is 1 where a kernel does not compile
or asks for more shared memory than a program has there.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

import ferrum_jax as fj
from ferrum_jax.config import ModelConfig
from ferrum_jax.config_file import load_toml_config
from ferrum_jax.errors import ConfigError
from ferrum_jax.sampling_filters import draw_best
from ferrum_kernels import triton, triton_tiles
from ferrum_kernels.tiles import tile_all

# KiB of shared memory that a program may have, by compute capability: the CUDA programming guide's table of them.
SHARED = {"8.0": 163, "8.6": 99, "8.7": 163, "8.9": 99, "9.0": 227, "10.0": 227, "12.0": 99}
BATCHES, PROMPTS, LENGTHS, PAGE = (1, 4, 16, 64, 256), (16, 128, 1024, 4096), (512, 8192), 16
SPILLS = 64  # bytes of stack from which on it is said


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel as it is lowered: its name, Triton's IR of it, and how it is compiled."""

    name: str
    ir: str
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a compiled kernel needs: bytes of shared memory of a program, registers and stack bytes of a thread."""

    shared: int
    registers: int
    stack: int


def kernels_of(function: Callable[..., Any], *args: Any) -> list[Kernel]:
    """The Triton kernels of a function, lowered for CUDA for arrays or shapes; no kernel twice."""
    from jaxlib.mlir import ir
    from jaxlib.triton import dialect

    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        module = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).compiler_ir()
    found: dict[Kernel, None] = {}

    def visit(operation: Any) -> Any:
        if operation.name == "stablehlo.custom_call" and "triton" in str(operation.attributes["call_target_name"]):
            config = operation.attributes["mhlo.backend_config"]
            body = ir.Module.parse(config["ir"].value_bytes)
            numbers = (config[name].value for name in ("num_warps", "num_stages"))
            found[Kernel(config["name"].value, body.operation.get_asm(), *numbers)] = None
        return ir.WalkResult.ADVANCE

    with module.context as context:
        dialect.register_dialect(context)
        module.operation.walk(visit)
    return list(found)


def compiled(kernel: Kernel, capability: str) -> Needs:
    """Machine code for a compute capability, by Triton's compiler.

    Raises:
      Exception: Triton's, where it does not compile.
    """
    import triton as compiler
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend

    number = int(capability.replace(".", ""))
    target, how = GPUTarget("cuda", number, 32), {"num_warps": kernel.warps, "num_stages": kernel.stages}
    backend, context = CUDABackend(target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    with tempfile.TemporaryDirectory(prefix="ferrum-jax-triton-") as folder:
        file = Path(folder) / "kernel.ttir"
        file.write_text(kernel.ir)
        module = ir.parse_mlir_module(str(file), context)
        module.context = context
        file.write_text(str(backend.make_ttir(module, {}, backend.parse_options(how), number)))
        made = compiler.compile(str(file), target=target, options=how)
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(made.asm["cubin"])
        cuobjdump = Path(compiler.__file__).parent / "backends/nvidia/bin/cuobjdump"
        said = subprocess.run([cuobjdump, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.findall(rf"{name}:(\d+)", said)[0]) for name in ("REG", "STACK"))
    return Needs(made.metadata.shared, registers, stack)


def programs(cfg: ModelConfig) -> Iterator[tuple[str, Callable[..., Any], tuple]]:
    """Names, functions and shapes of what a model runs."""
    params = jax.eval_shape(tile_all, fj.abstract(cfg))
    integers = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731

    def decode(params: Any, token: Any, cache: Any) -> Any:
        return fj.decode_step(params, token, cache, cfg)

    def prefill(params: Any, tokens: Any, lengths: Any, cache: Any) -> Any:
        return fj.prefill(params, tokens, lengths, cache, cfg)

    def contiguous(batch: int, length: int, dtype: str) -> Any:
        return jax.eval_shape(lambda: fj.init_cache(cfg, batch, length, dtype))

    def paged(batch: int, length: int, dtype: str) -> Any:
        pages = batch * length // PAGE
        return jax.eval_shape(lambda: fj.init_paged_cache(cfg, batch, pages, PAGE, length=length, dtype=dtype))

    most = cfg.max_position
    lengths = sorted({min(length, most) for length in LENGTHS})
    for dtype in (cfg.dtype, "int8"):
        for length, batch in itertools.product(lengths, BATCHES):
            given = params, integers(batch), contiguous(batch, length, dtype)
            yield f"decode {batch} of {length} in {dtype}", decode, given
        given = params, integers(BATCHES[-1]), paged(BATCHES[-1], lengths[-1], dtype)
        yield f"decode {BATCHES[-1]} of {lengths[-1]} in pages in {dtype}", decode, given
        for tokens in (tokens for tokens in PROMPTS if tokens <= most):
            given = params, integers(1, tokens), integers(1), contiguous(1, min(2 * PROMPTS[-1], most), dtype)
            yield f"prompt of {tokens} in {dtype}", prefill, given
    for batch in (1, 64):
        keys = jax.eval_shape(lambda n=batch: jax.random.key_data(jax.random.split(jax.random.key(0), n)))
        floats = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((batch, cfg.vocab_size), (batch,), (batch,)))
        logits, p, temperature = floats

        def draw(*given: Any) -> Any:
            return draw_best(*given, implementation="triton")

        yield f"draw for {batch}", draw, (logits, integers(batch), p, keys, temperature)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile all of them and print what each kernel needs at most."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).parents[2] / "configs/qwen3-30b-a3b.toml")
    parser.add_argument("--capability", default="8.0,8.9", help=f"of {', '.join(SHARED)}, separated by commas")
    options = parser.parse_args(arguments)
    wanted = options.capability.split(",")
    if unknown := [one for one in wanted if one not in SHARED]:
        parser.error(f"compute capability {unknown[0]!r} is not known here; known are {', '.join(SHARED)}.")
    try:
        cfg = load_toml_config(options.config)
    except ConfigError as error:
        parser.error(str(error))
    if cfg.dtype not in ("bfloat16", "float16"):
        parser.error(f"{options.config} has dtype {cfg.dtype!r}; the kernels take 'bfloat16' and 'float16': set one.")
    if jax.__version_info__ < (0, 10, 2):
        print(f"error: the Triton kernels need jax 0.10.2 or later; this is {jax.__version__}.", file=sys.stderr)
        return 3
    try:
        import triton as compiler  # noqa: F401
    except ImportError:
        print('error: Triton is not installed: pip install "triton>=3.6"', file=sys.stderr)
        return 3
    cfg = dataclasses.replace(cfg, implementation="triton")
    bad = sum(report(cfg, capability) for capability in wanted)
    print(f"{bad or 'no'} kernel{'' if bad == 1 else 's'} that would not run")
    return int(bad > 0)


def report(cfg: ModelConfig, capability: str) -> int:
    """Print a line for each name of a kernel, and one for each that would not run or spills; how many would not run."""
    limit, seen, bad = SHARED[capability] * 1024, {}, 0
    for name, function, shapes in programs(cfg):
        with as_on_a_gpu(capability):
            kernels = kernels_of(function, *shapes)
        for kernel in kernels:
            if kernel in seen:
                continue
            try:
                seen[kernel] = needs = compiled(kernel, capability)
            except Exception as error:
                bad += 1
                print(f"{capability} {name}: {kernel.name} does not compile: {str(error)[-300:]}", flush=True)
                seen[kernel] = Needs(0, 0, 0)
                continue
            if needs.shared > limit:
                bad += 1
                print(f"{capability} {name}: {kernel.name} needs {needs.shared / 1024:.1f} KiB of {limit // 1024}")
            if needs.stack > SPILLS:
                print(f"{capability} {name}: {kernel.name} has {needs.stack} bytes of stack", flush=True)
    print(f"compute capability {capability}, at most: kernels, KiB of {limit // 1024}, registers, bytes of stack")
    for name in sorted({kernel.name for kernel in seen}):
        all_needs = [needs for kernel, needs in seen.items() if kernel.name == name]
        shared, registers, stack = map(max, zip(*map(dataclasses.astuple, all_needs), strict=True))
        print(f"{name:18} {len(all_needs):4} {shared / 1024:7.1f} {registers:5} {stack:6}", flush=True)
    return bad


@contextlib.contextmanager
def as_on_a_gpu(capability: str) -> Iterator[None]:
    """Within, kernels are lowered as on a GPU of that compute capability."""
    available = mock.patch.object(triton, "unavailable", lambda: None)
    with available, mock.patch.object(triton_tiles, "capability", lambda: capability):
        yield


if __name__ == "__main__":
    sys.exit(main())
