"""`ferrum-jax doctor`: whether this environment can run a model, and what stands in the way."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from ferrum_jax import __version__
from ferrum_jax.cli.options import NO_DEFAULT, Common
from ferrum_jax.cli.output import Status, emit, size
from ferrum_jax.environment import (
    WEIGHT_CACHE,
    check_platform,
    compile_cache_folder,
    free_host_memory,
    installed,
    switched_off,
    weight_cache_folder,
)
from ferrum_jax.errors import BackendError
from ferrum_kernels import cpu_library

NEEDED = ("jax", "jaxlib", "flax", "chex", "numpy", "ml_dtypes", "safetensors", "tokenizers")
NEEDED += ("huggingface-hub", "jinja2", "jaxtyping", "tyro", "rich")
PLUGINS = ("jax-metal", "jax-mps", "jax-cuda12-plugin", "jax-cuda13-plugin")
LOWEST, ABOVE = "0.5.0", "0.13"
YNNPACK_SWITCH = "--xla_cpu_experimental_ynn_fusion_type="
VARIABLES = (
    "JAX_PLATFORMS",
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_ENABLE_X64",
    "JAX_DISABLE_JIT",
    "XLA_FLAGS",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "CUDA_VISIBLE_DEVICES",
    "LD_LIBRARY_PATH",
    "FERRUM_JAX_COMPILE_CACHE",
    "FERRUM_JAX_CPU_ISA",
    "FERRUM_JAX_DEBUG",
    "FERRUM_JAX_THREADS",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HF_ENDPOINT",
    "HF_TOKEN",
    "XDG_CACHE_HOME",
    "NO_COLOR",
)
# Run in a process of its own: a broken plugin can hang or crash the process that asks it for devices.
PROBE = """
import json, jax
def memory(device):
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except Exception:
        return None
devices = [{"platform": d.platform, "kind": d.device_kind, "memory_bytes": memory(d)} for d in jax.devices()]
assert float(jax.jit(lambda x: x + 1)(1.0)) == 2.0, "the device adds wrongly"
from ferrum_kernels import default_implementation
try:
    implementation, problem = default_implementation(), None
except Exception as error:
    implementation, problem = None, str(error)
left_out = None
if implementation == "triton" and getattr(jax.devices()[0], "compute_capability", None) == "9.0":
    from ferrum_kernels import mosaic
    left_out = mosaic.unavailable()
