"""The shared library of CPU kernels, which the installation compiles: found, checked and loaded once per process."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ferrum_kernels.errors import BackendError

MOST_THREADS = 1024
ABI = 1  # the number in native/ffi.cc
PATH = Path(__file__).with_name("libferrum_cpu.dylib" if sys.platform == "darwin" else "libferrum_cpu.so")
COMPILER = "xcode-select --install" if sys.platform == "darwin" else "on Debian and Ubuntu: apt install g++"
# pip keeps the wheel that it built without a compiler, and would install that again.
REINSTALL = "pip install --force-reinstall --no-deps --no-cache-dir ferrum-jax  (in a checkout, a dot for the name)"


@dataclass(frozen=True, slots=True)
class CpuKernels:
    """What the CPU kernels are on this machine.

    Attributes:
      isa: the instruction set in use; FERRUM_JAX_CPU_ISA chooses another.
      isas: those that this machine and this build have, best last.
      threads: how many one operation may use; FERRUM_JAX_THREADS sets it.
    """

    isa: str
    isas: tuple[str, ...]
    threads: int


def library() -> ctypes.CDLL:
    """The library, whose C symbols are the kernels.

    Returns:
      The same handle at every call.

    Raises:
      BackendError: it cannot be used here, or an environment variable for it is wrong.
    """
    loaded = _load()
    if isinstance(loaded, str):
        raise BackendError(loaded)
    return loaded


def unavailable() -> str | None:
    """Why the CPU kernels cannot be used and what to do about it, or None when they can.

    Raises:
      BackendError: FERRUM_JAX_CPU_ISA or FERRUM_JAX_THREADS is wrong, which is no reason to do without the kernels.

    >>> unavailable() is None or unavailable().endswith(".")
    True
    """
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def describe() -> CpuKernels:
    """What the CPU kernels are on this machine.

    Returns:
      Instruction sets and threads, as the library says.

    Raises:
      BackendError: it cannot be used here.
    """
    cpu = library()
    return CpuKernels(cpu.ferrum_cpu_isa().decode(), _isas(cpu), cpu.ferrum_cpu_threads())


@functools.cache
def _load() -> ctypes.CDLL | str:
    if sys.platform not in ("linux", "darwin"):
        return f"The CPU kernels run on Linux and macOS, and this is {sys.platform}."
    _check_threads()
    if not PATH.exists():
        return (
            f"The CPU kernels were not built when ferrum-jax was installed ({PATH} is missing). Install a C++ compiler "
            f"({COMPILER}), then run  {REINSTALL}."
        )
    try:
        jaxlib = version("jaxlib")
    except PackageNotFoundError:
        return "The CPU kernels need jaxlib, which is not installed; run  pip install jax."
    if tuple(map(int, re.findall(r"\d+", jaxlib)[:2])) < (0, 5):
        return f'The CPU kernels need jaxlib 0.5.0 or newer, and this is {jaxlib}; run  pip install "jax>=0.5.0".'
    try:
        cpu = ctypes.CDLL(str(PATH))
        cpu.ferrum_cpu_isa.restype = cpu.ferrum_cpu_isas.restype = ctypes.c_char_p
        found = cpu.ferrum_cpu_abi()
    except (OSError, AttributeError) as error:
        return f"{PATH} does not load ({error}); run  {REINSTALL}."
    if found != ABI:
        return f"{PATH} has interface {found}, and these Python files need {ABI}; run  {REINSTALL}."
    if not cpu.ferrum_cpu_isa():
        raise BackendError(
            f"FERRUM_JAX_CPU_ISA is {os.environ.get('FERRUM_JAX_CPU_ISA')!r}; this machine and this build have "
            f"{', '.join(_isas(cpu))}. Name one of these, or unset the variable."
        )
    return cpu


def _check_threads() -> None:
    wanted = os.environ.get("FERRUM_JAX_THREADS", "")
    if wanted and not (wanted.isdecimal() and 1 <= int(wanted) <= MOST_THREADS):
        raise BackendError(
            f"FERRUM_JAX_THREADS is {wanted!r}; a whole number from 1 to {MOST_THREADS} is accepted. Correct it, or "
            f"unset the variable to use every processor that this process may run on."
        )


def _isas(cpu: ctypes.CDLL) -> tuple[str, ...]:
    return tuple(cpu.ferrum_cpu_isas().decode().split(","))
