"""The structure of a parameter tree as JSON, for files that hold its arrays."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp

from ferrum_jax.errors import CheckpointError
from ferrum_jax.kernels import MixedStack, PackedLinear, TiledLinear

# The dataclasses of a parameter tree, each with the fields that hold arrays; the other fields are static.
_NODES = {
    PackedLinear: ("qweight", "scales", "qzeros", "perm", "bias"),
    TiledLinear: ("words", "scales", "zeros", "perm", "bias"),
    MixedStack: ("parts",),
}
_KINDS = {kind.__name__: kind for kind in _NODES}


def describe(node: Any, where: str = "params") -> Any:
    """Write the structure of a tree: dict -> object, tuple -> list, array -> "dtype[shape]".

    Args:
      node: dicts, tuples, PackedLinear, MixedStack and arrays, concrete or abstract.
      where: the name of the tree, for the error.

    Returns:
      What `json.dumps` takes.

    Raises:
      CheckpointError: the tree holds something else.

    >>> describe({"norm": jnp.zeros(3, jnp.float16)})
    {'norm': 'float16[3]'}
    """
    if node is None:
        return None
    if isinstance(node, dict):
        return {key: describe(child, f"{where}[{key!r}]") for key, child in node.items()}
    if isinstance(node, tuple):
        return [describe(child, f"{where}[{i}]") for i, child in enumerate(node)]
    if type(node) in _NODES:
        values = {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
        for name in _NODES[type(node)]:
            values[name] = describe(values[name], f"{where}.{name}")
        return {type(node).__name__: values}
    if hasattr(node, "shape") and hasattr(node, "dtype"):
        return f"{jnp.dtype(node.dtype).name}[{','.join(map(str, node.shape))}]"
    raise CheckpointError(
        f"{where} is a {type(node).__name__}; dicts, tuples, PackedLinear, MixedStack and arrays can be saved; "
        f"convert it first."
    )


def abstract_from(value: Any) -> Any:
    """The abstract tree that `describe` has described.

    Args:
      value: parsed JSON.

    Returns:
      The tree, with `jax.ShapeDtypeStruct` leaves.

    Raises:
      ValueError, KeyError or TypeError: nothing that describe wrote.

    >>> abstract_from({"norm": "float16[3]"})["norm"].shape
    (3,)
    """
    if value is None:
        return None
    if isinstance(value, str):
        found = re.fullmatch(r"(\w+)\[([\d,]*)\]", value)
        if found is None:
            raise ValueError(f"{value!r} describes no array")
        return jax.ShapeDtypeStruct(tuple(map(int, found[2].split(","))) if found[2] else (), jnp.dtype(found[1]))
    if isinstance(value, list):
        return tuple(abstract_from(child) for child in value)
    if len(value) == 1 and (name := next(iter(value))) in _KINDS:
        kind, values = _KINDS[name], value[name]
        arrays = {field: abstract_from(values[field]) for field in _NODES[kind]}
        return kind(**{**tuples(values), **arrays})
    return {key: abstract_from(child) for key, child in value.items()}


def tuples(value: Any) -> Any:
    """JSON's lists back to tuples."""
    if isinstance(value, dict):
        return {key: tuples(child) for key, child in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list) else value
