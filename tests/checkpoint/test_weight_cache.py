"""Assembled weights on disk: bit for bit what a cold load gives, or not used at all."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ferrum_jax as fj
from ferrum_jax import environment
from ferrum_jax.checkpoint import load as loading
from ferrum_jax.checkpoint import weight_cache, weight_file
from ferrum_jax.checkpoint.load import CheckpointWarning
from ferrum_jax.errors import CapacityError, CheckpointError
from tests.conftest import ROOT
from tests.support.checkpoint_writer import MIXED_DYNAMIC, TinySpec, write_checkpoint

SMALL = TinySpec(num_experts=4)
Disk = namedtuple("Disk", "free")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(environment.WEIGHT_CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "tiny", SMALL)


def load(folder: Path, **arguments: object) -> fj.Model:
    return fj.load(folder, **({"weight_cache": True, "quiet": True} | arguments))  # type: ignore[arg-type]


def entry(cache: Path) -> Path:
    (file,) = cache.iterdir()
    return file


def assert_same(one: fj.Model, other: fj.Model) -> None:
    assert one.cfg == other.cfg and jax.tree.structure(one.params) == jax.tree.structure(other.params)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype) and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize(
    "spec",
    [
        SMALL,
        TinySpec(bits=3, sym=False, desc_act=True, checkpoint_format="gptq_v2", shards=3),
        TinySpec(dynamic=MIXED_DYNAMIC, lm_head="quantized"),
        TinySpec(family="mixtral", bits=8, old_mixtral_names=True, attention_bias=False),
        TinySpec(family="qwen3", attention_bias=True, lm_head="tied", dtype="float16"),
        TinySpec(mlp_only_layers=(0,), num_layers=3, hidden_size=96, vocab_size=101),
    ],
    ids=["qwen3_moe", "asymmetric", "mixed", "mixtral", "dense", "odd_sizes"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_warm_start_gives_what_a_cold_load_gives(spec: TinySpec, dtype: str, tmp_path: Path, cache: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny", spec)
    plain = load(folder, dtype=dtype, weight_cache=False)
    assert (plain.report.weight_cache, plain.report.from_cache) == (None, False) and not cache.exists()
    cold = load(folder, dtype=dtype)
    assert (cold.report.weight_cache, cold.report.from_cache) == (entry(cache), False)
    warm = load(folder, dtype=dtype)
    assert (warm.report.weight_cache, warm.report.from_cache) == (entry(cache), True)
    assert (warm.report.version, warm.report.bytes_read) == (cold.report.version, cold.report.bytes_read)
    assert_same(cold, plain)
    assert_same(warm, plain)


def test_a_warm_start_does_not_read_the_checkpoint(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cold = load(folder)
    monkeypatch.setattr(loading, "open_checkpoint", lambda folder: pytest.fail("the checkpoint was opened"))
    warm = load(folder)
    tokens = jnp.array([[5, 6, 7]])
    np.testing.assert_array_equal(fj.forward(warm.params, tokens, warm.cfg), fj.forward(cold.params, tokens, cold.cfg))


def test_the_file_is_safetensors_private_and_on_page_boundaries(folder: Path, cache: Path) -> None:
    model = load(folder)
    assert (cache.stat().st_mode & 0o777, entry(cache).stat().st_mode & 0o777) == (0o700, 0o600)
    tensors = load_file(entry(cache))
    np.testing.assert_array_equal(tensors["embed"], model.params["embed"])
    down = model.params["layers"][0]["moe"]["experts"]["down"]
    np.testing.assert_array_equal(tensors["layers.0.moe.experts.down.qweight"], down.qweight)
    assert all(leaf.unsafe_buffer_pointer() % weight_file.PAGE == 0 for leaf in jax.tree.leaves(model.params))


def flip(position: int) -> Callable[[Path], None]:
    """Flip one bit, so many bytes from the start of the file or from its end."""

    def edit(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[position] ^= 4
        file.write_bytes(content)

    return edit


def flip_in(name: str) -> Callable[[Path], None]:
    """Flip one bit in the last byte of a leaf."""

    def edit(file: Path) -> None:
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        end = json.loads(content[8 : 8 + length])[name]["data_offsets"][1]
        flip(8 + length + end - 1)(file)

    return edit


def cut(keep: Callable[[int], int]) -> Callable[[Path], None]:
    return lambda file: os.truncate(file, keep(file.stat().st_size))


DAMAGE = {
    "no byte left": cut(lambda size: 0),
    "five bytes left": cut(lambda size: 5),
    "header only": cut(lambda size: weight_file.PAGE),
    "half": cut(lambda size: size // 2),
    "one byte short": cut(lambda size: size - 1),
    "one page longer": lambda file: os.truncate(file, file.stat().st_size + weight_file.PAGE),
    "header length": flip(0),
    "header length beyond the file": flip(5),
    "header": flip(300),
    "embedding": flip_in("embed"),
    "words of experts": flip_in("layers.0.moe.experts.down.qweight"),
    "scales": flip_in("layers.0.attn.qkv.scales"),
    "norm": flip_in("norm"),
    "checksum of a leaf": flip(-16),
    "checksum of the header": flip(-1),
    "another safetensors file": lambda file: save_file({"embed": np.zeros(3)}, file),
    "text": lambda file: file.write_text("not weights " * 10_000) and None,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_a_warning_and_a_normal_load(kind: str, folder: Path, cache: Path) -> None:
    plain = load(folder, weight_cache=False)
    load(folder)
    DAMAGE[kind](entry(cache))
    with pytest.warns(CheckpointWarning, match=r"tiny-\w+\.safetensors is damaged .*; the checkpoint is read instead"):
        healed = load(folder)
    assert not healed.report.from_cache
    assert_same(healed, plain)
    assert_same(load(folder), plain)
    assert load(folder).report.from_cache and len(list(cache.iterdir())) == 1


def test_a_flipped_bit_anywhere_is_never_a_wrong_number(tmp_path: Path, cache: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny", TinySpec(num_experts=4, num_layers=1))
    plain = load(folder, weight_cache=False)
    load(folder)
    whole = entry(cache).read_bytes()
    noticed = 0
    for position in range(11, len(whole), len(whole) // 60):
        flip(position)(entry(cache))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert_same(load(folder), plain)
        noticed += len(caught)
        entry(cache).write_bytes(whole)
    assert noticed > 20  # the others lie in the padding


def test_another_version_is_not_read(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(folder)
    monkeypatch.setattr(weight_cache, "VERSION", weight_cache.VERSION + 1)
    assert not load(folder).report.from_cache
    assert load(folder).report.from_cache and len(list(cache.iterdir())) == 1


def test_other_shapes_of_the_parameters_are_noticed(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(folder)
    monkeypatch.setattr(weight_cache, "abstract", lambda cfg: {"other": jax.ShapeDtypeStruct((2,), np.float32)})
    assert not load(folder).report.from_cache


def test_a_changed_file_is_read_even_with_its_old_time_of_change(folder: Path, cache: Path) -> None:
    first = load(folder)
    file = folder / "model.safetensors"
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = load(folder)
    assert not second.report.from_cache
    assert any(
        np.asarray(a).tobytes() != np.asarray(b).tobytes()
        for a, b in zip(jax.tree.leaves(first.params), jax.tree.leaves(second.params), strict=True)
    )
    assert_same(second, load(folder, weight_cache=False))
    assert len(list(cache.iterdir())) == 1  # in place of the old one


def test_another_checkpoint_of_the_same_name_and_sizes(tmp_path: Path, folder: Path, cache: Path) -> None:
    first = load(folder)
    shutil.rmtree(folder)
    write_checkpoint(folder, TinySpec(num_experts=4, seed=1))
    second = load(folder)
    assert not second.report.from_cache and not np.array_equal(first.params["embed"], second.params["embed"])
    elsewhere = write_checkpoint(tmp_path / "elsewhere" / "tiny", SMALL)
    assert_same(load(elsewhere), first)
    assert len(list(cache.iterdir())) == 2


def test_what_weights_depend_on_has_entries_of_its_own_and_the_rest_does_not(folder: Path, cache: Path) -> None:
    load(folder)
    assert load(folder, implementation="xla", dtype=load(folder).cfg.dtype).report.from_cache
    (folder / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert load(folder).report.from_cache and load(folder).cfg.eos_token_ids == (3,)
    half = load(folder, dtype="float16")
    assert not half.report.from_cache and half.params["embed"].dtype == "float16"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not load(folder, checkpoint_format="gptq_v2").report.from_cache
    assert load(folder).report.from_cache and load(folder, dtype="float16").report.from_cache


def test_warnings_about_the_checkpoint_come_at_every_start(tmp_path: Path, cache: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny", TinySpec(num_experts=4, checkpoint_format="gptq", zeros_version=2))
    for from_cache in (False, True):
        with pytest.warns(CheckpointWarning, match="zero points are stored as gptq_v2, the metadata says gptq"):
            model = load(folder)
        assert (model.report.from_cache, len(model.report.warnings)) == (from_cache, 1)


KILLED = """
import os, signal, sys
import ferrum_jax as fj
from ferrum_jax.checkpoint.weight_cache import Writer

