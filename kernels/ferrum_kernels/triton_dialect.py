"""Where MLIR finds the operations of Triton: looking in vain took a third of the time that lowering a kernel takes.

MLIR's Python bindings look for a module named after an operation's dialect whenever they hand one to Python, until they
find it. Those of Triton's dialect, `tt`, are in jaxlib under another name and are there already, so every operation
of a kernel costs three searches of the file system.
"""

from __future__ import annotations

import functools
import importlib
import sys

NAME = "jaxlib.mlir.dialects.tt"  # where the bindings look first


@functools.cache
def announce() -> bool:
    """Give the module with Triton's operations the name that the bindings look for.

    Returns:
      Whether this jaxlib has that module; without it nothing changes.
    """
    try:
        operations = importlib.import_module("jaxlib.triton.dialect")
    except ImportError:
        return False
    sys.modules.setdefault(NAME, operations)
    return True
