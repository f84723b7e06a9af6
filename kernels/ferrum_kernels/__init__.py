"""GPTQ-packed weights and their matmuls for JAX. Imports jax and numpy, nothing else, and those when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ferrum_kernels.blocks import Dispatch as Dispatch
    from ferrum_kernels.blocks import dispatch as dispatch
    from ferrum_kernels.blocks import dispatch_sorted as dispatch_sorted
    from ferrum_kernels.blocks import from_blocks as from_blocks
    from ferrum_kernels.blocks import max_blocks as max_blocks
    from ferrum_kernels.blocks import to_blocks as to_blocks
    from ferrum_kernels.errors import BackendError as BackendError
    from ferrum_kernels.errors import FerrumError as FerrumError
    from ferrum_kernels.errors import ShapeError as ShapeError
    from ferrum_kernels.expert_stack import batched_expert_matmul as batched_expert_matmul
    from ferrum_kernels.expert_stack import expert_linear as expert_linear
    from ferrum_kernels.gptq_format import GptqTensors as GptqTensors
    from ferrum_kernels.gptq_format import from_gptq as from_gptq
    from ferrum_kernels.gptq_format import to_gptq as to_gptq
    from ferrum_kernels.mixed import MixedStack as MixedStack
    from ferrum_kernels.ops import default_implementation as default_implementation
    from ferrum_kernels.ops import dequantize as dequantize
    from ferrum_kernels.ops import gptq_matmul as gptq_matmul
    from ferrum_kernels.ops import grouped_gptq_matmul as grouped_gptq_matmul
    from ferrum_kernels.packed import PackedLinear as PackedLinear
    from ferrum_kernels.packed import is_packed as is_packed
    from ferrum_kernels.packed import slice_columns as slice_columns
    from ferrum_kernels.rounding import round_to_nearest as round_to_nearest
    from ferrum_kernels.tiles import TiledLinear as TiledLinear
    from ferrum_kernels.tiles import is_weight as is_weight
    from ferrum_kernels.tiles import tile as tile
    from ferrum_kernels.tiles import untile as untile

_NAMES = {
    "blocks": ("Dispatch", "dispatch", "dispatch_sorted", "from_blocks", "max_blocks", "to_blocks"),
    "errors": ("BackendError", "FerrumError", "ShapeError"),
    "expert_stack": ("batched_expert_matmul", "expert_linear"),
    "gptq_format": ("GptqTensors", "from_gptq", "to_gptq"),
    "mixed": ("MixedStack",),
    "ops": ("default_implementation", "dequantize", "gptq_matmul", "grouped_gptq_matmul"),
    "packed": ("PackedLinear", "is_packed", "slice_columns"),
    "rounding": ("round_to_nearest",),
    "tiles": ("TiledLinear", "is_weight", "tile", "untile"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ferrum_kernels' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"ferrum_kernels.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
