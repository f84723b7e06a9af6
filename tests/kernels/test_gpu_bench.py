"""The GPU benchmarks, as far as they run without one: what they check, know of the device and print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_kernels import triton
from tests.support.bench_scripts import FOLDER, script
from tests.support.triton_cases import ignore_deprecation

compile_times, gpu_state, gpu_table = script("compile_times"), script("gpu_state"), script("gpu_table")
NAMES = {"driver": "driver_version", "sm_mhz": "clocks.sm"}
needs_pallas = pytest.mark.skipif(jax.__version_info__ < (0, 10, 2), reason="the Triton kernels need jax 0.10.2")


def put_on_the_path(folder, monkeypatch, script):
    file = folder / "nvidia-smi"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_clocks_are_asked_while_the_device_works(tmp_path, monkeypatch):
    put_on_the_path(tmp_path, monkeypatch, 'sleep 0.05; echo "$2" >&2; echo "580.1.2, 1980"')
    calls = []
    assert gpu_state.ask(NAMES, lambda: calls.append(1)) == {"driver": "580.1.2", "sm_mhz": 1980.0}
    assert len(calls) > 1


@pytest.mark.parametrize("script", ["exit 9", "echo 'No devices were found'", "echo '[N/A], [Not Supported]'"])
def test_clocks_that_are_not_told_are_none(tmp_path, monkeypatch, script):
    put_on_the_path(tmp_path, monkeypatch, script)
    assert gpu_state.ask(NAMES) == {"driver": None, "sm_mhz": None}


def test_without_nvidia_smi_nothing_is_known(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert gpu_state.versions() | {"date": ""} == {
        "device": jax.devices()[0].device_kind,
        "driver": None,
        "most_sm_mhz": None,
        "most_memory_mhz": None,
        "jax": jax.__version__,
        "jaxlib": gpu_state.jaxlib.__version__,
        "date": "",
    }


@pytest.fixture(scope="module")
def stacks():
    return gpu_table.random_stack(1, (2, 4), 256, 256, 128), gpu_table.random_stack(2, (2, 4), 128, 256, 128)


@ignore_deprecation
@needs_pallas
@pytest.mark.parametrize("routing", ["uniform", "one"])
def test_the_check_passes_what_is_right(stacks, routing):
    with triton.interpreted():
        assert 0 < gpu_table.checked(stacks, 5, 2, routing, jnp.bfloat16) <= gpu_table.LARGEST_ERROR


@ignore_deprecation
@needs_pallas
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda y: y.at[0].multiply(2), r"1 tokens, one routing: the relative error is 1\.0e\+00, over 0\.0029\."),
        (lambda y: y.at[0, 7].set(jnp.nan), r"1 tokens, one routing: the result holds a number that is not finite\."),
    ],
)
def test_the_check_stops_what_is_wrong(stacks, monkeypatch, spoil, message):
    right = triton.routed_experts
    monkeypatch.setattr(triton, "routed_experts", lambda *given: (spoil((found := right(*given))[0]), *found[1:]))
    with triton.interpreted(), pytest.raises(ValueError, match=message):
        gpu_table.checked(stacks, 1, 2, "one", jnp.bfloat16)


@ignore_deprecation
@needs_pallas
@pytest.mark.once
def test_a_row_of_skewed_routing_has_its_own_floor(stacks, monkeypatch):
    cfg = SimpleNamespace(hidden_size=256, moe_intermediate_size=128, num_experts=4, top_k=2, dtype="bfloat16")
    monkeypatch.setattr(gpu_table, "device", lambda: "H100")
    monkeypatch.setenv("PATH", "")
    with triton.interpreted():
        [one] = gpu_table.rows(cfg, "qwen3-30b-a3b", [3], 2, 1, "one", check=True)
    assert one["live_experts"] == 2.0
    nbytes = sum(stack.nbytes for stack in stacks) / 2 / 4 * 2
    assert one["floor_microseconds"] == pytest.approx(nbytes / 3.1e12 * 1e6)
    assert one["times_floor"] == pytest.approx(one["microseconds"] / one["floor_microseconds"])
    assert one["marlin_microseconds"] is None  # it was recorded with uniform routing
    assert 0 < one["relative_error"] < gpu_table.LARGEST_ERROR
    text = gpu_table.line(one)
    assert f"{one['times_floor']:7.1f}" in text and f"{one['relative_error']:8.1e}" in text
    json.dumps(one)


@pytest.mark.parametrize("on_a_gpu", [True, False])
def test_compile_times_come_from_three_processes_with_one_cache(monkeypatch, on_a_gpu):
    ran = []

    def run(command, env, **how):
        ran.append((command[1:], env["JAX_COMPILATION_CACHE_DIR"]))
        assert os.path.isdir(env["JAX_COMPILATION_CACHE_DIR"])
        said = [[3.0, 2.5], 4.5, True], [[0.25, 0.5], 0.625, True], [[0.125, 0.25], 0.375, on_a_gpu]
        return subprocess.CompletedProcess(command, 0, json.dumps(said[len(ran) - 1]), "")

    monkeypatch.setattr(compile_times.subprocess, "run", run)
    found = compile_times.measure(FOLDER / "none.toml", [1, 4], "triton")
    assert len({cache for _, cache in ran}) == 1
    command = [str(FOLDER / "compile_times.py"), str(FOLDER / "none.toml"), "1,4", "triton"]
    assert [words for words, _ in ran] == [[*command, keeps] for keeps in ("1", "0", "1")]
    whole = ("0.12", "0.25", "0.38") if on_a_gpu else ("-",) * 3
    assert (found["first_all"], found["cached_all"], found["kept_all"]) == (4.5, 0.625, 0.375 if on_a_gpu else None)
    assert [line.split() for line in compile_times.text_of(found).splitlines()[1:]] == [
        ["1", "3.00", "0.25", whole[0]],
        ["4", "2.50", "0.50", whole[1]],
        ["all", "4.50", "0.62", whole[2]],
    ]


def test_a_process_that_cannot_compile_is_told_of(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "error: out of memory")
    monkeypatch.setattr(compile_times.subprocess, "run", lambda *_, **how: failed)
    with pytest.raises(SystemExit, match="error: the process that compiles failed:\nerror: out of memory"):
        compile_times.measure(FOLDER / "none.toml", [1], None)


def test_a_decode_step_compiles_without_weights():
    config = FOLDER.parents[1] / "configs" / "tales-13m.toml"
    [seconds], whole = compile_times.compile_all(config, [2], "xla")
    assert 0 < seconds <= whole


def test_options_of_a_gpu_are_refused_without_one():
    command = [sys.executable, str(FOLDER / "moe_layer.py"), "--routing", "zipf"]
    paths = os.pathsep.join([str(FOLDER.parents[1]), str(FOLDER.parent)])
    ended = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    )
    assert ended.returncode == 2
    assert "error: --check and --routing are for the kernels of an NVIDIA GPU" in ended.stderr


@pytest.mark.parametrize("name", ["moe_layer", "counters", "cpu_layer"])
def test_what_are_no_numbers_of_tokens_is_said(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--tokens", "1,x"])
    with pytest.raises(SystemExit, match="2"):
        script(name).main()
    assert "argument --tokens: '1,x' are not positive numbers with commas between them, such as 1,16" in (
        capsys.readouterr().err
    )


def result_file(folder, **more):
    rows = [
        {"tokens": t, "microseconds": 20.0 * t, "floor_microseconds": 9.0 * t, "marlin_microseconds": 30.0 * t}
        for t in (1, 8, 64)
    ]
    found = {"device": "NVIDIA H100 80GB HBM3", "jax": "0.11.2", "config": "mixtral-8x7b.toml", "routing": "uniform"}
    file = folder / "result.json"
    file.write_text(json.dumps({**found, "rows": rows, **more}))
    return file


def test_the_plot_of_a_result_is_the_same_each_time(tmp_path, capsys):
    plot = script("plot_moe_layer")
    result = result_file(tmp_path, date="2026-11-27")
    for name in ("a.svg", "b.svg"):
        plot.main([str(result), "--out", str(tmp_path / name)])
    assert (tmp_path / "a.svg").read_text() == (tmp_path / "b.svg").read_text()
    figure = plot.draw(json.loads(result.read_text()))
    [axes] = figure.axes
    measured = axes.lines[-1]
    assert (list(measured.get_xdata()), list(measured.get_ydata())) == ([1, 8, 64], [20.0, 160.0, 1280.0])
    said = [text.get_text() for text in axes.texts]
    assert said.count("1.50x") == 3
    assert "NVIDIA H100 80GB HBM3, jax 0.11.2, 2026-11-27; lower is better" in said
    assert axes.get_title(loc="left") == "One expert layer of Mixtral-8x7B"
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "a.svg"), str(tmp_path / "b.svg")]


@pytest.mark.parametrize("text", ["", "not json", '{"rows": [{"tokens": 1, "milliseconds": 2.0}]}'])
def test_what_is_no_result_is_not_drawn(tmp_path, capsys, text):
    file = tmp_path / "cpu.json"
    file.write_text(text)
    with pytest.raises(SystemExit, match="2"):
        script("plot_moe_layer").main([str(file), "--out", str(tmp_path / "none.svg")])
    assert f"{file} is not what moe_layer.py --json prints on a GPU" in capsys.readouterr().err
    assert not (tmp_path / "none.svg").exists()


NCU = """==PROF== Connected to process 12
"ID","Kernel Name","gpu__time_duration.sum","dram__bytes_read.sum","launch__registers_per_thread","{a}","{b}","{c}"
"","","nsecond","Mbyte","register/thread","inst","inst","inst"
"0","gptq_gated","10,400","20.8","168","3.0","1.0","0"
"1","input_reduce_fusion(float *)","2000","n/a","32","0","0","0"
==PROF== Disconnected from process 12
"""


def test_counters_are_read_from_ncu():
    counters = script("counters")
    names = ("long_scoreboard", "barrier", "wait")
    text = NCU.format(**{k: f"{counters.STALLS}{n}_per_issue_active.ratio" for k, n in zip("abc", names, strict=True)})
    gated, total = counters.parse(text)
    assert (gated["kernel"], gated["microseconds"], gated["registers"]) == ("gptq_gated", 10.4, 168.0)
    assert gated["terabytes_per_second"] == pytest.approx(2.0)
    assert gated["stalls"] == {"long_scoreboard": 0.75, "barrier": 0.25}
    assert gated["dram_percent"] is None  # not asked for in this table
    assert (total["kernel"], total["microseconds"], total["stalls"]) == ("input_reduce_fusion", 2.0, {})
    shown = counters.line(gated)
    assert len(shown.split("  long")[0]) == len(counters.header().split("  waits")[0])
    assert shown.startswith("gptq_gated          10.4  2.00      -")
    assert shown.endswith("long_scoreboard 75%, barrier 25%")
    with pytest.raises(ValueError, match="ncu printed no table"):
        counters.parse("==ERROR== no permission\n")


def test_without_ncu_or_its_permission_it_says_so(tmp_path, monkeypatch, capsys):
    counters = script("counters")
    assert counters.main(["--ncu", str(tmp_path / "ncu")]) == 3
    assert "ncu is not on the path; it comes with CUDA as Nsight Compute." in capsys.readouterr().err
    program = tmp_path / "ncu"
    program.write_text("#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM'\nexit 1\n")
    program.chmod(0o755)
    assert counters.main(["--ncu", str(program), "--tokens", "8"]) == 1
    assert "8 tokens: ncu printed no table; it ended with 1:\n==ERROR== ERR_NVGPUCTRPERM" in capsys.readouterr().err


@ignore_deprecation
@needs_pallas
@pytest.mark.once
def test_what_the_sanitizer_watches_is_right(capsys, monkeypatch):
    small = script("small_shapes")
    rng = np.random.default_rng(0)
    with triton.interpreted():
        for run, dialect, rows in ((small.product, small.DIALECTS[4], 5), (small.grouped, small.DIALECTS[0], 9)):
            assert run(rng, dialect, rows) <= small.LARGEST_ERROR
        assert small.layer(rng, small.DIALECTS[3], 3) <= small.LARGEST_ERROR
        for tokens in (3, 37):  # logits at once, and in parts
            assert small.sums(rng, (), tokens) <= small.LARGEST_ERROR
        for weighted in (True, False):
            assert small.pairs(rng, (weighted,), 5) <= small.LARGEST_ERROR
        assert small.filters(rng, ("top-p",), 1) <= small.LARGEST_ERROR
        assert small.parts(rng, (small.CUTS[1],), 3) <= small.LARGEST_ERROR
        for kind, tokens in ((small.CACHES[1], 5), (small.CACHES[2], 1)):
            assert small.attention(rng, kind, tokens) <= small.LARGEST_ERROR
    kinds = {(dialect, run.__name__) for run, dialect, _ in small.cases()}
    assert {dialect for dialect, name in kinds if name == "layer"} == set(small.DIALECTS)
    names = {"product", "grouped", "layer", "sums", "pairs", "filters", "attention", "parts"}
    assert {name for _, name in kinds} == names
    assert "The Mosaic GPU kernels are left out: it needs a" in capsys.readouterr().err
    monkeypatch.setattr(small.mosaic, "unavailable", lambda: None)
    dealt = [case for part in range(3) for case in list(small.cases())[small.share_of(f"{part}/3")]]
    assert {run.__name__ for run, *_ in small.cases()} - {name for _, name in kinds} == {"ring", "matrix"}
    assert sorted(map(str, dealt)) == sorted(map(str, small.cases()))


def test_a_share_that_there_is_not_is_refused(capsys):
    with pytest.raises(SystemExit):
        script("small_shapes").main(["--share", "4/4"])
    assert "4/4 is no share; give I/N with I from 0 to N - 1, such as 0/4" in capsys.readouterr().err


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="what is said without a GPU")
def test_the_sanitizer_has_nothing_to_watch_without_a_gpu(capsys):
    assert script("small_shapes").main([]) == 3
    assert "error: these are the kernels of an NVIDIA GPU: it needs an NVIDIA GPU" in capsys.readouterr().err
