"""`ferrum-jax bench`: what the numbers are made of, for a checkpoint and for random weights of given sizes."""

from __future__ import annotations

import dataclasses
import json
import os
import re

import pytest

import ferrum_kernels
from ferrum_jax.cli import main
from ferrum_jax.cli.bench import fresh_compiles, text_of
from ferrum_jax.cli.bench_about import xla_attends_because
from tests.conftest import ROOT
from tests.support.tiny import tiny_config

TOML = """
model_type = "qwen3_moe"
vocab_size = 64
hidden_size = 32
num_layers = 3
num_heads = 2
num_kv_heads = 1
head_dim = 16
intermediate_size = 64
num_experts = 4
top_k = 2
moe_intermediate_size = 32
max_position = 64
moe_layers = [true, false, true]

[quant]
group_size = 32
"""
RUN = ("--prompt-tokens", "10", "--new-tokens", "5", "--repeats", "2", "--batch", "2")


@pytest.fixture
def sizes(tmp_path) -> str:
    path = tmp_path / "sizes.toml"
    path.write_text(TOML)
    return str(path)


def test_random_weights(sizes, capsys):
    assert main(["bench", "--synthetic", sizes, "--layers", "1", *RUN, "--json", "--dtype", "float32"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert not err and report["model"] == sizes and report["synthetic"] and report["load_seconds"] is None
    assert report["shapes"] == {"layers": 1, "prompt_tokens": 10, "new_tokens": 5, "batch": 2}
    for rate in (report["prefill"], report["decode"]):
        assert 0 < rate["min"] <= rate["tokens_per_second"] <= rate["max"]
    assert report["first_token_seconds_min"] <= report["first_token_seconds"] <= report["first_token_seconds_max"]
    assert [row["step"] for row in report["compiles"]] == ["prefill", "sample", "decode"]
    assert [row["bucket"] for row in report["compiles"]] == [[2, 16, 64], [2], [2, 64]]
    assert report["compile_seconds"] == pytest.approx(sum(row["seconds"] for row in report["compiles"]))
    assert report["peak_memory_bytes"] > report["parameter_bytes"] > 0 and report["peak_memory_of"] == "process"
    assert (report["dtype"], report["implementation"], report["repeats"]) == (
        "float32",
        ferrum_kernels.default_implementation("cpu"),
        2,
    )
    assert report["device"]["platform"] == "cpu" and report["device"]["count"] >= 1
    assert report["versions"].keys() == {"ferrum_jax", "jax", "jaxlib", "python"}
    assert report["xla_attends_because"] is None and "XLA attends" not in text_of(report)
    assert "\nXLA attends, not triton: why\n" in text_of(
        {**report, "implementation": "triton", "xla_attends_because": "why"}
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"head_dim": 48}, "heads of 16, 32, 64, 128 and 256; these are of 48"),
        ({"dtype": "float32"}, "float32"),
    ],
)
def test_it_says_where_xla_attends_in_place_of_a_gpus_kernels(changes, reason):
    cfg = tiny_config(**{"dtype": "bfloat16", "implementation": "triton", "head_dim": 64} | changes)
    found = xla_attends_because(cfg, None)
    assert found is None if reason is None else found is not None and found.endswith(reason)
    assert xla_attends_because(dataclasses.replace(cfg, implementation="xla"), None) is None


def test_a_checkpoint_and_text_for_people(tiny, capsys):
    assert main(["bench", str(tiny), *RUN, "--dtype", "bfloat16", "--implementation", "xla"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{tiny}   2 layers · bfloat16 · xla\ncpu (")
    assert "batch 2 · 10 prompt tokens · 5 new tokens" in out
    for start in (
        "2 runs ",
        "prefill tok/s ",
        "decode tok/s ",
        "first token s ",
        "peak memory ",
        "compiling ",
        "decode ",
    ):
        assert f"\n{start}" in out


def test_a_rounded_projection(sizes, capsys):
    reports = []
    for bits in ([], ["--lm-head-bits", "8"]):
        assert main(["bench", "--synthetic", sizes, "--layers", "1", *RUN, "--json", "--dtype", "float32", *bits]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert [report["lm_head_bits"] for report in reports] == [None, 8]
    saved = 32 * 64 * 3 - 64 * 2  # bytes of float32 [D, V] less those of 8 bits and a float16 scale per output
    assert reports[0]["parameter_bytes"] - reports[1]["parameter_bytes"] == saved
    assert text_of(reports[1]).splitlines()[0].endswith(" · lm_head in 8 bits")


def test_compiled_programs_are_not_taken_from_the_cache(monkeypatch):
    import jax
    from jax._src import compilation_cache

    read: list[str] = []
    monkeypatch.setattr(compilation_cache, "get_executable_and_time", lambda key, *_: read.append(key) or (None, None))
    with fresh_compiles():
        jax.jit(lambda x: x * 3 + 1)(2.0)
        assert not read
    jax.jit(lambda x: x * 5 + 1)(2.0)
    assert read, "afterwards the cache is used again"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--layers", "4"], 2, "--layers is 4; .*sizes.toml has 1 to 3"),
        (["--prompt-tokens", "60", "--new-tokens", "8"], 1, "60 prompt tokens and 8 new ones need a context of 68"),
    ],
)
def test_sizes_that_do_not_fit(sizes, capsys, arguments, code, message):
    assert main(["bench", "--synthetic", sizes, *arguments]) == code
    assert re.match(f"error: {message}", capsys.readouterr().err)


def test_weights_larger_than_memory_are_refused_before_they_exist(sizes, capsys, monkeypatch):
    monkeypatch.setattr("ferrum_jax.environment.free_memory", lambda: 1000)
    assert main(["bench", "--synthetic", sizes]) == 1
    assert f"error: {sizes} needs 0.0 GiB for its parameters; 0.0 GiB are free" in capsys.readouterr().err


def test_broken_logits_have_no_speed(sizes, capsys, monkeypatch):
    from ferrum_jax import params

    real = params.random_params
    monkeypatch.setattr(params, "random_params", lambda cfg: {**real(cfg), "norm": real(cfg)["norm"] * float("nan")})
    assert main(["bench", "--synthetic", sizes, "--layers", "1", *RUN]) == 1
    assert "the model gave logits that are NaN or infinite, so its speed means nothing" in capsys.readouterr().err


def test_the_configurations_of_the_repository_are_taken(capsys):
    for name in sorted(os.listdir(ROOT / "configs")):
        assert main(["bench", "--synthetic", str(ROOT / "configs" / name), "--layers", "1000"]) == 2
        assert "--layers is 1000" in capsys.readouterr().err
