"""Compiled programs kept whole: a later process reads them from files, and traces and lowers nothing.

JAX's compile cache is asked with the text of a program, so a process has to trace and lower what it will find there; of
a GPU's programs that is nearly all that a warm start takes. Here a program is found by all that goes into its text: the
sources and tables of both packages, versions, JAX's settings, the device, the function's own constants, and the
structure, shapes and dtypes of its arguments. The files lie in the folder of JAX's compile cache and follow its
switches: without that folder nothing is kept.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

import ferrum_kernels
from ferrum_jax.environment import installed

PLATFORMS = ("gpu",)  # elsewhere tracing is little of a start, and XLA's code is for one model of processor
FOLDER, DAYS = "ferrum-programs-", 30  # in the compile cache's folder; after so many days without use it goes
VARIABLES = ("XLA_FLAGS", "TF_XLA_FLAGS", "NVIDIA_TF32_OVERRIDE")  # that XLA reads, not JAX
_SUFFIXES = (".py", ".json")  # of the files that programs are made of
_keeps = False


def keep_programs(yes: bool = True) -> None:
    """Keep compiled steps whole from here on, and look for those of earlier processes before tracing.

    For processes that run this package as it is, as its commands do: a warm start on a GPU then traces nothing. A
    program is found by what the package's files say, so call it only where nothing replaces functions of the package
    in memory; such a change would not be seen. It is about the steps of `generate`, its streams and `Engine`; functions
    that you jit yourself stay with JAX's compile cache.

    Args:
      yes: False goes back to tracing every program.

    >>> import ferrum_jax as fj
    >>> fj.keep_programs()
    >>> fj.keep_programs(False)
    """
    global _keeps
    _keeps = yes


def file_for(constants: Any, donated: tuple[str, ...], arguments: dict[str, Any]) -> Path | None:
    """Where a program of this process is kept, there or not.

    Args:
      constants: what the function depends on besides its arguments, as something whose repr says all of it.
      donated: names of arguments whose buffers it may reuse.
      arguments: arrays or their shapes.

    Returns:
      A path, or None where the program is not to be kept: nobody has asked for it, there is no compile cache, or the
      program is not of one GPU alone.
    """
    config: Any = jax.config  # its options are made at run time
    cache = config.jax_compilation_cache_dir
    if not _keeps or not cache or not config.jax_enable_compilation_cache or config.jax_default_device is not None:
        return None
    if "://" in cache:  # JAX's own may lie in a bucket
        return None
    if jax.__version_info__ < (0, 10):  # which writes programs in another form
        return None
    device = jax.devices()[0]
    leaves, structure = jax.tree.flatten(arguments)
    where = {_devices(leaf) for leaf in leaves} - {()}
    if device.platform not in PLATFORMS or jax.process_count() > 1 or not where <= {(device.id,)}:
        return None
    # A thread may have settings of its own, which only the attributes tell.
    settings = {name: getattr(config, name, config.values[name]) for name in sorted(config.values)}
    settings = {name: value for name, value in settings.items() if "cache" not in name}
    settings |= {name: os.environ.get(name) for name in VARIABLES}
    settings["implementation"] = ferrum_kernels.default_implementation()  # which the environment may change
    shapes = [(leaf.shape, str(leaf.dtype), getattr(leaf, "weak_type", False)) for leaf in leaves]
    key = _digest(map(repr, (constants, donated, str(structure), shapes, sorted(where), settings)))
    return Path(cache) / f"{FOLDER}{_surroundings(device)[:16]}" / key


def _devices(leaf: Any) -> tuple[int, ...]:
    sharding = getattr(leaf, "sharding", None)
    return () if sharding is None else tuple(sorted(device.id for device in sharding.device_set))


@functools.cache
def _surroundings(device: Any) -> str:
    """Digest of what is the same for all programs of a process: this package, JAX, Python and the device."""
    about = [getattr(device, name, None) for name in ("platform", "device_kind", "compute_capability", "core_count")]
    versions = jax.__version__, installed("jaxlib"), device.client.platform_version, sys.version
    return _digest([repr((*about, *versions)), *map(_sources, (__file__, ferrum_kernels.__file__))])


def _sources(module: Any) -> str:
    """Digest of a package's sources and tables, by the file of one of its modules at the top."""
    folder = Path(module).parent
    files = sorted(path for path in folder.rglob("*") if path.suffix in _SUFFIXES)
    return _digest(f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files)


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def read(file: Path) -> Any:
    """The program of a file, loaded onto the device.

    Args:
      file: of `file_for`. What is in it becomes code of this process, so nobody else may write to its folder.

    Returns:
      A jax.stages.Compiled, or None, with a warning, where the file does not hold one or is not to be trusted.
    """
    from jax.experimental.serialize_executable import deserialize_and_load

    try:
        folder = file.parent.stat()
        if folder.st_mode & 0o022 or folder.st_uid != os.getuid():
            raise ValueError("its folder is not the user's own")
        os.utime(file)  # see `_forget_old`
        content = file.read_bytes()
        digest, content = content[:32], content[32:]
        if hashlib.sha256(content).digest() != digest:
            raise ValueError("it is not what was written")
        found = deserialize_and_load(*pickle.loads(content), execution_devices=jax.devices()[:1])
    except Exception as error:  # whatever XLA or a class that has changed says of it
        warnings.warn(
            f"{file} is no program that can be used ({' '.join(str(error).split())[:200]}), so it is compiled again.",
            stacklevel=2,
        )
        return None
    return found


def write(file: Path, compiled: Any) -> None:
    """Keep a program. Where it cannot be kept a warning says so: later processes compile it again.

    Args:
      file: of `file_for`.
      compiled: a jax.stages.Compiled.
    """
    from jax.experimental.serialize_executable import serialize

    try:
        content = pickle.dumps(serialize(compiled))
        if not file.parent.is_dir():
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _forget_old(file.parent)
        # Under another name until it is whole: other processes may look for it.
        descriptor, name = tempfile.mkstemp(dir=file.parent, suffix=".incomplete")
        try:
            with os.fdopen(descriptor, "wb") as out:
                out.write(hashlib.sha256(content).digest() + content)
            os.replace(name, file)
        except BaseException:
            os.unlink(name)
            raise
    except Exception as error:  # an error of the file system, or of XLA where a program has no such form
        warnings.warn(
            f"{file} was not written ({' '.join(str(error).split())[:200]}), so later processes compile this program "
            f"again.",
            stacklevel=2,
        )


def _forget_old(folder: Path) -> None:
    """Remove what other versions and devices have left beside a folder, where it has not been used for long."""
    long_ago = time.time() - DAYS * 24 * 3600
    for other in folder.parent.glob(f"{FOLDER}*"):
        with suppress(OSError):
            if max(path.stat().st_mtime for path in (other, *other.iterdir())) < long_ago:
                shutil.rmtree(other)
