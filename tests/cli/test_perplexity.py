"""`ferrum-jax perplexity`: the loss of the reference logits, window by window, however they are batched."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.cli import main
from ferrum_jax.cli.perplexity import measure
from tests.conftest import ROOT

GOLDEN = np.load(ROOT / "tests" / "golden" / "tales-13m-gptq-int4.npz")


@pytest.fixture(scope="module")
def model() -> fj.Model:
    return fj.load("demo", dtype="float32", quiet=True)


def test_the_reference(model, tmp_path, capsys):
    ids, logits = GOLDEN["ids_3"], GOLDEN["logits_q_3"].astype(np.float64)
    top = logits.max(axis=-1, keepdims=True)
    logp = logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
    nll = -logp[np.arange(18), ids[1:]].mean()
    file = tmp_path / "text"
    file.write_text(model.tokenizer.decode(ids))
    assert (
        main(["perplexity", "demo", str(file), "--context", "19", "--batch", "1", "--json", "--dtype", "float32"]) == 0
    )
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert not err and abs(report["nll"] - nll) < 1e-5
    assert math.isclose(report["perplexity"], math.exp(report["nll"]))
    assert (report["tokens"], report["windows"], report["context"], report["dtype"]) == (18, 1, 19, "float32")
    assert report["seconds"] > 0 and report["compile_seconds"] > 0 and report["model"] == "demo"


def test_a_rounded_projection(tmp_path, capsys):
    file, reports = tmp_path / "text", []
    file.write_text("Once upon a time there was a king who had three daughters")
    for bits in ([], ["--lm-head-bits", "8"]):
        assert main(["perplexity", "demo", str(file), "--context", "12", "--batch", "1", "--json", *bits]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert [report["lm_head_bits"] for report in reports] == [None, 8]
    assert 0 < abs(reports[0]["nll"] - reports[1]["nll"]) < 0.01


def test_windows_batches_and_tail(model):
    tokens = GOLDEN["heldout_ids"][:59].tolist()
    alone = [measure(model, tokens[at : at + 16], 16, 2, True) for at in (0, 16, 32, 48)]
    full = measure(model, tokens, 16, 2, False)
    assert (full.windows, full.tokens) == (3, 45), "the last, shorter window is left out"
    assert math.isclose(full.nll, sum(score.nll * score.tokens for score in alone[:3]) / 45, rel_tol=1e-5)
    tail = measure(model, tokens, 16, 2, True)
    assert (tail.windows, tail.tokens) == (4, 55)
    assert math.isclose(tail.nll, sum(score.nll * score.tokens for score in alone) / 55, rel_tol=1e-5)


def test_stdin_and_text_for_people(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Once upon a time there was a king who had three daughters"))
    assert main(["perplexity", "demo", "-", "--context", "16", "--batch", "2", "--tail"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("perplexity ") and "12 tokens scored in 1 windows of 16" in out


def test_texts_that_cannot_be_scored(model, tmp_path, capsys, monkeypatch):
    short, binary = tmp_path / "short", tmp_path / "binary"
    short.write_text("Once upon a time")
    binary.write_bytes(b"\x7fELF\xff\xfe")
    for arguments, message in {
        (
            short,
        ): "the text has 5 tokens, less than one window of 512. Give a longer text, a smaller --context, or --tail",
        (binary,): f"{binary} is not UTF-8 text",
        (short, "--context", "4096"): "--context 4096 exceeds this model's context of 2048 tokens",
    }.items():
        assert main(["perplexity", "demo", *map(str, arguments)]) == 1
        assert f"error: {message}" in capsys.readouterr().err
    with pytest.raises(fj.errors.RequestError, match="holds token id 4096; this model's vocabulary is 0 to 4095"):
        measure(model, [1, 4096], 2, 1, False)
    broken = {**model.params, "norm": model.params["norm"] * float("nan")}
    with pytest.raises(fj.errors.BackendError, match="the loss became NaN or infinite in windows 0 to 1"):
        measure(fj.Model(model.cfg, broken, model.tokenizer, model.report), list(range(16)), 16, 2, False)
