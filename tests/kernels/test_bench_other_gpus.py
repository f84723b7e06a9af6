"""kernels/bench/other_gpus.py: which kernels it finds in a model's programs, what it says of them, what it refuses."""

from __future__ import annotations

import dataclasses
import sys

import jax
import pytest

from ferrum_jax.config_file import load_toml_config
from ferrum_kernels import triton, triton_tiles
from tests.conftest import ROOT
from tests.support.bench_scripts import script
from tests.support.triton_cases import ignore_deprecation

other_gpus = script("other_gpus")
pytestmark = [
    ignore_deprecation,
    pytest.mark.skipif(jax.__version_info__ < (0, 10, 2), reason="the Triton kernels need jax 0.10.2"),
]
CONFIG = ROOT / "configs/tales-13m.toml"
DECODE = {"add_norm", "add_norm_route", "attend_one", "gptq_down_few", "gptq_gated_few", "gptq_rows"}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(other_gpus, "BATCHES", (1,))
    monkeypatch.setattr(other_gpus, "LENGTHS", (64,))
    monkeypatch.setattr(other_gpus, "PROMPTS", (16,))


def test_it_finds_the_kernels_of_a_models_programs(small):
    cfg = dataclasses.replace(load_toml_config(CONFIG), dtype="bfloat16", implementation="triton")
    name, function, shapes = next(iter(other_gpus.programs(cfg)))
    assert name == "decode 1 of 64 in bfloat16"
    with other_gpus.as_on_a_gpu("8.9"):
        assert triton.unavailable() is None and triton_tiles.little_memory() and triton_tiles.before_hopper()
        found = other_gpus.kernels_of(function, *shapes)
    assert {kernel.name for kernel in found} >= DECODE
    assert all(kernel.ir.startswith("module") and "tt.load" in kernel.ir for kernel in found)
    assert all(kernel.warps in (1, 2, 4, 8, 16, 32) and kernel.stages >= 1 for kernel in found)
    assert triton.unavailable() is not None or jax.default_backend() == "gpu"


def test_what_a_model_cannot_hold_is_left_out(monkeypatch):
    monkeypatch.setattr(other_gpus, "LENGTHS", (512, 8192))
    cfg = dataclasses.replace(load_toml_config(CONFIG), implementation="triton")
    names = [name for name, *_ in other_gpus.programs(cfg)]
    assert cfg.max_position == 2048 and "prompt of 1024 in int8" in names
    assert "decode 256 of 2048 in pages in bfloat16" in names
    assert not any("8192" in name or "prompt of 4096" in name for name in names)


def test_it_says_which_would_not_run(small, monkeypatch, capsys):
    kernel = other_gpus.Kernel
    large, wild, spilt = kernel("large", "a", 4, 2), kernel("wild", "b", 4, 2), kernel("spilt", "c", 4, 2)
    needs = {large: other_gpus.Needs(99 * 1024 + 1, 90, 0), spilt: other_gpus.Needs(2048, 255, 65)}
    monkeypatch.setattr(other_gpus, "programs", lambda cfg: [("one", None, ()), ("two", None, ())])
    monkeypatch.setattr(other_gpus, "kernels_of", lambda function: [large, wild, spilt])
    monkeypatch.setattr(other_gpus, "compiled", lambda kernel, capability: needs[kernel])
    monkeypatch.setitem(sys.modules, "triton", sys)
    assert other_gpus.main(["--config", str(CONFIG), "--capability", "8.9"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "8.9 one: large needs 99.0 KiB of 99"
    assert lines[1].startswith("8.9 one: wild does not compile: ")
    assert lines[2:4] == [
        "8.9 one: spilt has 65 bytes of stack",
        "compute capability 8.9, at most: kernels, KiB of 99, registers, bytes of stack",
    ]
    assert [line.split() for line in lines[4:6]] == [
        ["large", "1", "99.0", "90", "0"],
        ["spilt", "1", "2.0", "255", "65"],
    ]
    assert lines[-1] == "2 kernels that would not run"


def test_what_it_does_not_know_is_refused(capsys, monkeypatch, tmp_path):
    (tmp_path / "wide.toml").write_text(CONFIG.read_text().replace('"bfloat16"', '"float32"'))
    for arguments, message in (
        (["--capability", "7.5"], "compute capability '7.5' is not known here; known are 8.0, 8.6, "),
        (["--capability", "8.0,"], "compute capability '' is not known here; known are 8.0, 8.6, "),
        (["--config", str(tmp_path / "wide.toml")], "has dtype 'float32'; the kernels take 'bfloat16' and 'float16'"),
        (["--config", "none.toml"], "none.toml"),
    ):
        with pytest.raises(SystemExit):
            other_gpus.main(arguments)
        assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "triton", None)
    assert other_gpus.main([]) == 3
    assert 'error: Triton is not installed: pip install "triton>=3.6"' in capsys.readouterr().err
