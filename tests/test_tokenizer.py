"""Text to ids and back: the files of a checkpoint, what is refused, and streams that never cut a character."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

import ferrum_jax
from ferrum_jax.errors import CheckpointError, RequestError
from ferrum_jax.tokenizer import MAX_HELD_TOKENS, Tokenizer

DEMO = Path(ferrum_jax.__file__).parent / "models" / "tales-13m-gptq-int4"
TOKENIZER = Tokenizer.from_folder(DEMO)
EOS = TOKENIZER.eos_token_ids[0]


def streamed(tokenizer: Tokenizer, ids: list[int], **options) -> list[str]:
    stream = tokenizer.stream(**options)
    return [stream.push(token) for token in ids] + [stream.flush()]


def folder_with(tmp_path: Path, **files: object) -> Path:
    """The demo model's tokenizer.json, and the named files (`__` for a dot) as JSON or text."""
    shutil.copy(DEMO / "tokenizer.json", tmp_path)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return tmp_path


def test_the_demo_tokenizer():
    assert TOKENIZER.vocab_size == 4096 and TOKENIZER.eos_token_ids == (0,)
    assert TOKENIZER.special_tokens["eos_token"] == "<|endoftext|>" and TOKENIZER.chat_template is None
    text = "Once upon a time, Zoë saw 3 owls."
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.encode("") == []
    assert TOKENIZER.decode([*TOKENIZER.encode("Hi"), EOS]) == "Hi"
    assert TOKENIZER.decode([EOS], skip_special_tokens=False) == "<|endoftext|>"
    assert TOKENIZER.decode(np.array(TOKENIZER.encode("Hi"), np.int32)) == "Hi"
    assert TOKENIZER.decode([10**6]) == "", "a row of the model's padding has no text"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"bytes", "the text is a bytes; give a str"),
        (None, "the text is a NoneType; give a str"),
        ("ab\ud800", r"the text holds U\+D800 at character 2, half of a surrogate pair"),
        ("a" * 1_000_001, "the text has 1000001 characters; at most 1000000"),
    ],
    ids=["bytes", "none", "surrogate", "long"],
)
def test_what_encode_refuses(text, message):
    with pytest.raises(RequestError, match=message):
        TOKENIZER.encode(text)


def test_the_length_limit_can_be_set():
    with pytest.raises(RequestError, match="the text has 3 characters; at most 2"):
        TOKENIZER.encode("abc", max_chars=2)


@pytest.mark.parametrize("token", [-1, 2**32, True, 1.0, "a", None])
def test_what_is_not_a_token_id_is_refused(token):
    with pytest.raises(RequestError, match="is not a token id; give integers from 0"):
        TOKENIZER.decode([token])
    with pytest.raises(RequestError, match="is not a token id; give integers from 0"):
        TOKENIZER.stream().push(token)


def test_a_character_comes_out_whole():
    text = "owl 🦉, 家族 👩‍👩‍👧, naïve"
    ids = TOKENIZER.encode(text)
    assert len(ids) > len(text), "the demo vocabulary spells these in bytes"
    pieces = streamed(TOKENIZER, ids)
    assert "".join(pieces) == text and pieces[-1] == ""
    assert all("\ufffd" not in piece for piece in pieces)


def test_an_unfinished_character_waits_for_the_flush():
    ids = TOKENIZER.encode("🦉")
    assert streamed(TOKENIZER, ids[:-1]) == [""] * (len(ids) - 1) + ["\ufffd"]


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1) | st.integers(1, 260), max_size=40))
@example([EOS] * 3)
def test_pieces_are_the_decoded_whole(ids):
    assert "".join(streamed(TOKENIZER, ids)) == TOKENIZER.decode(ids)
    whole = TOKENIZER.decode(ids, skip_special_tokens=False)
    assert "".join(streamed(TOKENIZER, ids, skip_special_tokens=False)) == whole


@given(st.text(max_size=30))
def test_text_survives_encode_and_stream(text):
    pieces = streamed(TOKENIZER, TOKENIZER.encode(text, add_special_tokens=False), skip_special_tokens=False)
    assert "".join(pieces) == text
    assert "\ufffd" in text or all("\ufffd" not in piece for piece in pieces)


def sentencepiece_like() -> Tokenizer:
    """A decoder that joins byte tokens and drops the first space, as Llama's and Mixtral's do."""
    words = ["<unk>", "▁", "▁a", "b", "▁ça", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>")
    )
    decoders = tokenizers.decoders
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend)


SENTENCEPIECE = sentencepiece_like()


