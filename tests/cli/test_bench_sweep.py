"""The sweep of `ferrum-jax bench`: its rows, their floors, what does not fit, and one report against another."""

from __future__ import annotations

import contextlib
import io
import json
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.buckets import BucketedStep, Buckets
from ferrum_jax.cli import bench_compare, bench_compile, bench_experts, bench_roofline, bench_sweep, main
from ferrum_jax.cli.bench_roofline import Ceilings, ceilings, decode_bytes, experts_touched, prefill_flops
from ferrum_jax.cli.bench_sweep import gaps_of
from ferrum_jax.errors import CapacityError
from ferrum_jax.generation import steps_for
from ferrum_jax.params import num_bytes
from tests.cli.test_bench import TOML

SWEEP = ("--batch", "1,2", "--context", "8,20", "--prefill", "5,40", "--new-tokens", "6", "--repeats", "2")


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("sizes") / "sizes.toml"
    path.write_text(TOML)
    return str(path)


@pytest.fixture(scope="module")
def report(sizes: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """(file of a sweep, its content)."""
    path = tmp_path_factory.mktemp("report") / "old.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_roofline, "KNOWN", {"cpu": (1e9, 1e12)})
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert main(["bench", "--synthetic", sizes, *SWEEP, "--json", "--dtype", "float32"]) == 0
    path.write_text(out.getvalue())
    return str(path), json.loads(out.getvalue())


@pytest.mark.once
def test_a_row_for_every_batch_and_context_and_one_for_every_prompt(report: tuple[str, dict[str, Any]]) -> None:
    _, found = report
    assert [(row["context"], row["batch"]) for row in found["decode"]] == [(8, 1), (8, 2), (20, 1), (20, 2)]
    assert [row["prompt_tokens"] for row in found["prefill"]] == [5, 40]
    for row in found["decode"] + found["prefill"]:
        assert row["fits"] and 0 < row["min"] <= row["tokens_per_second"] <= row["max"]
        assert row["first_token_seconds"] > 0 and row["temporary_bytes"] > 0 and row["peak_memory_bytes"] > 0
    cold, warm = (
        sum(row[f"compile_seconds_{state}"] for row in found["decode"] + found["prefill"]) for state in ("cold", "warm")
    )
    assert cold > warm > 0
    for row in found["decode"]:
        assert 2 <= row["experts_touched"] <= min(4, 2 * row["batch"])
        assert 1 <= row["distinct_tokens"] <= row["batch"] and (row["batch"] > 1 or row["distinct_tokens"] == 1)
        assert 0 < row["inter_token_p50_seconds"] <= row["inter_token_p99_seconds"]
        least = (row["weight_bytes"] + row["live_cache_bytes"]) / 1e9
        assert row["roofline_tokens_per_second"] == pytest.approx(row["batch"] / least)
        assert row["roofline_fraction"] == pytest.approx(row["tokens_per_second"] * least / row["batch"])
    for row in found["prefill"]:
        assert row["roofline_fraction"] == pytest.approx(row["flops"] / 1e12 / row["first_token_seconds"])
    assert found["ceilings"] == {"bytes_per_second": 1e9, "flops_per_second": 1e12, "source": "known"}
    assert (
        found["experts_touched"] == "counted in a forward pass over the last 16 tokens of every row"
        and found["layers"] == 3
    )


@pytest.mark.once
def test_text_for_people_and_a_comparison(
    sizes: str, report: tuple[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = report
    arguments = ["--context", "8", "--new-tokens", "6", "--prefill", "6", "--repeats", "1", "--dtype", "bfloat16"]
    assert main(["bench", "--synthetic", sizes, *arguments, "--compare", path]) == 0
    out, said = capsys.readouterr()
    assert re.search(
        r"compiled for 2 lines in \d+\.\d s\ndecode 1 x 8: \d+ tok/s \(\d+\.\d s for this line\)\nprefill 6: ", said
    )
    assert re.search(
        r"decode\nbatch +context +tok/s +p50 ms +p99 ms +experts +of roofline +cache +compile s +warm s\n", out
    )
    assert re.search(r"prefill\nprompt_tokens +tok/s +first token ms", out)
    assert f"new over {path}\nnot alike: dtype was float32, is bfloat16\n" in out
    assert re.search(r"\ndecode 1 x 8 +\d+\.\d\dx ", out)
    assert "only in the new report: prefill 6\n" in out and "only in the old one: decode 2 x 8, decode 1 x 20" in out
    assert "\nroofline" not in out  # not known on a CPU


@pytest.mark.once
def test_rows_draw_tokens_of_their_own(sizes: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--context", "8", "--batch", "8", "--new-tokens", "6", "--repeats", "1", "--temperature", "100"]
    once = ["--compile-once", "--quiet", "--json"]
    assert main(["bench", "--synthetic", sizes, "--layers", "1", *arguments, *once]) == 0
    out, said = capsys.readouterr()
    found = json.loads(out)
    assert said == "" and found["decode"][0]["compile_seconds_cold"] > 0
    assert found["decode"][0]["compile_seconds_warm"] is None
    assert 5 < found["decode"][0]["distinct_tokens"] <= 8 and found["temperature"] == 100


@pytest.mark.once
def test_a_cache_in_int8_is_smaller(sizes: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--layers", "1", "--context", "24", "--new-tokens", "2", "--repeats", "1", "--dtype", "float32"]
    lines = []
    for more in ([], ["--cache-dtype", "int8"]):
        assert main(["bench", "--synthetic", sizes, *arguments, *more, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["cache_dtype"] == (more or ["float32"])[-1]
        lines += report["decode"]
    full, codes = lines
    assert codes["cache_bytes"] < 0.6 * full["cache_bytes"]
    assert codes["live_cache_bytes"] < 0.6 * full["live_cache_bytes"]


@pytest.mark.once
def test_a_report_against_itself_has_ratios_of_one(report: tuple[str, dict[str, Any]]) -> None:
    path, found = report
    compared = bench_compare.compare(found, bench_compare.read_report(path))
    assert (compared["only_new"], compared["only_old"], compared["differences"]) == ([], [], {})
    ratios = [ratio for row in compared["rows"] for ratio in row["ratios"].values()]
    assert len(ratios) > 20 and set(ratios) == {1.0}
    doubled = json.loads(json.dumps(found))
    doubled["decode"][1]["tokens_per_second"] *= 2
    rows = {row["row"]: row["ratios"] for row in bench_compare.compare(doubled, found)["rows"]}
    assert rows["decode 2 x 8"]["tokens_per_second"] == 2 and rows["decode 1 x 8"]["tokens_per_second"] == 1


def test_a_report_of_lines_that_were_compiled_once_is_compared() -> None:
    twice = {"batch": 1, "context": 8, "fits": True, "tokens_per_second": 4.0, "compile_seconds_warm": 0.5}
    old, new = ({"decode": [row], "prefill": []} for row in (twice, {**twice, "compile_seconds_warm": None}))
    for compared in (bench_compare.compare(new, old), bench_compare.compare(old, new)):
        assert compared["rows"] == [{"row": "decode 1 x 8", "ratios": {"tokens_per_second": 1.0}}]


def test_one_shape_is_compared_too(sizes: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["bench", "--synthetic", sizes, "--prompt-tokens", "4", "--new-tokens", "3", "--repeats", "1", "--json"]
    assert main(run) == 0
    (tmp_path / "one.json").write_text(capsys.readouterr().out)
    assert main([*run, "--compare", str(tmp_path / "one.json")]) == 0
    rows = {row["row"]: row["ratios"] for row in json.loads(capsys.readouterr().out)["compare"]["rows"]}
    assert rows["parameter_bytes"] == {"parameter_bytes": 1.0}
    assert rows["decode, layers 3 prompt_tokens 4 new_tokens 3 batch 1"]["tokens_per_second"] > 0


@pytest.mark.once
def test_rows_that_do_not_fit_say_so_and_the_others_are_measured(
    sizes: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = 2 * 3 * 64 * 16 * 2 * 4 + 8  # keys and values of two rows of 64 tokens
    real = bench_sweep._check_cache

    def small(model: fj.Model, batch: int, slots: int, cache_dtype: str | None) -> int:
        with monkeypatch.context() as patch:
            patch.setattr("ferrum_jax.environment.free_memory", lambda: held)
            return real(model, batch, slots, cache_dtype)

    monkeypatch.setattr(bench_sweep, "_check_cache", small)
    arguments = ["--batch", "2,3", "--context", "8", "--new-tokens", "4", "--repeats", "1", "--dtype", "float32"]
    assert main(["bench", "--synthetic", sizes, *arguments, "--json"]) == 0
    fits, too_large = json.loads(capsys.readouterr().out)["decode"]
    assert fits["fits"] and fits["cache_bytes"] == held
    assert too_large == {
        "batch": 3,
        "context": 8,
        "fits": False,
        "cache_bytes": (held - 8) // 2 * 3 + 12,
        "free_bytes": held,
    }
    assert main(["bench", "--synthetic", sizes, *arguments]) == 0
    out, said = capsys.readouterr()
    assert "decode 3 x 8: does not fit: its cache takes 72.0 KiB, 48.0 KiB are free" in out
    assert said.endswith("\ndecode 3 x 8: does not fit\n")


def test_a_device_that_runs_out_of_memory_is_a_row_and_other_errors_are_errors(
    sizes: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(words: str) -> Any:
        def timed(*arguments: Any) -> Any:
            raise jax.errors.JaxRuntimeError(words)

        return timed

    arguments = ["bench", "--synthetic", sizes, "--prefill", "4", "--repeats", "1"]
    monkeypatch.setattr(bench_sweep, "_timed", broken("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."))
    assert main(arguments) == 0
    assert "prefill 4: does not fit: RESOURCE_EXHAUSTED: Out of memory" in capsys.readouterr().out
    monkeypatch.setattr(bench_sweep, "_timed", broken("INTERNAL: the bus"))
    assert main(arguments) == 1 and "INTERNAL: the bus" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"), [(jax.errors.JaxRuntimeError("INTERNAL: the bus"), 1), (KeyboardInterrupt(), 130)]
)
def test_a_sweep_that_ends_early_still_prints_the_lines_that_are_over(
    sizes: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    real = bench_sweep._timed

    def second_breaks(model: fj.Model, prompts: Any, line: Any) -> Any:
        if line.prompt == 9:
            raise error
        return real(model, prompts, line)

    monkeypatch.setattr(bench_sweep, "_timed", second_breaks)
    arguments = ["bench", "--synthetic", sizes, "--prefill", "4,9,5", "--repeats", "1"]
    assert main([*arguments, "--json"]) == code
    out, said = capsys.readouterr()
    found = json.loads(out)
    assert [row["prompt_tokens"] for row in found["prefill"]] == [4] and found["prefill"][0]["tokens_per_second"] > 0
    assert found["ended_by"] == (str(error) or "KeyboardInterrupt")
    assert "INTERNAL: the bus" in said or code == 130
    assert main(arguments) == code
    assert f"ended early: {found['ended_by']}" in capsys.readouterr().out


def test_steps_that_do_not_fit_beside_the_cache_are_a_row_too(
    sizes: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ferrum_jax.budget.free_memory", lambda: 25_000)  # a cache of 24 KiB fits alone
    assert main(["bench", "--synthetic", sizes, "--prefill", "4,40", "--repeats", "1", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert "prefill 4: does not fit: a cache of 64 tokens needs 0.00 GiB; the device has" in out
    assert "prefill 40: does not fit: " in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--batch", "1,x"], 2, "--batch is 1,x; give positive numbers with commas between them, such as 1,16,64"),
        (["--batch", "0"], 2, "--batch is 0; give positive numbers"),
        (["--context", "8,"], 2, "--context is 8,; give positive numbers"),
        (["--prefill", "-3"], 2, "--prefill is -3; give positive numbers"),
        (
            ["--context", "8", "--new-tokens", "16"],
            2,
            "--context is 8; a decode of 16 new tokens around it begins 8 before",
        ),
        (["--context", "60", "--new-tokens", "16"], 1, "--context 60 with 16 new tokens reaches 68; .* context is 64"),
        (["--prefill", "63"], 1, "--prefill 63 and 2 new tokens need a context of 65; this model's is 64"),
        (["--temperature", "1"], 2, "--temperature goes with a sweep; give --batch 1,4, --context or --prefill too"),
        (["--compile-once"], 2, "--compile-once goes with a sweep; without one every program is compiled once anyway"),
        (["--prefill", "4", "--temperature", "-1"], 2, "--temperature is -1.0; give 0 for greedy, or 0.001 to 100"),
        (["--compare", "absent.json"], 2, r"--compare absent.json cannot be read \(No such file"),
    ],
)
def test_what_is_refused(
    sizes: str, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert main(["bench", "--synthetic", sizes, *arguments]) == code
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "is no JSON"),
        ("{}", "is no report of bench"),
        ("[1]", "is no report of bench"),
        ('{"device": 1, "prefill": 1, "decode": [2]}', "is no report of bench"),
    ],
)
def test_files_that_are_no_reports(tmp_path: Any, sizes: str, capsys: Any, text: str, message: str) -> None:
    (tmp_path / "old.json").write_text(text)
    assert main(["bench", "--synthetic", sizes, "--compare", str(tmp_path / "old.json")]) == 2
    assert message in capsys.readouterr().err


def test_what_is_compiled_beforehand_is_what_a_line_asks_for() -> None:
    model = fj.load("demo", quiet=True, weight_cache=False)
    sampling = [fj.SamplingParams(max_tokens=7, ignore_eos=True, temperature=1.0, seed=row) for row in range(2)]
    lines = [
        bench_compile.Line(
            2, 20, 128, Buckets(batch=(2,), prefill=(16,), cache=(128,), steps=(1, 4)), sampling, "int8"
        ),
        bench_compile.Line(1, 40, 128, Buckets(batch=(1,), prefill=(16, 24), cache=(128,)), sampling[:1], None),
    ]
    found = bench_compile.compile_all(model, lines)
    before = {(record.step, record.bucket) for record in steps_for(model.cfg).records()}
    assert {name for name, _ in before} == {"prefill", "sample", "decode", "decode 4"}
    assert all(row["compile_seconds_cold"] > 0 and row["temporary_bytes"] > 0 for row in found)
    for line in lines:
        run = bench_sweep._timed(model, [[5] * line.prompt] * line.batch, line)
        assert run.stats.compile_seconds == 0 and len(run.written[0]) == 7
    records = steps_for(model.cfg).records()
    assert {(record.step, record.bucket) for record in records} == before and len(records) == len(before)


def test_a_program_that_does_not_compile_is_left_to_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fj.load("demo", quiet=True, weight_cache=False)
    line = bench_compile.Line(1, 3, 128, Buckets(batch=(1,), cache=(128,)), [fj.SamplingParams(max_tokens=2)], None)
    right = BucketedStep.trace

    def trace(step: Any, bucket: Any, **arguments: Any) -> Any:
        if step.name == "prefill":
            raise CapacityError("too wide")
        if step.name == "sample":
            return broken
        return right(step, bucket, **arguments)

    def broken() -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(BucketedStep, "trace", trace)
    [found] = bench_compile.compile_all(model, [line])
    assert [record.step for record in steps_for(model.cfg).records()] == ["decode"]
    assert found["compile_seconds_cold"] > 0


def test_the_users_compile_cache_is_left_as_it_was() -> None:
    before = {name: jax.config.values[name] for name in ("jax_compilation_cache_dir", "jax_enable_compilation_cache")}
    with bench_compile.own_compile_cache():
        assert jax.config.values["jax_compilation_cache_dir"] != before["jax_compilation_cache_dir"]
    assert {name: jax.config.values[name] for name in before} == before


def test_tokens_of_one_dispatch_share_the_wait_for_it() -> None:
    assert gaps_of([0, 1, 2, 4]) == [1, 1, 2]
    assert gaps_of([0, 8, 8.1, 8.2, 8.3, 16.3]) == [2, 2, 2, 2, 8.3]
    assert gaps_of([5]) == []


def test_bytes_of_a_step_are_those_of_the_leaves_it_reads() -> None:
    model = fj.load("demo", quiet=True, weight_cache=False)
    cfg, params = model.cfg, model.params
    experts = sum(num_bytes(run["moe"]["experts"]) for run in params["layers"])
    rest = num_bytes(params) - experts
    one = decode_bytes(cfg, params, 1, 100)
    assert one["weights"] == pytest.approx(rest + experts * cfg.top_k / cfg.num_experts)  # tied: all of the embedding
    assert one["cache"] == 100 * num_bytes(jax.eval_shape(lambda: fj.init_cache(cfg, 1, 1))) - 400
    assert decode_bytes(cfg, params, 8, 100, cfg.top_k)["weights"] == one["weights"]  # eight rows, the same experts
    assert decode_bytes(cfg, params, 10**6, 1)["weights"] == pytest.approx(rest + experts)


@pytest.mark.once
def test_experts_are_counted_where_rows_send_their_last_token() -> None:
    model = fj.load("demo", quiet=True, weight_cache=False)
    same, different = [[5, 6, 7]] * 8, np.random.default_rng(0).integers(0, 4096, (20, 3)).tolist()
    assert bench_experts.experts_counted(model, same) == model.cfg.top_k
    found = bench_experts.experts_counted(model, different)
    _, aux = fj.forward(model.params, jnp.asarray(different, jnp.int32), model.cfg, with_aux=True)
    (routing,) = aux.routing
    assert found == np.mean([len(np.unique(layer[:, -1])) for layer in routing.experts])
    assert found is not None and found > 8


@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_experts_touched_are_those_that_equal_chances_touch(tokens: int) -> None:
    cfg = fj.load("demo", quiet=True, weight_cache=False).cfg
    rng = np.random.default_rng(0)
    counts = [
        len(np.unique([rng.permutation(cfg.num_experts)[: cfg.top_k] for _ in range(tokens)])) for _ in range(2000)
    ]
    assert experts_touched(cfg, tokens) == pytest.approx(np.mean(counts), rel=0.02)


def test_operations_of_a_prompt() -> None:
    cfg = fj.load("demo", quiet=True, weight_cache=False).cfg
    d, f, k, h = cfg.hidden_size, cfg.moe_intermediate_size, cfg.top_k, cfg.head_dim
    projections = d * h * (2 * cfg.num_heads + 2 * cfg.num_kv_heads)
    layer = projections + 3 * k * d * f + d * cfg.num_experts
    attention = sum(4 * cfg.num_heads * h * (i + 1) for i in range(7))
    expected = cfg.num_layers * (2 * 7 * layer + attention) + 2 * d * cfg.vocab_size
    assert prefill_flops(cfg, 7) == expected


def test_a_cpu_has_no_ceiling_and_an_unknown_device_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ceilings() == Ceilings(None, None, None)
    assert bench_roofline._measured_bandwidth(2**16, 1) > 0
    device = SimpleNamespace(device_kind="NVIDIA A100", platform="gpu")
    monkeypatch.setattr(bench_roofline, "_measured_bandwidth", lambda: 1.5e12)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert ceilings() == Ceilings(1.5e12, None, "measured")
    device.device_kind = "NVIDIA H200"
    assert ceilings() == Ceilings(4.65e12, 790e12, "known")
