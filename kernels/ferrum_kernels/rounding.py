"""Round a plain weight to the packed format: symmetric, the nearest code, one scale per group of inputs.

A group's scale is its largest magnitude divided by 2**(bits - 1) - 1, rounded up to the next float16. So no code is cut
off, and no weight moves by more than half a step (one step is the scale). Ties go to the even code. Codes span
1 .. 2**bits - 1 around the zero point 2**(bits - 1); code 0 stays unused. The smallest scale is float16's smallest
number, 2**-24, which a group of zeros gets too.

GPTQ itself chooses codes by the errors they cause on sample texts; this needs no texts.
"""

from __future__ import annotations

import numpy as np

from ferrum_kernels.bits import check_bits, pack
from ferrum_kernels.errors import ShapeError
from ferrum_kernels.packed import PackedLinear


def round_to_nearest(weight: np.ndarray, bits: int = 8, group_size: int = 128) -> PackedLinear:
    """Pack a plain weight; `dequantize` of the result is at most half a step from it.

    Args:
      weight: floats [K, N] on the host. Files hold [N, K]: their transposed view is the fast case.
      bits: 2, 3, 4 or 8.
      group_size: inputs per scale, at least 1; the last group may be shorter.

    Returns:
      PackedLinear of shape (K, N) with host (numpy) arrays and neither zero points nor a permutation. Beside it at most
      four float32 copies of `weight` exist for a moment, so that a large matrix is best given some columns at a time.

    Raises:
      ShapeError: weight is no matrix, bits or group_size are none, or a value is NaN, infinite or too large.

    >>> w = round_to_nearest(np.array([[0.5], [-1.0], [0.0], [127.0]]), bits=8, group_size=4)
    >>> w.scales.tolist(), hex(w.qweight[0, 0])
    ([[1.0]], '0xff807f80')
    """
    check_bits(bits)
    if weight.ndim != 2 or not weight.size or group_size < 1:
        raise ShapeError(
            f"round_to_nearest got a weight {list(weight.shape)} and group_size={group_size}; it takes a matrix [K, N] "
            f"that is not empty and groups of 1 or more inputs."
        )
    k, n = weight.shape
    group_size, most = min(group_size, k), 2 ** (bits - 1) - 1
    rows = np.zeros((n, -(-k // group_size), group_size), np.float32)
    rows.reshape(n, -1)[:, :k] = weight.T
    exact = np.abs(rows).max(-1) / np.float32(most)
    with np.errstate(over="ignore"):
        scales = np.maximum(exact.astype(np.float16), np.finfo(np.float16).smallest_subnormal)
        scales = np.where(scales < exact, np.nextafter(scales, np.float16(np.inf)), scales)
    if not np.isfinite(scales).all():
        raise ShapeError(
            f"the weight holds values that are NaN, infinite or beyond {most} x 65504, the largest that {bits} bits "
            f"with a float16 scale can hold; keep it as it is."
        )
    rows /= scales[..., None].astype(np.float32)
    np.rint(rows, out=rows)
    codes = (rows + np.float32(most + 1)).astype(np.uint8).reshape(n, -1)[:, :k]
    qweight = pack(codes, bits, axis=-1)
    return PackedLinear(qweight.T, scales.T, bits=bits, group_size=group_size, shape=(k, n))
