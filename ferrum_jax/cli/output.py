"""What every command prints with: data to stdout, talk to stderr, and one passing status line on a terminal."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, TextIO

DIM, RED, YELLOW = "2", "31", "33"
LINE_AWAY = "\r\x1b[2K"  # what takes away the line that the cursor is on


def styled(text: str, code: str, stream: TextIO) -> str:
    """The text in an ANSI style, where the stream is a terminal that wants one.

    Args:
      text: to show.
      code: of the style, such as DIM.
      stream: where it will be written.

    Returns:
      The text, unchanged for files, pipes, NO_COLOR and dumb terminals.
    """
    plain = not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"\x1b[{code}m{text}\x1b[0m"


def say(text: str) -> None:
    """Write a line to stderr."""
    print(text, file=sys.stderr, flush=True)


def say_error(sentence: str) -> None:
    """Write an error to stderr, as one line that begins with "error:"."""
    say(f"{styled('error:', RED, sys.stderr)} {sentence}")


def say_warning(sentence: str) -> None:
    """Write a warning to stderr, as one line that begins with "warning:"."""
    say(f"{styled('warning:', YELLOW, sys.stderr)} {' '.join(sentence.split())}")


def emit(data: dict[str, Any]) -> None:
    """Write one JSON object to stdout."""
    print(json.dumps(data, indent=2, allow_nan=False))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows in aligned columns.

    Args:
      header: names of the columns.
      rows: cells.
      left: how many columns, from the first, align to the left; the others align to the right.

    Returns:
      Lines joined by newlines.

    >>> print(table(["step", "s"], [["prefill", "1.25"]]))
    step        s
    prefill  1.25
    """
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, strict=True)
        aligned = (cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(cells))
        return "  ".join(aligned).rstrip()

    return "\n".join(line(row) for row in (header, *rows))


def size(count: float) -> str:
    """A number of bytes for people.

    >>> size(98_304)
    '96.0 KiB'
    """
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


class Status:
    """A line on stderr that says what is being waited for and disappears; nothing where stderr is no terminal."""

    def __init__(self, text: str, quiet: bool = False) -> None:
        """Prepare; nothing is shown before the block is entered.

        Args:
          text: a few words.
          quiet: show nothing.
        """
        self._text, self._shown_at, self._quiet = text, 0.0, quiet
        self._show = not quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def __enter__(self) -> Status:
        self.update(self._text)
        return self

    def update(self, text: str) -> None:
        """Replace the words, at most ten times a second."""
        if not self._show or time.monotonic() - self._shown_at < 0.1:
            return
        self._shown_at = time.monotonic()
        room = shutil.get_terminal_size().columns - 1
        sys.stderr.write(f"{LINE_AWAY}{styled(text[:room], DIM, sys.stderr)}")
        sys.stderr.flush()

    def note(self, text: str) -> None:
        """Leave a line on stderr above the words, also where it is no terminal; nothing where the status is quiet."""
        if not self._quiet:
            sys.stderr.write(f"{LINE_AWAY if self._show else ''}{text}\n")
            sys.stderr.flush()
            self._shown_at = 0.0  # the words are gone, so the next ones are shown however soon they come

    def clear(self) -> None:
        """Take the line away for good; harmless when it is gone."""
        if self._show:
            self._show = False
            sys.stderr.write(LINE_AWAY)
            sys.stderr.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()
