"""Integer codes of 2, 3, 4 or 8 bits in 32-bit words: the little-endian bit stream that GPTQ writes.

Code `i` occupies bits `[i * bits, (i + 1) * bits)` of the stream; word `j` holds bits `[32 * j, 32 * (j + 1))`.
For 3 bits a code can straddle two words. Both directions run on numpy arrays and, traced, on JAX arrays.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from ferrum_kernels.errors import ShapeError

SUPPORTED_BITS = (2, 3, 4, 8)


def words_for(count: int, bits: int) -> int:
    """Number of 32-bit words that hold `count` codes of `bits` bits.

    >>> words_for(128, 4), words_for(32, 3), words_for(5, 4)
    (16, 3, 1)
    """
    return -(-count * bits // 32)


def _namespace(array: Any) -> ModuleType:
    return np if isinstance(array, np.ndarray) else jnp


def check_bits(bits: int) -> None:
    """Raise ShapeError unless `bits` is a width that GPTQ has."""
    if bits not in SUPPORTED_BITS:
        raise ShapeError(f"bits={bits} is not a GPTQ width; accepted are 2, 3, 4 and 8.")


def unpack(words: Any, bits: int, count: int, axis: int) -> Any:
    """Split packed words into codes along one axis.

    Args:
      words: uint32 [..., W, ...], W = words_for(count, bits) along `axis`.
      bits: 2, 3, 4 or 8.
      count: number of codes to return along `axis`.
      axis: -2 for qweight (codes run down the column), -1 for qzeros (codes run along the row).

    Returns:
      uint32 codes in [0, 2**bits), `count` of them along `axis`; numpy in, numpy out.

    Raises:
      ShapeError: unknown bits, or a word count that does not hold `count` codes.

    >>> unpack(np.array([[0x76543210]], np.uint32), 4, 8, axis=-1)
    array([[0, 1, 2, 3, 4, 5, 6, 7]], dtype=uint32)
    """
    check_bits(bits)
    if words.shape[axis] != words_for(count, bits):
        raise ShapeError(
            f"{words.shape[axis]} words along axis {axis} of {tuple(words.shape)} cannot hold {count} codes of "
            f"{bits} bits; expected {words_for(count, bits)} words."
        )
    xp = _namespace(words)
    if axis == -1:
        return unpack(words[..., None], bits, count, axis=-2)[..., 0]
    mask = np.uint32(2**bits - 1)
    if 32 % bits == 0:
        shifts = np.arange(0, 32, bits, dtype=np.uint32).reshape([1] * (words.ndim - 1) + [-1, 1])
        codes = (words[..., :, None, :] >> shifts) & mask
    else:
        # 32 codes fill `bits` whole words, so the pattern of straddling codes repeats every `bits` words.
        pad = -words.shape[-2] % bits
        words = xp.pad(words, [(0, 0)] * (words.ndim - 2) + [(0, pad), (0, 0)])
        words = words.reshape(*words.shape[:-2], -1, bits, words.shape[-1])
        word, shift = np.divmod(np.arange(0, 32 * bits, bits), 32)
        shift = shift.astype(np.uint32).reshape([1] * (words.ndim - 2) + [-1, 1])
        low = xp.take(words, word, axis=-2) >> shift
        # Where a code does not straddle, these bits lie above the mask. Shifts by 31 and 1, as one by 32 is undefined.
        high = xp.take(words, np.minimum(word + 1, bits - 1), axis=-2) << (np.uint32(31) - shift) << np.uint32(1)
        codes = (low | high) & mask
    codes = codes.reshape(*codes.shape[:-3], -1, codes.shape[-1])
    return codes[..., :count, :]


def pack(codes: Any, bits: int, axis: int) -> Any:
    """Join codes into 32-bit words along one axis; the exact inverse of `unpack`, unused high bits are zero.

    Args:
      codes: unsigned or signed integers in [0, 2**bits), any shape with `axis`.
      bits: 2, 3, 4 or 8.
      axis: -2 or -1, as in `unpack`.

    Returns:
      uint32 words, words_for(codes.shape[axis], bits) of them along `axis`.

    Raises:
      ShapeError: unknown bits.

    >>> hex(pack(np.arange(8)[None], 4, axis=-1)[0, 0])
    '0x76543210'
    """
    check_bits(bits)
    xp = _namespace(codes)
    if axis == -1:
        return pack(codes[..., None], bits, axis=-2)[..., 0]
    count = codes.shape[-2]
    codes = codes.astype(np.uint32)
    codes = xp.pad(codes, [(0, 0)] * (codes.ndim - 2) + [(0, -count % 32), (0, 0)])
    codes = codes.reshape(*codes.shape[:-2], -1, 32, codes.shape[-1])
    words = [xp.zeros_like(codes[..., 0, :]) for _ in range(bits)]
    for i, start in enumerate(range(0, 32 * bits, bits)):
        word, shift = divmod(start, 32)
        words[word] = words[word] | (codes[..., i, :] << np.uint32(shift))
        if shift + bits > 32:
            words[word + 1] = words[word + 1] | (codes[..., i, :] >> np.uint32(32 - shift))
    packed = xp.stack(words, axis=-2)
    packed = packed.reshape(*packed.shape[:-3], -1, packed.shape[-1])
    return packed[..., : words_for(count, bits), :]


def centred(words: Any, bits: int) -> Any:
    """Random words with codes that are 2**(bits - 1) on average: a code of zero becomes that middle.

    Symmetric weights made of plain random words have a mean of half a step below zero. That is the same direction in
    every output, so a random model of some depth sends all its tokens to the same experts.

    Args:
      words: unsigned integers of any width, random, of numpy or JAX.
      bits: 2, 4 or 8; words of 3 bits are returned as they are, as their codes straddle words.

    Returns:
      Words of the same shape.

    >>> hex(centred(np.array([0x76543210], np.uint32), 4)[0])
    '0x76543218'
    """
    if 32 % bits:
        return words
    any_bit, width, kind = words, 1, words.dtype.type
    while width < bits:
        any_bit = any_bit | (any_bit >> kind(width))
        width *= 2
    lowest = kind(sum(1 << i for i in range(0, 8 * words.dtype.itemsize, bits)))
    return words | ((~any_bit & lowest) << kind(bits - 1))