@given(st.lists(st.integers(1, 4) | st.sampled_from([5 + byte for byte in "é🦉".encode()]), max_size=30))
@example([1, 1, 2, 1, 2, 3])
def test_pieces_are_the_decoded_whole_for_sentencepiece_too(ids):
    pieces = streamed(SENTENCEPIECE, ids)
    whole = SENTENCEPIECE.decode(ids)
    if "\ufffd" not in whole:
        assert "".join(pieces) == whole
    else:  # this decoder turns a whole run of bytes into U+FFFD once one of them is bad, however late it comes
        assert "".join(pieces).replace("\ufffd", "").startswith(whole[: whole.index("\ufffd")])


def test_a_stream_of_garbage_is_not_held_for_ever():
    stream = SENTENCEPIECE.stream()
    pieces = [stream.push(5 + 0xFF) for _ in range(MAX_HELD_TOKENS + 1)]
    assert pieces[-1] == "\ufffd" * (MAX_HELD_TOKENS + 1) and not any(pieces[:-1])
    stream = TOKENIZER.stream()
    assert not any(stream.push(EOS) for _ in range(3 * MAX_HELD_TOKENS)) and stream.push(TOKENIZER.encode("a")[0])


def test_bos_is_as_the_checkpoint_says(tmp_path):
    plain = TOKENIZER.encode("Hi")
    named = {"bos_token": {"content": "<|endoftext|>", "lstrip": False}, "eos_token": "<|endoftext|>"}
    with_bos = Tokenizer.from_folder(folder_with(tmp_path, tokenizer_config__json=named | {"add_bos_token": True}))
    assert with_bos.encode("Hi") == [0, *plain]
    assert with_bos.encode("<|endoftext|>Hi") == [0, *plain], "never twice"
    assert with_bos.encode("Hi", add_special_tokens=False) == plain

    backend = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    backend.post_processor = tokenizers.processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])
    backend.save(str(tmp_path / "tokenizer.json"))
    for add_bos, want in [(None, [0, *plain]), (True, [0, *plain]), (False, plain)]:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(named | {"add_bos_token": add_bos}))
        assert Tokenizer.from_folder(tmp_path).encode("Hi") == want


def test_truncation_and_padding_of_the_training_run_are_dropped(tmp_path):
    backend = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "a long story about an owl"
    assert Tokenizer.from_folder(tmp_path).encode(text) == TOKENIZER.encode(text)


def test_where_the_chat_template_comes_from(tmp_path):
    read = Tokenizer.from_folder
    assert read(folder_with(tmp_path)).chat_template is None, "tokenizer.json is enough"
    assert read(folder_with(tmp_path, tokenizer_config__json={"chat_template": "A"})).chat_template == "A"
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert read(folder_with(tmp_path, tokenizer_config__json={"chat_template": named})).chat_template == "D"
    assert read(folder_with(tmp_path, tokenizer_config__json={"chat_template": named[:1]})).chat_template == "T"
    assert read(folder_with(tmp_path, chat_template__jinja="J")).chat_template == "J", "the file wins"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "tokenizer_config.json is not JSON"),
        ("[" * 100_000, "tokenizer_config.json is not JSON"),
        ([], "tokenizer_config.json holds a list; it must be an object"),
        ({"eos_token": 3}, "eos_token is 3; it must be a string"),
        ({"eos_token": {"id": 3}}, 'it must be a string or {"content": string}'),
        ({"eos_token": "<|nothing|>"}, "eos_token is '<|nothing|>', but tokenizer.json has no such token"),
        ({"add_bos_token": 1}, "add_bos_token is 1; it must be true or false"),
        ({"add_bos_token": True}, "add_bos_token is true but names no bos_token"),
        ({"chat_template": 3}, "gives a int for the chat template"),
        ({"chat_template": [{"name": "default"}]}, "gives a NoneType for the chat template"),
        ({"chat_template": []}, "has the chat templates [] and none is named 'default'"),
        ({"chat_template": [{"name": "a"}, {"name": "b"}]}, "has the chat templates ['a', 'b'] and none is named"),
    ],
    ids=lambda value: None if isinstance(value, str) and len(value) > 80 else str(value)[:40],
)
def test_a_bad_tokenizer_config_is_refused(tmp_path, config, message):
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.from_folder(folder_with(tmp_path, tokenizer_config__json=config))
    assert message in str(caught.value)


def test_missing_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no tokenizer.json; copy the one of the model"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    with pytest.raises(
        CheckpointError, match=r"tokenizer.model \(SentencePiece\) but no tokenizer.json.*save_pretrained"
    ):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(CheckpointError, match=r"tokenizer.json of .* cannot be read .*fetch the file again"):
        Tokenizer.from_folder(tmp_path)
    (folder_with(tmp_path) / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template.jinja is not UTF-8"):
        Tokenizer.from_folder(tmp_path)
