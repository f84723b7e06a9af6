"""The benchmarks under kernels/bench, which are scripts and no package."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "kernels" / "bench"


def script(name: str) -> Any:
    """The module of a script, with what it imports from its own folder."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))
