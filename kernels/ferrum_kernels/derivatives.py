"""Kernels that XLA cannot differentiate: values from the kernel, derivatives from its specification."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ferrum_kernels.errors import BackendError


def differentiable(kernel: Callable[..., Any], specification: Callable[..., Any]) -> Callable[..., Any]:
    """A function of (activations, constants) with the kernel's values and the specification's derivatives.

    Args:
      kernel: (activations, constants) -> arrays; both arguments are pytrees.
      specification: the same function in operations that JAX differentiates.

    Returns:
      The function. It is differentiable with respect to the activations in reverse mode; asking for a derivative with
      respect to a constant raises BackendError.

    >>> triple = differentiable(lambda x, c: 3.0 * x * c, lambda x, c: 3.0 * x * c)
    >>> float(jax.grad(lambda x: triple(x, 2.0))(1.0))
    6.0
    """

    def perturbed(node: Any) -> bool:
        return hasattr(node, "perturbed")

    @jax.custom_vjp
    def run(activations: Any, constants: Any) -> Any:
        return kernel(activations, constants)

    def forward(activations: Any, constants: Any) -> tuple[Any, Any]:
        refuse_weight_gradients(constants)
        activations, constants = jax.tree.map(lambda n: n.value, (activations, constants), is_leaf=perturbed)
        return kernel(activations, constants), (activations, constants)

    def backward(saved: Any, cotangents: Any) -> tuple[Any, None]:
        activations, constants = saved
        out, pull = jax.vjp(lambda a: specification(a, constants), activations)
        given = jax.tree.map(
            lambda y, c: jnp.zeros(y.shape, y.dtype) if isinstance(c, jax.custom_derivatives.SymbolicZero) else c,
            out,
            cotangents,
        )
        return pull(given)[0], None

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run


def refuse_weight_gradients(constants: Any) -> None:
    """Raise when a gradient of a packed weight is asked for, inside the forward rule of a custom_vjp."""
    leaves = jax.tree.leaves(constants, is_leaf=lambda node: hasattr(node, "perturbed"))
    # Integers that come out of a differentiated function count as perturbed, though no gradient reaches them.
    if any(leaf.perturbed and jnp.issubdtype(leaf.value.dtype, jnp.inexact) for leaf in leaves):
        raise BackendError(
            "this product is differentiable with respect to activations only; a gradient of the packed weights was "
            "asked for. Differentiate a dense copy instead: dequantize(weights)."
        )
