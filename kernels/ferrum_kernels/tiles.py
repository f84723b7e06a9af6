"""TiledLinear: a packed weight in the order in which a GPU kernel reads it, made once at load.

Containers of 16 bits hold 16 / bits codes. Inputs are cut into runs of 32 (planes); container i of a block holds
input i of each of its planes, so that a plane's codes are one shift and one mask away and meet 32 consecutive
activations. The words of one block and of neighbouring outputs lie together: a tile is one run of memory.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp

from ferrum_kernels.bits import pack, unpack
from ferrum_kernels.errors import BackendError, ShapeError
from ferrum_kernels.packed import PackedLinear, PackedWeight, check_packed

PLANE = 32  # inputs of a plane, containers of a block
COLUMNS = 64  # outputs are padded to a multiple of this


@dataclasses.dataclass(frozen=True)
class TiledLinear(PackedWeight):
    """A weight `[K, N]` kept packed, laid out for tiles; it stands for the same numbers as its PackedLinear.

    Attributes:
      words: uint16 [..., B, N', 32], B blocks of 32 * 16 / bits inputs, N' = N rounded up to 64.
      scales: float16 or wider [..., G, N'].
      zeros: uint8 [..., G, N'], zero points; None means 2**(bits - 1) everywhere.
      perm: int32 [..., K], the input of each packed row; None means the identity.
      bias: [..., N] or None.
      bits: 4 or 8 (static).
      group_size: inputs that share a scale, a multiple of 32 unless one group covers all (static).
      shape: (K, N) (static).

    Source: nibble planes, so that activations need no shuffle, are this package's own; two codes made floats by bit
    operations after Marlin (https://github.com/IST-DASLab/marlin).
    """

    words: Any
    scales: Any
    zeros: Any = None
    perm: Any = None
    bias: Any = None
    bits: int = 4
    group_size: int = 128
    shape: tuple[int, int] = (0, 0)

    @property
    def num_blocks(self) -> int:
        """Blocks of containers down the inputs."""
        return self.words.shape[-3]

    @property
    def planes(self) -> int:
        """Codes of a container."""
        return 16 // self.bits

    @property
    def padded_k(self) -> int:
        """Inputs that the blocks cover."""
        return self.num_blocks * self.planes * PLANE

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading axes, `()` for a single matrix."""
        return tuple(self.words.shape[:-3])


jax.tree_util.register_dataclass(
    TiledLinear,
    data_fields=["words", "scales", "zeros", "perm", "bias"],
    meta_fields=["bits", "group_size", "shape"],
)


def is_weight(node: Any) -> TypeGuard[PackedLinear | TiledLinear]:
    """True for a packed weight in either layout; the `is_leaf` of tree functions that treat packed weights whole.

    >>> is_weight(jnp.zeros(3))
    False
    """
    return isinstance(node, PackedLinear | TiledLinear)


def check_tiled(w: TiledLinear) -> None:
    """Check that the arrays of a TiledLinear have the shapes and dtypes its static fields promise.

    Raises:
      ShapeError: names the field, what was found and what is expected.
    """
    k, n = w.shape
    wide, lead = n + -n % COLUMNS, w.lead
    blocks = -(-k // (PLANE * w.planes))
    expected = {
        "words": ((*lead, blocks, wide, PLANE), "uint16"),
        "scales": ((*lead, w.num_groups, wide), None),
        "zeros": ((*lead, w.num_groups, wide), "uint8"),
        "perm": ((*lead, k), "int32"),
        "bias": ((*lead, n), None),
    }
    for field, (shape, dtype) in expected.items():
        array = getattr(w, field)
        if array is None and field not in ("words", "scales"):
            continue
        if array is None or tuple(array.shape) != shape or (dtype and array.dtype != dtype):
            found = "missing" if array is None else f"{array.dtype}{list(array.shape)}"
            raise ShapeError(
                f"{field} of this {w.bits}-bit TiledLinear with shape={w.shape} and group_size={w.group_size} is "
                f"{found}; expected {dtype or 'a float array'}{list(shape)}. Make it with tile()."
            )


def tile_all(tree: Any) -> Any:
    """Every PackedLinear of a pytree in tiles; the rest as it is."""
    return jax.tree.map(lambda w: tile(w) if isinstance(w, PackedLinear) else w, tree, is_leaf=is_weight)


def cannot_tile(w: PackedLinear) -> str | None:
    """Why a weight has no tiled form, or None when it has one.

    >>> cannot_tile(PackedLinear(None, None, bits=3, group_size=32, shape=(32, 8)))
    'tiles hold codes of 4 and 8 bits; this weight has 3'
    """
    if w.bits not in (4, 8):
        return f"tiles hold codes of 4 and 8 bits; this weight has {w.bits}"
    if w.group_size % PLANE and w.group_size < w.k:
        return (
            f"tiles hold groups of a multiple of {PLANE} inputs, or one group for all of them; this weight has groups "
            f"of {w.group_size} of {w.k} inputs"
        )
    return None


def tile(w: PackedLinear) -> TiledLinear:
    """Lay a packed weight out in tiles, one matrix at a time.

    Args:
      w: a packed weight of 4 or 8 bits with any leading axes; its groups hold a multiple of 32 inputs, or all of them.

    Returns:
      The TiledLinear. Beside both forms it takes the memory of one unpacked matrix; works under jit.

    Raises:
      ShapeError: the arrays do not fit the static fields.
      BackendError: other bits or groups.

    >>> w = PackedLinear(jnp.full((1, 2), 0x99999999, jnp.uint32), jnp.ones((1, 2), jnp.float16), group_size=8,
    ...                  shape=(8, 2))
    >>> tile(w).words.shape
    (1, 64, 32)
    """
    check_packed(w)
    if problem := cannot_tile(w):
        raise BackendError(f'{problem}. Use implementation="xla" for it.')
    n, wide = w.n_per_expert, -w.n_per_expert % COLUMNS

    def padded(rows: jax.Array) -> jax.Array:
        return jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, wide)])

    words = _one_by_one(functools.partial(_tile_codes, bits=w.bits, k=w.k), w.qweight, 2)
    zeros = None if w.qzeros is None else padded(unpack(w.qzeros, w.bits, n, axis=-1).astype(jnp.uint8))
    return TiledLinear(words, padded(w.scales), zeros, w.perm, w.bias, w.bits, w.group_size, w.shape)


def untile(w: TiledLinear) -> PackedLinear:
    """The inverse of `tile`, bit for bit.

    Args:
      w: a tiled weight with any leading axes.

    Returns:
      The PackedLinear.
    """
    n = w.n_per_expert
    qweight = _one_by_one(functools.partial(_untile_codes, bits=w.bits, k=w.k, n=n), w.words, 3)
    qzeros = None if w.zeros is None else pack(w.zeros[..., :n], w.bits, axis=-1)
    return PackedLinear(qweight, w.scales[..., :n], qzeros, w.perm, w.bias, w.bits, w.group_size, w.shape)


def _one_by_one(function: Callable[[jax.Array], jax.Array], array: jax.Array, rank: int) -> jax.Array:
    """Map over all leading axes, so that only one matrix exists unpacked."""
    lead = array.shape[:-rank]
    if not lead:
        return function(array)
    flat = array.reshape(math.prod(lead), *array.shape[-rank:])
    out = jax.lax.map(function, flat)
    return out.reshape(*lead, *out.shape[1:])


def _tile_codes(qweight: jax.Array, bits: int, k: int) -> jax.Array:
    planes, n = 16 // bits, qweight.shape[-1]
    codes = unpack(qweight, bits, k, axis=-2).astype(jnp.uint16)
    codes = jnp.pad(codes, [(0, -k % (planes * PLANE)), (0, -n % COLUMNS)])
    codes = codes.reshape(-1, planes, PLANE, codes.shape[-1])
    words = functools.reduce(jnp.bitwise_or, (codes[:, j] << jnp.uint16(bits * j) for j in range(planes)))
    return words.swapaxes(-1, -2)


def _untile_codes(words: jax.Array, bits: int, k: int, n: int) -> jax.Array:
    planes = 16 // bits
    rows = words.swapaxes(-1, -2)[..., :n]
    codes = jnp.stack([(rows >> jnp.uint16(bits * j)) & jnp.uint16(2**bits - 1) for j in range(planes)], axis=1)
    return pack(codes.reshape(-1, n)[:k], bits, axis=-2)
