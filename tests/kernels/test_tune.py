"""kernels/bench/tune.py: candidates that run, a log that survives being cut off, and the choice made of it."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
from typing import Any

import jax
import pytest

from ferrum_jax.config_file import load_toml_config
from ferrum_kernels import dequantize, triton, triton_tiles
from ferrum_kernels.tiles import untile
from ferrum_kernels.triton_matmul import Rows
from ferrum_kernels.triton_tiles import fit
from tests.conftest import ROOT
from tests.support.bench_scripts import script
from tests.support.triton_cases import ignore_deprecation, lower_for_cuda

tune, tune_cases, tune_device = script("tune"), script("tune_cases"), script("tune_device")
tune_parts, tune_rings, tune_tables = script("tune_parts"), script("tune_rings"), script("tune_tables")
Case = tune_cases.Case
LOADS = [0.25, 1.0, 4.0]
TUNED = triton_tiles.FOLDER
TABLE, RINGS = (json.loads((TUNED / f"{name}-h100.json").read_text()) for name in ("nvidia", "mosaic"))
CASES = tune_cases.expert_cases(256, 128, 8, LOADS) + tune_cases.row_cases([1, 64], [(256, 128)])
CASES += tune_cases.few_cases(256, 128, 8, 2, TABLE["few"])


def all_cases():
    options = tune.parse([])
    return tune.candidates(options, load_toml_config(options.config), TABLE, RINGS, options.rings)


@pytest.fixture(autouse=True)
def flags_stay(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # tune.py adds to it


def fill(log, cases=CASES, microseconds=lambda case: float(sum(case.cut))):
    for case in cases:
        log.add(case, microseconds(case))


def test_candidates_divide_their_weights_and_differ():
    cases = all_cases()
    assert len({case.key for case in cases}) == len(cases)
    for case in cases:  # as the kernels read an entry
        if case.product.startswith("ring"):
            assert tune_rings.is_valid(tune_rings.ring_of(case))
            assert tune_rings.ring_of(case).outputs in (128, 256)  # which divide what `mosaic.takes`
        elif case.product == "parts":
            cut = tune_parts.cut_of(case)
            assert cut.parts > 1 and case.columns % cut.n == case.blocks % cut.step == 0
        elif case.product.startswith("few"):
            assert triton_tiles._cut(list(case.cut), case.columns, case.blocks) == case.few
        elif case.product not in ("place", "whole"):
            assert fit(case.tile, case.columns, case.blocks) == case.tile
            assert case.tile == triton_tiles._tile(list(case.cut))[1]
    for load in tune_cases.LOADS:  # every load can be served
        assert {case.product for case in cases if case.load == round(load * 128)} >= {"up", "down", "place"}
    assert {case.load for case in cases if case.product == "few_down"} == {8, 16, 32, 64}


def test_a_run_that_was_killed_goes_on(tmp_path):
    path = tmp_path / "log.jsonl"
    tune.Log(path, "a").add(CASES[0], 1.5)
    with path.open("a") as file:
        file.write(json.dumps({"source": "a", "key": CASES[1].key, "microseconds": 2.5})[:-7])  # cut off
    log = tune.Log(path, "a")
    assert log.results == {CASES[0].key: 1.5}
    log.add(CASES[1], "XlaRuntimeError: too much shared memory")
    again = tune.Log(path, "a")
    assert again.results == {CASES[0].key: 1.5, CASES[1].key: "XlaRuntimeError: too much shared memory"}
    assert tune.left(CASES[:3], again) == [CASES[2]]
    assert tune.left(CASES[:3], tune.Log(path, "other kernels")) == CASES[:3]


def test_results_are_of_all_sources_of_the_kernels(tmp_path, monkeypatch):
    needed, left = set(), [(ROOT / "kernels" / "bench" / "tune_device.py").read_text()]
    while left:
        found = {
            name
            for node in ast.walk(ast.parse(left.pop()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in re.findall(r"(?:triton|mosaic)_\w+", ast.unparse(node))
            if (tune.KERNELS / f"{name}.py").exists()
        }
        left += [(tune.KERNELS / f"{name}.py").read_text() for name in found - needed]
        needed |= found
    assert set(tune.SOURCES) == needed
    names = {tune.source_of_kernels()}
    shutil.copytree(tune.KERNELS, tmp_path / "copy", ignore=shutil.ignore_patterns("*.so", "native", "__pycache__"))
    monkeypatch.setattr(tune, "KERNELS", tmp_path / "copy")
    assert tune.source_of_kernels() in names
    for name in tune.SOURCES:
        with (tmp_path / "copy" / f"{name}.py").open("a") as file:
            file.write("# changed\n")
        names.add(tune.source_of_kernels())
    assert len(names) == 1 + len(tune.SOURCES)


def test_a_run_measures_what_is_left_and_stops_in_time(tmp_path):
    log, seen = tune.Log(tmp_path / "log.jsonl", "a"), []
    log.add(CASES[0], 1.0)

    def lower(case):
        if case == CASES[1]:
            raise RuntimeError("no such tile")

        def compile_it():
            if case == CASES[2]:
                raise MemoryError("out of shared memory")
            return lambda: 3.0

        return compile_it

    def run(seconds):
        report = lambda case, result: seen.append((case, result))  # noqa: E731
        return tune.run(CASES[:4], log, lower, seconds=seconds, threads=2, report=report)

    assert run(seconds=0) == 3
    assert seen == []
    assert run(seconds=60) == 0
    failed = ["RuntimeError: no such tile", "MemoryError: out of shared memory"]
    assert seen == list(zip(CASES[1:4], [*failed, 3.0], strict=True))


def test_a_case_that_never_ends_is_given_up(tmp_path):
    path = tmp_path / "log.jsonl"
    for others in (CASES[:2], CASES[1:2]):
        log = tune.Log(path, "a")
        assert tune.left(others, log) == list(others)
        log.begin(CASES[1])  # and the process is ended
    assert tune.Log(path, "a").results == {CASES[1].key: "the process ended while this ran, twice"}
    tune.Log(path, "a").add(CASES[1], 2.0)
    assert tune.Log(path, "a").results == {CASES[1].key: 2.0}


def test_a_run_ends_where_the_device_does(tmp_path):
    def lower(case):
        def timed():
            if case == CASES[1]:
                raise RuntimeError("an illegal memory access was encountered")
            return 2.0

        return lambda: timed

    log, working = tune.Log(tmp_path / "log.jsonl", "a"), [True]

    def run():
        how = {"seconds": 60, "threads": 1, "report": lambda case, result: None, "answers": lambda: working[0]}
        return tune.run(CASES[:9], log, lower, **how)

    working[0] = False
    assert run() == 7
    assert log.results == {CASES[0].key: 2.0, CASES[1].key: "RuntimeError: an illegal memory access was encountered"}
    assert run() == 0  # in a new process
    assert tune.answers()


def test_the_fastest_is_chosen_and_ties_go_to_the_smaller():
    up = [case for case in CASES if case.product == "up" and case.load == 32]
    results: dict[str, Any] = {case.key: 5.0 for case in up}
    assert tune_cases.best(up[::-1], results) == (min(up, key=lambda case: case.cut), 5.0)
    results[up[3].key], results[up[4].key] = 4.02, 4.01  # the same to a tenth
    assert tune_cases.best(up, results)[0] == min(up[3:5], key=lambda case: case.cut)
    results[up[3].key] = results[up[4].key] = "relative error 1.0"
    assert tune_cases.best(up, results)[1] == 5.0
    assert tune_cases.best(up, {}) is None


def test_both_products_take_the_places_of_the_larger_block():
    results = {case.key: 9.0 + case.cut[0] for case in CASES if case.load == 32 and case.product != "rows"}
    up = next(case for case in CASES if (case.product, case.load, case.cut[0]) == ("up", 32, 16))
    results[up.key] = 5.0
    [entry] = tune_cases.expert_rows(CASES, results, [4.0], 8)
    assert (entry["up"], entry["down"][0], entry["microseconds"]) == (list(up.cut), 8, [5.0, 17.0, 25.0])
    del results[Case("place", 8, 0, 32, (16,)).key]
    assert tune_cases.expert_rows(CASES, results, [4.0], 8) == []


def test_few_tokens_change_the_entries_that_serve_them():
    few = {"pairs": 4, "load": 1, "note": "", "cuts": [{"outputs": 300, "up": [1], "down": [1]}, {"outputs": None}]}
    cases = tune_cases.few_cases(256, 128, 8, 2, few)
    assert {case.load for case in cases} == {2, 4}
    results = {case.key: float(case.load * case.cut[2]) for case in cases if case.load == 2}
    found = tune_cases.few_rows(cases, results, few, 128)
    assert found["cuts"][0]["microseconds"] == [4.0, 4.0]
    assert found["cuts"][0]["up"][2] == 2 and found["cuts"][1] == {"outputs": None}
    assert few["cuts"][0]["up"] == [1]  # as it was


def test_rows_take_the_cut_that_suits_all_shapes():
    cases = tune_cases.row_cases([64], [(256, 128), (256, 64)])
    one, other, middle = cases[0].cut, cases[1].cut, cases[2].cut
    times = {(128, one): 1.0, (64, one): 9.0, (128, other): 9.0, (64, other): 1.0}
    results = {case.key: times.get((case.n, case.cut), 2.0 if case.cut == middle else 20.0) for case in cases}
    [entry] = tune_cases.row_rows(cases, results, [64])
    assert entry == {"load": None, "tile": list(middle), "microseconds": [2.0, 2.0]}
    # Each shape has its own fastest, and neither is it.
    assert one != middle != other


def test_the_table_that_is_written_is_the_one_that_is_read(tmp_path, monkeypatch, capsys):
    out, log = tmp_path / "nvidia-imaginary.json", tmp_path / "log.jsonl"
    config = tmp_path / "small.toml"
    config.write_text("")
    options = tune.parse(["--config", str(config), "--loads", "0.25,1,4", "--rows", "1,64"])
    results = tune.Log(log, "a")
    fill(results)
    table = tune_tables.make_table(options, (256, 128, 8), CASES, results.results, "NVIDIA Imaginary", TABLE)
    out.write_text(tune_cases.as_text(table))
    assert [entry["load"] for entry in table["experts"]] == [0.5, 2.0, None]
    assert [entry["load"] for entry in table["rows"]] == [8.0, None]
    monkeypatch.setattr(triton_tiles, "FOLDER", tmp_path)
    triton_tiles.table.cache_clear()
    try:
        assert triton_tiles.table("NVIDIA Imaginary 9") == table
        assert json.loads(out.read_text()) == table
    finally:
        triton_tiles.table.cache_clear()
    assert f"pairs per expert <= {'None':8} up {table['experts'][-1]['up']}" in tune_tables.text_of(table)
    # What was not measured stays as it was.
    kept = tune_tables.make_table(options, (256, 128, 8), CASES, {}, "NVIDIA Imaginary", TABLE)
    assert {name for name in kept if kept[name] != TABLE[name]} <= {"device", "date", "shapes", "note"}


def test_near_candidates_are_the_present_entry_and_its_neighbours():
    cases = [case for case in all_cases() if re.match("up|down|few|rows|place", case.product)]
    few = tune_cases.near(cases, TABLE, 128)
    assert {(case.product, case.load) for case in few} == {(case.product, case.load) for case in cases}
    assert len(few) < len(cases) / 2
    present = TABLE["experts"][-1]["up"]
    assert {sum(a != b for a, b in zip(c.cut, present, strict=True)) for c in few if c.product == "up"} >= {0, 1, 2}
    assert all(
        sum(a != b for a, b in zip(case.cut, present, strict=True)) <= 2
        for case in few
        if (case.product, case.load) == ("up", 256 * 128)
    )


def test_the_shipped_table_is_in_the_form_that_is_written():
    for path in TUNED.glob("*.json"):
        assert tune_cases.as_text(json.loads(path.read_text())) + "\n" == path.read_text(), path.name


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="what is said without a GPU")
def test_without_a_gpu_it_says_what_is_needed(tmp_path, capsys):
    arguments = ["--loads", "1", "--rows", "", "--no-few", "--log", str(tmp_path / "log.jsonl")]
    assert tune.main(arguments) == 3
    assert capsys.readouterr().err == (
        "error: tiles are measured on the GPU that will use them: it needs an NVIDIA GPU; the default device is 'cpu' "
        "of platform 'cpu'.\n--dry-run lists the candidates anywhere.\n"
    )
    assert tune.main([*arguments, "--dry-run"]) == 0
    text = capsys.readouterr()
    assert text.out.splitlines()[0].startswith("up 2048x1536 128 8,")
    assert f"{len(text.out.splitlines())} candidates, " in text.err
    assert not list(tmp_path.iterdir())


@ignore_deprecation
@pytest.mark.skipif(jax.__version_info__ < (0, 10, 2), reason="the Triton kernels need jax 0.10.2")
@pytest.mark.parametrize(
    "case",
    [
        Case("few_up", 256, 256, 4, (16, 1, 2, 2, 1)),
        pytest.param(Case("few_down", 128, 256, 4, (16, 1, 2, 2, 1)), marks=pytest.mark.once),
        Case("up", 256, 256, 24, (8, 64, 4, 3, 1)),
        pytest.param(Case("down", 128, 256, 24, (8, 64, 4, 2, 1)), marks=pytest.mark.once),
        pytest.param(Case("place", 8, 0, 24, (8,)), marks=pytest.mark.once),
        Case("place", 8, 0, 48, (2, 4)),
        Case("rows", 256, 64, 3, (8, 64, 4, 2, 2)),
        pytest.param(Case("parts", 512, 128, 5, (64, 16, 4, 3, 1, 4)), marks=pytest.mark.once),
        pytest.param(Case("whole", 512, 128, 5, ()), marks=pytest.mark.once),
        pytest.param(Case("whole", 512, 128, 17, (32, 64, 4, 3, 4)), marks=pytest.mark.once),
    ],
    ids=lambda case: case.key,
)
def test_what_is_timed_is_right(case, bench):
    program = bench.program(case)
    memory = program.memory()
    assert not program.error(memory) < tune_device.LARGEST_ERROR
    results = program.lower().compile()(memory, *program.arguments)
    assert len(results) == program.kernels
    assert program.error(results) < tune_device.LARGEST_ERROR
    spoilt = jax.tree.map(lambda leaf: leaf * 0 + 1, results)
    assert program.error(spoilt) > tune_device.LARGEST_ERROR


@pytest.fixture(scope="module")
def bench():
    return tune_device.Bench(256, 128, experts=8, top_k=2, layers=1, interpret=True)


def test_a_whole_run(tmp_path, monkeypatch, capsys):
    def fake_timer(options, d, f, experts, top_k):
        return lambda case: lambda: lambda: 100.0 / (case.cut[0] + 1) + case.cut[-1]

    monkeypatch.setattr(triton, "unavailable", lambda: None)
    monkeypatch.setattr(tune, "timer", fake_timer)
    out, log = tmp_path / "table.json", str(tmp_path / "log.jsonl")
    arguments = ["--loads", "1,64", "--rows", "8", "--parts", "", "--out", str(out), "--log", log, "--threads", "2"]
    assert tune.main([*arguments, "--budget-seconds", "0"]) == 0
    said = capsys.readouterr().err
    assert "candidates are not measured yet: run this again.\n" in said
    assert "The Mosaic GPU kernels are not measured: it needs a Hopper GPU, compute capability 9.0; " in said
    assert not out.exists()
    assert tune.main([*arguments, "--json"]) == 0
    text = capsys.readouterr()
    assert f"wrote {out}" in text.err
    table = json.loads(text.out)
    assert table == json.loads(out.read_text())
    # The largest block, and the smallest cut of those that are as fast.
    assert [entry["up"][0] for entry in table["experts"]] == [16, 128]
    assert table["rows"] == [{"load": None, "tile": [8, 16, 1, 3, 1], "microseconds": [12.1, 12.1, 12.1]}]
    assert tune.main([*arguments, "--dry-run"]) == 0
    assert " 0 without a result" in capsys.readouterr().err


@pytest.mark.skipif(jax.__version_info__ < (0, 10, 2), reason="the Triton kernels need jax 0.10.2")
def test_the_compiler_is_told_before_the_device_is_asked_for(tmp_path, monkeypatch):
    """XLA reads its flags once, when a backend starts."""
    devices, flags = jax.devices, []
    monkeypatch.setattr(jax, "devices", lambda: flags.append(os.environ["XLA_FLAGS"]) or devices())
    assert tune.main(["--dry-run", "--near", "--rows", "", "--log", str(tmp_path / "log.jsonl")]) == 0
    assert flags and all("--xla_gpu_command_buffer_scheduling_mode=SERIALIZE" in found for found in flags)


RING_CASES = [Case("ring_up", 256, 256, 48, (1, 4, 2, 2, 8, 16)), Case("ring_down", 128, 256, 48, (1, 6, 2, 4, 8))]
BOTH_CASE = Case("ring_both", 256, 128, 48, (2, 4, 0, 2, 8, 16))


def in_plain_jax(x, w, layer, rows, out_rows, ring, *, gated=False, pairs_per_row=0, by_pair=False):
    """What mosaic_matmul.product computes; rows that no block has are NaN."""
    block = jax.numpy.repeat(jax.numpy.arange(len(rows.counts)), ring.block)
    inside = jax.numpy.tile(jax.numpy.arange(ring.block), len(rows.counts))
    place = rows.starts[block] + inside
    pair = rows.order[place]
    dense = dequantize(untile(jax.tree.map(lambda leaf: leaf[layer], w)), jax.numpy.float32)
    source = x[pair // pairs_per_row if pairs_per_row else block * ring.block + inside]
    y = jax.numpy.einsum("pk,pkn->pn", source.astype("float32"), dense[rows.experts[block]])
    if gated:
        gate, up = jax.numpy.split(y, 2, axis=1)
        y = jax.nn.silu(gate) * up
    to = pair if by_pair else block * ring.block + inside
    to = jax.numpy.where(inside < rows.counts[block], to, out_rows)
    return jax.numpy.full((out_rows, y.shape[1]), jax.numpy.nan, "bfloat16").at[to].set(y.astype("bfloat16"))


@pytest.mark.parametrize("case", RING_CASES, ids=lambda case: case.key)
def test_what_is_expected_of_a_ring(case, bench, monkeypatch):
    monkeypatch.setattr(tune_device.mosaic_matmul, "product", in_plain_jax)
    program = bench.program(case)
    [y] = jax.jit(program.step)(*program.arguments)
    assert program.error([y]) < tune_device.LARGEST_ERROR
    assert program.error(program.memory()) == float("inf")
    written = jax.numpy.flatnonzero(jax.numpy.isfinite(y).all(1))
    assert len(written) == case.load
    assert program.error([y.at[written[-1]].set(jax.numpy.nan)]) == float("inf")
    assert program.error([jax.numpy.roll(y, 1, axis=1)]) > tune_device.LARGEST_ERROR


def experts_in_plain_jax(x, up, down, layer, places, top_k, pairs, ring):
    """What mosaic_few.experts computes, by the pieces above."""
    order, *blocks, zeros = places
    rows = Rows(ring.block, *blocks, order=order)
    slots = len(zeros) * ring.block
    h = in_plain_jax(x, up, layer, rows, slots, ring, gated=True, pairs_per_row=top_k)
    return in_plain_jax(jax.numpy.nan_to_num(h), down, layer, rows, pairs, ring, by_pair=True)


def test_what_is_expected_of_both_products(bench, monkeypatch):
    monkeypatch.setattr(tune_device.mosaic_few, "experts", experts_in_plain_jax)
    program = bench.program(BOTH_CASE)
    [y] = program.step(*program.arguments)
    assert not program.arguments[1][-1].any()
    assert program.error([y]) < tune_device.LARGEST_ERROR
    assert program.error(program.memory()) == float("inf")
    assert program.error([y.at[-1].set(jax.numpy.nan)]) == float("inf")
    assert program.error([jax.numpy.roll(y, 1, axis=1)]) > tune_device.LARGEST_ERROR


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the Mosaic GPU kernels need jax 0.11")
@pytest.mark.parametrize("case", [*RING_CASES, BOTH_CASE], ids=lambda case: case.key)
def test_a_ring_lowers_for_cuda(case, bench):
    program = bench.program(case)
    assert (
        len(re.findall(r"gptq_(?:gated|product|experts)_mosaic_gpu", lower_for_cuda(program.step, *program.arguments)))
        >= 1
    )
