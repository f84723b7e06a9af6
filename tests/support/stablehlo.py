"""What a StableHLO program is made of: operations, element types, and which of them the Apple plugins do not take."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.export

_OPERATION = re.compile(r"\b((?:stablehlo|chlo|mhlo|vhlo|shape|tensor|sdy)\.[a-z_0-9]+)")
_TENSOR = re.compile(r"tensor<((?:[0-9?]+x)*)([a-zA-Z][^<>]*(?:<[^<>]*>)?)>")
_ATTRIBUTES = re.compile(r"<?\{[^{}]*\}>?")  # of one operation, on one line; they may hold 64-bit numbers

# jax-metal and jax-mps lack 64-bit and 4-bit integers, float64, 8-bit floats and complex numbers.
DTYPES = frozenset({"i1", "i8", "ui8", "i16", "ui16", "i32", "ui32", "f16", "bf16", "f32"})
# The operations that jax-mps 0.10 maps, without those that jax-metal is known to lack or that no decoder needs:
# scatter, custom calls and composites (top_k), complex numbers, fft, linear algebra, windows, random bits, collectives.
NAMES = """
abs add and bitcast_convert broadcast_in_dim case ceil clamp compare concatenate constant convert cosine divide
dot_general dynamic_slice dynamic_update_slice exponential exponential_minus_one floor gather iota is_finite log
log_plus_one logistic maximum minimum multiply negate not or pad power reduce remainder reshape return reverse
round_nearest_even rsqrt select shift_left shift_right_arithmetic shift_right_logical sign sine slice sort sqrt
subtract tanh transpose while xor
"""
OPERATIONS = frozenset(f"stablehlo.{name}" for name in NAMES.split())


def lower(function: Callable[..., Any], platform: str, *args: Any) -> str:
    """The StableHLO text of a function for a platform that need not be here; arguments may be abstract."""
    return jax.export.export(jax.jit(function), platforms=[platform])(*args).mlir_module()


def refused(text: str) -> set[str]:
    """Operations, element types and dynamic shapes of a program that an Apple plugin would not take."""
    found = set()
    for line in text.splitlines():
        line = re.sub(r'"([^"\s]*)"', r"\1", line)  # "stablehlo.gather"(...) and composite "chlo.top_k"
        line = re.sub(r"loc\(.*|module @.*", "", line)
        found |= {name for name in _OPERATION.findall(line.split("<{")[0]) if name not in OPERATIONS}
        while (bare := _ATTRIBUTES.sub("", line)) != line:
            line = bare
        for shape, dtype in _TENSOR.findall(line):
            found |= {dtype} - DTYPES
            found |= {"dynamic shape"} if "?" in shape else set()
    return found
