"""JSON files are read strictly, and every refusal names the file and the reason."""

from __future__ import annotations

import re

import pytest

from ferrum_jax.checkpoint.files import read_json
from ferrum_jax.errors import CheckpointError


def test_object_with_and_without_byte_order_mark(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b'{"a": [1, 2.5, null]}')
    assert read_json(path, "the configuration") == {"a": [1, 2.5, None]}
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(str(path), "the configuration") == {"a": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; it should hold the configuration"),
        (b"model_type: qwen3", "is not a JSON object .*; it should hold the configuration"),
        (b'{"a": 1', "is not a JSON object .*delimiter"),
        (b"[1]", "is not a JSON object .it holds a list, not an object."),
        (b'"text"', "is not a JSON object .it holds a str, not an object."),
        (b'{"a": ' + b"[" * 100_000, "is not a JSON object"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "is not a JSON object .*integer"),
        (b'\xff\xfe{\x00"\x00', "is not a JSON object .*utf-8"),
        (b'{"a": 1, "b": 2, "a": 3}', "has the key 'a' twice in one object"),
        (b'{"q": {"bits": 4, "bits": 8}}', "has the key 'bits' twice in one object"),
        (b"<!doctype html><title>404</title>", "is an HTML page .*33 bytes., not the configuration"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer .43 bytes., not the configuration"),
        (b'{"a": "' + b"x" * 2000 + b'"}', "is larger than 1,000 bytes, the most that is accepted for the config"),
    ],
)
def test_bad_content(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    limit = 1000 if b"xxx" in content else 1_000_000
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))} {message}"):
        read_json(path, "the configuration", limit)


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"config.json is missing; it holds the configuration\. Fetch it again"):
        read_json(tmp_path / "config.json", "the configuration")


def test_folder_in_place_of_a_file(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        read_json(tmp_path, "the configuration")
