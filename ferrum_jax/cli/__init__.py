"""The command `ferrum-jax`: one frozen dataclass per subcommand, parsed by tyro.

Exit codes: 0 done, 1 a problem in the model or the request, 2 wrong usage, 3 an environment that cannot run a model,
130 interrupted. Results go to stdout, everything else to stderr. Nothing here imports jax before a command needs it.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ferrum_jax.errors import FerrumError

if TYPE_CHECKING:
    from ferrum_jax.cli.options import Common

OK, PROBLEM, USAGE, ENVIRONMENT, INTERRUPTED = 0, 1, 2, 3, 130
DESCRIPTION = "Run GPTQ mixture-of-experts language models with JAX. MODEL is demo, a folder, or a Hugging Face id."


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
    debug = os.environ.get("FERRUM_JAX_DEBUG", "") not in ("", "0")
    try:
        try:
            command = parse(sys.argv[1:] if argv is None else argv)
            debug = debug or command.debug
            code = command.execute()
        except SystemExit as leaving:  # help, version and usage errors
            code = leaving.code if isinstance(leaving.code, int) else OK
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has seen enough. Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception as error:
        return _report(error, debug)


def parse(arguments: Sequence[str]) -> Common:
    """The command that the arguments ask for.

    Args:
      arguments: words after the program's name.

    Raises:
      SystemExit: help or the version was asked for (0), or the arguments are wrong (2).
    """
    if list(arguments) == ["--version"]:
        from ferrum_jax import __version__

        print(f"ferrum-jax {__version__}")
        raise SystemExit(OK)
    import tyro

    from ferrum_jax.cli.bench import Bench
    from ferrum_jax.cli.doctor import Doctor
    from ferrum_jax.cli.inspect import Inspect
    from ferrum_jax.cli.perplexity import Perplexity
    from ferrum_jax.cli.run import Run

    return tyro.extras.subcommand_cli_from_dict(
        {"run": Run, "inspect": Inspect, "perplexity": Perplexity, "bench": Bench, "doctor": Doctor},
        prog="ferrum-jax",
        description=DESCRIPTION,
        args=list(arguments),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


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
    say_error(
        f"this should not happen: {type(error).__name__}: {' '.join(str(error).split())}. "
        f"Run again with --debug and report what it prints."
    )
    return PROBLEM
