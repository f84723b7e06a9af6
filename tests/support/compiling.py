"""Compiling faster, for tests that compile much and compute little."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax._src import compiler

OPTION = "jax_disable_most_optimizations"
# jaxlib 0.10 has two code generators for fused operations: the one it uses, whose passes over each of them are most of
# the time that a small model takes to compile, and the one before. Later ones have one only and refuse the option.
GENERATOR = [("xla_cpu_use_fusion_emitters", False)] if jax.__version_info__[:2] == (0, 10) else []


@contextmanager
def quickly() -> Iterator[None]:
    """Leave most of XLA's optimisations out, as long as the block runs; the goldens are compiled with all of them."""
    before, options_for = jax.config.values[OPTION], compiler.get_compile_options

    def with_generator(*args: Any, **kwargs: Any) -> Any:
        options = options_for(*args, **kwargs)
        options.env_option_overrides = [*options.env_option_overrides, *GENERATOR]
        return options

    jax.config.update(OPTION, True)
    compiler.get_compile_options = with_generator
    try:
        yield
    finally:
        jax.config.update(OPTION, before)
        compiler.get_compile_options = options_for


class Compilations:
    """Counts what the backend compiles, or reads from its cache on disk, from now on: any program at all."""

    _EVENTS = ("/jax/core/compile/backend_compile_duration",)

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **_: object) -> None:
        del duration_secs
        self.count += event in self._EVENTS
