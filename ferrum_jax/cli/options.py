"""Options that commands share, and the one way in which they load a model. Imports no jax before a model is loaded."""

from __future__ import annotations

import abc
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from ferrum_jax.cli.output import Status, say_warning
from ferrum_jax.errors import BackendError

if TYPE_CHECKING:
    from ferrum_jax.checkpoint.load import Model

NO_DEFAULT = ""
ModelName = Annotated[str, arg(metavar="MODEL", help_behavior_hint=NO_DEFAULT)]


class UsageError(Exception):
    """Options that do not go together; exit code 2."""


class CannotStart(BackendError):
    """The environment cannot run any model; exit code 3."""


@dataclass(frozen=True, kw_only=True)
class Common(abc.ABC):
    """Options of every command.

    Args:
      quiet: no progress and no statistics on stderr; warnings and errors stay.
      debug: show the traceback of an error (FERRUM_JAX_DEBUG=1 does the same).
    """

    quiet: Annotated[bool, arg(aliases=("-q",), help_behavior_hint=NO_DEFAULT)] = False
    debug: Annotated[bool, arg(help_behavior_hint=NO_DEFAULT)] = False

    @abc.abstractmethod
    def execute(self) -> int:
        """Do the work; returns the exit code."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Common):
    """Options of every command that reads a checkpoint.

    Args:
      dtype: of activations and unquantised weights; without it the checkpoint's own, or float32 on a CPU without the
        CPU kernels.
      revision: branch, tag or commit on the Hugging Face Hub.
      offline: read the Hugging Face cache only.
      checkpoint_format: settles how zero points are stored, where the files leave it open.
    """

    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        arg(metavar="{bfloat16,float16,float32}", help_behavior_hint=NO_DEFAULT),
    ] = None
    revision: Annotated[str | None, arg(metavar="REVISION", help_behavior_hint=NO_DEFAULT)] = None
    offline: Annotated[bool, arg(help_behavior_hint=NO_DEFAULT)] = False
    checkpoint_format: Annotated[
        Literal["gptq", "gptq_v2"] | None, arg(metavar="{gptq,gptq_v2}", help_behavior_hint=NO_DEFAULT)
    ] = None


@dataclass(frozen=True, kw_only=True)
class Loading(Checkpoint):
    """Options of every command that runs a model.

    Args:
      implementation: of the packed matmuls (cpu, cpu-exact, cpu-int8, triton, mosaic, xla, apple, reference); without
        it the best of the device.
      lm_head_bits: hold an unquantised output projection in 4 or 8 bits, rounded while it is loaded.
      no_weight_cache: read the checkpoint itself, and keep no assembled weights on disk for the next start.
    """

    implementation: Annotated[str | None, arg(metavar="NAME", help_behavior_hint=NO_DEFAULT)] = None
    lm_head_bits: Annotated[Literal[4, 8] | None, arg(metavar="{4,8}", help_behavior_hint=NO_DEFAULT)] = None
    no_weight_cache: Annotated[bool, arg(help_behavior_hint=NO_DEFAULT)] = False


CacheDtype = Annotated[
    Literal["bfloat16", "float16", "float32", "int8"] | None,
    arg(metavar="{bfloat16,float16,float32,int8}", help_behavior_hint=NO_DEFAULT),
]


def load_model(options: Loading, model: str) -> Model:
    """Start JAX and load a model; warnings about the checkpoint become lines on stderr.

    Args:
      options: of the command.
      model: what the user named.

    Returns:
      Model.

    Raises:
      CannotStart: JAX does not come up here.
      FerrumError: as `ferrum_jax.load`.
    """
    start_jax(options)
    from ferrum_jax.checkpoint.load import load

    with warnings_as_lines():
        return load(
            model,
            revision=options.revision,
            dtype=options.dtype,
            implementation=options.implementation,
            checkpoint_format=options.checkpoint_format,
            lm_head_bits=options.lm_head_bits,
            offline=options.offline or None,
            weight_cache=False if options.no_weight_cache else None,
            quiet=options.quiet,
        )


def start_jax(options: Loading) -> None:
    """Import JAX and bring up its devices, before any file is read.

    Args:
      options: of the command.

    Raises:
      CannotStart: a plugin does not fit, or no device comes up.
      BackendError: the implementation is unknown, or none is made for the device.
    """
    from ferrum_jax.environment import check_platform
    from ferrum_jax.kept import keep_programs

    with Status("starting JAX", options.quiet):
        try:
            check_platform()
            import jax

            jax.devices()
            keep_programs()
        except (BackendError, RuntimeError) as error:
            advice = "" if isinstance(error, BackendError) else " Run  ferrum-jax doctor  to see why."
            raise CannotStart(f"{' '.join(str(error).split())}{advice}") from error
        from ferrum_kernels.ops import IMPLEMENTATIONS, default_implementation

        if options.implementation is None:
            default_implementation()
        elif options.implementation not in IMPLEMENTATIONS:
            raise BackendError(
                f"--implementation {options.implementation} is unknown; accepted are {', '.join(IMPLEMENTATIONS)}."
            )


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Print warnings about the checkpoint as one line each on stderr while the block runs."""
    from ferrum_jax.checkpoint.load import CheckpointWarning

    with warnings.catch_warnings():
        warnings.simplefilter("always", CheckpointWarning)
        show = warnings.showwarning

        def show_line(message, category, *details, **more):
            if issubclass(category, CheckpointWarning):
                say_warning(str(message))
            else:
                show(message, category, *details, **more)

        warnings.showwarning = show_line
        yield


def on_terminal() -> bool:
    """Whether a person can type into stdin."""
    return sys.stdin is not None and sys.stdin.isatty()
