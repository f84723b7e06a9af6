"""kernels/bench/tune.py beyond whole Triton products: parts and the Mosaic GPU kernels, and tables read back."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import jax
import pytest

from ferrum_kernels import mosaic, triton, triton_tiles
from ferrum_kernels.mosaic_matmul import Ring
from tests.conftest import ROOT
from tests.support.bench_scripts import script

tune, tune_cases, tune_device = script("tune"), script("tune_cases"), script("tune_device")
tune_parts, tune_rings, tune_tables = script("tune_parts"), script("tune_rings"), script("tune_tables")
Case = tune_cases.Case
TUNED = triton_tiles.FOLDER
TABLE, RINGS = (json.loads((TUNED / f"{name}-h100.json").read_text()) for name in ("nvidia", "mosaic"))


@pytest.fixture(autouse=True)
def flags_stay(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # tune.py adds to it


def rings_of(load):
    rings = mosaic.rings(load * 128, 128)
    assert rings is not None
    return rings


def part_cases(rows):
    return tune_parts.part_cases(rows, TABLE["rows"])


def test_products_in_parts_are_whole_where_that_is_as_fast():
    cases = part_cases([64, 256, 512])
    whole = {case.key: 10.0 for case in cases if case.product == "whole"}
    at = {load: [case for case in cases if case.product == "parts" and case.load == load] for load in (64, 256, 512)}
    assert tune_parts.part_rows(cases, {}, [64, 256, 512]) is None
    assert tune_parts.part_rows(cases, whole, [64, 256, 512]) == []
    equal = whole | {case.key: 10.0 for case in at[512]}
    # With so many rows only the output product has parts, and the other counts as whole.
    one = next(case for case in at[256] if not any(c.cut == case.cut and c.n != case.n for c in at[256]))
    found = tune_parts.part_rows(cases, equal | {one.key: 8.0}, [64, 256, 512])
    times = {"load": 360.0, "cut": list(one.cut), "microseconds": [10.0, 8.0]}
    assert found == [{"load": 130.0, "cut": None, "microseconds": [10.0, 10.0]}, times]
    [entry] = tune_parts.part_rows(cases, whole | {case.key: 9.0 for case in at[64]}, [64])
    both = [case.cut for case in at[64] if sum(other.cut == case.cut for other in at[64]) == 2]
    assert (entry["load"], entry["cut"]) == (64, list(min(both)))


def test_blocks_of_rings_are_shared_and_triton_keeps_what_it_wins():
    cases = tune_rings.ring_cases(2048, 768, 128, [4, 16], TABLE)
    here = [case for case in cases if case.load == 4 * 128]
    triton_cases = [case for case in here if case.product in ("up", "down")]
    assert [list(case.cut) for case in triton_cases] == [TABLE["experts"][2][name] for name in ("up", "down")]
    # Up is fastest with blocks of 8, down with blocks of 16, and both together with 8.
    longer = {"ring_up": 1, "ring_both": 10}
    rings = [case for case in here if "ring" in case.product]
    results = {case.key: 50.0 + longer.get(case.product, 0) * case.cut[-1] for case in rings}
    [up] = [c for c in here if c.product == "ring_up" and c.cut == (1, 6, 3, 4, 8)]
    [down] = [c for c in here if c.product == "ring_down" and c.cut == (1, 6, 2, 4, 8, 16)]
    results |= {up.key: 40.0, down.key: 49.0} | {case.key: 3.0 for case in here if case.product == "place"}
    first, last = tune_rings.ring_rows(cases, results, [4, 16], 128)
    assert Ring(**first["up"] | {"columns": (8,)}) == Ring((8,), 1, 6, 3, 4)
    assert first["down"]["columns"] == [8] and first["microseconds"] == [40.0, 50.0, 3.0]
    apart = [case for case in rings if case.product != "ring_both"]
    wide = {case.key: 46.4 for case in apart if case.cut[-2:] == (8, 32)}
    [entry] = tune_rings.ring_rows(cases, results | wide, [4], 128)  # 95.8 instead of 93
    assert entry["up"]["columns"] == [8]
    [entry] = tune_rings.ring_rows(cases, results | dict.fromkeys(wide, 45.9), [4], 128)  # 94.8: an expert of many rows
    assert entry["up"]["columns"] == entry["down"]["columns"] == [8, 32]
    assert (first["load"], last) == (8.0, {"load": None, "up": None, "down": None})  # nothing ran at 16
    results |= {triton_cases[0].key: 40.0, triton_cases[1].key: 50.0}
    [entry] = tune_rings.ring_rows(cases, results, [4], 128)
    assert entry == {"load": None, "up": None, "down": None}  # as fast, and the simpler kernels
    results |= {triton_cases[1].key: 50.1}
    assert tune_rings.ring_rows(cases, results, [4], 128)[0]["up"] == first["up"]
    assert tune_rings.ring_rows(cases, {}, [4, 16], 128) == []
    # Both in one kernel, which takes less than the two.
    [both] = [c for c in here if c.product == "ring_both" and c.cut == (2, 5, 0, 2, 8, 16, 32)]
    [entry] = tune_rings.ring_rows(cases, results | {both.key: 85.0}, [4], 128)
    assert entry["up"] == entry["down"] and entry["microseconds"] == [85.0, 3.0]
    assert Ring(**entry["up"] | {"columns": (8, 16, 32)}) == Ring((8, 16, 32), stages=5, alone=True)


def test_what_is_near_in_the_other_tables():
    cases = part_cases([64, 256])
    near = tune_parts.near_parts(cases, TABLE["parts"])
    assert len(near) < len(cases) / 2 and set(near) >= {case for case in cases if case.product == "whole"}
    for row in TABLE["parts"]:  # the entry itself, or one that gives the same parts
        present = {tune_parts.cut_of(Case("parts", 4096, 2048, row["load"], tuple(row["cut"])))}
        assert present <= {
            tune_parts.cut_of(case) for case in near if (case.product, case.load) == ("parts", row["load"])
        }
    assert tune_parts.near_parts(cases, [{"load": 64, "cut": None}]) == cases
    cases = tune_rings.ring_cases(2048, 768, 128, tune_rings.LOADS, TABLE)
    near = tune_rings.near_rings(cases, RINGS["experts"], 128)
    assert len(near) < len(cases) / 2
    assert {(case.product, case.load) for case in near} == {(case.product, case.load) for case in cases}
    made = {(case.product, case.load, tune_rings.ring_of(case)) for case in near if "ring" in case.product}
    with_rings = [load for load in tune_rings.LOADS if mosaic.rings(round(load * 128), 128)]
    assert with_rings == [load for load in tune_rings.LOADS if load > 0.5]
    for load in with_rings:
        up, down = (dataclasses.replace(ring, shared=False) for ring in rings_of(load))
        if up.alone:
            assert up == down and ("ring_both", load * 128, up) in made
        else:
            assert ("ring_up", load * 128, up) in made
            assert ("ring_down", load * 128, dataclasses.replace(down, lag=2)) in made


def test_turns_are_shared_up_to_the_same_load_as_in_the_table():
    for row in RINGS["experts"]:
        if row["up"] is not None:
            shared = row["up"]["alone"] and row["load"] is not None and row["load"] <= tune_rings.MOST_SHARED
            assert [row[name].get("shared", False) for name in ("up", "down")] == [shared] * 2


def fake_timer(options, d, f, experts, top_k):
    """Rings win but at 4 pairs per expert, parts win at all loads, and of each kind the smallest numbers."""
    base = {"up": 500.0, "down": 500.0, "whole": 50.0}

    def microseconds(case):
        triton_wins = case.load == 4 * experts and case.product in ("up", "down")
        return sum(case.cut) / 100 + (1.0 if triton_wins else base.get(case.product, 10.0))

    return lambda case: lambda: lambda: microseconds(case)


class Card:
    platform, device_kind, compute_capability, core_count = "gpu", "NVIDIA Imaginary 9", "9.0", 132


@pytest.fixture
def imaginary(tmp_path, monkeypatch):
    """A device whose tables are in a folder of their own, beside those of an H100."""
    shutil.copytree(TUNED, tmp_path / "tuned")
    monkeypatch.setattr(triton_tiles, "FOLDER", tmp_path / "tuned")
    monkeypatch.setattr(jax, "devices", lambda *_: [Card()])
    for module in (triton, mosaic):
        monkeypatch.setattr(module, "unavailable", lambda: None)
    caches = triton_tiles.table, mosaic.table
    for cache in caches:
        cache.cache_clear()
    yield tmp_path / "tuned"
    for cache in caches:
        cache.cache_clear()


def test_a_whole_run_on_a_hopper_gpu_writes_what_the_kernels_read(imaginary, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "timer", fake_timer)
    arguments = ["--loads", "", "--rows", "", "--no-few", "--parts", "16,64", "--rings", "4,64", "--near"]
    arguments += ["--log", str(tmp_path / "log.jsonl"), "--threads", "2"]
    assert tune.main([*arguments, "--budget-seconds", "0"]) == 0
    files = [imaginary / f"{backend}-imaginary-9.json" for backend in ("nvidia", "mosaic")]
    said = capsys.readouterr().err
    assert all(f"{file} is as it was.\n" in said and not file.exists() for file in files)
    assert tune.main([*arguments, "--json"]) == 0
    tables = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert tables == [json.loads(file.read_text()) for file in files]
    assert {name for name in TABLE if tables[0][name] != TABLE[name]} <= {"device", "date", "shapes", "note", "parts"}
    assert tune.main([*arguments, "--dry-run"]) == 0
    assert " 0 without a result" in capsys.readouterr().err
    for cache in (triton_tiles.table, mosaic.table):
        cache.cache_clear()
    few, many = tables[1]["experts"]
    assert few == {"load": 16.0, "up": None, "down": None} and mosaic.rings(4 * 128, 128) is None
    assert [tune_rings.entry_of(ring) for ring in rings_of(64)] == [many["up"], many["down"]]
    w = tune_device.random_stack(0, (1,), 4096, 2048, 128)
    for rows, entry in zip((16, 64), tables[0]["parts"], strict=True):
        assert triton_tiles.part_cut(rows, w) == tune_parts.cut_of(Case("parts", 4096, 2048, rows, tuple(entry["cut"])))
    assert triton_tiles.part_cut(65, w) is None
    text = tune_tables.text_of(tables[0])
    assert f"rows in parts    <= 64       cut {tables[0]['parts'][-1]['cut']}" in text


def test_a_table_of_a_family_is_written_where_it_is_found(imaginary):
    (imaginary / "mosaic-imaginary.json").write_text("{}")
    assert tune_tables.file_of("mosaic", "NVIDIA Imaginary 9").name == "mosaic-imaginary.json"
    assert mosaic.table("NVIDIA Imaginary 9") == {}
    assert mosaic.table("NVIDIA Other") == RINGS
    assert tune_tables.file_of("nvidia", "NVIDIA Imaginary 9").name == "nvidia-imaginary-9.json"
    assert triton_tiles.file_of("nvidia", "NVIDIA Imaginary 9") is None


def test_sizes_that_the_mosaic_kernels_do_not_take_are_said(imaginary, tmp_path, capsys):
    config = tmp_path / "odd.toml"
    text = (ROOT / "configs" / "qwen3-30b-a3b.toml").read_text()
    config.write_text(text.replace("moe_intermediate_size = 768", "moe_intermediate_size = 704"))
    assert tune.main(["--config", str(config), "--dry-run", "--log", str(tmp_path / "log.jsonl")]) == 0
    text = capsys.readouterr()
    assert text.err.startswith(
        "The Mosaic GPU kernels are not measured: they take hidden sizes that 256 divides and intermediate sizes that "
        "128 divides; these are 2048 and 704.\n"
    )
    assert "ring" not in text.out
