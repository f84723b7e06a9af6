"""Which tiles the Triton kernels use: tables measured on a device, as JSON in tuned/, and how a tile is made to fit."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from ferrum_kernels import triton_rows
from ferrum_kernels.tiles import TiledLinear
from ferrum_kernels.triton_few import Cut
from ferrum_kernels.triton_matmul import Tile
from ferrum_kernels.triton_route import power

FOLDER = Path(__file__).parent / "tuned"
# Devices whose programs may use less than 100 KiB of shared memory: fewer blocks in flight.
LITTLE_SHARED_MEMORY = ("8.6", "8.7", "8.9", "12.0", "12.1")
LEAST_TURNS, MOST_PARTS = 2, 8  # of the loop of a part; of a sum, which is written and read again
MOST_SEGMENTS = 32  # of a program of the down kernel for few tokens: more do not fit registers


@functools.cache
def table(device_kind: str) -> dict[str, Any]:
    """The measured table for a kind of device, or that of its nearest relative: only a Hopper GPU was measured.

    >>> sorted(table("NVIDIA H200"))
    ['date', 'device', 'experts', 'few', 'note', 'parts', 'rows', 'shapes']
    """
    return json.loads((file_of("nvidia", device_kind) or FOLDER / "nvidia-h100.json").read_text(encoding="utf-8"))


def file_of(backend: str, device_kind: str) -> Path | None:
    """The file in tuned/ that a kind of device's or its family's table is in; None where neither was measured.

    Args:
      backend: how the file's name begins: "nvidia" for the Triton kernels, "mosaic" for those.
      device_kind: as JAX says it.

    >>> [file.name for kind in ("NVIDIA H100 PCIe", "NVIDIA A100") if (file := file_of("mosaic", kind))]
    ['mosaic-h100.json']
    """
    name = name_of(backend, device_kind)
    found = [file for file in FOLDER.glob(f"{backend}-*.json") if name.startswith(file.stem)]
    return max(found, key=lambda file: len(file.stem), default=None)


def name_of(backend: str, device_kind: str) -> str:
    """What a device's table is called, without a family.

    >>> name_of("mosaic", "NVIDIA H100 80GB HBM3")
    'mosaic-h100-80gb-hbm3'
    """
    return f"{backend}-{device_kind.lower().replace(' ', '-').removeprefix('nvidia-')}"


def capability() -> str:
    """The default device's compute capability, such as "9.0"; empty where it has none."""
    return str(getattr(jax.devices()[0], "compute_capability", ""))


def little_memory() -> bool:
    """Whether a program of the default device has little shared memory."""
    return capability() in LITTLE_SHARED_MEMORY


def before_hopper() -> bool:
    """Whether the default device's matrix units take their operands from registers, of which large tiles need many."""
    return capability().startswith("8.")


def _row(name: str, load: float) -> dict[str, Any]:
    rows = table(jax.devices()[0].device_kind)[name]
    return next(row for row in rows if row["load"] is None or load <= row["load"])


def _tile(numbers: list[int]) -> tuple[int, Tile]:
    block, n, warps, stages, step = numbers
    if little_memory():
        stages, step = min(stages, 2), min(step, 2)
    return block, Tile(n, warps, stages, merge=n >= 64 and warps >= 4, step=step)


def few_cuts(
    pairs: int, top_k: int, num_experts: int, gate_up: TiledLinear, down: TiledLinear
) -> tuple[Cut, Cut] | None:
    """Cuts of both kernels for few tokens; None where blocks of an expert's pairs are better or a width does not fit.

    Args:
      pairs: tokens times the experts of each.
      top_k: experts of a token, which the down kernel adds up.
      num_experts: E.
      gate_up, down: the stacks.
    """
    few = table(jax.devices()[0].device_kind)["few"]
    features = down.k
    if pairs > min(few["pairs"], few["load"] * num_experts):
        return None
    if 2 * features != gate_up.words.shape[-2] or features % 16:
        return None
    row = next(row for row in few["cuts"] if row["outputs"] is None or pairs * features <= row["outputs"])
    return (
        _cut(row["up"], features, gate_up.num_blocks),
        _cut(row["down"], down.words.shape[-2], down.num_blocks, power(top_k)),
    )


def _cut(numbers: list[int], columns: int, blocks: int, members: int = 1) -> Cut:
    """A row's cut made to fit: the second number is the most blocks of a segment, of which each member has as many."""
    n, most, warps, stages, step = numbers
    if little_memory():
        stages, step = min(stages, 2), 1
    while columns % n:
        n //= 2
    splits = 1
    while blocks % (2 * splits) == 0 and blocks > most * splits and 2 * splits * members <= MOST_SEGMENTS:
        splits *= 2
    step = max(step for step in range(1, step + 1) if blocks // splits % step == 0)
    return Cut(n, splits, warps, stages, step, merge=warps >= 4)


def expert_tiles(pairs: int, num_experts: int) -> tuple[int, Tile, int, Tile]:
    """Rows of a block and tile of both products of an expert layer in blocks.

    >>> [expert_tiles(8 * tokens, 128)[0] for tokens in (16, 64, 4096)]
    [8, 8, 64]
    """
    row = _row("experts", pairs / num_experts)
    return (*_tile(row["up"]), *_tile(row["down"]))


def row_tile(rows: int) -> tuple[int, Tile]:
    """Rows of a block and tile of the product of some rows with one matrix."""
    return _tile(_row("rows", rows)["tile"])


def part_cut(rows: int, w: TiledLinear) -> triton_rows.Cut | None:
    """How a product of some rows with one matrix is cut into parts; None where it is better whole.

    A row of the table is outputs and rows of a program, warps, stages, blocks per turn and about how many programs
    there should be, from which the parts follow; null where products of so many rows are better whole.
    """
    parts = table(jax.devices()[0].device_kind)["parts"]
    found = next((row["cut"] for row in parts if rows <= row["load"]), None)
    return None if found is None else parts_of(found, rows, w.words.shape[-2], w.num_blocks)


def parts_of(numbers: Sequence[int], rows: int, columns: int, blocks: int) -> triton_rows.Cut | None:
    """What a row of the table is for a product of some rows with a weight; None where that is better whole.

    >>> parts_of([64, 64, 4, 3, 1, 256], 64, 2048, 32)
    Cut(n=64, splits=1, warps=4, stages=3, rows=64, parts=8, step=1, merge=True)
    """
    n, block, warps, stages, step, programs = numbers
    if little_memory():
        stages, step = min(stages, 2), 1
    while columns % n:
        n, warps = n // 2, max(1, warps // 2)
    step = max(step for step in range(1, step + 1) if blocks % step == 0)
    block = min(block, power(rows))
    alike = columns // n * -(-rows // block)  # programs of a part
    count = min(round(programs / alike), blocks // step // LEAST_TURNS, MOST_PARTS)
    if count < 2:
        return None
    return triton_rows.Cut(n, 1, warps, stages, block, count, step, merge=n >= 64 and warps >= 4)


def fit(tile: Tile, columns: int, blocks: int) -> Tile:
    """A tile that divides the outputs and the blocks of a weight: halved, or with a smaller step, until it does.

    >>> fit(Tile(64, 4, 3, merge=True, step=4), columns=96, blocks=6)
    Tile(n=32, warps=4, stages=3, merge=False, step=3)
    """
    n = tile.n
    while columns % n:
        n //= 2
    step = max(step for step in range(1, tile.step + 1) if blocks % step == 0)
    return dataclasses.replace(tile, n=n, merge=tile.merge and n >= 64, step=step)
