"""The scripts of kernels/bench that need no GPU: a checkpoint of a published shape, the picture of a report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.checkpoint.files import open_checkpoint
from ferrum_jax.config_file import load_toml_config
from ferrum_jax.params import abstract
from tests.conftest import ROOT
from tests.support.bench_scripts import script

SIZES = """
model_type = "qwen3_moe"
vocab_size = 320
hidden_size = 64
num_layers = 2
num_heads = 2
num_kv_heads = 1
head_dim = 32
intermediate_size = 64
num_experts = 4
top_k = 2
moe_intermediate_size = 32
max_position = 64
qk_norm = true
dtype = "bfloat16"
eos_token_ids = [319]
[quant]
group_size = 32
checkpoint_format = "gptq"
"""


def test_the_30b_checkpoint_has_the_published_names_and_shapes(shared: Path) -> None:
    import gzip

    text = gzip.decompress((shared / "checkpoints" / "qwen3-30b-a3b-gptq-int4.shapes.tsv.gz").read_bytes()).decode()
    published = {}
    for line in text.splitlines():
        name, dtype, shape = line.split("\t")
        published[name] = dtype, tuple(map(int, shape.split("x")))
    cfg = load_toml_config(ROOT / "configs" / "qwen3-30b-a3b.toml")
    ours = {one.name: (one.dtype, one.shape) for one in script("synthetic_checkpoint").tensors(cfg)}
    assert ours == published and len(ours) == 74_739


def test_a_checkpoint_is_written_loaded_and_the_same_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sizes.toml").write_text(SIZES)
    module = script("synthetic_checkpoint")
    for folder, threads in (("one", 1), ("many", 4)):
        monkeypatch.setattr(module, "THREADS", threads)
        arguments = [
            "x",
            "--config",
            str(tmp_path / "sizes.toml"),
            "--out",
            str(tmp_path / folder),
            "--shard-gb",
            "2e-5",
        ]
        monkeypatch.setattr(sys, "argv", arguments)
        module.main()
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert sum(name.endswith(".safetensors") for name in names) > 3
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes(), name
    model = fj.load(tmp_path / "one", quiet=True)
    assert not model.report.warnings and model.cfg.num_layers == 2
    logits = np.asarray(fj.forward(model.params, jnp.array([[5, 6, 7]]), model.cfg))
    assert np.isfinite(logits).all() and logits.std() > 0.01
    assert model.tokenizer.decode(model.tokenizer.encode("a tale")) == "a tale"
    files = open_checkpoint(tmp_path / "one")
    with files.reader() as read:
        words = [read[name] for name in files.tensors if name.endswith("q_proj.qweight")]
    assert not np.array_equal(words[0], words[1])


def report(**changes: Any) -> dict[str, Any]:
    rows = [
        {
            "batch": batch,
            "context": context,
            "fits": (batch, context) != (256, 8192),
            "tokens_per_second": rate / (1 + context / 8192),
            "roofline_tokens_per_second": 2 * rate,
        }
        for context in (256, 8192)
        for batch, rate in ((1, 400), (16, 3000), (64, 9000), (256, 20_000))
    ]
    return {
        "model": "/models/qwen3",
        "layers": 48,
        "decode": rows,
        "device": {"kind": "NVIDIA H200"},
        "versions": {"jax": "0.11.2"},
        "date": "2026-11-27",
        **changes,
    }


def words(figure: Any) -> list[str]:
    (axes,) = figure.axes
    return [text.get_text() for text in axes.texts] + [text.get_text() for text in axes.get_legend().get_texts()]


def test_the_plot_has_every_line_and_the_ratios_to_vllm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = script("plot_throughput")
    figure = module.draw(report())
    found = words(figure)
    assert [line for line in found if line.endswith("x")] == ["1.66x", "1.36x", "1.37x", "1.22x"]
    assert "measured, context 256" in found and "roofline, context 8,192" in found
    assert any(line.startswith("vLLM 0.24") for line in found)
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert len(lines["measured, context 8,192"]) == 3  # one does not fit
    assert lines["roofline, context 256"] == [800, 6000, 18_000, 40_000]
    (tmp_path / "report.json").write_text(json.dumps(report()))
    for _ in range(2):
        module.main([str(tmp_path / "report.json"), "--out", str(tmp_path / "a.svg")])
    assert capsys.readouterr().out == f"{tmp_path / 'a.svg'}\n" * 2
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_another_model_is_not_held_against_vllm_and_an_unknown_device_has_no_roofline() -> None:
    module = script("plot_throughput")
    rows = [{**row, "roofline_tokens_per_second": None} for row in report()["decode"]]
    found = words(module.draw(report(layers=6, decode=rows)))
    assert found[1:] == ["measured, context 256", "measured, context 8,192"]


def test_a_report_without_decode_rows_is_refused() -> None:
    with pytest.raises(SystemExit, match="the report has no rows of decode; make it with  ferrum-jax bench MODEL"):
        script("plot_throughput").draw(report(decode={"tokens_per_second": 3}))


def test_a_report_of_gpu_decode_can_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sizes.toml"
    path.write_text(SIZES)
    cfg, module = load_toml_config(path), script("gpu_decode")
    params = abstract(cfg)
    unknown = module.report_row(cfg, params, 4, 16, 20.0, 2.0)
    assert unknown["tokens_per_second"] == 2000 and unknown["roofline_tokens_per_second"] is None
    monkeypatch.setattr(module, "device", lambda: "H100")
    row = module.report_row(cfg, params, 4, 16, 20.0, 2.0)
    # Keys and values of 2 layers of one head of 32, 2 bytes each, for 20 tokens of 4 rows.
    assert row["live_cache_bytes"] == 2 * 2 * 32 * 2 * 20 * 4
    assert row["roofline_tokens_per_second"] == 4 * 3.1e12 / (row["weight_bytes"] + row["live_cache_bytes"])
    made = module.report(cfg, path, [row], 0.0)
    assert "measured, context 16" in words(script("plot_throughput").draw(made))
    codes = module.report_row(cfg, params, 4, 16, 20.0, 2.0, "int8")
    assert codes["live_cache_bytes"] == 2 * 2 * (32 + 4) * 20 * 4  # a scale of 4 bytes with each 32 codes


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_a_cache_of_gpu_decode_holds_different_numbers_of_each_token(dtype: str | None, tmp_path: Path) -> None:
    path = tmp_path / "sizes.toml"
    path.write_text(SIZES)
    cache = script("gpu_decode").cache_of(load_toml_config(path), 3, 5, 8, dtype)
    assert cache.dtype == (dtype or "bfloat16") and cache.lengths.tolist() == [5] * 3
    heads = np.asarray(cache.k[0].astype("float32")).reshape(3 * 8, -1)
    assert len(np.unique(heads, axis=0)) == 3 * 8
    assert dtype is None or bool((cache.k_scale > 0).all() and (cache.v_scale > 0).all())


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("gpu_decode", ["--batches", "1,x"], "'1,x' are not positive numbers with commas between them"),
        ("gpu_prefill", ["--prompts", "0"], "'0' are not positive numbers with commas between them"),
        ("gpu_prefill", ["--config", "/nowhere.toml"], "/nowhere.toml cannot be read"),
        ("plot_throughput", ["/nowhere.json"], "/nowhere.json is no report of  ferrum-jax bench --json"),
        ("plot_throughput", [str(ROOT / "README.md")], "README.md is no report of  ferrum-jax bench --json"),
    ],
)
def test_bad_arguments_are_sentences(
    name: str, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as ended:
        script(name).main()
    assert ended.value.code == 2 and message in capsys.readouterr().err