print(json.dumps(dict(devices=devices, implementation=implementation, problem=problem, left_out=left_out)))
"""


@dataclass(frozen=True, kw_only=True)
class Doctor(Common):
    """Check versions, devices, compilers, caches and known bad pairs.

    Ends with exit code 3 when a model cannot run here.

    Args:
      timeout: seconds to wait for the devices to come up.
      json: print a JSON object.
    """

    timeout: Annotated[float, arg(metavar="SECONDS")] = 60.0
    json: Annotated[bool, arg(help_behavior_hint=NO_DEFAULT)] = False

    def execute(self) -> int:
        """Examine; returns the exit code."""
        with Status("asking JAX for its devices", self.quiet):
            report = examine(self.timeout)
        if self.json:
            emit(report)
        else:
            print("\n".join(_lines(report)))
        return 3 if report["problems"] else 0


@dataclass(frozen=True, slots=True)
class Devices:
    """What JAX said about its devices.

    Attributes:
      devices: platform, kind and memory_bytes of each.
      implementation: of the packed matmuls, None when there is none for the device.
      problem: why there are no devices, or no implementation.
      seconds: what it took to ask.
      left_out: why a Hopper GPU is left to the slower of its two backends, or None.
    """

    devices: tuple[dict[str, Any], ...]
    implementation: str | None
    problem: str | None
    seconds: float
    left_out: str | None = None


def examine(timeout: float) -> dict[str, Any]:
    """Everything about this environment.

    Args:
      timeout: seconds to wait for the devices.

    Returns:
      The report that --json prints.
    """
    packages = {name: installed(name) for name in (*NEEDED, *PLUGINS)}
    devices = probe(timeout)
    cpu = cpu_kernels()
    problems = list(find_problems(packages, devices, sys.version_info[:2]))
    warnings = list(find_warnings({**packages, "pallas": installed("pallas")}, devices, os.environ, cpu["problem"]))
    return {
        "verdict": "this environment cannot run a model" if problems else "ready",
        "problems": problems,
        "warnings": warnings,
        "python": {"version": platform.python_version(), "executable": sys.executable, "platform": platform.platform()},
        "packages": {"ferrum-jax": __version__, **packages},
        "devices": asdict(devices),
        "cpu_kernels": cpu,
        "cpu_cores": os.cpu_count(),
        "compiler": compiler(),
        "caches": {
            "huggingface": cache(_huggingface_cache()),
            "compile": cache(_compile_cache()),
            "weights": cache(None if switched_off(WEIGHT_CACHE) else weight_cache_folder()),
        },
        "memory": {"total_bytes": _total_memory(), "available_bytes": free_host_memory()},
        "environment": {name: shown(name, os.environ[name]) for name in VARIABLES if name in os.environ},
    }


def probe(timeout: float, code: str = PROBE) -> Devices:
    """Ask JAX for its devices in another process.

    Args:
      timeout: seconds after which that process is ended.
      code: what it runs.

    Returns:
      Devices; a process that fails, crashes or hangs is a `problem`.
    """
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    began = time.monotonic()

    def failed(problem: str) -> Devices:
        return Devices((), None, problem, time.monotonic() - began)

    try:
        # -P keeps the working folder off the path, where its file names could shadow packages.
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return failed(f"JAX did not bring up its devices within {timeout:g} s; its plugin hangs.")
    except OSError as error:
        return failed(f"a second Python process did not start ({error}).")
    if done.returncode < 0:
        return failed(f"JAX crashed with signal {-done.returncode} while it brought up its devices.")
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return failed(f"JAX does not start: {said[-1].strip() if said else 'it gave no reason'}")
    answer = json.loads(done.stdout.splitlines()[-1])
    seconds = time.monotonic() - began
    return Devices(tuple(answer["devices"]), answer["implementation"], answer["problem"], seconds, answer["left_out"])


def find_problems(packages: Mapping[str, str | None], devices: Devices, python: tuple[int, int]) -> Iterator[str]:
    """What keeps a model from running, as sentences.

    Args:
      packages: distribution -> installed version or None.
      devices: from probe.
      python: major and minor version.
    """
    if python < (3, 11):
        yield f"Python {python[0]}.{python[1]} is too old; install 3.11 or newer."
    if missing := [name for name in NEEDED if packages[name] is None]:
        yield f"{', '.join(missing)} not installed; run  pip install ferrum-jax  in this environment."
    jax = packages["jax"]
    if jax is not None and not version(LOWEST) <= version(jax) < version(ABOVE):
        yield f'jax {jax} is outside the supported range; run  pip install "jax>={LOWEST},<{ABOVE}".'
    try:
        check_platform()
    except BackendError as error:
        yield str(error)
    if not devices.devices:
        yield f"{devices.problem} JAX_PLATFORMS=cpu leaves plugins out."


def find_warnings(
    packages: Mapping[str, str | None], devices: Devices, environment: Mapping[str, str], cpu_problem: str | None
) -> Iterator[str]:
    """What may slow a model down or break it, as sentences.

    Args:
      packages: distribution -> installed version or None.
      devices: from probe.
      environment: environment variables.
      cpu_problem: why the CPU kernels cannot be used, or None.
    """
    if cpu_problem and any(device["platform"] == "cpu" for device in devices.devices):
        yield f"{cpu_problem} Models run through XLA instead, which is slower."
    jaxlib = packages["jaxlib"]
    if jaxlib in ("0.10.2", "0.11.0") and YNNPACK_SWITCH not in environment.get("XLA_FLAGS", ""):
        yield (
            f"jaxlib {jaxlib} has known faults in XLA's YNNPACK fusions on CPU (wrong results, crashes: jax#39103, "
            f"jax#39257, jax#40412). If numbers look wrong, switch them off with  XLA_FLAGS={YNNPACK_SWITCH}"
        )
    if devices.devices and devices.implementation is None:
        yield str(devices.problem)
    if devices.left_out:
        yield f"The faster kernels of this Hopper GPU are left out: {devices.left_out}."
    if packages["jax-metal"] is not None:
        yield 'jax-metal is unmaintained; on Apple silicon prefer jax-mps:  pip install "ferrum-jax[mps]"'
    cuda = [name for name in ("jax-cuda12-plugin", "jax-cuda13-plugin") if packages[name] is not None]
    if len(cuda) > 1:
        yield f"{' and '.join(cuda)} are both installed, and one hides the other; uninstall one."
    for name in cuda:
        if packages[name] != jaxlib:
            yield f"{name} is {packages[name]} and jaxlib is {jaxlib}; JAX ignores a plugin of another version."
    if packages["pallas"] is not None:
        yield "the package pallas is no part of JAX (jax.experimental.pallas is); uninstall it if you meant that one."
    if environment.get("JAX_DISABLE_JIT", "").lower() in ("1", "true"):
        yield "JAX_DISABLE_JIT is set: every step runs operation by operation, and very slowly."


def version(text: str) -> tuple[int, ...]:
    """The numbers that a version begins with.

    >>> version("0.12.0.1rc2") < version("0.13")
    True
    """
    numbers = re.match(r"[\d.]*", text)
    return tuple(int(number) for number in re.findall(r"\d+", numbers[0] if numbers else ""))


def cpu_kernels() -> dict[str, Any]:
    """The CPU kernels here: isa, isas (best last) and threads, or all of them None and problem a sentence."""
    try:
        return {**asdict(cpu_library.describe()), "problem": None}
    except BackendError as error:
        return {"isa": None, "isas": None, "threads": None, "problem": str(error)}


def compiler() -> str | None:
    """The C++ compiler on the path, with which an installation builds the CPU kernels."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            try:
                done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10)
            except (OSError, subprocess.TimeoutExpired):
                return path
            return f"{path} ({done.stdout.splitlines()[0]})" if done.stdout else path
    return None


