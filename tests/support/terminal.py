"""The command in a process of its own: with pipes, or on a pseudo-terminal that a test types into."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from types import TracebackType

COMMAND = (sys.executable, "-c", "from ferrum_jax.cli import main; main()")


def heed_interrupts() -> None:
    """Let new processes take Ctrl-C: a shell makes what it runs in the background ignore it, tests included."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def environment(**changes: str) -> dict[str, str]:
    """This process's environment with its import path, and without what would change the look of the output."""
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
    return {**kept, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "TERM": "xterm", **changes}


def run(*arguments: str, stdin: str = "", **changes: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end with pipes for stdin, stdout and stderr."""
    return subprocess.run(
        [*COMMAND, *arguments], input=stdin, capture_output=True, text=True, env=environment(**changes), timeout=300
    )


class Terminal:
    """The command on a pseudo-terminal of its own, which is also its controlling terminal: Ctrl-C works.

    >>> with Terminal("run", "demo") as terminal:
    ...     terminal.wait_for("> ")
    ...     terminal.type("/exit\\n")
    ...     terminal.exit_code()
    0
    """

    def __init__(self, *arguments: str, **changes: str) -> None:
        self._ours, theirs = pty.openpty()
        # The shell leads a new session; the first terminal it opens becomes the session's.
        opened = ["sh", "-c", 'exec "$@" <"$0" >"$0" 2>&1', os.ttyname(theirs), *COMMAND, *arguments]
        heed_interrupts()
        self._process = subprocess.Popen(opened, env=environment(**changes), start_new_session=True)
        self._theirs = theirs
        self.output = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._ours)
        os.close(self._theirs)

    def type(self, text: str) -> None:
        """Send keys; "\\x04" is Ctrl-D. Forgets the output so far."""
        self.output = ""
        os.write(self._ours, text.encode())

    def interrupt(self) -> None:
        """Press Ctrl-C, not sooner than a person would: input() loses a signal that comes just as it begins to wait."""
        time.sleep(0.5)
        self.type("\x03")

    def wait_for(self, pattern: str, seconds: float = 120) -> str:
        """Read until the output since the last keys holds a match; returns that output."""
        until = time.monotonic() + seconds
        while not re.search(pattern, self.output):
            assert time.monotonic() < until, f"no {pattern!r} in {self.output!r}"
            self._read()
        return self.output

    def exit_code(self, seconds: float = 60) -> int:
        """Wait for the end."""
        until = time.monotonic() + seconds
        while self._process.poll() is None:
            assert time.monotonic() < until, f"still running after {self.output!r}"
            self._read()
        while self._read():
            pass
        return self._process.returncode

    def _read(self) -> bool:
        """Take what is there, waiting a little; False when nothing came."""
        if not select.select([self._ours], [], [], 0.05)[0]:
            return False
        self.output += os.read(self._ours, 65536).decode(errors="replace")
        return True
