"""Codecs between PackedLinear and the tensors of a GPTQ file, bit-exact in both directions, on the host.

On disk, as GPTQModel and AutoGPTQ write it, for K inputs, N outputs and G = ceil(K / group_size) groups:

    qweight int32 [ceil(K * bits / 32), N]    codes down the column, row k is input k
    qzeros  int32 [G, ceil(N * bits / 32)]    zero points along the row; "gptq" (v1) stores zero - 1, "gptq_v2" the zero
    scales  float16 [G, N]
    g_idx   int32 [K]                         the group of each input; optional, k // group_size when absent

v1 subtracts one from whole words, so a zero point of 0 borrows from its neighbour; only a word-wide wrapping add undoes
that. 3-bit fields straddle words and are shifted one by one, modulo 8.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ferrum_kernels.bits import check_bits, pack, unpack, words_for
from ferrum_kernels.errors import ShapeError
from ferrum_kernels.packed import PackedLinear, check_packed

VERSIONS = ("gptq", "gptq_v2")
_WORD_OF_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


@dataclasses.dataclass(frozen=True)
class GptqTensors:
    """The tensors of one linear layer as they lie in a GPTQ file (host arrays; see the module text for shapes)."""

    qweight: np.ndarray
    qzeros: np.ndarray
    scales: np.ndarray
    g_idx: np.ndarray | None = None
    bias: np.ndarray | None = None


def decode_zeros(qzeros: np.ndarray, bits: int, n: int, version: str) -> np.ndarray:
    """Stored zero points -> packed true zero points.

    Args:
      qzeros: int32 or uint32 [G, words_for(n, bits)] as stored.
      bits: 2, 3, 4 or 8.
      n: number of outputs.
      version: "gptq" or "gptq_v2".

    Returns:
      uint32, same shape; fields past n are zero.

    Raises:
      ShapeError: unknown bits or version.
    """
    _check_dialect(bits, version)
    words = qzeros.view(np.uint32)
    if version == "gptq" and bits != 3:
        words = words + np.uint32(_WORD_OF_ONES[bits])
    zeros = unpack(words, bits, n, axis=-1)
    if version == "gptq" and bits == 3:
        zeros = (zeros + np.uint32(1)) & np.uint32(7)
    return pack(zeros, bits, axis=-1)


def encode_zeros(zeros: np.ndarray, bits: int, n: int, version: str) -> np.ndarray:
    """Packed true zero points -> int32 as stored; the inverse of decode_zeros.

    Args:
      zeros: uint32 [G, words_for(n, bits)].
      bits: 2, 3, 4 or 8.
      n: number of outputs.
      version: "gptq" or "gptq_v2".

    Returns:
      int32, same shape. In v1 the borrow of the last field runs into the padding above it, as the writer's does.
    """
    _check_dialect(bits, version)
    if version == "gptq_v2":
        return zeros.view(np.int32)
    if bits == 3:
        return pack((unpack(zeros, 3, n, axis=-1) - np.uint32(1)) & np.uint32(7), 3, axis=-1).view(np.int32)
    return (zeros - np.uint32(_WORD_OF_ONES[bits])).view(np.int32)


def _check_dialect(bits: int, version: str) -> None:
    check_bits(bits)
    if version not in VERSIONS:
        raise ShapeError(f"checkpoint_format {version!r} is unknown; accepted are 'gptq' (v1) and 'gptq_v2'.")


def input_order(g_idx: np.ndarray, group_size: int) -> np.ndarray | None:
    """The permutation that sorts inputs by group, or None when they are sorted already.

    Args:
      g_idx: int32 [K], the group of each input.
      group_size: inputs per group; only the last group may have fewer.

    Returns:
      int32 [K] or None.

    Raises:
      ShapeError: a group outside 0 .. G-1, or groups of unequal size.

    >>> input_order(np.array([1, 0, 0, 1]), 2).tolist()
    [1, 2, 0, 3]
    """
    k = g_idx.shape[0]
    expected = np.arange(k, dtype=np.int32) // group_size
    if np.array_equal(g_idx, expected):
        return None
    low, high, groups = int(g_idx.min()), int(g_idx.max()), -(-k // group_size)
    if low < 0 or high >= groups:
        raise ShapeError(
            f"g_idx holds groups {low} to {high}; K={k} with group_size={group_size} has 0 to {groups - 1}."
        )
    order = np.argsort(g_idx, kind="stable").astype(np.int32)
    if not np.array_equal(g_idx[order], expected):
        sizes = np.bincount(g_idx, minlength=groups)
        worst = int(np.argmax(np.abs(sizes - np.bincount(expected))))
        raise ShapeError(
            f"g_idx puts {sizes[worst]} inputs into group {worst}; every group must have group_size={group_size} "
            f"inputs (the last one may have fewer)."
        )
    return order


def from_gptq(
    tensors: GptqTensors,
    bits: int,
    group_size: int,
    version: str = "gptq",
    *,
    k: int | None = None,
    sym: bool | None = None,
    act_order: bool | None = None,
) -> PackedLinear:
    """Read one linear layer.

    Args:
      tensors: the stored tensors.
      bits: 2, 3, 4 or 8.
      group_size: inputs per scale, -1 for one group.
      version: "gptq" (v1) or "gptq_v2".
      k: number of inputs; None takes it from g_idx, or from the words where they have no padding.
      sym: False keeps zero points even if they are all 2**(bits - 1), as stacking with others may need; None drops
        them then; True demands it.
      act_order: True keeps a permutation even if it is the identity; None drops it then.

    Returns:
      PackedLinear with host (numpy) arrays.

    Raises:
      ShapeError: unknown bits or version, shapes that contradict each other, bad groups, or zero points that are not
        symmetric with sym=True.

    >>> t = GptqTensors(np.zeros((2, 8), np.int32), np.full((1, 1), 0x77777777, np.int32), np.ones((1, 8), np.float16))
    >>> w = from_gptq(t, bits=4, group_size=16)
    >>> w.shape, w.qzeros is None
    ((16, 8), True)
    """
    _check_dialect(bits, version)
    n = tensors.qweight.shape[1]
    if k is None:
        k = len(tensors.qweight) * 32 // bits if tensors.g_idx is None else len(tensors.g_idx)
    if group_size < 1 and group_size != -1:
        raise ShapeError(f"group_size={group_size} is no size; accepted are 1 or more inputs, and -1 for one group.")
    group_size = k if group_size == -1 else group_size
    perm = None if tensors.g_idx is None else input_order(tensors.g_idx, group_size)
    if tensors.qweight.shape[0] != words_for(k, bits):
        raise ShapeError(
            f"qweight has {tensors.qweight.shape[0]} rows of words; {k} inputs of {bits} bits need "
            f"{words_for(k, bits)}."
        )
    qweight = tensors.qweight.view(np.uint32)
    if perm is not None:
        qweight = pack(unpack(qweight, bits, k, axis=-2)[perm], bits, axis=-2)
    elif act_order:
        perm = np.arange(k, dtype=np.int32)
    qzeros: Any = decode_zeros(tensors.qzeros, bits, n, version)
    symmetric = bool((unpack(qzeros, bits, n, axis=-1) == 2 ** (bits - 1)).all())
    if sym and not symmetric:
        raise ShapeError(f"zero points are not all {2 ** (bits - 1)}, so this weight is not symmetric; use sym=None.")
    if symmetric and sym is not False:
        qzeros = None
    w = PackedLinear(qweight, tensors.scales, qzeros, perm, tensors.bias, bits, group_size, (k, n))
    check_packed(w)
    return w


def to_gptq(w: PackedLinear, version: str = "gptq") -> GptqTensors:
    """Write one linear layer as GPTQ files hold it; `from_gptq` of the result gives back the same bits.

    Args:
      w: a single PackedLinear.
      version: "gptq" (v1) or "gptq_v2".

    Returns:
      GptqTensors of host arrays, with an explicit g_idx.

    Raises:
      ShapeError: w is a stack, or the version is unknown.
    """
    if w.lead:
        raise ShapeError(f"to_gptq takes one matrix, this PackedLinear has leading axes {w.lead}; index it first.")
    k, n = w.shape
    bits = w.bits
    groups = np.arange(k, dtype=np.int32) // w.group_size
    qweight = np.asarray(w.qweight)
    if w.perm is not None:
        inverse = np.argsort(np.asarray(w.perm), kind="stable")
        qweight, groups = pack(unpack(qweight, bits, k, axis=-2)[inverse], bits, axis=-2), groups[inverse]
    if w.qzeros is None:
        zeros = pack(np.full((w.num_groups, n), 2 ** (bits - 1), np.uint32), bits, axis=-1)
    else:
        zeros = np.asarray(w.qzeros)
    return GptqTensors(
        qweight=qweight.view(np.int32),
        qzeros=encode_zeros(zeros, bits, n, version),
        scales=np.asarray(w.scales),
        g_idx=groups,
        bias=None if w.bias is None else np.asarray(w.bias),
    )
