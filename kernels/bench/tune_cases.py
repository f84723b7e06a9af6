"""What tune.py measures and what it makes of it: candidates, which of them wins, and the table that is written.

A case is one kernel at one load with one cut. Results are a mapping of the case's key to microseconds, or to a text
where it failed, so that the choice depends on nothing but the log.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ferrum_kernels.tiles import PLANE
from ferrum_kernels.triton_matmul import LEAST_ROWS, Tile
from ferrum_kernels.triton_tiles import fit

LOADS = (0.0625, 0.25, 0.5, 1.0, 4.0, 8.0, 16.0, 64.0, 256.0)  # pairs per expert
ROWS = (1, 8, 16, 64, 256, 1024, 4096)
ROW_SHAPES = ((2048, 4096), (2048, 512), (4096, 2048))  # inputs and outputs: query, key or value, output
SHARED_MEMORY = 227 * 1024  # bytes that a program of a Hopper GPU may use
ACCUMULATORS = 128  # registers of a thread that sums may take

# (outputs, warps) and (stages, blocks of weights per turn) that are tried.
THIN = [(16, 1), (16, 2), (32, 1), (32, 2), (32, 4), (64, 4)]
WIDE = [(32, 2), (64, 4), (128, 4), (128, 8)]
FLIGHTS = [(2, 1), (3, 1), (4, 1), (2, 2), (3, 2), (2, 3), (2, 4)]
FEW_FLIGHTS = [(3, 1), (2, 2), (3, 2), (2, 4)]


@dataclasses.dataclass(frozen=True, order=True)
class Case:
    """One kernel to time.

    Attributes:
      product: "up" (gate and up with silu(gate) * up), "down", "place" or "rows".
      k, n: inputs and outputs of one matrix; for "place" the experts and 0.
      load: pairs of the expert layer, or rows of the single product.
      cut: rows of a block (0: one per pair), outputs, warps, stages, blocks of weights per turn; for "place" the rows.
    """

    product: str
    k: int
    n: int
    load: int
    cut: tuple[int, ...]

    @property
    def key(self) -> str:
        """The name in the log."""
        return f"{self.product} {self.k}x{self.n} {self.load} {','.join(map(str, self.cut))}"

    @property
    def tile(self) -> Tile:
        """As the product takes it; the same reading as triton_tiles has."""
        _, n, warps, stages, step = self.cut
        return Tile(n, warps, stages, merge=n >= 64 and warps >= 4, step=step)


def is_valid(case: Case, bits: int = 4) -> bool:
    """Whether the cut divides the weight as it is, and fits shared memory and registers."""
    block, n, warps, stages, step = case.cut
    gated = case.product == "up"
    run = PLANE * 16 // bits
    if case.k % run or fit(case.tile, case.n // 2 if gated else case.n, case.k // run) != case.tile:
        return False
    width, matrices = max(LEAST_ROWS, block), 2 if gated else 1
    flight = stages * step * (matrices * n * PLANE * 2 + width * run * 2)
    return flight <= SHARED_MEMORY and matrices * n * width <= ACCUMULATORS * 32 * warps


def _cuts(product: str, k: int, n: int, load: int, blocks: Sequence[int], shapes: Any) -> Iterator[Case]:
    for block in blocks:
        for outputs, warps in shapes:
            for stages, step in FEW_FLIGHTS if product == "rows" else FLIGHTS:
                case = Case(product, k, n, load, (block, outputs, warps, stages, step))
                if is_valid(case):
                    yield case


def _blocks(mean: float) -> list[int]:
    """Rows of a block that suit a mean load: a quarter of it to twice it, between 8 and 128."""
    return [block for block in (8, 16, 32, 64, 128) if min(mean / 4, 32) <= block <= max(16.0, 2 * mean)]


def expert_cases(d: int, f: int, experts: int, loads: Sequence[float]) -> list[Case]:
    """Every candidate of the expert products of hidden size d and intermediate size f."""
    cases: list[Case] = []
    for load in loads:
        pairs = pairs_of(load, experts)
        mean = pairs / experts
        for product, k, n in (("up", d, 2 * f), ("down", f, d)):
            if mean <= 0.5:
                cases += _cuts(product, k, n, pairs, [0], THIN)
            if mean >= 0.25:
                cases += _cuts(product, k, n, pairs, _blocks(mean), WIDE)
        if mean >= 0.25:
            cases += [Case("place", experts, 0, pairs, (block,)) for block in _blocks(mean)]
    return cases


def row_cases(rows: Sequence[int], shapes: Sequence[tuple[int, int]] = ROW_SHAPES) -> list[Case]:
    """Every candidate of the single product."""
    cases: list[Case] = []
    for count in rows:
        few = count <= 16
        blocks = [block for block in (8, 16) if block < 2 * max(count, 8)] if few else _blocks(count)
        for k, n in shapes:
            cases += _cuts("rows", k, n, count, blocks, THIN + WIDE[2:] if few else WIDE)
    return cases


def near(cases: Sequence[Case], table: Mapping[str, Any], experts: int) -> list[Case]:
    """The cases that differ from the table's entry for their load in at most two of its five numbers."""

    def entry(case: Case) -> Sequence[int]:
        single = case.product == "rows"
        load = case.load if single else case.load / experts
        rows = table["rows" if single else "experts"]
        row = next(row for row in rows if row["load"] is None or load <= row["load"])
        return row["tile" if single else case.product]

    return [
        case
        for case in cases
        if case.product == "place" or sum(a != b for a, b in zip(case.cut, entry(case), strict=True)) <= 2
    ]


