"""Laws compile much and compute little."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.compiling import quickly


@pytest.fixture(autouse=True, scope="module")
def compile_quickly() -> Iterator[None]:
    with quickly():
        yield
