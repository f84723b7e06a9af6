"""Kernel tests compile much and compute little; those that read compiled programs need all optimisations."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.compiling import quickly


@pytest.fixture(autouse=True, scope="module")
def compile_quickly(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.module.__name__.endswith(("test_memory", "test_triton_attention_gpu")):
        yield
        return
    with quickly():
        yield
