"""The table "parts" of tune.py: how a product of some rows is cut along its inputs, and from where on it is whole.

What is timed is the product and the norm that adds its parts up: more parts are read for longer. The norm stands for
attention, too, which reads the parts of query, key and value.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from tune_cases import ACCUMULATORS, FEW_FLIGHTS, SHARED_MEMORY, WIDE, Case, best_of_all, serving, thresholds

from ferrum_kernels import triton_rows
from ferrum_kernels.tiles import PLANE
from ferrum_kernels.triton_matmul import LEAST_ROWS
from ferrum_kernels.triton_route import power
from ferrum_kernels.triton_tiles import parts_of

ROWS = (16, 64, 128, 256, 512)
SHAPES = ((2048, 5120), (4096, 2048))  # inputs and outputs: query, key and value in one, output
BLOCKS = (16, 32, 64, 128)  # rows of a program
PROGRAMS = (128, 192, 256, 320, 512)  # about how many there should be

Shapes = Sequence[tuple[int, int]]


def cut_of(case: Case) -> triton_rows.Cut | None:
    """As the kernel takes a case's cut, read as a row of the table is; None where the product is better whole."""
    return parts_of(case.cut, case.load, case.n, case.blocks)


def part_cases(rows: Sequence[int], table_rows: Sequence[Mapping[str, Any]], shapes: Shapes = SHAPES) -> list[Case]:
    """Every candidate, and for each shape the whole product, cut as the table's "rows" say: product "whole"."""
    cases: list[Case] = []
    for count in rows:
        cases += [_whole(count, shape, table_rows) for shape in shapes]
        seen = set()
        for cut in _cuts(count):
            alike = tuple(cut_of(Case("parts", *shape, count, cut)) for shape in shapes)
            # Another number of programs may give the same parts; a cut that must be changed to fit is another's.
            if alike in seen or not any(alike) or not all(_fits(cut, made) for made in alike):
                continue
            seen.add(alike)
            cases += [Case("parts", *shape, count, cut) for shape, made in zip(shapes, alike, strict=True) if made]
    return cases


def _whole(count: int, shape: tuple[int, int], table_rows: Sequence[Mapping[str, Any]]) -> Case:
    tile = () if count <= triton_rows.MOST else table_rows[serving(table_rows, "load", count)]["tile"]
    return Case("whole", *shape, count, tuple(tile))


def _cuts(count: int) -> list[tuple[int, ...]]:
    """Outputs and rows of a program, warps, stages, blocks per turn, programs; that fit shared memory and registers."""
    cuts = []
    blocks = [block for block in BLOCKS if block <= max(BLOCKS[0], power(count))]
    for (n, warps), block, (stages, step) in itertools.product(WIDE, blocks, [*FEW_FLIGHTS, (4, 1)]):
        width = max(LEAST_ROWS, block)
        flight = stages * step * (n * PLANE * 2 + width * 4 * PLANE * 2)
        if flight <= SHARED_MEMORY and n * width <= ACCUMULATORS * 32 * warps:
            cuts += [(n, block, warps, stages, step, programs) for programs in PROGRAMS]
    return cuts


def _fits(cut: tuple[int, ...], made: triton_rows.Cut | None) -> bool:
    return made is None or (made.n, made.warps, made.stages, made.step) == (cut[0], *cut[2:5])


def near_parts(cases: Sequence[Case], table: Sequence[Mapping[str, Any]], shapes: Shapes = SHAPES) -> list[Case]:
    """The cases that differ from the table's entry in at most two numbers, and the whole products.

    Where the table has no cut, the nearest before it counts. Numbers of programs that give the same parts are one.
    """

    @functools.cache
    def entry(count: int) -> list[int]:
        cut = [row for row in table if row["cut"] is not None]
        n, block, *rest = next((row["cut"] for row in cut if count <= row["load"]), cut[-1]["cut"])
        return [n, min(block, power(count)), *rest]

    @functools.cache
    def is_near(count: int, cut: tuple[int, ...]) -> bool:
        present = entry(count)
        with_its_programs = (*cut[:-1], present[-1])
        differ = any(
            cut_of(Case("parts", *shape, count, cut)) != cut_of(Case("parts", *shape, count, with_its_programs))
            for shape in shapes
        )
        return differ + sum(a != b for a, b in zip(cut[:-1], present[:-1], strict=True)) <= 2

    if not any(row["cut"] for row in table):
        return list(cases)
    return [case for case in cases if case.product == "whole" or is_near(case.load, case.cut)]


def part_rows(cases: Sequence[Case], results: Mapping[str, Any], rows: Sequence[int]) -> list[dict] | None:
    """The table's "parts", None where nothing was measured: for each load the cut that suits all shapes.

    A shape that a cut leaves whole counts as the whole product. Null is chosen where no cut is faster than that; the
    table ends with the last cut, since what was not measured is whole.
    """
    entries: list[dict] = []
    for count, end in zip(rows, [*thresholds(rows)[:-1], *rows[-1:]], strict=True):
        whole = [case for case in cases if case.product == "whole" and case.load == count]
        parts = [case for case in cases if case.product == "parts" and case.load == count]
        times: dict[str, float] = {}
        kinds = []
        for cut in [(), *sorted({case.cut for case in parts})]:
            for other in whole:
                case = Case("parts", other.k, other.n, count, cut)
                kinds.append(case)
                time = results.get((case if cut and cut_of(case) else other).key)
                if isinstance(time, float):
                    times[case.key] = time
        if found := best_of_all(kinds, times):
            entries.append({"load": end, "cut": list(found[0]) or None, "microseconds": found[1]})
    if not entries:
        return None
    while entries and entries[-1]["cut"] is None:
        entries.pop()
    return entries