def pairs_of(load: float, experts: int) -> int:
    """Pairs that give so many per expert."""
    return max(1, round(load * experts))


def thresholds(loads: Sequence[float]) -> list[float | None]:
    """Up to which load each entry serves: the geometric middle of it and the next, to two digits; the last has no end.

    >>> thresholds([1, 4, 16])
    [2.0, 8.0, None]
    """
    middles = [math.sqrt(a * b) for a, b in itertools.pairwise(loads)]
    return [*(float(f"{middle:.2g}") for middle in middles), None]


def best(cases: Sequence[Case], results: Mapping[str, Any]) -> tuple[Case, float] | None:
    """The fastest that was measured; equal tenths of a microsecond go to the smaller cut."""
    timed = [
        (round(results[case.key], 1), case.cut, case) for case in cases if isinstance(results.get(case.key), float)
    ]
    if not timed:
        return None
    microseconds, _, case = min(timed)
    return case, microseconds


def expert_rows(cases: Sequence[Case], results: Mapping[str, Any], loads: Sequence[float], experts: int) -> list[dict]:
    """The table's "experts": both products with blocks of their own for each pair, or both without, as is faster.

    Pairs that share experts need the kernel that places them, whose time counts. An entry is left out where a product
    has no measurement.
    """
    entries = []
    for load, end in zip(loads, thresholds(loads), strict=True):
        pairs = pairs_of(load, experts)
        here = [case for case in cases if case.load == pairs and case.product != "rows"]
        ways = []
        for alone in (True, False):
            up, down = (
                best([c for c in here if c.product == product and (c.cut[0] == 0) == alone], results)
                for product in ("up", "down")
            )
            if up is None or down is None:
                continue
            # Both products share the places of the larger block.
            block = max(up[0].cut[0], down[0].cut[0])
            place = 0.0 if alone else results.get(Case("place", experts, 0, pairs, (block,)).key)
            if isinstance(place, float):
                ways.append((round(up[1] + down[1] + place, 1), not alone, up, down, place))
        if ways:
            _, _, up, down, place = min(ways, key=lambda way: way[:2])
            entries.append(
                {
                    "load": end,
                    "up": list(up[0].cut),
                    "down": list(down[0].cut),
                    "microseconds": [up[1], down[1], round(place, 1)],
                }
            )
    return entries


def row_rows(cases: Sequence[Case], results: Mapping[str, Any], rows: Sequence[int]) -> list[dict]:
    """The table's "rows": the cut whose times, each over the best of its shape, have the least sum."""
    entries = []
    for count, end in zip(rows, thresholds(rows), strict=True):
        here = [case for case in cases if case.product == "rows" and case.load == count]
        least: dict[tuple[int, int], float] = {}
        times: dict[tuple[int, ...], dict[tuple[int, int], float]] = {}
        for case in here:
            if isinstance(time := results.get(case.key), float):
                shape = case.k, case.n
                least[shape] = min(least.get(shape, math.inf), time)
                times.setdefault(case.cut, {})[shape] = time
        whole = {cut: found for cut, found in times.items() if len(found) == len(least)}
        if not whole:
            continue
        cut = min(whole, key=lambda cut: (round(sum(t / least[shape] for shape, t in whole[cut].items()), 3), cut))
        entries.append(
            {"load": end, "tile": list(cut), "microseconds": [round(t, 1) for _, t in sorted(whole[cut].items())]}
        )
    return entries


def as_text(table: Mapping[str, Any]) -> str:
    """The table as JSON with one entry a line, as it is kept in the repository."""
    parts = []
    for name, value in table.items():
        if isinstance(value, list):
            entries = ",\n".join(f"    {json.dumps(entry)}" for entry in value)
            parts.append(f"  {json.dumps(name)}: [\n{entries}\n  ]")
        else:
            parts.append(f"  {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
