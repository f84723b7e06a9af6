"""The C++ of the CPU kernels under sanitizers, and for ARM under an emulator where this machine has one."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[2] / "kernels" / "ferrum_kernels" / "native"
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]
X86 = {"avx2": AVX2, "avx512": AVX512, "amx": [*AVX512, "-mamx-tile", "-mamx-int8"]}
NEON = "-march=armv8.2-a+dotprod+fp16"
ARM = {"neon": [NEON], "i8mm": [f"{NEON}+i8mm"]}


def build(folder: Path, compiler: str, flags: list[str], isas: dict[str, list[str]]) -> Path:
    """The harness with some instruction sets; the portable one is always part of it."""
    common = [compiler, "-std=c++17", "-O1", "-ffp-contract=off", "-I", str(NATIVE), *flags]
    common += [f"-DFERRUM_HAVE_{isa.upper()}" for isa in isas]
    objects = []
    for isa, own in {"portable": [], **isas}.items():
        objects.append(str(folder / f"{isa}.o"))
        subprocess.run([*common, *own, "-c", str(NATIVE / f"isa_{isa}.cc"), "-o", objects[-1]], check=True)
    others = [str(NATIVE / name) for name in ("dispatch.cc", "pool.cc")]
    harness = str(Path(__file__).with_name("isa_test.cc"))
    program = folder / "isa_test"
    subprocess.run([*common, *others, harness, *objects, "-o", str(program), "-pthread"], check=True)
    return program


def flags_of_this_machine() -> dict[str, list[str]]:
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    needed = {"avx2": "avx2", "avx512": "avx512_vnni", "amx": "amx_int8"}
    return {isa: flags for isa, flags in X86.items() if needed[isa] in words}


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_no_sanitizer_finds_anything(sanitizer: str, tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("needs g++ on x86-64")
    flags = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-g1"]
    # What an instruction set has of its own knows no threads, so races are looked for beside the portable one.
    program = build(tmp_path, compiler, flags, {} if sanitizer == "thread" else flags_of_this_machine())
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith(": 0 failures\n"), done.stdout + done.stderr


@pytest.fixture(scope="module")
def on_arm(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Runs the harness, built once, on an emulated processor."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)")
    program = build(tmp_path_factory.mktemp("arm"), compiler, ["-static"], ARM)

    def run(processor: str) -> subprocess.CompletedProcess[str]:
        known = subprocess.run([emulator, "-cpu", "help"], capture_output=True, text=True).stdout.split()
        if processor not in known:
            pytest.skip(f"this qemu-aarch64 has no {processor}")
        return subprocess.run([emulator, "-cpu", processor, program], capture_output=True, text=True)

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processor", "usable"),
    [("max", "portable,neon,i8mm"), ("neoverse-n1", "portable,neon"), ("cortex-a72", "portable")],
)
def test_arm_gives_the_same_bits_under_an_emulator(
    on_arm: Callable[[str], subprocess.CompletedProcess[str]], processor: str, usable: str
) -> None:
    done = on_arm(processor)
    assert (done.returncode, done.stdout) == (0, f"{usable}: 0 failures\n"), done.stdout + done.stderr
