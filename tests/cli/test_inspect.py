"""`ferrum-jax inspect`: dialect, sizes and budget from headers and small tensors; whatever is broken is a problem."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from ferrum_jax.checkpoint.files import TensorReader
from ferrum_jax.checkpoint.hub import DEMO_FOLDER
from ferrum_jax.cli import main
from tests.support import terminal
from tests.support.checkpoint_writer import MIXED_DYNAMIC, TinySpec, write_checkpoint
from tests.support.damage import drop, set_value

KEYS = {"model", "folder", "architecture", "dialect", "memory", "chat_template", "tensors", "problems", "warnings"}


def report_of(capsys, *arguments: str, code: int = 0) -> dict:
    assert main(["inspect", *arguments, "--json"]) == code
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report.keys() == KEYS and bool(report["problems"]) == bool(code) and not err
    return report


def test_the_demo_model(capsys):
    report = report_of(capsys, "demo", "--memory", "1")
    arch, dialect, memory = report["architecture"], report["dialect"], report["memory"]
    assert (arch["model_type"], arch["layers"], arch["experts"], arch["experts_per_token"]) == ("qwen3_moe", 6, 16, 4)
    assert arch["parameters"] == 12_873_728 and arch["active_parameters"] == 5_795_840
    assert (dialect["version"], dialect["version_from"], dialect["formats"]) == (
        "gptq",
        "data",
        {"4-bit g128 sym": 312},
    )
    assert memory["kv_bytes_per_token"] == 2 * 6 * 4 * 64 * 2, "keys and values of 6 layers, 4 heads of 64 in bfloat16"
    assert memory["tokens_that_fit"] == (2**30 - memory["weights_bytes"]) // memory["kv_bytes_per_token"]
    assert report["tensors"] is None and report["chat_template"] is False and not report["warnings"]
    wide = report_of(capsys, "demo", "--dtype", "float32")["memory"]
    assert wide["kv_bytes_per_token"] == 2 * memory["kv_bytes_per_token"]
    small = report_of(capsys, "demo", "--memory", "0.001")["memory"]
    assert small["tokens_that_fit"] == 0


def test_the_budget_is_what_loading_takes(capsys):
    import ferrum_jax as fj

    memory = report_of(capsys, "demo", "--dtype", "float32")["memory"]
    assert memory["weights_bytes"] == fj.load("demo", dtype="float32", quiet=True).report.bytes_held


def test_text_for_people(capsys):
    assert main(["inspect", "demo", "--memory", "1", "--tensors"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == (
        "tales-13m-gptq-int4   qwen3_moe · 6 layers · 16 experts, 4 active · 12.9 M parameters, 5.8 M active · "
        "GPTQ 4-bit g128 sym, zeros v1 (checked in data)"
    )
    assert "weights 7.9 MiB · KV 6.0 KiB/token · context 2048 tokens (12.0 MiB) · bfloat16\n" in out
    assert "in 1.0 GiB: 84 x 2048 tokens, before temporary memory\nproblems: none\nwarnings: none\n" in out
    row = next(line for line in out.splitlines() if line.startswith("model.layers.0.self_attn.q_proj.qweight "))
    assert row.split() == [
        *("model.layers.0.self_attn.q_proj.qweight", "I32", "[32,", "512]", "4-bit", "g128", "sym"),
        *("model.safetensors", "65536"),
    ]


def test_packed_words_are_not_read(monkeypatch, capsys):
    read: list[str] = []
    real = TensorReader.__getitem__
    monkeypatch.setattr(TensorReader, "__getitem__", lambda self, name: read.append(name) or real(self, name))
    report_of(capsys, "demo")
    assert read and not [name for name in read if name.endswith(".qweight")]


def test_no_device_is_touched():
    code = (
        "import sys; from ferrum_jax.cli import main; code = main(['inspect', 'demo', '--quiet']);"
        "from jax._src import xla_bridge; sys.exit(code or len(xla_bridge._backends))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=terminal.environment())
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("spec", "expected", "line"),
    [
        (TinySpec(checkpoint_format="gptq_v2"), ("gptq_v2", "data", [4]), "4-bit g32 sym, zeros v2 (checked in data)"),
        (TinySpec(sym=False), ("gptq", "metadata", [4]), "4-bit g32 asym, zeros v1 (says the metadata)"),
        (TinySpec(sym=False, checkpoint_format=None), ("gptq", "assumed", [4]), "zeros v1 (assumed)"),
        (TinySpec(desc_act=True, bits=8), ("gptq", "data", [8]), "8-bit g32 sym act-order"),
        (TinySpec(dynamic=MIXED_DYNAMIC), ("gptq", "data", [4, 8]), "x 8-bit g16 sym"),
    ],
    ids=["v2", "asym", "no version", "act-order", "mixed"],
)
def test_dialects(tmp_path, capsys, spec, expected, line):
    folder = str(write_checkpoint(tmp_path / "tiny", spec))
    dialect = report_of(capsys, folder)["dialect"]
    assert (dialect["version"], dialect["version_from"], dialect["bits"]) == expected
    assert main(["inspect", folder]) == 0
    assert line in capsys.readouterr().out


def test_the_user_settles_the_version_and_sees_the_warnings(tmp_path, capsys):
    folder = str(write_checkpoint(tmp_path / "tiny", TinySpec(sym=False, checkpoint_format=None)))
    report = report_of(capsys, folder, "--checkpoint-format", "gptq_v2")
    assert (report["dialect"]["version"], report["dialect"]["version_from"]) == ("gptq_v2", "option")
    [sentence] = report_of(capsys, folder)["warnings"]
    assert "the metadata has no checkpoint_format and the zero points vary" in sentence


def test_an_unquantised_checkpoint(tmp_path, capsys):
    folder = str(write_checkpoint(tmp_path / "tiny", TinySpec(dynamic={"-:.*": {}}, family="qwen3")))
    assert report_of(capsys, folder)["dialect"]["quantised"] is False
    assert main(["inspect", folder]) == 0
    assert "not quantised" in capsys.readouterr().out


def test_every_independent_problem_is_reported(tmp_path, capsys):
    edits = [drop("model.norm.weight")]
    folder = write_checkpoint(tmp_path / "tiny", edits=edits)
    (folder / "tokenizer.json").write_text("{")
    report = report_of(capsys, str(folder), "--tensors", code=1)
    problems = " ".join(report["problems"])
    assert "tokenizer.json of tiny cannot be read" in problems and "holds no tensor 'model.norm.weight'" in problems
    assert report["architecture"]["layers"] == 2 and report["dialect"] is None and report["memory"] is None
    assert len(report["tensors"]) > 10, "the table is shown although the model cannot be loaded"
    assert main(["inspect", str(folder)]) == 1
    assert "problems:\n  - " in capsys.readouterr().out


def lfs_pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def cut_short(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lfs_pointer, "Git LFS pointer"),
        (cut_short, "model.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"}'), "gpt2"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no .safetensors file"),
        (shutil.rmtree, "There is no folder"),
    ],
    ids=["lfs", "short", "no config", "list", "family", "no weights", "no folder"],
)
def test_a_broken_checkpoint_is_a_problem(tmp_path, capsys, damage, message):
    folder = shutil.copytree(DEMO_FOLDER, tmp_path / "broken")
    damage(folder)
    report = report_of(capsys, str(folder), "--tensors", code=1)
    assert any(message in problem for problem in report["problems"])


def test_numbers_that_are_not_finite_are_a_problem(tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "tiny", edits=[set_value("model.norm.weight", 3, float("nan"))])
    [problem] = report_of(capsys, str(folder), code=1)["problems"]
    assert "'model.norm.weight' holds 1 values that are NaN or infinite" in problem
