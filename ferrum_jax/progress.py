"""Progress on stderr for long work: a bar on a terminal, silence elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any


class Progress:
    """A context manager around one rich progress bar that counts bytes."""

    def __init__(self, title: str, total: int, quiet: bool = False) -> None:
        """Prepare; nothing is shown before the block is entered.

        Args:
          title: a few words.
          total: bytes of the whole work.
          quiet: show nothing even on a terminal.
        """
        self._title, self._total = title, total
        self._bar: Any = None
        self._show = not quiet and sys.stderr.isatty()

    def __enter__(self) -> Progress:
        if self._show:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total)
        return self

    def advance(self, done: int) -> None:
        """Count more bytes."""
        if self._bar is not None:
            self._bar.advance(self._task, done)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
