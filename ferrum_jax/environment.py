"""The machine around the model: plugin versions that fit, memory that suffices, a cache for compiled programs."""

from __future__ import annotations

import os
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ferrum_jax.errors import BackendError, CapacityError

COMPILE_CACHE = "FERRUM_JAX_COMPILE_CACHE"
WEIGHT_CACHE = "FERRUM_JAX_WEIGHT_CACHE"
_OFF = ("off", "0", "no", "false")


def installed(package: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_platform() -> None:
    """Refuse a jax-metal that cannot work with the installed JAX, before JAX fails in its own words.

    Raises:
      BackendError: jax-metal is installed beside any jax but 0.5.0, and JAX_PLATFORMS does not keep to the CPU.
    """
    metal, jax_version = installed("jax-metal"), installed("jax")
    if metal is None or jax_version == "0.5.0" or os.environ.get("JAX_PLATFORMS", "").lower() == "cpu":
        return
    raise BackendError(
        f"jax-metal {metal} does not work with jax {jax_version}: its last release needs jax 0.5.0. Install the "
        f'maintained plugin with pip install "ferrum-jax[mps]" (jax-mps), keep the old pair with '
        f'pip install "ferrum-jax[metal]", or set JAX_PLATFORMS=cpu.'
    )


def free_memory() -> int | None:
    """Bytes that the default device can still hold, or None where it does not say."""
    import jax

    device = jax.devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return free_host_memory() if device.platform == "cpu" else None


def free_host_memory() -> int | None:
    """Bytes of main memory that programs can still take, or None where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return None
    return int(lines["MemAvailable"].split()[0]) * 1024


def check_memory(needed: int, what: str, working: int = 0) -> None:
    """Refuse parameters that do not fit, before anything is allocated.

    Args:
      needed: bytes.
      what: the model's name, for the sentence.
      working: bytes that making the parameters takes beside them.

    Raises:
      CapacityError: with the numbers.
    """
    free = free_memory()
    if free is not None and needed + working > free:
        more = f" and {working / 2**30:.1f} GiB while they are laid out" if working else ""
        raise CapacityError(
            f"{what} needs {needed / 2**30:.1f} GiB for its parameters{more}; {free / 2**30:.1f} GiB are free on this "
            f"device. Free memory, use a 16-bit dtype, or take a smaller model."
        )


def compile_cache_folder() -> Path | None:
    """Where compiled programs are kept: $FERRUM_JAX_COMPILE_CACHE, else the user's cache folder; None when off."""
    return None if switched_off(COMPILE_CACHE) else _cache_folder(COMPILE_CACHE, "xla")


def weight_cache_folder() -> Path:
    """Where assembled weights are kept: $FERRUM_JAX_WEIGHT_CACHE, else the user's cache folder, even when off."""
    return _cache_folder(WEIGHT_CACHE, "weights")


def switched_off(variable: str) -> bool:
    """Whether the environment says off where a folder could stand."""
    return os.environ.get(variable, "").lower() in _OFF


def _cache_folder(variable: str, name: str) -> Path:
    setting = os.environ.get(variable, "")
    if setting and setting.lower() not in _OFF:
        return Path(setting)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ferrum_jax" / name


def make_private(folder: Path) -> str | None:
    """Make a folder that only its owner can use, unless it exists.

    Args:
      folder: the folder.

    Returns:
      None, or why the folder must not be used, in words that fit before "so".
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = folder.stat().st_mode
    except OSError as error:
        return f"{folder} cannot be made ({error.strerror})"
    # What is loaded from a folder that others can write to is whatever they put there.
    return f"{folder} can be written by everyone" if mode & 0o002 else None


def enable_compile_cache() -> Path | None:
    """Let JAX keep compiled programs across processes, unless the user chose a folder or switched it off.

    Set FERRUM_JAX_COMPILE_CACHE to a folder to move the cache, or to "off". A folder given to JAX itself
    (JAX_COMPILATION_CACHE_DIR) wins.

    Returns:
      The folder in use, or None when it is off or, with a warning, when the folder is not safe to use.
    """
    import jax

    if chosen := jax.config.values.get("jax_compilation_cache_dir"):
        return Path(chosen)
    folder = compile_cache_folder()
    if folder is None:
        return None
    if why := make_private(folder):
        warnings.warn(
            f"{why}, so compiled programs are not kept and every start compiles again. Set {COMPILE_CACHE} to a "
            f"folder of your own, or to off.",
            stacklevel=2,
        )
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return folder
