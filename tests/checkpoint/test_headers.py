"""Every damaged safetensors file is refused with its own sentence."""

from __future__ import annotations

import re

import pytest

from ferrum_jax.checkpoint.headers import MAX_HEADER_BYTES, read_header
from ferrum_jax.errors import CheckpointError
from tests.support.raw_safetensors import entry, write_raw

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4976698672\n"
TWICE = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'


def test_names_dtypes_shapes_and_sizes(tmp_path):
    header = {
        "__metadata__": {"format": "pt"},
        "scalar": entry("BF16", [], (0, 2)),
        "matrix": entry("I32", [2, 3], (2, 26)),
        "empty": entry("F16", [0, 7], (26, 26)),
    }
    path = write_raw(tmp_path / "x.safetensors", header, bytes(26))
    infos = read_header(path)
    assert list(infos) == ["scalar", "matrix", "empty"]
    assert {name: (info.dtype, info.shape, info.nbytes) for name, info in infos.items()} == {
        "scalar": ("BF16", (), 2),
        "matrix": ("I32", (2, 3), 24),
        "empty": ("F16", (0, 7), 0),
    }
    assert all(info.file == path and info.name == name for name, info in infos.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\x08\x00\x00\x00", "has only 4 bytes, less than the shortest safetensors file"),
        (LFS, f"is a Git LFS pointer of {len(LFS)} bytes, not safetensors weights"),
        (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "is an HTML page .* of 49 bytes, not safetensors"),
        (b"\n <html>", "is an HTML page"),
        (b"GGUF\x03\x00\x00\x00" + bytes(64), "is a GGUF file of 72 bytes, not safetensors"),
        (b"PK\x03\x04\x00\x00\x08\x08" + bytes(64), "is a zip archive .*torch.save"),
        (b"\x80\x02}q\x00X\x01\x00\x00\x00", "is a Python pickle .*torch.save"),
        ((2**63).to_bytes(8, "little") + bytes(8), "announces a header of 9,223,372,036,854,775,808 bytes; at most"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "announces a header of 100,000,001 bytes"),
        ((900).to_bytes(8, "little") + b'{"a":', "is cut short inside its header: 900 bytes announced, 5 there"),
        ((0).to_bytes(8, "little"), "has a corrupt header"),
    ],
    ids="empty 4-bytes lfs html html-2 gguf zip pickle 2**63 over-limit cut-header no-header".split(),
)
def test_files_that_are_not_safetensors(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))} {message}.*Fetch it again"):
        read_header(path)


@pytest.mark.parametrize(
    ("header", "body", "message"),
    [
        (b"{abc", 0, "has a corrupt header .*property name"),
        (b"[1, 2]", 0, "has a corrupt header .it holds a list, not an object"),
        (b"[" * 5000, 0, "has a corrupt header"),
        (b'{"\xff": 1}', 0, "has a corrupt header .*utf-8"),
        (TWICE, 8, "has the key 'a' twice in its header"),
        ({"a": entry()}, 4, "is cut short: tensor 'a' ends at byte 8 of the data, the file holds 4"),
        ({"a": entry()}, 12, "is corrupt: 4 bytes after the last tensor belong to no tensor"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, 12, "is corrupt: tensor 'b' overlaps 'a'"),
        ({"a": entry(), "b": entry(offsets=(12, 20))}, 20, "is corrupt: 4 bytes before tensor 'b' belong to no tensor"),
        ({"a": entry("Q9")}, 8, "holds tensor 'a' of unknown dtype 'Q9'; known are BOOL, U8"),
        ({"a": entry(shape=[3])}, 8, r"tensor 'a' of dtype F32 and shape \[3\] needs 12 bytes, its .* give 8"),
        ({"a": entry(shape=[2**62, 4])}, 8, "tensor 'a' of dtype F32 .* needs 73,786,976,294,838,206,464 bytes"),
        ({"a": entry(shape=[10**30])}, 8, r"tensor 'a' has the impossible shape \[1000"),
        ({"a": entry(shape=[-1])}, 8, r"tensor 'a' has the impossible shape \[-1\]"),
        ({"a": entry(shape=[2.0])}, 8, r"tensor 'a' has the impossible shape \[2.0\]"),
        ({"a": entry(offsets=(8, 0))}, 8, r"tensor 'a' has the impossible data_offsets \[8, 0\]"),
        ({"a": {"shape": [2]}}, 8, "tensor 'a' lacks a dtype, a shape or data_offsets"),
        ({"a": 1}, 8, "tensor 'a' lacks a dtype"),
        ({"__metadata__": {"format": 1}, "a": entry()}, 8, "has a header that safetensors refuses: .*string"),
        ({"../../x": entry()}, 8, r"names a tensor '../../x'; names may not .*look like a path"),
        ({"/etc/x": entry()}, 8, "names a tensor '/etc/x'"),
        ({"a\\..\\x": entry()}, 8, "names a tensor .*; names may not"),
        ({"a\nb": entry()}, 8, r"names a tensor 'a\\nb'; names may not"),
        ({"": entry()}, 8, "names a tensor ''; names may not be empty"),
    ],
)
def test_contradictory_headers(tmp_path, header, body, message):
    path = write_raw(tmp_path / "model.safetensors", header, bytes(body))
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))} .*{message}"):
        read_header(path)


def test_missing_file_names_the_repository_of_a_cache(tmp_path):
    path = tmp_path / "models--some--model" / "snapshots" / "abc" / "model.safetensors"
    with pytest.raises(CheckpointError, match=r'is missing\. .*hf download some/model --include "model.safetensors"'):
        read_header(path)


def test_folder_in_place_of_a_file(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        read_header(tmp_path / "model.safetensors")
