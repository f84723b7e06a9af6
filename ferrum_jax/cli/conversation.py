"""The conversation that `ferrum-jax run` opens on a terminal: a chat, or continued texts where there is no template."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Protocol

from ferrum_jax.cli.output import DIM, say, say_error, styled
from ferrum_jax.cli.run import chat_ids, check_finite, stats_line, text_ids, write
from ferrum_jax.errors import FerrumError, RequestError

if TYPE_CHECKING:
    from ferrum_jax.checkpoint.load import Model
    from ferrum_jax.sampling_params import SamplingParams

COMMANDS = """\
/clear        forget what was said
/system TEXT  set the system message of a chat and begin again; without TEXT show it
/help         show this
/exit         leave, as Ctrl-D does
Ctrl-C stops an answer; twice, it leaves. A space before / sends the line as text."""


class Dialogue(Protocol):
    """What is remembered between two lines."""

    greeting: str

    def ids(self, line: str) -> list[int]:
        """The prompt that follows from a line; empty when the line asks for nothing."""
        ...

    def keep(self, line: str, reply: str) -> None:
        """Remember a line and its reply."""
        ...

    def clear(self) -> None:
        """Forget everything but the system message."""
        ...

    def system(self, text: str) -> str:
        """Set the system message, or leave it when the text is empty; returns what to say."""
        ...


class Chat:
    """Messages in the checkpoint's chat template."""

    greeting = "Type a message. /help lists the commands."

    def __init__(self, model: Model, system: str | None) -> None:
        """Begin.

        Args:
          model: with a chat template.
          system: system message, or None.
        """
        self._model, self._system = model, system
        self._messages: list[dict[str, str]] = []

    def ids(self, line: str) -> list[int]:
        """The conversation so far and the new message."""
        if not line.strip():
            return []
        head = [{"role": "system", "content": self._system}] if self._system else []
        return chat_ids(self._model, [*head, *self._messages, {"role": "user", "content": line}])

    def keep(self, line: str, reply: str) -> None:
        """Remember both messages."""
        self._messages += [{"role": "user", "content": line}, {"role": "assistant", "content": reply}]

    def clear(self) -> None:
        """Forget the messages."""
        self._messages = []

    def system(self, text: str) -> str:
        """Set or show the system message."""
        if text:
            self._system = text
            self.clear()
            return "The system message is set; the conversation begins again."
        return f"The system message is: {self._system}" if self._system else "There is no system message."


class Story:
    """One text that grows."""

    greeting = "Type the beginning of a text; an empty line goes on with it. /help lists the commands."

    def __init__(self, model: Model, system: str | None) -> None:
        """Begin.

        Args:
          model: the model.
          system: must be None: there is no place for it.

        Raises:
          RequestError: there is a system message.
        """
        self._model, self._text = model, ""
        text_ids(model, "", system)

    def ids(self, line: str) -> list[int]:
        """A new text, or the old one for an empty line."""
        return text_ids(self._model, line or self._text)

    def keep(self, line: str, reply: str) -> None:
        """Remember the text with its continuation."""
        self._text = (line or self._text) + reply

    def clear(self) -> None:
        """Forget the text."""
        self._text = ""

    def system(self, text: str) -> str:
        """Refuse: without a template there is no system message."""
        raise RequestError("a text that is continued has no system message; write it into the text.")


def converse(
    model: Model,
    sampling: SamplingParams,
    system: str | None,
    raw: bool,
    quiet: bool,
    cache_dtype: str | None = None,
) -> int:
    """Read lines and answer them until the user leaves.

    Args:
      model: the model.
      sampling: for every answer.
      system: system message, or None.
      raw: continue texts although there is a chat template.
      quiet: no greeting and no statistics.
      cache_dtype: of keys and values; None means the activations'.

    Returns:
      The exit code: 0, or 130 after Ctrl-C twice.
    """
    dialogue: Dialogue = (Story if raw or model.tokenizer.chat_template is None else Chat)(model, system)
    if not quiet:
        say(styled(dialogue.greeting, DIM, sys.stderr))
    interrupted = False
    while True:
        try:
            line = _read_line()
        except EOFError:
            say("")
            return 0
        except KeyboardInterrupt:
            say("")
            if interrupted:
                return 130
            interrupted = True
            say("Ctrl-C again leaves.")
            continue
        interrupted = False
        try:
            if line.startswith("/"):
                if _command(line, dialogue):
                    return 0
            else:
                interrupted = _answer(model, sampling, dialogue, line, quiet, cache_dtype)
        except FerrumError as error:
            say_error(str(error))


def _read_line() -> str:
    prompt = "> "
    if sys.stdout.isatty():
        try:
            import readline  # noqa: F401  input() then edits lines and remembers them
        except ImportError:  # not in every build of Python
            pass
        return input(prompt)
    # stdout is data: a file that receives the answers must not receive the prompts.
    sys.stderr.write(prompt)
    sys.stderr.flush()
    return input()


def _command(line: str, dialogue: Dialogue) -> bool:
    """Carry out a line that begins with /; True leaves."""
    name, _, rest = line.partition(" ")
    if name == "/exit":
        return True
    if name == "/clear":
        dialogue.clear()
        say("Forgotten.")
    elif name == "/system":
        say(dialogue.system(rest.strip()))
    elif name == "/help":
        say(COMMANDS)
    else:
        raise RequestError(f"{name} is no command; /help lists them. A space before / sends the line as text.")
    return False


def _answer(
    model: Model, sampling: SamplingParams, dialogue: Dialogue, line: str, quiet: bool, cache_dtype: str | None
) -> bool:
    """Stream the answer to a line; True when Ctrl-C ended it."""
    from ferrum_jax.generation import stream_generate

    pieces: list[str] = []
    last = None
    try:
        ids = dialogue.ids(line)
        if not ids:
            return False
        try:
            last = write(stream_generate(model, ids, sampling, cache_dtype=cache_dtype), pieces, quiet)
        finally:
            print(flush=True)
    except KeyboardInterrupt:
        say(styled("[interrupted]", DIM, sys.stderr))
    if pieces:
        dialogue.keep(line, "".join(pieces))
    if last is None:
        return True
    check_finite(last)
    if not quiet:
        say(styled(stats_line(last), DIM, sys.stderr))
    return False
