"""A guard for tests of bad input: the device stays empty until the error."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest


@pytest.fixture
def untouched_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail when anything is put on the device, or is still there afterwards."""

    def refuse(*args: object, **kwargs: object) -> None:
        pytest.fail("the device was touched before the error")

    before = len(jax.live_arrays())
    for module, name in ((jnp, "zeros"), (jnp, "asarray"), (jnp, "array"), (jax, "device_put")):
        monkeypatch.setattr(module, name, refuse)
    yield
    assert len(jax.live_arrays()) <= before
