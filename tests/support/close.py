"""Random activations, and closeness measured against the largest number of the expected array."""

from __future__ import annotations

from typing import Any

import numpy as np

# Half a unit in the last place of the largest number, and a little.
ROUNDING = {"float32": 1e-5, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def normal(seed: int, *shape: int) -> Any:
    """A numpy array of float32 standard normal numbers; untyped, as JAX functions take it as it is."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def assert_close(actual: Any, expected: Any, rel: float = 1e-5) -> None:
    """Assert equal shapes and |actual - expected| <= rel * max |expected|; NaN is never close."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    if expected.size:
        worst = np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30)
        assert worst <= rel, f"off by {worst:.2e} of the largest number; {rel:.0e} is accepted"
