"""How the Triton attention kernels are cut up: tiles of positions, programs that share rows, tiles of queries.

Most numbers were found on an H100 of 132 multiprocessors; where shared memory is small, tiles are half as large.
"""

from __future__ import annotations

from ferrum_kernels.triton_statics import Cut, Statics
from ferrum_kernels.triton_tiles import before_hopper, little_memory


def _tile(s: Statics, most: int) -> int:
    """Positions of a tile: less of wide heads, and of any where shared memory is small."""
    return max(16, min(most, most * 128 // s.head_dim) // (2 if little_memory() else 1))


def decode_cut(s: Statics, batch: int) -> Cut:
    """How one new token per row is cut up: a program for each row and key head, or some that share long rows."""
    pairs = batch * s.kv_heads  # of a row and a key head
    few, fewest = pairs < 132, pairs <= 32
    whole = 256 if fewest else 512 if few else 1024
    if s.capacity <= whole:
        return Cut(_tile(s, 128 if s.codes or few else 64), warps=4, stages=3 if few else 2)
    # Programs are as many as fit the multiprocessors at once, so that each begins once: two for each, and one where few
    # rows are to be shared by many. Where rows are about as many, rows alike are left whole.
    programs = max(1, (132 if fewest or (few and not s.codes) else 264) // s.kv_heads)
    programs = batch if 15 * programs <= 16 * batch <= 16 * programs else programs
    # Small tiles where each has a program of its own; elsewhere two of them, one after the other, lose to a large one.
    small = fewest and s.capacity <= 512 and batch * (1 - (-s.capacity // _tile(s, 64))) <= programs
    tile = _tile(s, 64 if small or not (s.codes or fewest) else 128)
    return Cut(
        tile,
        warps=2 if s.codes and not fewest else 4,
        stages=3,
        programs=programs,
        least=max(1, (64 if small else 128 if few else 256) // tile),
        whole=(128 if small else whole) // tile,
        fresh=1 if few else 3,
    )


def most_programs(capacity: int, cut: Cut, batch: int) -> int:
    """Programs that share the rows of a key head: not more than all rows' units are worth when they are full."""
    units = cut.fresh - (-capacity // cut.tile)
    return max(1, min(cut.programs, batch * units // cut.least, batch * cut.most_parts(units)))


def prefill_cut(s: Statics, batch: int, tokens: int) -> Cut:
    """How several new tokens per row are cut up: tiles of many queries, fewer where multiprocessors would idle."""
    little = little_memory()
    width = 64 if little else 256 if s.head_dim <= 128 else 128
    width = min(width, 128, 128 * 128 // s.head_dim) if before_hopper() else width
    while width > 16 and batch * s.kv_heads * -(-tokens * s.padded_group // width) < 132:
        width //= 2
    count = min(max(1, width // s.padded_group), 1 << (tokens - 1).bit_length())
    warps = 8 if count * s.padded_group >= 128 else 4
    return Cut(_tile(s, 64), warps=warps, stages=2 if little or s.head_dim > 128 else 3, queries=count)
