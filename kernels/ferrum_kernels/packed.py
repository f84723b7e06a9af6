"""PackedLinear: one GPTQ-packed linear layer, or a stack of them, as a pytree."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from ferrum_kernels.bits import check_bits, pack, unpack, words_for
from ferrum_kernels.errors import ShapeError


class PackedWeight(abc.ABC):
    """What the layouts of a packed weight share: matrices `[K, N]` with any leading axes, scales by group."""

    shape: tuple[int, int]
    group_size: int

    @property
    @abc.abstractmethod
    def lead(self) -> tuple[int, ...]:
        """Leading axes, `()` for a single matrix."""

    @property
    def k(self) -> int:
        """Input features."""
        return self.shape[0]

    @property
    def n_per_expert(self) -> int:
        """Output features of one matrix."""
        return self.shape[1]

    @property
    def num_groups(self) -> int:
        """Rows of `scales`: ceil(K / group_size)."""
        return -(-self.shape[0] // self.group_size)

    @property
    def num_experts(self) -> int:
        """Size of the last leading axis."""
        if not self.lead:
            name = type(self).__name__
            raise ShapeError(f"this {name} is a single matrix; num_experts needs a stack with a leading axis.")
        return self.lead[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def __getitem__(self, index: Any) -> Self:
        if not self.lead:
            raise ShapeError(f"this {type(self).__name__} is a single matrix and has no leading axis to index.")
        return jax.tree.map(lambda leaf: leaf[index], self)


@dataclasses.dataclass(frozen=True)
class PackedLinear(PackedWeight):
    """A weight `[K, N]` kept packed, with any leading axes (`[E]` experts, `[L, E]` layers of experts).

    The weight it stands for, with `i` the packed row that holds input `perm[i]`:

        W[perm[i], n] = scales[i // group_size, n] * (codes[i, n] - zeros[i // group_size, n])

    Attributes:
      qweight: uint32 [..., words_for(K, bits), N], codes packed down the input axis.
      scales: float16 [..., G, N] with G = ceil(K / group_size); kept in float16 because that is what files hold.
      qzeros: uint32 [..., G, words_for(N, bits)], true zero points packed along the output axis; None means
        2**(bits - 1) everywhere (symmetric quantisation).
      perm: int32 [..., K], the input that each packed row multiplies; None means the identity (no act-order).
      bias: [..., N] or None.
      bits: 2, 3, 4 or 8 (static).
      group_size: rows that share a scale; the last group may be shorter (static).
      shape: (K, N) of one matrix (static).

    `stack[i]` takes entry `i` (an int, a slice or a traced scalar) of the leading axis. The fields are plain arrays:
    `jax.tree.map`, `dataclasses.replace`, `jit` and checkpoint libraries work on it as on any pytree.
    Source: the layout of AutoGPTQ and GPTQModel (https://github.com/ModelCloud/GPTQModel), rows sorted by group.

    >>> w = PackedLinear(jnp.full((1, 8), 0x99999999, jnp.uint32), jnp.ones((1, 8), jnp.float16), bits=4,
    ...                  group_size=8, shape=(8, 8))
    >>> w.num_groups, w.lead
    (1, ())
    """

    qweight: Any
    scales: Any
    qzeros: Any = None
    perm: Any = None
    bias: Any = None
    bits: int = 4
    group_size: int = 128
    shape: tuple[int, int] = (0, 0)

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading axes, `()` for a single matrix."""
        return tuple(self.qweight.shape[:-2])


jax.tree_util.register_dataclass(
    PackedLinear,
    data_fields=["qweight", "scales", "qzeros", "perm", "bias"],
    meta_fields=["bits", "group_size", "shape"],
)


def is_packed(node: Any) -> bool:
    """True for a PackedLinear; the `is_leaf` of tree functions that treat packed weights whole.

    >>> is_packed(np.zeros(3))
    False
    """
    return isinstance(node, PackedLinear)


def check_packed(w: PackedLinear) -> None:
    """Check that the arrays of a PackedLinear have the shapes and dtypes its static fields promise.

    Args:
      w: the packed weight, concrete, abstract or traced.

    Raises:
      ShapeError: names the field, what was found and what is expected.
    """
    k, n = w.shape
    check_bits(w.bits)
    if not (0 < w.group_size and k > 0 and n > 0):
        raise ShapeError(f"PackedLinear needs positive sizes; got shape={w.shape} and group_size={w.group_size}.")
    groups, lead = w.num_groups, w.lead
    expected = {
        "qweight": ((*lead, words_for(k, w.bits), n), "uint32"),
        "scales": ((*lead, groups, n), None),
        "qzeros": ((*lead, groups, words_for(n, w.bits)), "uint32"),
        "perm": ((*lead, k), "int32"),
        "bias": ((*lead, n), None),
    }
    for field, (shape, dtype) in expected.items():
        array = getattr(w, field)
        if array is None:
            if field in ("qweight", "scales"):
                raise ShapeError(f"{field} is missing; expected {dtype or 'a float array'}{list(shape)}.")
            continue
        if tuple(array.shape) != shape or (dtype and array.dtype != dtype):
            raise ShapeError(
                f"{field} of this {w.bits}-bit PackedLinear with shape={w.shape} and group_size={w.group_size} is "
                f"{array.dtype}{list(array.shape)}; expected {dtype or 'a float array'}{list(shape)}."
            )
        if dtype is None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise ShapeError(f"{field} is {array.dtype}; expected a floating dtype (float16 as the file holds it).")


def zero_points(w: PackedLinear) -> Any:
    """Zero points as int32 [..., G, N], or the Python int 2**(bits - 1) for a symmetric weight."""
    if w.qzeros is None:
        return 2 ** (w.bits - 1)
    return unpack(w.qzeros, w.bits, w.n_per_expert, axis=-1).astype(np.int32)


def slice_columns(w: PackedLinear, start: int, size: int, bias: Any = None) -> PackedLinear:
    """The packed weight of output columns `[start, start + size)`, still packed.

    Args:
      w: a packed weight with any leading axes.
      start: first output column.
      size: number of columns, at least 1.
      bias: [..., size] to put in place of the weight's own bias slice, or None to keep that.

    Returns:
      A PackedLinear of shape (K, size).

    Raises:
      ShapeError: the slice leaves [0, N), or the bias has another length.
    """
    n = w.n_per_expert
    if size < 1 or start < 0 or start + size > n:
        raise ShapeError(
            f"columns [{start}, {start + size}) are outside this weight, which has {n} output columns; "
            f"start must be at least 0, size at least 1 and start + size at most {n}."
        )
    if bias is not None and bias.shape[-1] != size:
        raise ShapeError(f"bias has {bias.shape[-1]} entries; the slice has {size} columns and needs as many.")
    columns = slice(start, start + size)
    qzeros = None
    if w.qzeros is not None:
        qzeros = pack(unpack(w.qzeros, w.bits, n, axis=-1)[..., columns], w.bits, axis=-1)
    if bias is None and w.bias is not None:
        bias = w.bias[..., columns]
    return dataclasses.replace(
        w,
        qweight=w.qweight[..., columns],
        scales=w.scales[..., columns],
        qzeros=qzeros,
        bias=bias,
        shape=(w.k, size),
    )
