"""What a measurement on an NVIDIA GPU was taken on: versions, driver, and the clocks while it works."""

from __future__ import annotations

import datetime
import subprocess
from collections.abc import Callable
from typing import Any

import jax
import jaxlib

# Names in a report, and nvidia-smi's.
CLOCKS = {"sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem", "watts": "power.draw", "celsius": "temperature.gpu"}
MOST_CLOCKS = {"most_sm_mhz": "clocks.max.sm", "most_memory_mhz": "clocks.max.mem"}


def versions() -> dict[str, Any]:
    """Device, driver, greatest clocks, versions and date; None for what nvidia-smi does not tell."""
    told = ask({"driver": "driver_version", **MOST_CLOCKS})
    return {
        "device": jax.devices()[0].device_kind,
        **told,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "date": datetime.date.today().isoformat(),
    }


def clocks_under(work: Callable[[], Any]) -> dict[str, Any]:
    """The clocks of the first GPU while `work` is called again and again; None for what nvidia-smi does not tell."""
    return ask(CLOCKS, work)


def ask(names: dict[str, str], work: Callable[[], Any] = lambda: None) -> dict[str, Any]:
    """What nvidia-smi reports of the first GPU, by our names: a number where it is one, None where it is missing.

    Args:
      names: of a report: nvidia-smi's.
      work: called until nvidia-smi has answered.
    """
    missing = dict.fromkeys(names)
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(names.values())}", "--format=csv,noheader,nounits"]
    try:
        asked = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return missing
    with asked:
        while asked.poll() is None:
            work()
            try:
                asked.wait(0.001)
            except subprocess.TimeoutExpired:
                continue
        return parse(names, asked.communicate()[0])


def parse(names: dict[str, str], text: str) -> dict[str, Any]:
    """One line of nvidia-smi's values.

    >>> parse({"driver": "driver_version", "watts": "power.draw", "fan": "fan.speed"}, "580.1.2, 67.10, [N/A]")
    {'driver': '580.1.2', 'watts': 67.1, 'fan': None}
    """
    values = [value.strip() for value in text.strip().splitlines()[0].split(",")] if text.strip() else []
    if len(values) != len(names):
        return dict.fromkeys(names)
    return {name: _value(value) for name, value in zip(names, values, strict=True)}


def _value(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return None if text.startswith("[") else text
