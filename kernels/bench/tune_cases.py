"""What tune.py measures and what it makes of it: candidates, which of them wins, and the table that is written.

Here are the Triton kernels' expert layers and whole products; tune_parts.py has products in parts, tune_rings.py the
Mosaic GPU kernels. A case is one kernel at one load with one cut. Results are a mapping of the case's key to
microseconds, or to a text where it failed, so that the choice depends on nothing but the log.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ferrum_kernels.tiles import PLANE
from ferrum_kernels.triton_few import Cut
from ferrum_kernels.triton_matmul import LEAST_ROWS, Tile
from ferrum_kernels.triton_tiles import fit

LOADS = (1.0, 4.0, 8.0, 16.0, 64.0, 256.0)  # pairs per expert, in blocks of an expert's pairs
FEW_TOKENS = (1, 2, 4, 8, 16, 32)  # as far as the table says that few tokens go
ROWS = (8, 16, 64, 256, 1024, 4096)
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
      product: "up" (gate and up with silu(gate) * up) and "down" by blocks, "few_up" and "few_down" with few tokens,
        "place", or "rows" for the single product; those of tune_parts.py and tune_rings.py.
      k, n: inputs and outputs of one matrix; for "place" the experts and 0.
      load: pairs of the expert layer, or rows of the single product.
      cut: as the table has it. Rows of a block, outputs, warps, stages, blocks of weights per turn; with few tokens
        outputs, most blocks of a segment, warps, stages, blocks per turn; for "place" the rows of a block.
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
    def columns(self) -> int:
        """Outputs that programs share out among each other."""
        return self.n // 2 if self.product in ("up", "few_up") else self.n

    @property
    def blocks(self) -> int:
        """Blocks of 4-bit weights down the inputs."""
        return -(-self.k // (4 * PLANE))

    @property
    def tile(self) -> Tile:
        """As the product by blocks takes it; the same reading as triton_tiles has."""
        _, n, warps, stages, step = self.cut
        return Tile(n, warps, stages, merge=n >= 64 and warps >= 4, step=step)

    @property
    def few(self) -> Cut:
        """As the kernels for few tokens take it; the same reading as triton_tiles has."""
        n, most, warps, stages, step = self.cut
        return Cut(n, self.blocks // most, warps, stages, step, merge=warps >= 4)


def is_valid(case: Case) -> bool:
    """Whether the cut of a product by blocks divides the weight as it is, and fits shared memory and registers."""
    block, n, warps, stages, step = case.cut
    if case.k % (4 * PLANE) or fit(case.tile, case.columns, case.blocks) != case.tile:
        return False
    width, matrices = max(LEAST_ROWS, block), 2 if case.product == "up" else 1
    flight = stages * step * (matrices * n * PLANE * 2 + width * 4 * PLANE * 2)
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
    """Every candidate of the expert products of hidden size d and intermediate size f, by blocks."""
    cases: list[Case] = []
    for load in loads:
        pairs = pairs_of(load, experts)
        blocks = _blocks(pairs / experts)
        cases += _cuts("up", d, 2 * f, pairs, blocks, WIDE)
        cases += _cuts("down", f, d, pairs, blocks, WIDE)
        cases += [Case("place", experts, 0, pairs, (block,)) for block in blocks]
    return cases


def few_cases(d: int, f: int, experts: int, top_k: int, few: Mapping[str, Any]) -> list[Case]:
    """Every candidate of the kernels for few tokens, as far as a table says that those go."""
    most = min(few["pairs"], few["load"] * experts)
    cases = []
    for tokens, (product, k, n) in itertools.product(FEW_TOKENS, (("few_up", d, 2 * f), ("few_down", f, d))):
        members = 1 if product == "few_up" else 1 << (top_k - 1).bit_length()
        for outputs, splits, warps, flight in itertools.product((16, 32, 64), (1, 2, 4, 8), (2, 4, 8), FLIGHTS[:5]):
            blocks = k // (4 * PLANE)
            if tokens * top_k > most or blocks % splits or blocks // splits % flight[1] or f % 16:
                continue
            case = Case(product, k, n, tokens * top_k, (outputs, blocks // splits, warps, *flight))
            rows, width = outputs * members * splits, max(LEAST_ROWS, members * splits)
            sums = rows * width * (2 if product == "few_up" else 1)
            # Warps without 16 rows of their own would repeat another's.
            if case.columns % outputs == 0 and rows >= 16 * warps and sums <= ACCUMULATORS * 32 * warps:
                cases.append(case)
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


def serving(rows: Sequence[Mapping[str, Any]], name: str, load: float) -> int:
    """The number of the entry that serves a load: the first whose end is not below it."""
    return next(i for i, row in enumerate(rows) if row[name] is None or load <= row[name])


def near(cases: Sequence[Case], table: Mapping[str, Any], experts: int) -> list[Case]:
    """The cases that differ from the table's entry for their load in at most two of its numbers."""

    def entry(case: Case) -> Sequence[int]:
        if case.product == "place":
            return case.cut
        if case.product == "rows":
            return table["rows"][serving(table["rows"], "load", case.load)]["tile"]
        if case.product.startswith("few"):
            features = case.columns if case.product == "few_up" else case.k
            cuts = table["few"]["cuts"]
            n, most, *rest = cuts[serving(cuts, "outputs", case.load * features)][case.product.removeprefix("few_")]
            splits = 1  # as triton_tiles makes it fit
            while case.blocks % (2 * splits) == 0 and case.blocks > most * splits:
                splits *= 2
            return [n, case.blocks // splits, *rest]
        return table["experts"][serving(table["experts"], "load", case.load / experts)][case.product]

    return [case for case in cases if sum(a != b for a, b in zip(case.cut, entry(case), strict=True)) <= 2]


def pairs_of(load: float, experts: int) -> int:
    """Pairs that give so many per expert."""
    return max(1, round(load * experts))


def thresholds(loads: Sequence[float]) -> list[float | None]:
    """Up to which load each entry serves: the geometric middle of it and the next, to two digits; the last has no end.

    >>> thresholds([1, 4, 16]), thresholds([])
    ([2.0, 8.0, None], [])
    """
    middles = [math.sqrt(a * b) for a, b in itertools.pairwise(loads)]
    return [*(float(f"{middle:.2g}") for middle in middles), None] if loads else []


def best(cases: Sequence[Case], results: Mapping[str, Any]) -> tuple[Case, float] | None:
    """The fastest that was measured; equal tenths of a microsecond go to the smaller cut."""
    timed = [
        (round(results[case.key], 1), case.cut, case) for case in cases if isinstance(results.get(case.key), float)
    ]
    if not timed:
        return None
    microseconds, _, case = min(timed)
    return case, microseconds


def best_of_all(cases: Sequence[Case], results: Mapping[str, Any]) -> tuple[tuple[int, ...], list[float]] | None:
    """The cut that suits several shapes or loads: whose times, each over the best of its kind, have the least sum.

    Returns:
      The cut and its microseconds by (inputs, outputs, load), or None where no cut was measured for all kinds.
    """
    least: dict[tuple[int, ...], float] = {}
    times: dict[tuple[int, ...], dict[tuple[int, ...], float]] = {}
    for case in cases:
        if isinstance(time := results.get(case.key), float):
            kind = case.k, case.n, case.load
            least[kind] = min(least.get(kind, math.inf), time)
            times.setdefault(case.cut, {})[kind] = time
    whole = {cut: found for cut, found in times.items() if len(found) == len(least)}
    if not whole:
        return None
    cut = min(whole, key=lambda cut: (round(sum(t / least[kind] for kind, t in whole[cut].items()), 3), cut))
    return cut, [round(time, 1) for _, time in sorted(whole[cut].items())]


def expert_rows(cases: Sequence[Case], results: Mapping[str, Any], loads: Sequence[float], experts: int) -> list[dict]:
    """The table's "experts"; an entry is left out where a kernel has no measurement."""
    entries = []
    for load, end in zip(loads, thresholds(loads), strict=True):
        here = [case for case in cases if case.load == pairs_of(load, experts)]
        up, down = (best([case for case in here if case.product == product], results) for product in ("up", "down"))
        if up is None or down is None:
            continue
        # Both products share the places of the larger block.
        block = max(up[0].cut[0], down[0].cut[0])
        place = results.get(Case("place", experts, 0, pairs_of(load, experts), (block,)).key)
        if isinstance(place, float):
            cuts = {"up": list(up[0].cut), "down": list(down[0].cut)}
            entries.append({"load": end, **cuts, "microseconds": [up[1], down[1], round(place, 1)]})
    return entries


def few_rows(cases: Sequence[Case], results: Mapping[str, Any], few: Mapping[str, Any], f: int) -> dict[str, Any]:
    """The table's "few": its own, with new cuts in the entries that serve what was measured."""
    cuts = [dict(entry) for entry in few["cuts"]]
    for i, entry in enumerate(cuts):
        here = [case for case in cases if case.product.startswith("few")]
        here = [case for case in here if serving(cuts, "outputs", case.load * f) == i]
        up, down = (
            best_of_all([case for case in here if case.product == product], results)
            for product in ("few_up", "few_down")
        )
        if up is not None and down is not None:
            entry |= {"up": list(up[0]), "down": list(down[0]), "microseconds": [up[1][-1], down[1][-1]]}
    return {**few, "cuts": cuts}


def row_rows(cases: Sequence[Case], results: Mapping[str, Any], rows: Sequence[int]) -> list[dict]:
    """The table's "rows"; an entry is left out where no cut was measured for all shapes."""
    entries = []
    for count, end in zip(rows, thresholds(rows), strict=True):
        here = [case for case in cases if case.product == "rows" and case.load == count]
        if (found := best_of_all(here, results)) is not None:
            entries.append({"load": end, "tile": list(found[0]), "microseconds": found[1]})
    return entries


def as_text(value: Any, indent: str = "") -> str:
    """A table as JSON, as it is kept in the repository: entries of a list of objects are one line each.

    An entry that holds objects has a line for each of its fields.

    >>> print(as_text({"date": "today", "rows": [{"load": 8}, {"load": None}]}))
    {
      "date": "today",
      "rows": [
        {"load": 8},
        {"load": null}
      ]
    }
    """
    more = indent + "  "
    if isinstance(value, Mapping):
        parts = [f"{more}{json.dumps(name)}: {as_text(part, more)}" for name, part in value.items()]
        return "{\n" + ",\n".join(parts) + f"\n{indent}}}"
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return "[\n" + ",\n".join(more + _entry(entry, more) for entry in value) + f"\n{indent}]"
    return json.dumps(value)


def _entry(entry: Mapping[str, Any], indent: str) -> str:
    if not any(isinstance(part, Mapping) for part in entry.values()):
        return json.dumps(entry)
    fields = (f"{indent}  {json.dumps(name)}: {json.dumps(part)}" for name, part in entry.items())
    return "{\n" + ",\n".join(fields) + f"\n{indent}}}"
