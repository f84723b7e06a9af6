"""Reading compiled HLO text: which arrays a program makes, as against those it is given or only looks at."""

from __future__ import annotations

import re
from dataclasses import dataclass

# `%name = f32[2,3]{1,0} add(...)`; operations with tuple results pass their arrays on and are not matched.
_OPERATION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (\w+)\[([\d,]*)\]\S* ([\w\-]+)\(", re.MULTILINE)
_VIEWS = ("parameter", "get-tuple-element", "bitcast")


@dataclass(frozen=True)
class Made:
    """One array that an operation makes."""

    dtype: str
    shape: tuple[int, ...]
    operation: str


def arrays_made(text: str) -> list[Made]:
    """The results of every operation of a module, fused ones included, that are not views of what was there."""
    found = [Made(d, tuple(int(n) for n in s.split(",") if n), op) for d, s, op in _OPERATION.findall(text)]
    return [made for made in found if made.operation not in _VIEWS]
