"""Compiling faster, for tests that compile much and compute little."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax

OPTION = "jax_disable_most_optimizations"


@contextmanager
def quickly() -> Iterator[None]:
    """Leave most of XLA's optimisations out, as long as the block runs; the goldens are compiled with all of them."""
    before = jax.config.values[OPTION]
    jax.config.update(OPTION, True)
    try:
        yield
    finally:
        jax.config.update(OPTION, before)


class Compilations:
    """Counts what the backend compiles, or reads from its cache on disk, from now on: any program at all."""

    _EVENTS = ("/jax/core/compile/backend_compile_duration",)

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **_: object) -> None:
        del duration_secs
        self.count += event in self._EVENTS
