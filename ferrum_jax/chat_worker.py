"""The process that renders chat templates: one JSON request a line on stdin, one JSON reply a line on stdout.

Templates come with checkpoints, from strangers. Jinja's sandbox keeps them from Python's internals, but not from
endless loops and giant strings; a process can be stopped (`ferrum_jax.chat`) and given a memory limit. Run as a
script, it imports Jinja and the standard library only.
"""

from __future__ import annotations

import datetime
import functools
import json
import signal
import sys
from typing import Any, ClassVar

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_LIMIT_BYTES = 1 << 30
ORPHAN_LIMIT_SECONDS = 60


class TemplateRefusal(Exception):
    """The template called raise_exception."""


class OutputTooLong(Exception):
    """The rendered text passed its limit."""


class GenerationTag(Extension):
    """`{% generation %}` marks the assistant's text for training; here its content is rendered and nothing more."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        """Parses the tag to its content."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> ImmutableSandboxedEnvironment:
    """The sandbox with the filters and globals that Hugging Face's chat templates rely on."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, LoopControlExtension]
    )
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _refuse
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return env


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes <, > and & for HTML, which would change the prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: object) -> None:
    raise TemplateRefusal(str(message))


@functools.lru_cache(maxsize=8)
def compiled(source: str) -> jinja2.Template:
    """The template, compiled once."""
    return environment().from_string(source)


def render(source: str, context: dict[str, Any], max_chars: int) -> str:
    """The rendered text; piece by piece, so that a text without end stops at the limit."""
    pieces, length = [], 0
    for piece in compiled(source).generate(**context):
        pieces.append(piece)
        length += len(piece)
        if length > max_chars:
            raise OutputTooLong(f"more than {max_chars} characters")
    return "".join(pieces)


def reply(request: dict[str, Any]) -> dict[str, str]:
    """{"text": ...}, or {"kind": ..., "message": ...} for what went wrong."""
    try:
        return {"text": render(**request)}
    except TemplateRefusal as error:
        return {"kind": "refused", "message": str(error)}
    except OutputTooLong as error:
        return {"kind": "limit", "message": str(error)}
    except (MemoryError, RecursionError) as error:
        return {"kind": "limit", "message": "the memory limit" if isinstance(error, MemoryError) else "too deep calls"}
    except jinja2.TemplateSyntaxError as error:
        return {"kind": "syntax", "message": f"line {error.lineno}: {error.message}"}
    except SecurityError as error:
        return {"kind": "security", "message": str(error)}
    except Exception as error:  # a template may fail in any way that Python can
        return {"kind": "failed", "message": f"{type(error).__name__}: {error}"[:500]}


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows: the time limit has to do
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_LIMIT_BYTES if hard == resource.RLIM_INFINITY else min(hard, MEMORY_LIMIT_BYTES)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    except (ValueError, OSError):  # macOS refuses an address-space limit: the time limit has to do
        return


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    """Answers until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that started us
    _limit_memory()
    _say("ready")
    # The program that started us stops us sooner; should it be gone, the alarm ends this process.
    alarm = getattr(signal, "alarm", lambda seconds: None)
    for line in sys.stdin:
        alarm(ORPHAN_LIMIT_SECONDS)
        _say(json.dumps(reply(json.loads(line))))
        alarm(0)


if __name__ == "__main__":
    main()