def cache(folder: Path | None) -> dict[str, Any]:
    """A cache folder: where it is, its size, and whether it can be written; path None when it is off."""
    if folder is None:
        return {"path": None, "exists": False, "bytes": 0, "writable": False}
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except OSError:  # another process may clean up meanwhile
                continue
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    return {"path": str(folder), "exists": folder.exists(), "bytes": total, "writable": os.access(nearest, os.W_OK)}


def shown(name: str, value: str) -> str:
    """A variable's value without secrets.

    >>> shown("HF_TOKEN", "hf_x"), shown("HF_ENDPOINT", "https://me:pw@hub.example")
    ('(set)', 'https://...@hub.example')
    """
    return "(set)" if "TOKEN" in name else re.sub(r"//[^/@\s]*@", "//...@", value)


def _huggingface_cache() -> Path | None:
    try:
        from huggingface_hub import constants
    except ImportError:
        return None
    return Path(constants.HF_HUB_CACHE)


def _compile_cache() -> Path | None:
    own = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    return Path(own) if own else compile_cache_folder()


def _total_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _lines(report: dict[str, Any]) -> Iterator[str]:
    python, devices, memory = report["python"], report["devices"], report["memory"]
    yield f"python      {python['version']}  {python['executable']}  {python['platform']}"
    versions = [f"{name} {found}" for name, found in report["packages"].items() if found]
    yield f"packages    {versions[0]}"
    for at in range(1, len(versions), 5):
        yield f"            {', '.join(versions[at : at + 5])}"
    for device in devices["devices"]:
        held = f", {size(device['memory_bytes'])}" if device["memory_bytes"] else ""
        yield f"device      {device['platform']}: {device['kind']}{held}"
    yield f"kernels     {devices['implementation'] or 'none for this device'}"
    cpu = report["cpu_kernels"]
    yield "cpu kernels " + (
        f"{cpu['isa']} (this machine has {', '.join(cpu['isas'])}), {cpu['threads']} threads"
        if cpu["isa"]
        else "none: the portable XLA path"
    )
    total, free = (size(memory[key]) if memory[key] else "unknown" for key in ("total_bytes", "available_bytes"))
    yield f"machine     {report['cpu_cores']} cores, {total} of memory, {free} free"
    yield f"c++         {report['compiler'] or 'none found'}"
    for name, found in report["caches"].items():
        state = "" if found["writable"] else ", not writable"
        where = f"{found['path']} ({size(found['bytes'])}{state})" if found["path"] else "off"
        yield f"cache       {name}: {where}"
    for name, value in report["environment"].items():
        yield f"variable    {name}={value}"
    for kind in ("warnings", "problems"):
        for sentence in report[kind]:
            yield f"{kind[:-1]:<11} {sentence}"
    yield f"verdict     {report['verdict']}"
