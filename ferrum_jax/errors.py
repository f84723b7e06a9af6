"""Every error a user can meet, by kind. Each message says what was found, what is accepted and what to do."""

from ferrum_kernels.errors import BackendError as BackendError
from ferrum_kernels.errors import FerrumError as FerrumError
from ferrum_kernels.errors import ShapeError as ShapeError


class CheckpointError(FerrumError, ValueError):
    """A file of a checkpoint is missing, damaged, contradictory or of a kind that is not supported."""


class ConfigError(FerrumError, ValueError):
    """A configuration value is missing, out of range or unknown."""


class RequestError(FerrumError, ValueError):
    """A prompt or a sampling parameter cannot be served."""


class CapacityError(FerrumError, ValueError):
    """The work does not fit the cache, the context or the memory it was given."""


class RetraceError(FerrumError, RuntimeError):
    """A step would compile again for shapes outside the bucket table."""
