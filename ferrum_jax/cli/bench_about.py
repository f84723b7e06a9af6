"""What every report of `ferrum-jax bench` says beside its measurements: model, memory, machine."""

from __future__ import annotations

import datetime
import platform
import resource
import sys
from typing import TYPE_CHECKING, Any

from ferrum_jax import __version__
from ferrum_jax.environment import installed

if TYPE_CHECKING:
    from ferrum_jax.checkpoint.load import Model
    from ferrum_jax.config import ModelConfig


def about(options: Any, model: Model) -> dict[str, Any]:
    """What every report says of model, memory and machine.

    Args:
      options: of the command.
      model: that was measured.

    Returns:
      What goes into the report beside the measurements.
    """
    peak, where = peak_memory()
    return {
        "model": options.model or options.synthetic,
        "synthetic": options.synthetic is not None,
        "layers": model.cfg.num_layers,
        "peak_memory_bytes": peak,
        "peak_memory_of": where,
        "parameter_bytes": model.report.bytes_held,
        "load_seconds": None if options.synthetic else model.report.seconds,
        "repeats": options.repeats,
        "dtype": model.cfg.dtype,
        "cache_dtype": options.cache_dtype or model.cfg.dtype,
        "lm_head_bits": model.cfg.lm_head_bits,
        "implementation": _implementation(model),
        "xla_attends_because": xla_attends_because(model.cfg, options.cache_dtype),
        "date": datetime.date.today().isoformat(),
        "device": _device(),
        "versions": _versions(),
    }


def peak_memory() -> tuple[int, str]:
    """The most bytes held so far, and by what: the device where it counts them, else this process."""
    import jax

    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"], "device"
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024), "process"


def _implementation(model: Model) -> str:
    from ferrum_jax.kernels import default_implementation

    return model.cfg.implementation or default_implementation()


def xla_attends_because(cfg: ModelConfig, cache_dtype: str | None) -> str | None:
    """Why attention is not in the kernels of the GPU's backend, or None: it is, or the backend is another."""
    from ferrum_jax.layers import uses_triton
    from ferrum_kernels.triton_attention import refuses

    return refuses(cfg.dtype, cfg.head_dim, cache_dtype or cfg.dtype) if uses_triton(cfg) else None


def _device() -> dict[str, Any]:
    import jax

    device = jax.devices()[0]
    return {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()}


def _versions() -> dict[str, str | None]:
    packages = {name: installed(name) for name in ("jax", "jaxlib")}
    return {"ferrum_jax": __version__, **packages, "python": platform.python_version()}
