"""The command `ferrum-jax`: one frozen dataclass per subcommand, parsed by tyro.

Exit codes: 0 done, 1 a problem in the model or the request, 2 wrong usage, 3 an environment that cannot run a model,
130 interrupted. Results go to stdout, everything else to stderr. Nothing here imports jax before a command needs it.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from ferrum_jax.errors import FerrumError

if TYPE_CHECKING:
    from ferrum_jax.cli.options import Common

OK, PROBLEM, USAGE, ENVIRONMENT, INTERRUPTED = 0, 1, 2, 3, 130
COMMANDS = {  # name: (class, what it does); its module has the same name
    "run": ("Run", "write text, or talk with a model on a terminal"),
    "inspect": ("Inspect", "say what a checkpoint is, what memory it needs and what is wrong with it"),
    "perplexity": ("Perplexity", "measure how well a model predicts a text"),
    "bench": ("Bench", "measure speed, compile times and memory"),
    "doctor": ("Doctor", "check whether this environment can run a model"),
}
HELP = """\
usage: ferrum-jax COMMAND ...

Run GPTQ mixture-of-experts language models with JAX.

commands:
{commands}

  ferrum-jax COMMAND --help says more; ferrum-jax --version gives the version.
  MODEL is demo (it ships with the package), a folder, or a Hugging Face id such as OWNER/NAME.

    ferrum-jax run demo "Once upon a time"

exit codes: 0 done, 1 a problem in the model or the request, 2 wrong usage, 3 an environment that cannot run a model,
130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
      argv: the arguments after the program's name; None takes those of the process.

    Returns:
      The exit code: 0 done, 1 a problem in the model or the request, 2 wrong usage, 3 an environment that cannot run
      a model, 130 interrupted.

    >>> main(["--version"])  # doctest: +ELLIPSIS
    ferrum-jax ...
    0
    """
    code = _run(sys.argv[1:] if argv is None else argv)
    if argv is None:
        _leave(code)
    return code


def _run(arguments: Sequence[str]) -> int:
    debug = os.environ.get("FERRUM_JAX_DEBUG", "") not in ("", "0")
    try:
        try:
            command = parse(arguments)
            debug = debug or command.debug
            code = command.execute()
        except SystemExit as leaving:  # help, version and usage errors
            code = leaving.code if isinstance(leaving.code, int) else OK
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader has seen enough
        return OK
    except Exception as error:
        return _report(error, debug)


def _leave(code: int) -> NoReturn:
    """End the process without Python's teardown: after Ctrl-C, XLA may still compile in a thread, and would crash."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def parse(arguments: Sequence[str]) -> Common:
    """The command that the arguments ask for.

    Args:
      arguments: words after the program's name.

    Raises:
      SystemExit: help or the version was asked for (0), or the arguments are wrong (2).
    """
    name, *rest = arguments or ("",)
    if name == "--version":
        from ferrum_jax import __version__

        print(f"ferrum-jax {__version__}")
        raise SystemExit(OK)
    if name in ("-h", "--help", "help"):
        print(_help(), end="")
        raise SystemExit(OK)
    if name not in COMMANDS:
        print(_help() if not name else _unknown(name), end="", file=sys.stderr)
        raise SystemExit(USAGE)
    import tyro

    command = getattr(importlib.import_module(f"ferrum_jax.cli.{name}"), COMMANDS[name][0])
    return tyro.cli(command, prog=f"ferrum-jax {name}", args=rest, config=(tyro.conf.FlagCreatePairsOff,))


def _help() -> str:
    return HELP.format(commands="\n".join(f"  {name:<11} {what}" for name, (_, what) in COMMANDS.items()))


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else "ferrum-jax --help lists what there is."
    return f"error: {name!r} is no command; commands are {', '.join(COMMANDS)}; {hint}\n"


def _report(error: Exception, debug: bool) -> int:
    from ferrum_jax.cli.options import CannotStart, UsageError
    from ferrum_jax.cli.output import say_error

    if debug:
        traceback.print_exception(error)
    if isinstance(error, UsageError):
        say_error(str(error))
        return USAGE
    if isinstance(error, ImportError):
        say_error(
            f"a package that is needed cannot be imported ({error}). Install ferrum-jax again, or run  "
            f"ferrum-jax doctor  to see what is missing."
        )
        return ENVIRONMENT
    if isinstance(error, FerrumError):
        say_error(str(error))
        return ENVIRONMENT if isinstance(error, CannotStart) else PROBLEM
    if isinstance(error, OSError):
        say_error(
            f"{error.filename or 'reading or writing'}: {error.strerror or error}. Check the disk and permissions."
        )
        return PROBLEM
    say_error(
        f"this should not happen: {type(error).__name__}: {' '.join(str(error).split())}. "
        f"Run again with --debug and report what it prints."
    )
    return PROBLEM