close, seen = Writer.close, []

def killing(self, *arguments):
    close(self, *arguments)
    seen.append(1)
    if len(seen) == 20:
        os.kill(os.getpid(), signal.SIGKILL)

Writer.close = killing
fj.load(sys.argv[1], weight_cache=True, quiet=True)
"""


def test_a_killed_writer_leaves_nothing_that_is_used(folder: Path, cache: Path) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environ = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder)], env=environ, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert entry(cache).name.endswith(".incomplete")
    model = load(folder)
    assert not model.report.from_cache and model.report.weight_cache == entry(cache)  # the remains are gone
    assert_same(model, load(folder, weight_cache=False))


def test_the_file_of_a_living_writer_is_left_alone(folder: Path, cache: Path) -> None:
    cache.mkdir()
    with (cache / "other.incomplete").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        load(folder)
        assert (cache / "other.incomplete").exists()


def test_a_file_that_is_taken_for_an_orphan_before_it_is_locked_is_made_anew(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, taken = weight_cache.fcntl.flock, []

    def late(file: int, how: int) -> None:
        if not taken:
            taken.extend(cache.glob("*.incomplete"))
            taken[0].unlink()
        flock(file, how)

    monkeypatch.setattr(weight_cache.fcntl, "flock", late)
    assert load(folder).report.weight_cache == entry(cache) and len(taken) == 1
    assert load(folder).report.from_cache


def test_an_error_while_writing_leaves_nothing(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object, source: object, out: object) -> None:
        raise CheckpointError("the disk of the checkpoint failed")

    monkeypatch.setattr(loading.LeafReader, "fill", broken)
    with pytest.raises(CheckpointError, match="the disk of the checkpoint failed"):
        load(folder)
    assert not list(cache.iterdir())


def test_a_checkpoint_that_changes_while_it_is_read_is_refused_and_not_kept(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = weight_cache.Writer.finish

    def touched(self: weight_cache.Writer) -> list[np.ndarray]:
        os.utime(folder / "model.safetensors")
        return finish(self)

    monkeypatch.setattr(weight_cache.Writer, "finish", touched)
    with pytest.raises(CheckpointError, match=r"tiny changed while it was read\. Load it again\."):
        load(folder)
    assert not list(cache.iterdir())


def not_kept(folder: Path, words: str) -> None:
    with pytest.warns(CheckpointWarning, match=f"{words}.* so the assembled weights are not kept") as caught:
        model = load(folder)
    assert "Set FERRUM_JAX_WEIGHT_CACHE to a folder of your own" in str(caught[0].message)
    assert (model.report.weight_cache, model.report.from_cache) == (None, False)
    assert_same(model, load(folder, weight_cache=False))


def test_a_folder_that_cannot_be_made(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.WEIGHT_CACHE, str(folder / "config.json" / "cache"))
    not_kept(folder, r"config.json/cache cannot be made \(Not a directory\),")


def test_a_folder_that_everyone_can_write_to_is_not_even_read(folder: Path, cache: Path) -> None:
    load(folder)
    cache.chmod(0o777)
    not_kept(folder, "cache can be written by everyone,")


def test_a_read_only_folder_is_read_but_not_written(
    folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(folder)

    def refuse(*arguments: object, **keywords: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    assert load(folder).report.from_cache
    not_kept(write_checkpoint(tmp_path / "other", SMALL), r"cache cannot be written \(Read-only file system\),")


def test_a_disk_without_room_is_noticed_before_and_while_writing(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: Disk(2**31))
        not_kept(folder, r"\(0.0 GiB are needed and 2 GiB to spare, 2.0 GiB are free\),")
    written, pwrite = [], os.pwrite

    def full(*arguments: object) -> int:
        written.append(1)
        if len(written) > 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        not_kept(folder, r"cache cannot be written \(No space left on device\),")
    assert not list(cache.iterdir())


def test_who_decides_whether_weights_are_kept(
    folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(folder, weight_cache=None)
    assert not cache.exists()  # small ones are not worth it
    monkeypatch.setattr(loading, "LEAST", 1000)
    load(folder, weight_cache=False)
    assert not cache.exists()
    load(folder, weight_cache=None)
    assert entry(cache).exists()
    monkeypatch.setenv(environment.WEIGHT_CACHE, "off")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    load(folder, weight_cache=None)
    assert not (tmp_path / "user").exists() or not (tmp_path / "user" / "ferrum_jax" / "weights").exists()
    assert load(folder).report.weight_cache == entry(tmp_path / "user" / "ferrum_jax" / "weights")


def test_kept_weights_that_do_not_fit_are_refused(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(folder)
    monkeypatch.setattr(environment, "free_memory", lambda: 1000)
    with pytest.raises(CapacityError, match=r"tiny needs 0.0 GiB for its parameters"):
        load(folder)
