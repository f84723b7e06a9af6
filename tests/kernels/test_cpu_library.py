"""The shared library of CPU kernels: found where it was built, and refused with a sentence where it cannot be used."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ferrum_kernels import BackendError, cpu_library, ops

compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(compiler is None, reason="there is no C++ compiler")
needs_library = pytest.mark.skipif(not cpu_library.PATH.exists(), reason="the CPU kernels were not built here")

uncached = cpu_library._load.__wrapped__

GOOD = """
extern "C" int ferrum_cpu_abi() { return ABI; }
extern "C" const char* ferrum_cpu_isa() { return ISA; }
extern "C" const char* ferrum_cpu_isas() { return "portable,wide"; }
extern "C" int ferrum_cpu_threads() { return 3; }
"""


@pytest.fixture
def load(monkeypatch, tmp_path):
    """Has cpu_library look at another file, and on what the platform and jaxlib are said to be."""

    def load(path: Path, platform: str = "linux", jaxlib: str = "0.10.2") -> str | None:
        monkeypatch.setattr(cpu_library, "PATH", path)
        monkeypatch.setattr(cpu_library, "_load", uncached)
        monkeypatch.setattr(cpu_library.sys, "platform", platform)
        monkeypatch.setattr(cpu_library, "version", lambda _: jaxlib)
        return cpu_library.unavailable()

    return load


def build(folder: Path, source: str, **defined: str) -> Path:
    path = folder / f"lib{len(list(folder.iterdir()))}.so"  # a loader that has seen a name may not look again
    flags = [f"-D{name}={value}" for name, value in defined.items()]
    subprocess.run(
        [str(compiler), "-x", "c++", "-", "-shared", "-fPIC", "-o", path, *flags], input=source.encode(), check=True
    )
    return path


def test_it_is_not_built(load, tmp_path):
    assert f"({tmp_path / 'absent.so'} is missing). Install a C++ compiler (" in load(tmp_path / "absent.so")
    with pytest.raises(BackendError, match=r"pip install --force-reinstall --no-deps --no-cache-dir ferrum-jax"):
        cpu_library.library()


def test_it_is_no_library(load, tmp_path):
    (tmp_path / "text.so").write_text("no library")
    assert load(tmp_path / "text.so").startswith(f"{tmp_path / 'text.so'} does not load (")


def test_other_platforms_are_named(load, tmp_path):
    assert load(tmp_path, platform="win32") == "The CPU kernels run on Linux and macOS, and this is win32."


def test_an_old_jaxlib_is_named(load, tmp_path):
    assert "need jaxlib 0.5.0 or newer, and this is 0.4.38;" in load(tmp_path, jaxlib="0.4.38")


@needs_compiler
def test_what_it_says_about_itself(load, tmp_path):
    assert load(build(tmp_path, GOOD, ABI=str(cpu_library.ABI), ISA='"wide"')) is None
    assert cpu_library.describe() == cpu_library.CpuKernels("wide", ("portable", "wide"), 3)


@needs_compiler
def test_files_of_two_versions(load, tmp_path):
    assert f"has interface 99, and these Python files need {cpu_library.ABI};" in load(
        build(tmp_path, GOOD, ABI="99", ISA='""')
    )
    assert "does not load (" in load(build(tmp_path, "int other() { return 0; }"))


@needs_compiler
def test_an_instruction_set_that_is_not_there(load, tmp_path, monkeypatch):
    monkeypatch.setenv("FERRUM_JAX_CPU_ISA", "wider")
    with pytest.raises(BackendError, match=r"'wider'; this machine and this build have portable, wide\. Name one"):
        load(build(tmp_path, GOOD, ABI=str(cpu_library.ABI), ISA='""'))


@pytest.mark.parametrize("threads", ["abc", "-3", "0", "1.5", "1000000"])
def test_a_number_of_threads_that_is_none_is_refused(load, tmp_path, monkeypatch, threads):
    monkeypatch.setenv("FERRUM_JAX_THREADS", threads)
    message = rf"FERRUM_JAX_THREADS is '{threads}'; a whole number from 1 to 1024 is accepted\. Correct it, or unset"
    with pytest.raises(BackendError, match=message):
        load(tmp_path / "absent.so")


def test_a_wrong_variable_is_not_answered_with_the_slow_path(load, tmp_path, monkeypatch):
    load(tmp_path / "absent.so")
    assert ops.default_implementation("cpu") == "xla"
    monkeypatch.setenv("FERRUM_JAX_THREADS", "many")
    with pytest.raises(BackendError, match="FERRUM_JAX_THREADS is 'many'"):
        ops.default_implementation("cpu")


@needs_library
def test_this_build():
    assert cpu_library.unavailable() is None
    assert cpu_library.library() is cpu_library.library()
    kernels = cpu_library.describe()
    assert kernels.isa in kernels.isas and kernels.isas[0] == "portable" and kernels.threads >= 1


@needs_library
@pytest.mark.parametrize("isa", ["portable", "no-such-set"])
def test_the_variable_chooses(isa):
    code = "from ferrum_kernels import cpu_library as c; print(c.describe().isa)"
    environment = {"FERRUM_JAX_CPU_ISA": isa, "PYTHONPATH": str(cpu_library.PATH.parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == isa if isa == "portable" else "Name one of these" in done.stderr


@needs_library
def test_only_its_own_symbols_are_seen():
    if not (nm := shutil.which("nm")):
        pytest.skip("there is no nm")
    words = ["-gU"] if sys.platform == "darwin" else ["-D", "--defined-only"]
    lines = subprocess.run(
        [nm, *words, cpu_library.PATH], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert {line.split()[-1].lstrip("_").split("_")[0] for line in lines} == {"ferrum"}
