"""A checkpoint folder opens from its headers, reads tensors exactly, and is refused by name when it contradicts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from ferrum_jax.checkpoint import files as files_module
from ferrum_jax.checkpoint.files import open_checkpoint
from ferrum_jax.checkpoint.hub import DEMO_FOLDER
from ferrum_jax.errors import CheckpointError
from tests.support.raw_safetensors import entry, write_raw, write_shards

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def resident_mib() -> float:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024


class TestReading:
    def test_demo_model(self):
        files = open_checkpoint(DEMO_FOLDER)
        assert files.warnings == ()
        assert files.tensors["model.embed_tokens.weight"].shape == (4096, 256)
        assert files.nbytes == sum(info.nbytes for info in files.tensors.values())
        assert files.nbytes < (DEMO_FOLDER / "model.safetensors").stat().st_size

    def test_values_of_every_readable_dtype(self, tmp_path):
        kinds = [np.int32, np.uint32, np.float16, np.float32, np.float64, np.int64, np.uint8, np.bool_]
        saved = {np.dtype(kind).name: np.array([[0, 1, 3], [2, 1, 0]]).astype(kind) for kind in kinds}
        saved["bfloat16"] = np.array([1.5, -2.0, 3e38], ml_dtypes.bfloat16)
        saved["empty"] = np.zeros((0, 4), np.float16)
        saved["scalar"] = np.array(7, np.int32)
        save_file(saved, tmp_path / "model.safetensors")
        files = open_checkpoint(tmp_path)
        with files.reader() as read:
            arrays = {name: read[name] for name in files.tensors}
        assert arrays.keys() == saved.keys()
        for name, array in arrays.items():
            assert array.dtype == saved[name].dtype
            np.testing.assert_array_equal(array, saved[name])

    def test_arrays_outlive_the_reader_and_the_file(self, tmp_path):
        save_file({"a": np.arange(5)}, tmp_path / "model.safetensors")
        with open_checkpoint(tmp_path).reader() as read:
            array = read["a"]
        (tmp_path / "model.safetensors").unlink()
        np.testing.assert_array_equal(array, np.arange(5))

    def test_shards_are_one_table(self, tmp_path):
        files = open_checkpoint(write_shards(tmp_path, {A: ["x", "y"], B: ["z"]}))
        assert {name: info.file.name for name, info in files.tensors.items()} == {"x": A, "y": A, "z": B}
        assert files.warnings == ()
        with files.reader() as read:
            np.testing.assert_array_equal(read["z"], np.arange(4, dtype=np.float32))

    def test_only_file_of_another_name(self, tmp_path):
        save_file({"a": np.arange(5)}, tmp_path / "gptq_model-4bit-128g.safetensors")
        assert list(open_checkpoint(str(tmp_path)).tensors) == ["a"]

    @pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
    def test_resident_memory_stays_bounded(self, tmp_path):
        size = 8 * 2**20
        header = {f"t{i}": entry("U8", [size], (i * size, (i + 1) * size)) for i in range(24)}
        write_raw(tmp_path / "model.safetensors", header, bytes(24 * size))
        files = open_checkpoint(tmp_path)
        before, peak = resident_mib(), 0.0
        with files.reader() as read:
            for name in files.tensors:
                assert read[name].nbytes == size
                peak = max(peak, resident_mib() - before)
        assert peak < 48  # of 192 MiB read: two copies of one tensor, and slack
        assert resident_mib() - before < 32

    def test_reading_in_place_and_in_blocks(self, tmp_path):
        saved = np.arange(7 * 5, dtype=np.int32).reshape(7, 5)
        save_file({"a": saved, "b": saved[:0]}, tmp_path / "model.safetensors")
        with open_checkpoint(tmp_path).reader() as read:
            read.into("a", out := np.zeros((7, 5), np.uint32))
            np.testing.assert_array_equal(out, saved)
            for limit, sizes in ((1, [1] * 7), (45, [2, 2, 2, 1]), (1000, [7])):
                blocks = [(rows, block.copy()) for rows, block in read.blocks("a", limit)]
                assert [len(block) for _, block in blocks] == sizes
                for rows, block in blocks:
                    np.testing.assert_array_equal(block, saved[rows])
            assert list(read.blocks("b")) == []

    def test_threads_share_a_reader(self, tmp_path):
        saved = {f"t{i}": np.full((64, 1024), i, np.int32) for i in range(32)}
        save_file(saved, tmp_path / "model.safetensors")
        files = open_checkpoint(tmp_path)
        with files.reader() as read, ThreadPoolExecutor(8) as pool:

            def same(name: str) -> bool:
                return all((block == saved[name][rows]).all() for rows, block in read.blocks(name, 4096))

            assert all(pool.map(same, list(saved) * 4))

    def test_advice_to_the_system_changes_nothing(self, tmp_path):
        files = open_checkpoint(write_shards(tmp_path, {A: ["x", "y"], B: ["z"]}))
        with files.reader(scattered=True) as read:
            read.prefetch(["x", "z"])
            before = {name: read[name] for name in "xyz"}
            read.forget(["x", "z"])
            for name, array in before.items():
                np.testing.assert_array_equal(read[name], array)

    def test_74000_headers_open_in_seconds(self, tmp_path):
        names = [f"model.layers.{i % 48}.mlp.experts.{i % 128}.gate_proj.{i}.qweight" for i in range(74_000)]
        header = {name: entry("I32", [1], (4 * i, 4 * i + 4)) for i, name in enumerate(names)}
        write_raw(tmp_path / "model.safetensors", header, bytes(4 * len(names)))
        start = time.perf_counter()
        files = open_checkpoint(tmp_path)
        assert time.perf_counter() - start < 10  # about one second; wide, for a busy machine
        assert len(files.tensors) == 74_000


class TestReaderErrors:
    def test_unknown_tensor(self, tmp_path):
        save_file({"a": np.arange(5)}, tmp_path / "model.safetensors")
        with open_checkpoint(tmp_path).reader() as read:
            with pytest.raises(CheckpointError, match=r"holds no tensor 'b' \(it holds 1 others\).*config.json"):
                read["b"]

    def test_fp8(self, tmp_path):
        write_raw(tmp_path / "model.safetensors", {"a": entry("F8_E4M3", [8])}, bytes(8))
        files = open_checkpoint(tmp_path)
        assert files.tensors["a"].dtype == "F8_E4M3"
        with files.reader() as read, pytest.raises(CheckpointError, match="stores 'a' as F8_E4M3, a type that is not"):
            read["a"]

    def test_file_replaced_after_its_header_was_read(self, tmp_path):
        path = tmp_path / "model.safetensors"
        save_file({"a": np.arange(5)}, path)
        files = open_checkpoint(tmp_path)
        save_file({"a": np.arange(6)}, path)
        with (
            files.reader() as read,
            pytest.raises(CheckpointError, match=r"changed after its header was read"),
        ):
            read["a"]
        write_raw(path, {"a": entry()}, b"cut")
        with files.reader() as read, pytest.raises(CheckpointError, match=r"changed after .*Load the checkpoint again"):
            read["a"]

    def test_file_cut_short_while_it_is_read(self, tmp_path):
        path = tmp_path / "model.safetensors"
        save_file({"a": np.arange(5), "b": np.arange(1000)}, path)
        with open_checkpoint(tmp_path).reader() as read:
            read["a"]
            os.truncate(path, path.stat().st_size - 100)
            with pytest.raises(
                CheckpointError, match=r"model.safetensors was cut short while it was read.*hf download"
            ):
                read["b"]

    def test_file_removed_after_its_header_was_read(self, tmp_path):
        save_file({"a": np.arange(5)}, tmp_path / "model.safetensors")
        files = open_checkpoint(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        with files.reader() as read, pytest.raises(CheckpointError, match=r"model.safetensors cannot be read: No such"):
            read["a"]


class TestFolders:
    def test_missing(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"There is no folder .*nowhere\. Check the path"):
            open_checkpoint(tmp_path / "nowhere")

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("model.Q4_K_M.gguf", "is a file .GGUF files are not supported."),
            ("model.pt", "is a file .PyTorch .pt files are not read"),
            ("model.safetensors", "is a file; a checkpoint is a folder .*Give the folder"),
        ],
    )
    def test_file_in_place_of_a_folder(self, tmp_path, name, message):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path / name)

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            ([], "holds no .safetensors file; it holds nothing. A checkpoint needs model.safetensors"),
            (["config.json"], "it holds config.json. A checkpoint needs"),
            (["config.json", "pytorch_model.bin"], "holds config.json, pytorch_model.bin. PyTorch .bin .*pickle"),
            (["m.Q4_0.gguf"], "holds m.Q4_0.gguf. GGUF files are not supported"),
            (["m.pt"], "PyTorch .pt files are not read"),
            (["a.gguf", "b.gguf", "c.gguf", "d.gguf", "e.gguf"], "a.gguf, b.gguf, c.gguf and 2 more. GGUF"),
        ],
    )
    def test_without_safetensors(self, tmp_path, names, message):
        for name in names:
            (tmp_path / name).write_bytes(b"x")
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path)

    def test_unreadable(self, tmp_path, monkeypatch):
        def refuse(self):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "iterdir", refuse)
        with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
            open_checkpoint(tmp_path)

    def test_file_without_tensors(self, tmp_path):
        write_raw(tmp_path / "model.safetensors", {"__metadata__": {"format": "pt"}})
        with pytest.raises(CheckpointError, match=r"model.safetensors holds no tensors"):
            open_checkpoint(tmp_path)


class TestIndex:
    def index(self, folder, weight_map):
        (folder / files_module.INDEX).write_text(json.dumps({"weight_map": weight_map}))

    def test_shards_without_index(self, tmp_path):
        write_shards(tmp_path, {A: ["x"], B: ["y"]})
        (tmp_path / files_module.INDEX).unlink()
        with pytest.raises(CheckpointError, match=f"holds {A}, {B} but no model.safetensors.index.json"):
            open_checkpoint(tmp_path)

    @pytest.mark.parametrize(
        "place",
        ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..\\x.safetensors", "a\0.safetensors", 3],
    )
    def test_paths_out_of_the_folder(self, tmp_path, place):
        write_shards(tmp_path / "m", {A: ["x"]}, {"x": A, "t": place})
        save_file({"t": np.arange(3)}, tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match=r"places tensor 't' in .*; only plain file names inside the folder"):
            open_checkpoint(tmp_path / "m")

    @pytest.mark.parametrize("place", ["pytorch_model-00001-of-00002.bin", "..", ""])
    def test_other_kinds_of_shards(self, tmp_path, place):
        write_shards(tmp_path, {A: ["x"]}, {"x": A, "t": place})
        with pytest.raises(CheckpointError, match=f"places tensor 't' in '{place}'; only .safetensors files are read"):
            open_checkpoint(tmp_path)

    @pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {}}'])
    def test_no_weight_map(self, tmp_path, index):
        (tmp_path / files_module.INDEX).write_text(index)
        with pytest.raises(CheckpointError, match=r"index.json has no weight_map \(tensor name to file name\)"):
            open_checkpoint(tmp_path)

    def test_corrupt_index(self, tmp_path):
        (tmp_path / files_module.INDEX).write_text("<html>")
        with pytest.raises(CheckpointError, match=r"index.json is an HTML page .*not the map from tensors to shards"):
            open_checkpoint(tmp_path)

    def test_missing_shard(self, tmp_path):
        write_shards(tmp_path, {A: ["x"], B: ["y"]})
        (tmp_path / B).unlink()
        with pytest.raises(CheckpointError, match=rf"lacks 1 of its 2 weight files: {B}\. .*--include \"{B}\""):
            open_checkpoint(tmp_path)

    def test_damaged_shard_is_named(self, tmp_path):
        write_shards(tmp_path, {A: ["x"], B: ["y"]})
        (tmp_path / B).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
        with pytest.raises(CheckpointError, match=f"{B} is a Git LFS pointer"):
            open_checkpoint(tmp_path)

    def test_same_tensor_in_two_shards(self, tmp_path):
        write_shards(tmp_path, {A: ["x", "y"], B: ["y"]})
        with pytest.raises(CheckpointError, match=rf"Tensor 'y' is in both {A} and {B} \(1 such"):
            open_checkpoint(tmp_path)

    def test_tensor_in_another_shard(self, tmp_path):
        write_shards(tmp_path, {A: ["x"], B: ["y", "z"]}, {"x": A, "y": A, "z": B})
        with pytest.raises(CheckpointError, match=f"places tensor 'y' in {A}, but it is in {B}"):
            open_checkpoint(tmp_path)

    def test_tensor_in_no_shard(self, tmp_path):
        write_shards(tmp_path, {A: ["x"], B: ["y"]}, {"x": A, "y": B, "w": B, "v": B})
        with pytest.raises(CheckpointError, match=rf"lists w, v, which no shard holds \(the first should be in {B}\)"):
            open_checkpoint(tmp_path)

    def test_single_file_beside_an_index_of_other_shards(self, tmp_path):
        write_shards(tmp_path, {A: ["x"], B: ["y"]})
        save_file({"x": np.arange(3)}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"holds both model.safetensors and an index of other shards"):
            open_checkpoint(tmp_path)

    def test_extra_shard_is_a_warning(self, tmp_path):
        write_shards(tmp_path, {A: ["x"], B: ["y"], "old.safetensors": ["z"]}, {"x": A, "y": B})
        files = open_checkpoint(tmp_path)
        assert set(files.tensors) == {"x", "y"}
        assert len(files.warnings) == 1
        assert "also holds old.safetensors, outside its weights; not read" in files.warnings[0]

    def test_tensor_outside_the_index_is_a_warning(self, tmp_path):
        write_shards(tmp_path, {A: ["x", "bias"]}, {"x": A})
        files = open_checkpoint(tmp_path)
        assert set(files.tensors) == {"x", "bias"}
        assert "does not list bias, found in its shards; read anyway" in files.warnings[0]


class TestLinks:
    def snapshot(self, root):
        folder = root / "models--o--n" / "snapshots" / "abc"
        folder.mkdir(parents=True)
        return folder

    @pytest.mark.parametrize("store", ["models--o--n/blobs/1f", "blobs/1f/1f00"])
    def test_into_the_blob_store_of_the_cache(self, tmp_path, store):
        folder = self.snapshot(tmp_path)
        (tmp_path / store).parent.mkdir(parents=True)
        save_file({"a": np.arange(3)}, tmp_path / store)
        (folder / "model.safetensors").symlink_to(tmp_path / store)
        assert list(open_checkpoint(folder).tensors) == ["a"]

    def test_folder_reached_through_a_link(self, tmp_path):
        write_shards(tmp_path / "real", {A: ["x"]})
        (tmp_path / "link").symlink_to(tmp_path / "real")
        assert list(open_checkpoint(tmp_path / "link").tensors) == ["x"]

    @pytest.mark.parametrize("cached", [True, False])
    def test_elsewhere(self, tmp_path, cached):
        folder = self.snapshot(tmp_path) if cached else tmp_path / "m"
        folder.mkdir(exist_ok=True)
        save_file({"a": np.arange(3)}, tmp_path / "secret.safetensors")
        (folder / "model.safetensors").symlink_to(tmp_path / "secret.safetensors")
        with pytest.raises(CheckpointError, match=r"links to .*secret.safetensors, outside the checkpoint folder"):
            open_checkpoint(folder)

    def test_blobs_of_a_folder_that_is_no_cache(self, tmp_path):
        (tmp_path / "blobs").mkdir()
        (tmp_path / "m").mkdir()
        save_file({"a": np.arange(3)}, tmp_path / "blobs" / "1f")
        (tmp_path / "m" / "model.safetensors").symlink_to(tmp_path / "blobs" / "1f")
        with pytest.raises(CheckpointError, match="outside the checkpoint folder"):
            open_checkpoint(tmp_path / "m")

    def test_blob_store_that_is_itself_a_link(self, tmp_path):
        folder = self.snapshot(tmp_path)
        (tmp_path / "outside").mkdir()
        save_file({"a": np.arange(3)}, tmp_path / "outside" / "1f")
        (tmp_path / "models--o--n" / "blobs").symlink_to(tmp_path / "outside")
        (folder / "model.safetensors").symlink_to("../../blobs/1f")
        with pytest.raises(CheckpointError, match="outside the checkpoint folder"):
            open_checkpoint(folder)

    def test_broken(self, tmp_path):
        (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
        with pytest.raises(CheckpointError, match=r"lacks 1 of its 1 weight files: model.safetensors"):
            open_checkpoint(tmp_path)


def test_importing_and_opening_leave_jax_and_the_hub_client_alone():
    code = (
        "import sys; from ferrum_jax.checkpoint import files, hub; files.open_checkpoint(hub.resolve('demo'));"
        "print(sorted({'jax', 'torch', 'huggingface_hub'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
