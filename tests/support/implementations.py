"""Which implementations a test can hold to float32 exactness here, and the instruction sets of this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from ferrum_kernels import cpu_library

NO_LIBRARY = cpu_library.unavailable()
needs_library = pytest.mark.skipif(NO_LIBRARY is not None, reason=str(NO_LIBRARY))
EXACT = [pytest.param("cpu-exact", marks=needs_library), "xla", "apple", "reference"]
ISAS = [] if NO_LIBRARY else list(cpu_library.describe().isas)


def skip_refused(implementation: str, bits: int) -> None:
    """Skip what the CPU kernels refuse with a sentence that test_cpu_kernels tests."""
    if implementation.startswith("cpu") and bits not in (4, 8):
        pytest.skip("the CPU kernels take 4 and 8 bits")


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Run the CPU kernels on another instruction set of this machine."""
    library = cpu_library.library()
    before = cpu_library.describe().isa
    assert library.ferrum_cpu_choose_isa(name.encode()), name
    try:
        yield
    finally:
        library.ferrum_cpu_choose_isa(before.encode())
