"""Errors as sentences: what was found, what is accepted, what to do."""


class FerrumError(Exception):
    """Base of every error that ferrum_kernels and ferrum_jax raise on purpose."""


class ShapeError(FerrumError, ValueError):
    """An array, index or packed weight does not have the shape, dtype or range an operation takes."""


class BackendError(FerrumError, RuntimeError):
    """No implementation on this device takes the work, or the one that was named cannot run here."""
