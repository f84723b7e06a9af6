"""Messages to a prompt, through the chat template of the checkpoint, within limits of time, memory and length.

Templates are rendered by `ferrum_jax.chat_worker` in a process of its own, started at the first use (0.1 s) and kept:
the one sure way to stop a template that loops or grows without end.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from ferrum_jax.errors import CheckpointError, RequestError
from ferrum_jax.tokenizer import MAX_TEXT_CHARS, check_utf8

MAX_TEMPLATE_CHARS = 131_072
MAX_MESSAGES = 512
TIME_LIMIT_SECONDS = 5.0
START_LIMIT_SECONDS = 60.0
# What a caller may set besides the messages; anything else could rename or shadow the template's own variables.
OPTIONS: dict[str, type] = {"enable_thinking": bool, "thinking": bool, "reasoning_effort": str}
# The rest of the environment, tokens and keys with it, stays out of the process that runs a stranger's template.
_KEPT_ENVIRONMENT = ("PATH", "PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TEMP", "TMPDIR", "TZ")


def render(
    template: str | None,
    messages: Sequence[Mapping[str, str]],
    add_generation_prompt: bool = True,
    special_tokens: Mapping[str, str] | None = None,
    **options: bool | str,
) -> str:
    """The prompt of a conversation. Encode it with `add_special_tokens=False`: templates write their own bos.

    Args:
      template: Jinja source, as `Tokenizer.chat_template` has it; never take it from a request.
      messages: up to 512 of {"role": str, "content": str}.
      add_generation_prompt: end with the opening of the assistant's turn.
      special_tokens: `Tokenizer.special_tokens`, for templates that write bos_token or eos_token.
      **options: enable_thinking, thinking (bool) or reasoning_effort (str), for templates that know them.

    Returns:
      The prompt, at most a million characters.

    Raises:
      RequestError: no template, malformed messages, an unknown option, or the template does not take the messages.
      CheckpointError: the template is broken, breaks out of its sandbox or passes a limit.

    Example:
      >>> template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
      >>> render(template, [{"role": "user", "content": "Hi"}])
      '<user>Hi'
    """
    if template is None:
        raise RequestError(
            "this checkpoint has no chat template, so it does not take messages; give it a plain prompt to continue."
        )
    if len(template) > MAX_TEMPLATE_CHARS:
        raise CheckpointError(
            f"the chat template has {len(template)} characters; at most {MAX_TEMPLATE_CHARS} are taken. "
            f"Save a shorter one as chat_template.jinja."
        )
    context = {**(special_tokens or {}), **_checked_options(options), "messages": _checked_messages(messages)}
    context |= {"add_generation_prompt": bool(add_generation_prompt), "tools": None, "documents": None}
    answer = _worker.ask({"source": template, "context": context, "max_chars": MAX_TEXT_CHARS})
    if "text" in answer:
        return answer["text"]
    raise _error(answer["kind"], answer["message"])


def _error(kind: str, message: str) -> CheckpointError | RequestError:
    if kind == "refused":
        return RequestError(f"the chat template refuses these messages: {message}")
    if kind == "failed":
        return RequestError(f"the chat template fails on these messages ({message}); check roles and their order.")
    if kind == "syntax":
        return CheckpointError(f"the chat template is not valid Jinja ({message}); correct chat_template.jinja.")
    if kind == "security":
        return CheckpointError(
            f"the chat template reaches outside its sandbox ({message}); do not use this checkpoint."
        )
    return CheckpointError(
        f"the chat template was stopped at a limit ({message}); shorten the messages, or distrust the checkpoint."
    )


def _checked_options(options: Mapping[str, bool | str]) -> dict[str, bool | str]:
    for name, value in options.items():
        if name not in OPTIONS:
            raise RequestError(f"{name!r} is not an option of chat templates here; known are {', '.join(OPTIONS)}.")
        if not isinstance(value, OPTIONS[name]):
            raise RequestError(f"{name} is {value!r}; give a {OPTIONS[name].__name__}.")
    return dict(options)


def _checked_messages(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    if not isinstance(messages, list | tuple):
        raise RequestError(f"messages is a {type(messages).__name__}; give a list of role and content.")
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise RequestError(f"there are {len(messages)} messages; give 1 to {MAX_MESSAGES}.")
    for at, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            found = f"the keys {sorted(map(str, message))}" if isinstance(message, Mapping) else type(message).__name__
            raise RequestError(f"message {at} is {found}; give exactly role and content.")
        for key, value in message.items():
            if not isinstance(value, str):
                raise RequestError(f"{key} of message {at} is a {type(value).__name__}; give a str (text only).")
            check_utf8(f"{key} of message {at}", value)
        if not message["role"]:
            raise RequestError(f"role of message {at} is empty; use system, user or assistant.")
    length = sum(len(value) for message in messages for value in message.values())
    if length > MAX_TEXT_CHARS:
        raise RequestError(f"the messages have {length} characters; at most {MAX_TEXT_CHARS} are taken.")
    return [dict(message) for message in messages]


class _Worker:
    """The one rendering process: started when needed, killed when late, never left with a question unanswered."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = os.getpid()

    def ask(self, request: dict[str, object]) -> dict[str, str]:
        with self._lock:
            process = self._running()
            try:
                return json.loads(self._exchange(process, json.dumps(request) + "\n", TIME_LIMIT_SECONDS))
            except TimeoutError:
                return {"kind": "limit", "message": f"{TIME_LIMIT_SECONDS:g} s"}
            except EOFError:  # a template can drive Python's own compiler to a crash
                return {"kind": "limit", "message": "the process that renders it ended"}

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None or self._owner != os.getpid():
            self.close()
            self._process, self._owner = self._start(), os.getpid()
            try:
                self._exchange(self._process, "", START_LIMIT_SECONDS)
            except (EOFError, TimeoutError) as error:
                raise RequestError(
                    "the process that renders chat templates did not start; check that jinja2 imports in "
                    f"{sys.executable!r}, or give a plain prompt."
                ) from error
        return self._process

    @staticmethod
    def _start() -> subprocess.Popen[str]:
        environment = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        try:
            # -P keeps this package's own folder off the path, where its file names could shadow others.
            return subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).with_name("chat_worker.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                encoding="utf-8",
            )
        except OSError as error:
            raise RequestError(
                f"chat templates are rendered by a second Python process, and {sys.executable!r} did not start "
                f"({error}); render the messages yourself and give a plain prompt."
            ) from error

    def _exchange(self, process: subprocess.Popen[str], text: str, seconds: float) -> str:
        """One line out, one line in. Whatever goes wrong, the process is gone before anyone can ask again."""
        assert process.stdin and process.stdout
        late = threading.Event()
        timer = threading.Timer(seconds, lambda: (late.set(), process.kill()))
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(text)
            process.stdin.flush()
            line = process.stdout.readline()
            if line.endswith("\n"):
                return line
            raise EOFError
        except (EOFError, OSError):
            self.close()
            raise TimeoutError if late.is_set() else EOFError from None
        except BaseException:  # Ctrl-C: an answer nobody waits for must not reach the next question
            self.close()
            raise
        finally:
            timer.cancel()
            timer.join()
            if late.is_set():
                self.close()

    def close(self) -> None:
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:  # unsent text of a killed process
                    pass


_worker = _Worker()
atexit.register(_worker.close)
