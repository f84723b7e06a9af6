"""Programs kept whole: a later step reads them without tracing, finds only its own, and says where it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

import ferrum_jax as fj
from ferrum_jax import kept
from ferrum_jax.buckets import BucketedStep, compile_together
from ferrum_jax.engine_steps import steps_for as engine_steps_for
from ferrum_jax.generation import steps_for

pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="programs are kept from jax 0.10 on")
OPTIONS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
ONES = {"x": jnp.ones(4), "y": jnp.ones((2, 2), jnp.int32)}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A compile cache of its own, with programs of the CPU kept as well."""
    config: Any = jax.config
    before = {name: getattr(config, name) for name in OPTIONS}
    # JAX itself writes nothing: XLA's programs for a CPU, once read from its cache, cannot be written again.
    for name, value in zip(OPTIONS, (str(tmp_path), 1e9), strict=True):
        config.update(name, value)
    reset_cache()
    monkeypatch.setattr(kept, "PLATFORMS", ("cpu", "gpu"))
    fj.keep_programs()
    yield tmp_path
    for name, value in before.items():
        config.update(name, value)
    reset_cache()


def files_in(cache: Path) -> list[Path]:
    return sorted(cache.glob(f"{kept.FOLDER}*/*"))


def filling(traces: list[int]) -> BucketedStep:
    def fill(pool: dict[str, jax.Array], x: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        traces.append(1)
        return {"cache": pool["cache"].at[0].set(x)}, x * 2

    return BucketedStep("fill", fill, ("pool",), ("of these tests",))


def test_a_later_step_reads_the_program_and_traces_nothing(cache: Path) -> None:
    traces: list[int] = []
    for _ in range(3):
        pool = {"cache": jnp.zeros(64)}
        [record] = [(step := filling(traces))(1, pool=pool, x=jnp.float32(3.0)) and step.records[0]]
        new, twice = step(1, pool={"cache": jnp.zeros(64)}, x=jnp.float32(5.0))
        assert float(new["cache"].sum()) == 5.0 and float(twice) == 10.0
        assert pool["cache"].is_deleted()  # its buffer was the step's to reuse
        assert record.seconds > 0 and record.temp_bytes is not None
    assert len(traces) == 1 and len(files_in(cache)) == 1


def test_a_program_that_was_read_refuses_other_shapes_as_one_that_was_compiled(cache: Path) -> None:
    for _ in range(2):
        step = filling([])
        step(1, pool={"cache": jnp.zeros(8)}, x=jnp.float32(1))
        with pytest.raises(fj.errors.RetraceError, match=r"argument 'x' changed float32\[\] -> float32\[1\]"):
            step(1, pool={"cache": jnp.zeros(8)}, x=jnp.ones(1))


def test_programs_are_read_together(cache: Path) -> None:
    shapes = {n: jax.ShapeDtypeStruct((n,), jnp.float32) for n in (2, 3, 4)}
    traces: list[int] = []

    def double(x: jax.Array) -> jax.Array:
        traces.append(x.shape[0])
        return x * 2

    for _ in range(2):
        step = BucketedStep("double", double, constants=())
        compile_together((step.trace(n, x=shape) for n, shape in shapes.items()), threads=2)
        assert [step(n, x=jnp.ones(n)).tolist() for n in shapes] == [[2.0] * n for n in shapes]
    assert traces == [2, 3, 4] and len(files_in(cache)) == 3


CHANGES: dict[str, Callable[[pytest.MonkeyPatch], Path | None]] = {
    "constants": lambda _: kept.file_for((2,), ("x",), ONES),
    "donated": lambda _: kept.file_for((1,), (), ONES),
    "a shape": lambda _: kept.file_for((1,), ("x",), {**ONES, "x": jnp.ones(5)}),
    "a dtype": lambda _: kept.file_for((1,), ("x",), {**ONES, "x": jnp.ones(4, jnp.bfloat16)}),
    "a weak type": lambda _: kept.file_for((1,), ("x",), {**ONES, "x": jax.lax.full((4,), 1.0)}),
    "structure": lambda _: kept.file_for((1,), ("x",), {"x": ONES["y"], "y": (ONES["x"],)}),
    "names": lambda _: kept.file_for((1,), ("x",), {"x": ONES["x"], "z": ONES["y"]}),
    "a placed argument": lambda _: kept.file_for(
        (1,), ("x",), {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in ONES.items()}
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_program_is_made_of_is_its_name(cache: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = kept.file_for((1,), ("x",), ONES)
    assert known == kept.file_for((1,), ("x",), dict(ONES)) and known is not None
    other = CHANGES[change](monkeypatch)
    assert other is not None and other != known and other.parent == known.parent


def test_settings_and_flags_are_part_of_the_name(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def name() -> Path | None:
        return kept.file_for((), (), ONES)

    names = [name()]
    with jax.default_matmul_precision("float32"):  # of this thread alone
        names.append(name())
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0")
    names.append(name())
    # What is best here may follow from other variables too, as where processes share a GPU.
    monkeypatch.setattr(kept.ferrum_kernels, "default_implementation", lambda: "another")
    names.append(name())
    assert None not in names and len(set(names)) == 4
    monkeypatch.undo()


def test_sources_and_tables_are_part_of_the_name(tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    module, table, other = tmp_path / "module.py", tmp_path / "tables" / "h200.json", tmp_path / "notes.txt"
    digests = []
    for file, text in [(module, "x = 1"), (table, "{}"), (module, "x = 2"), (table, "[]")]:
        file.write_text(text)
        digests.append(kept._sources(module))
    assert len(set(digests)) == 4
    other.write_text("no program is made of this")
    assert kept._sources(module) == digests[-1]
    table.rename(tmp_path / "tables" / "h100.json")
    assert kept._sources(module) != digests[-1]


def test_the_package_s_sources_are_looked_at() -> None:
    assert kept._sources(kept.__file__) != kept._sources(kept.ferrum_kernels.__file__)


def test_nothing_is_kept_unless_it_is_asked_for_and_there_is_a_cache(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config: Any = jax.config

    def is_kept() -> bool:
        return kept.file_for((), (), ONES) is not None

    assert is_kept()
    fj.keep_programs(False)
    assert not is_kept()
    fj.keep_programs()
    enabled = config.jax_enable_compilation_cache
    config.update("jax_enable_compilation_cache", False)
    assert not is_kept()
    config.update("jax_enable_compilation_cache", enabled)
    with jax.default_device(jax.devices()[0]):
        assert not is_kept()
    for other in (None, "gs://bucket/xla"):
        config.update("jax_compilation_cache_dir", other)
        assert not is_kept()
    config.update("jax_compilation_cache_dir", str(cache))
    assert is_kept()
    monkeypatch.setattr(kept, "PLATFORMS", ("tpu",))
    assert not is_kept()


def test_steps_without_constants_are_not_kept(cache: Path) -> None:
    assert BucketedStep("double", lambda x: x * 2)(1, x=jnp.ones(2)).tolist() == [2.0, 2.0]
    assert files_in(cache) == []


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "of another version"])
def test_a_file_that_is_no_program_is_named_and_written_anew(cache: Path, damage: str) -> None:
    traces: list[int] = []
    filling(traces)(1, pool={"cache": jnp.zeros(8)}, x=jnp.float32(1))
    [file] = files_in(cache)
    content = bytearray(file.read_bytes())
    if damage == "changed":
        content[len(content) // 2] ^= 1
    elif damage == "of another version":
        content = bytearray(kept.hashlib.sha256(b"no pickle").digest() + b"no pickle")
    file.write_bytes(
        content if damage in ("changed", "of another version") else content[: 99 if damage == "cut" else 0]
    )
    with pytest.warns(
        UserWarning, match=rf"{file.name} is no program that can be used \(.+\), so it is compiled again\."
    ):
        new, _ = filling(traces)(1, pool={"cache": jnp.zeros(8)}, x=jnp.float32(7))
    assert float(new["cache"][0]) == 7 and len(traces) == 2
    filling(traces)(1, pool={"cache": jnp.zeros(8)}, x=jnp.float32(1))
    assert len(traces) == 2


def test_a_folder_that_others_can_write_to_is_not_trusted(cache: Path) -> None:
    traces: list[int] = []
    filling(traces)(1, pool={"cache": jnp.zeros(8)}, x=jnp.float32(1))
    [file] = files_in(cache)
    file.parent.chmod(0o777)
    with pytest.warns(UserWarning, match=r"\(its folder is not the user's own\), so it is compiled again"):
        filling(traces)(1, pool={"cache": jnp.zeros(8)}, x=jnp.float32(1))
    assert len(traces) == 2


def test_where_nothing_can_be_written_a_warning_says_so(cache: Path) -> None:
    place = kept.file_for((), (), ONES)
    assert place is not None
    place.parent.write_text("a file where the folder should be")
    step = BucketedStep("double", lambda x: x * 2, constants=())
    with pytest.warns(UserWarning, match=r"was not written \(.+\), so later processes compile this program again\."):
        assert step(1, x=jnp.ones(2)).tolist() == [2.0, 2.0]
    assert place.parent.is_file()


def test_a_file_appears_whole_or_not_at_all(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept.os, "replace", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        filling([])(1, pool={"cache": jnp.zeros(8)}, x=jnp.float32(1))
    assert files_in(cache) == []


def test_only_the_user_can_write_where_programs_lie(cache: Path) -> None:
    filling([])(1, pool={"cache": jnp.zeros(8)}, x=jnp.float32(1))
    [file] = files_in(cache)
    assert file.parent.stat().st_mode & 0o077 == 0 and file.stat().st_mode & 0o077 == 0


def test_what_nobody_has_used_for_long_goes(cache: Path) -> None:
    old, used, foreign = (cache / name for name in (f"{kept.FOLDER}old", f"{kept.FOLDER}used", "mine"))
    long_ago = time.time() - (kept.DAYS + 1) * 24 * 3600
    for folder in (old, used, foreign):
        folder.mkdir()
        (folder / "program").write_bytes(b"")
        os.utime(folder / "program", (long_ago, long_ago))
        os.utime(folder, (long_ago, long_ago))
    os.utime(used / "program")
    filling([])(1, pool={"cache": jnp.zeros(8)}, x=jnp.float32(1))
    assert not old.exists() and used.exists() and foreign.exists()


def test_reading_a_program_is_using_it(cache: Path) -> None:
    for _ in range(2):
        filling([])(1, pool={"cache": jnp.zeros(8)}, x=jnp.float32(1))
        [file] = files_in(cache)
        assert time.time() - file.stat().st_mtime < 3600
        os.utime(file, (0, 0))


@pytest.mark.once
def test_all_steps_of_generate_and_of_the_engine_are_kept(cache: Path) -> None:
    model = fj.load("demo", implementation="xla")
    rows, files = [], []
    for _ in range(2):
        steps_for.cache_clear()
        engine_steps_for.cache_clear()
        tokens = [step.token for step in fj.stream_generate(model, "Once", max_tokens=4)]
        records = steps_for(model.cfg).records()
        engine = fj.Engine(model, slots=2, pages=8, page=16)
        engine.submit("Once", max_tokens=4)
        while not engine.idle:
            tokens += [event.step.token for event in engine.step()]
        records += engine._steps.records
        rows.append(tokens)
        files.append(files_in(cache))
        assert {record.step for record in records} == {"prefill", "sample", "decode", "read", "admit"}
        assert len(files[-1]) == len(records)
    assert rows[0] == rows[1] and rows[0][:4] == rows[0][4:] and files[0] == files[1]


@pytest.mark.once
def test_another_process_finds_the_same_names(cache: Path) -> None:
    code = """
import sys
import jax, jax.numpy as jnp
import ferrum_jax as fj
from ferrum_jax import kept
kept.PLATFORMS = ("cpu", "gpu")
fj.keep_programs()
cfg = fj.load("demo").cfg
print(kept.file_for((cfg,), ("x",), {"x": jnp.ones(4), "y": jnp.ones((2, 2), jnp.int32), "params": fj.abstract(cfg)}))
"""
    found = set()
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "JAX_COMPILATION_CACHE_DIR": str(cache)}
        ended = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        found.add(ended.stdout)
    assert len(found) == 1 and str(cache) in found.pop()
