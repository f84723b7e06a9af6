"""Lowering a Triton kernel does not search the file system for what is imported already."""

from __future__ import annotations

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from ferrum_kernels import mosaic, triton, triton_dialect
from ferrum_kernels.triton_norm import add_norm
from tests.support.triton_cases import ignore_deprecation, lower_for_cuda

pytestmark = [
    ignore_deprecation,
    pytest.mark.skipif(jax.__version_info__ < (0, 10, 2), reason="the Triton kernels need jax 0.10.2"),
]


class Searches:
    """Counts the searches for a module, as the last resort of an import that sys.modules does not answer."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def find_spec(self, name: str, *_: Any) -> None:
        self.found.append(name)


@pytest.fixture
def searches(monkeypatch):
    """Lower one kernel of `d` columns and say how often a module of Triton's dialect was looked for."""
    monkeypatch.setitem(sys.modules, triton_dialect.NAME, None)
    del sys.modules[triton_dialect.NAME]  # and it is as it was after the test
    triton_dialect.announce.cache_clear()

    def count(d: int) -> int:
        seen = Searches()
        monkeypatch.setattr(sys, "meta_path", [seen, *sys.meta_path])
        x = jax.ShapeDtypeStruct((2, d), jnp.bfloat16)
        kernel = functools.partial(add_norm, layer=None, eps=1e-6, interpret=False)
        text = lower_for_cuda(kernel, x, x, jax.ShapeDtypeStruct((d,), jnp.bfloat16))
        assert "xla.gpu.triton" in text
        return sum(name.endswith(".tt") for name in seen.found)

    yield count
    triton_dialect.announce.cache_clear()


def test_the_dialect_is_found_at_once_where_it_was_announced(searches):
    assert triton_dialect.announce()
    assert searches(128) == 0


@pytest.mark.parametrize("backend", [triton, mosaic])
def test_checking_a_kernel_announces_the_dialect(searches, monkeypatch, backend):
    monkeypatch.setattr(backend, "unavailable", lambda: None)
    backend.check()
    assert triton_dialect.NAME in sys.modules
    assert searches(256) == 0


def test_a_jaxlib_without_the_dialect_changes_nothing(searches, monkeypatch):
    monkeypatch.setitem(sys.modules, "jaxlib.triton.dialect", None)  # an import of it fails
    assert not triton_dialect.announce()
    assert triton_dialect.NAME not in sys.modules
