"""Matrix products with float32 sums on every device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer


def compute_dtype(dtype: Any) -> Any:
    """The dtype in which operands of a product are best given: float32 for 16-bit floats on CPU, else unchanged.

    XLA's CPU backend has no 16-bit product with a float32 sum for every shape (jaxlib 0.10 refuses some at run time).
    """
    return jnp.dtype(jnp.float32) if jax.default_backend() == "cpu" else jnp.dtype(dtype)


def is_traced(array: Any) -> bool:
    """Whether a value is known only inside a transformation, so that it cannot be checked on the host."""
    return isinstance(array, Tracer)


def einsum(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """float32 einsum of two arrays of one dtype; float32 operands are never rounded to tf32 or bfloat16.

    >>> einsum("ij,jk->ik", jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 1), jnp.bfloat16)).tolist()
    [[3.0], [3.0]]
    """
    dtype = compute_dtype(a.dtype)
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return jnp.einsum(
        subscripts, a.astype(dtype), b.astype(dtype), precision=precision, preferred_element_type=jnp.float32
    )
