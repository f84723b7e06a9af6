"""Text to token ids and back, from a checkpoint's tokenizer.json. Imports no jax and no transformers."""

from __future__ import annotations

import json
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsIndex

import tokenizers

from ferrum_jax.errors import CheckpointError, RequestError

MAX_TEXT_CHARS = 1_000_000
# A character takes at most four byte tokens; more than this many unfinished tokens is not text.
MAX_HELD_TOKENS = 64
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """The tokenizer of one checkpoint.

    Args:
      backend: the `tokenizers.Tokenizer` that does the work.
      special_tokens: text of bos_token, eos_token, pad_token and unk_token, as far as the checkpoint names them.
      chat_template: the Jinja source of the checkpoint's (default) chat template, or None.
      add_bos: True puts the bos token first, False leaves out all special tokens, None does as tokenizer.json says.

    Example:
      >>> import ferrum_jax, pathlib
      >>> folder = pathlib.Path(ferrum_jax.__file__).parent / "models" / "tales-13m-gptq-int4"
      >>> tokenizer = Tokenizer.from_folder(folder)
      >>> tokenizer.decode(tokenizer.encode("Once upon a time"))
      'Once upon a time'
    """

    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None
    add_bos: bool | None = None

    @staticmethod
    def from_folder(folder: str | Path) -> Tokenizer:
        """Reads tokenizer.json, and tokenizer_config.json and chat_template.jinja where they exist.

        Args:
          folder: a checkpoint in Hugging Face layout.

        Raises:
          CheckpointError: a file is missing, damaged or of a kind that is not supported.
        """
        folder = Path(folder)
        backend = _read_backend(folder)
        config = _read_config(folder / "tokenizer_config.json")
        special = {name: _token_text(name, config[name]) for name in _SPECIAL if config.get(name) is not None}
        for name, text in special.items():
            if name in ("bos_token", "eos_token") and backend.token_to_id(text) is None:
                raise CheckpointError(
                    f"tokenizer_config.json says {name} is {text!r}, but tokenizer.json has no such token; "
                    f"fetch both from the same place."
                )
        add_bos = config.get("add_bos_token")
        if add_bos is not None and not isinstance(add_bos, bool):
            raise CheckpointError(f"tokenizer_config.json says add_bos_token is {add_bos!r}; it must be true or false.")
        if add_bos and "bos_token" not in special:
            raise CheckpointError("tokenizer_config.json says add_bos_token is true but names no bos_token; add one.")
        return Tokenizer(backend, special, _read_template(folder, config), add_bos)

    @property
    def vocab_size(self) -> int:
        """The number of token ids; the model may have more rows than that, as padding."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The id of the eos token, or nothing; generation_config.json may name more."""
        return self._ids("eos_token")

    def _ids(self, name: str) -> tuple[int, ...]:
        token = self.backend.token_to_id(self.special_tokens[name]) if name in self.special_tokens else None
        return () if token is None else (token,)

    def encode(self, text: str, add_special_tokens: bool = True, max_chars: int = MAX_TEXT_CHARS) -> list[int]:
        """Token ids of a text.

        Args:
          text: any string; names of special tokens in it become those tokens.
          add_special_tokens: add what the checkpoint puts around a text, such as bos; False after a chat template,
            which writes its own.
          max_chars: longest text taken, checked before the work starts.

        Raises:
          RequestError: not a string, not encodable as UTF-8, or too long.

        Example:
          >>> Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a"))).encode("a")
          [0]
        """
        if not isinstance(text, str):
            raise RequestError(f"the text is a {type(text).__name__}; give a str.")
        if len(text) > max_chars:
            raise RequestError(f"the text has {len(text)} characters; at most {max_chars} are taken at once.")
        check_utf8("the text", text)
        ids = self.backend.encode(text, add_special_tokens=add_special_tokens and self.add_bos is not False).ids
        if add_special_tokens and self.add_bos:
            bos = list(self._ids("bos_token"))
            return ids if ids[:1] == bos else bos + ids
        return ids

    def decode(self, ids: Iterable[SupportsIndex], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD, ids without a token become nothing.

        Args:
          ids: token ids.
          skip_special_tokens: leave out tokens such as eos.

        Raises:
          RequestError: an id is not a non-negative 32-bit integer.
        """
        return self.backend.decode([_checked_id(token) for token in ids], skip_special_tokens=skip_special_tokens)

    def stream(self, skip_special_tokens: bool = True) -> TextStream:
        """A decoder for tokens that come one by one: `push(id)` gives the text that is certain, `flush()` the rest."""
        return TextStream(self, skip_special_tokens)


class TextStream:
    """Text of a growing list of tokens, cut at character boundaries only.

    The pieces of all pushes and one flush together are the decoded whole. A character whose bytes are spread over
    several tokens comes out when its last byte has come.

    Example:
      >>> backend = tokenizers.Tokenizer(tokenizers.models.BPE({"Ã": 0, "©": 1}, []))
      >>> backend.decoder = tokenizers.decoders.ByteLevel()
      >>> stream = Tokenizer(backend).stream()
      >>> [stream.push(0), stream.push(1), stream.flush()]
      ['', 'é', '']
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        # Some decoders treat the first token of a text differently, so the last piece given stays as context.
        self._context: list[int] = []
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """Takes the next token id.

        Returns:
          The text that became certain, often empty.

        Raises:
          RequestError: not a token id.
        """
        self._held.append(_checked_id(token))
        return self._release(final=len(self._held) > MAX_HELD_TOKENS)

    def flush(self) -> str:
        """Ends the stream.

        Returns:
          What was held back; bytes that never became a character are U+FFFD.
        """
        return self._release(final=True)

    def _release(self, final: bool) -> str:
        before = self._tokenizer.decode(self._context, self._skip)
        text = self._tokenizer.decode(self._context + self._held, self._skip)
        piece = text[len(before) :]
        if not final and (not piece or text.endswith("\ufffd")):
            return ""
        if piece:
            self._context = self._held
        self._held = []
        return piece


def check_utf8(what: str, text: str) -> None:
    """Refuses lone surrogates, which no tokenizer can take.

    Raises:
      RequestError: the text cannot be written as UTF-8.

    Example:
      >>> check_utf8("the text", "Zoë")
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{what} holds U+{ord(text[error.start]):04X} at character {error.start}, half of a surrogate pair; "
            f"decode the text with errors='replace' first."
        ) from None


def _checked_id(token: object) -> int:
    if isinstance(token, bool) or not isinstance(token, numbers.Integral) or not 0 <= int(token) < 2**32:
        raise RequestError(f"{token!r} is not a token id; give integers from 0 to {2**32 - 1}.")
    return int(token)


def _read_backend(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        if (folder / "tokenizer.model").is_file():
            raise CheckpointError(
                f"{folder.name} has tokenizer.model (SentencePiece) but no tokenizer.json, the only kind that is read. "
                f"Convert it once where transformers is installed: "
                f"AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
            )
        raise CheckpointError(
            f"{folder.name} has no tokenizer.json; copy the one of the model this checkpoint was made from."
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(
            f"tokenizer.json of {folder.name} cannot be read ({error}); fetch the file again, or update tokenizers."
        ) from error
    # A file may carry the truncation of its training run, which would cut prompts without a word.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"tokenizer_config.json is not JSON ({error}); fetch the file again.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"tokenizer_config.json holds a {type(config).__name__}; it must be an object.")
    return config


def _token_text(name: str, value: object) -> str:
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise CheckpointError(
            f'tokenizer_config.json says {name} is {value!r}; it must be a string or {{"content": string}}.'
        )
    return text


def _read_template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"chat_template.jinja is not UTF-8 ({error}); fetch the file again.") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        if "default" not in named and len(named) != 1:
            raise CheckpointError(
                f"tokenizer_config.json has the chat templates {sorted(map(str, named))} and none is named 'default'; "
                f"save the one you want as chat_template.jinja."
            )
        template = named["default"] if "default" in named else next(iter(named.values()))
    elif template is None:
        return None
    if not isinstance(template, str):
        raise CheckpointError(
            f"tokenizer_config.json gives a {type(template).__name__} for the chat template; "
            f"it must be a string or a list of objects with name and template."
        )
    return template
