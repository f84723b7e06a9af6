"""`ferrum-jax doctor`: a true picture of this environment, and a verdict on ones that are broken in known ways."""

from __future__ import annotations

import json
import sys
import time

import jax
import pytest

import ferrum_kernels
from ferrum_jax import environment
from ferrum_jax.cli import doctor, main
from ferrum_kernels import cpu_library, triton
from tests.support import terminal

FINE = doctor.Devices(({"platform": "cpu", "kind": "cpu", "memory_bytes": None},), "xla", None, 1.0)
NONE = doctor.Devices((), None, "JAX does not start: it gave no reason", 1.0)
PACKAGES = {name: "1.0" for name in doctor.NEEDED} | dict.fromkeys((*doctor.PLUGINS, "pallas"))
PACKAGES |= {"jax": "0.12.0", "jaxlib": "0.12.0"}


def problems(packages=PACKAGES, devices=FINE, python=(3, 12)) -> list[str]:
    return list(doctor.find_problems(packages, devices, python))


def warnings(packages=PACKAGES, devices=FINE, cpu=None, **variables: str) -> list[str]:
    return list(doctor.find_warnings(packages, devices, variables, cpu))


def test_this_environment(capsys, monkeypatch):
    import jax

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_ENDPOINT", "http://me:secret@127.0.0.1:9")
    assert main(["doctor", "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert not err and "secret" not in out
    assert report["verdict"] == "ready" and report["problems"] == []
    assert report["packages"]["jax"] == environment.installed("jax")
    assert [device["platform"] for device in report["devices"]["devices"]] == [d.platform for d in jax.devices()]
    assert report["devices"]["implementation"] == ferrum_kernels.default_implementation()
    assert report["cpu_kernels"]["problem"] == cpu_library.unavailable()
    assert report["python"]["version"] == ".".join(map(str, sys.version_info[:3]))
    assert report["caches"]["compile"]["path"] and report["caches"]["huggingface"]["writable"]
    assert report["memory"]["total_bytes"] > 2**28 and report["cpu_cores"] >= 1
    assert report["environment"]["HF_TOKEN"] == "(set)"
    assert report["environment"]["HF_ENDPOINT"] == "http://...@127.0.0.1:9"


def test_text_for_people(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "probe", lambda _: FINE)
    monkeypatch.setenv("FERRUM_JAX_COMPILE_CACHE", "off")
    monkeypatch.setenv("FERRUM_JAX_WEIGHT_CACHE", "/somewhere/else")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("python      3.") and out.endswith("verdict     ready\n")
    for line in (
        "device      cpu: cpu\n",
        "kernels     xla\n",
        "cache       compile: off\n",
        "cache       weights: /somewhere/else (0 B",
        "cache       huggingface: /",
    ):
        assert line in out


def test_a_broken_environment_is_exit_code_3():
    done = terminal.run("doctor", "--quiet", JAX_PLATFORMS="abacus")
    assert done.returncode == 3 and not done.stderr
    assert "problem     JAX does not start: " in done.stdout and "'abacus'" in done.stdout
    assert done.stdout.endswith("verdict     this environment cannot run a model\n")


def test_a_plugin_that_crashes_fails_or_hangs_is_survived():
    crash = doctor.probe(60, "import os, signal; os.kill(os.getpid(), signal.SIGABRT)")
    assert crash.problem == "JAX crashed with signal 6 while it brought up its devices." and not crash.devices
    failure = doctor.probe(60, "raise SystemExit('no such plugin')")
    assert failure.problem == "JAX does not start: no such plugin"
    silent = doctor.probe(60, "raise SystemExit(1)")
    assert silent.problem == "JAX does not start: it gave no reason"
    began = time.monotonic()
    hang = doctor.probe(0.5, "import time; time.sleep(60)")
    assert hang.problem == "JAX did not bring up its devices within 0.5 s; its plugin hangs."
    assert time.monotonic() - began < 30


def test_no_second_process(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert "a second Python process did not start" in str(doctor.probe(5).problem)


def test_nothing_to_say_about_a_sound_environment(monkeypatch):
    monkeypatch.setattr(environment, "installed", PACKAGES.get)
    assert problems() == [] and warnings() == []


@pytest.mark.parametrize(
    ("packages", "python", "devices", "message"),
    [
        ({}, (3, 10), FINE, "Python 3.10 is too old; install 3.11 or newer."),
        ({"jinja2": None, "tyro": None}, (3, 11), FINE, "jinja2, tyro not installed; run  pip install ferrum-jax  in"),
        (
            {"jax": "0.4.38"},
            (3, 11),
            FINE,
            'jax 0.4.38 is outside the supported range; run  pip install "jax>=0.5.0,<0.13"',
        ),
        ({"jax": "0.13.0"}, (3, 11), FINE, "jax 0.13.0 is outside the supported range"),
        ({"jax-metal": "0.1.1"}, (3, 11), FINE, "jax-metal 0.1.1 does not work with jax 0.12.0"),
        ({}, (3, 11), NONE, "JAX does not start: it gave no reason JAX_PLATFORMS=cpu leaves plugins out."),
    ],
    ids=["python", "missing", "old jax", "new jax", "metal", "devices"],
)
def test_known_problems(monkeypatch, packages, python, devices, message):
    packages = {**PACKAGES, **packages}
    monkeypatch.setattr(environment, "installed", packages.get)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    [found] = problems(packages, devices, python)
    assert message in found


@pytest.mark.parametrize(
    ("packages", "variables", "message"),
    [
        ({"jaxlib": "0.10.2"}, {}, "jaxlib 0.10.2 has known faults in XLA's YNNPACK fusions"),
        ({"jaxlib": "0.11.0"}, {"XLA_FLAGS": "--xla_x=1"}, "XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type="),
        ({"jax-metal": "0.1.1"}, {}, "jax-metal is unmaintained"),
        ({"jax-cuda13-plugin": "0.11.0"}, {}, "jax-cuda13-plugin is 0.11.0 and jaxlib is 0.12.0"),
        (
            {"jax-cuda12-plugin": "0.12.0", "jax-cuda13-plugin": "0.12.0"},
            {},
            "jax-cuda12-plugin and jax-cuda13-plugin are both installed",
        ),
        ({"pallas": "0.10"}, {}, "the package pallas is no part of JAX"),
        ({}, {"JAX_DISABLE_JIT": "1"}, "JAX_DISABLE_JIT is set"),
    ],
)
def test_known_bad_pairs(packages, variables, message):
    [found] = warnings({**PACKAGES, **packages}, **variables)
    assert message in found


def test_a_device_without_kernels_is_a_warning():
    devices = doctor.Devices(
        ({"platform": "gpu", "kind": "x", "memory_bytes": 1},), None, "no GPTQ kernel for gpu", 1.0
    )
    assert warnings(devices=devices) == ["no GPTQ kernel for gpu"]
    assert problems(devices=devices) == []


def test_cpu_kernels(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "probe", lambda _: FINE)
    monkeypatch.setattr(cpu_library, "describe", lambda: cpu_library.CpuKernels("avx2", ("portable", "avx2"), 8))
    assert main(["doctor"]) == 0
    assert "cpu kernels avx2 (this machine has portable, avx2), 8 threads\n" in capsys.readouterr().out


def test_without_cpu_kernels_it_says_what_to_install(monkeypatch, capsys):
    def missing():
        raise ferrum_kernels.BackendError("Not built. Install a compiler.")

    monkeypatch.setattr(doctor, "probe", lambda _: FINE)
    monkeypatch.setattr(cpu_library, "describe", missing)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "cpu kernels none: the portable XLA path\n" in out
    assert "warning     Not built. Install a compiler. Models run through XLA instead, which is slower.\n" in out
    gpu = doctor.Devices(({"platform": "gpu", "kind": "x", "memory_bytes": 1},), "cuda", None, 1.0)
    assert warnings(devices=gpu, cpu="Not built.") == []


class Hopper:
    platform, device_kind, compute_capability = "gpu", "NVIDIA H200", "9.0"

    def memory_stats(self) -> None:
        return None


def test_a_hopper_gpu_that_processes_share_has_its_faster_kernels_left_out(monkeypatch, capsys):
    monkeypatch.setattr(jax, "devices", lambda: [Hopper()])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/tmp")
    exec(doctor.PROBE, {})
    answer = json.loads(capsys.readouterr().out)
    assert answer["implementation"] == "triton"
    gpu = doctor.Devices(tuple(answer["devices"]), "triton", None, 1.0, answer["left_out"])
    assert warnings(devices=gpu) == [
        "The faster kernels of this Hopper GPU are left out: CUDA_MPS_PIPE_DIRECTORY lets processes share the GPU, and "
        "programs of its kernels wait for each other, so that they need the whole GPU; unset it where this process is "
        "alone."
    ]


def test_the_ynnpack_switch_silences_its_warning():
    assert warnings({**PACKAGES, "jaxlib": "0.10.2"}, XLA_FLAGS=f"--a=b {doctor.YNNPACK_SWITCH}") == []


def test_caches(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"x" * 1000)
    assert doctor.cache(tmp_path) == {"path": str(tmp_path), "exists": True, "bytes": 1000, "writable": True}
    absent = doctor.cache(tmp_path / "not" / "yet")
    assert (absent["exists"], absent["bytes"], absent["writable"]) == (False, 0, True)


def test_a_compiler_is_only_information(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert doctor.compiler() is None
    fake = tmp_path / "c++"
    fake.write_text("#!/bin/sh\necho fake 1.0\n")
    fake.chmod(0o755)
    assert doctor.compiler() == f"{fake} (fake 1.0)"
