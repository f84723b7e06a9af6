"""GPTQ mixture-of-experts language models as plain JAX functions.

Names are looked up when first used, so ``import ferrum_jax`` does not import jax.

>>> import ferrum_jax as fj
>>> model = fj.load("demo")
>>> len(fj.generate(model, ["Once upon a time"], max_tokens=4))
1
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ferrum_jax import errors as errors
    from ferrum_jax import kernels as kernels
    from ferrum_jax.buckets import Buckets as Buckets
    from ferrum_jax.budget import MemoryPlan as MemoryPlan
    from ferrum_jax.budget import plan_memory as plan_memory
    from ferrum_jax.cache import KVCache as KVCache
    from ferrum_jax.cache import init_cache as init_cache
    from ferrum_jax.checkpoint.load import Model as Model
    from ferrum_jax.checkpoint.load import load as load
    from ferrum_jax.config import ModelConfig as ModelConfig
    from ferrum_jax.engine import Engine as Engine
    from ferrum_jax.engine import Event as Event
    from ferrum_jax.generation import Step as Step
    from ferrum_jax.generation import generate as generate
    from ferrum_jax.generation import stream_generate as stream_generate
    from ferrum_jax.kept import keep_programs as keep_programs
    from ferrum_jax.model import decode_step as decode_step
    from ferrum_jax.model import forward as forward
    from ferrum_jax.model import prefill as prefill
    from ferrum_jax.moe import combine as combine
    from ferrum_jax.moe import dispatch as dispatch
    from ferrum_jax.moe import moe_layer as moe_layer
    from ferrum_jax.moe import route as route
    from ferrum_jax.paged import PagedCache as PagedCache
    from ferrum_jax.paged import init_paged_cache as init_paged_cache
    from ferrum_jax.params import abstract as abstract
    from ferrum_jax.params import layer as layer
    from ferrum_jax.params import random_params as random_params
    from ferrum_jax.params import set_layer as set_layer
    from ferrum_jax.sampling import SamplingParams as SamplingParams
    from ferrum_jax.sampling import sample as sample
    from ferrum_jax.saving import load_params as load_params
    from ferrum_jax.saving import save_params as save_params
    from ferrum_kernels import PackedLinear as PackedLinear
    from ferrum_kernels import TiledLinear as TiledLinear
    from ferrum_kernels import dequantize as dequantize
    from ferrum_kernels import gptq_matmul as gptq_matmul
    from ferrum_kernels import grouped_gptq_matmul as grouped_gptq_matmul
    from ferrum_kernels import is_weight as is_weight

    __version__: str

_SUBMODULES = ("errors", "kernels")
_NAMES = {
    "ferrum_jax.budget": ("MemoryPlan", "plan_memory"),
    "ferrum_jax.buckets": ("Buckets",),
    "ferrum_jax.cache": ("KVCache", "init_cache"),
    "ferrum_jax.checkpoint.load": ("Model", "load"),
    "ferrum_jax.config": ("ModelConfig",),
    "ferrum_jax.engine": ("Engine", "Event"),
    "ferrum_jax.generation": ("Step", "generate", "stream_generate"),
    "ferrum_jax.kept": ("keep_programs",),
    "ferrum_jax.model": ("decode_step", "forward", "prefill"),
    "ferrum_jax.moe": ("combine", "dispatch", "moe_layer", "route"),
    "ferrum_jax.paged": ("PagedCache", "init_paged_cache"),
    "ferrum_jax.params": ("abstract", "layer", "random_params", "set_layer"),
    "ferrum_jax.sampling": ("SamplingParams", "sample"),
    "ferrum_jax.saving": ("load_params", "save_params"),
    "ferrum_kernels": (
        "PackedLinear",
        "TiledLinear",
        "dequantize",
        "gptq_matmul",
        "grouped_gptq_matmul",
        "is_weight",
    ),
}
# No public name may equal a submodule's: importing the submodule would replace the name.
_HOME = {name: module for module, names in _NAMES.items() for name in names}


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ferrum-jax")
    except PackageNotFoundError:  # a source tree on the path, not installed
        return "0+source"


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value = _version()
    elif name in _SUBMODULES:
        value = importlib.import_module(f"ferrum_jax.{name}")
    elif name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'ferrum_jax' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_SUBMODULES, "__version__"})
