"""The Mosaic GPU kernels' table of tune.py: candidates for the rings of both products, and which of them wins.

Both products share the places of one block, so the block is chosen for the sum of them and of the kernel that finds
the places. Where warps multiply alone one kernel has both products, "ring_both", and one ring. The Triton kernels are
timed at the same load as their table has them, and keep the loads that they win.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tune_cases import Case, best, expert_rows, pairs_of, serving, thresholds

from ferrum_kernels.mosaic_matmul import Ring
from ferrum_kernels.mosaic_registers import GROUP, RUN
from ferrum_kernels.tiles import PLANE

LOADS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 256.0)  # pairs per expert
COLUMNS = (
    *((8,), (16,), (24,), (32,), (48,), (64,), (8, 16), (8, 24), (8, 32), (16, 32), (32, 64), (64, 96), (32, 128)),
    *((64, 128), (8, 16, 32), (16, 24, 32), (16, 32, 48), (32, 64, 96), (32, 64, 128)),
    *((8, 16, 24, 32), (16, 32, 48, 64), (32, 64, 96, 128)),
)
SHAPES = ((1, 2), (2, 2), (1, 4))  # parts and warpgroups
FLIGHTS = ((4, 2), (5, 2), (6, 2), (6, 3), (8, 3), (8, 4))  # stages and lag
NO_LAG = 2  # of down, which gathers nothing
ALONE = ((3, 0), (4, 0), (5, 0), (6, 0))  # of warps that multiply alone, which a lag of 0 stands for; 2 parts of 2
ALIKE = 1.02  # times that count as equal
MOST_COLUMNS = {2: 128, 4: 32}  # that registers hold, by warpgroups
MOST_ALONE = 32
MOST_SHARED = 2.0  # pairs per expert up to which turns are shared, which pays with skewed routing and is not timed here
SHARED_MEMORY = 227 * 1024  # bytes that a program of a Hopper GPU may use
BARRIERS = 1024  # bytes, more than enough


def ring_of(case: Case) -> Ring:
    """As the kernel takes a case's cut: parts, stages, lag, warpgroups and the columns."""
    parts, stages, lag, warpgroups, *columns = case.cut
    return Ring(tuple(columns), parts, stages, lag or Ring.lag, warpgroups, alone=lag == 0)


def refuses(d: int, f: int) -> str | None:
    """Why the kernels do not take layers of hidden size d and intermediate size f, or None; see mosaic.takes."""
    if d % 256 == 0 and f % 128 == 0:
        return None
    return f"they take hidden sizes that 256 divides and intermediate sizes that 128 divides; these are {d} and {f}"


def is_valid(ring: Ring) -> bool:
    """Whether a ring fits shared memory and registers."""
    stage = ring.outputs * (2 * PLANE + 2) + ring.block * 2 * GROUP
    # What is written, or the sums that two warpgroups give each other.
    staging = ring.block * 2 * RUN * (2 * 4 if ring.alone else ring.warpgroups * 2)
    return (
        ring.lag < ring.stages
        and ring.block <= (MOST_ALONE if ring.alone else MOST_COLUMNS[ring.warpgroups])
        and ring.stages * stage + staging + BARRIERS <= SHARED_MEMORY
    )


def ring_cases(
    d: int, f: int, experts: int, loads: Sequence[float], triton_table: Mapping[str, Any] | None = None
) -> list[Case]:
    """Every candidate: "ring_up", "ring_down", "ring_both" (of hidden and intermediate size) and "place".

    With a table those of Triton come too, as it has them at the same loads.
    """
    cases: list[Case] = []
    for load in loads:
        pairs = pairs_of(load, experts)
        mean, blocks = pairs / experts, set()
        for columns in COLUMNS:
            if not min(mean / 4, 32) <= columns[-1] <= max(32.0, 2 * mean):
                continue
            blocks.add(columns[-1])
            made = []
            for parts, warpgroups in SHAPES:
                for product, k, n in (("ring_up", d, 2 * f), ("ring_down", f, d)):
                    flights = FLIGHTS if product == "ring_up" else sorted({(stages, NO_LAG) for stages, _ in FLIGHTS})
                    made += [Case(product, k, n, pairs, (parts, *flight, warpgroups, *columns)) for flight in flights]
            made += [Case("ring_both", d, f, pairs, (2, *flight, 2, *columns)) for flight in ALONE]
            cases += [case for case in made if is_valid(ring_of(case))]
        if triton_table is not None:
            entry = triton_table["experts"][serving(triton_table["experts"], "load", mean)]
            cases.append(Case("up", d, 2 * f, pairs, tuple(entry["up"])))
            cases.append(Case("down", f, d, pairs, tuple(entry["down"])))
            blocks.add(max(entry["up"][0], entry["down"][0]))
        cases += [Case("place", experts, 0, pairs, (block,)) for block in sorted(blocks)]
    return cases


def near_rings(cases: Sequence[Case], table: Sequence[Mapping[str, Any]], experts: int) -> list[Case]:
    """The cases whose ring differs from the table's at their load in at most two fields, and those without a ring.

    Who multiplies (parts, warpgroups, alone) is one field, as few of its values go together. Where the table has no
    ring, the next load's counts. Down's lag does not, as nothing reads it, nor whether turns are shared.
    """
    who = ("parts", "warpgroups", "alone")
    rings = [row for row in table if row["up"] is not None]

    def is_near(case: Case) -> bool:
        name = "down" if case.product == "ring_down" else "up"  # of both there is one ring
        end = math.inf if rings[-1]["load"] is None else rings[-1]["load"]
        here = rings[serving(rings, "load", min(case.load / experts, end))][name]
        mine = entry_of(ring_of(case))
        names = mine.keys() - {*who, "shared", *(("lag",) if name == "down" else ())}
        other = any(mine[field] != here[field] for field in who)
        return other + sum(mine[field] != here[field] for field in names) <= 2

    return [case for case in cases if not case.product.startswith("ring_") or not rings or is_near(case)]


def entry_of(ring: Ring) -> dict[str, Any]:
    """A ring as the table has it."""
    return {**dataclasses.asdict(ring), "columns": list(ring.columns)}


def ring_rows(cases: Sequence[Case], results: Mapping[str, Any], loads: Sequence[float], experts: int) -> list[dict]:
    """The table's "experts"; empty where no ring was measured.

    An entry is null for both products where Triton's kernels take no longer, or where no ring gave a right result.
    """
    entries, measured = [], False
    for load, end in zip(loads, thresholds(loads), strict=True):
        here = [case for case in cases if case.load == pairs_of(load, experts)]
        found = _fastest(here, results, experts)
        measured |= found is not None
        triton = expert_rows(here, results, [load], experts)
        if found is None or (triton and sum(triton[0]["microseconds"]) <= sum(found[1])):
            entries.append({"load": end, "up": None, "down": None})
            continue
        shared = end is not None and end <= MOST_SHARED
        up, down = ({**entry_of(ring), "shared": shared and ring.alone} for ring in found[0])
        entries.append({"load": end, "up": up, "down": down, "microseconds": found[1]})
    return entries if measured else []


def _fastest(
    cases: Sequence[Case], results: Mapping[str, Any], experts: int
) -> tuple[tuple[Ring, Ring], list[float]] | None:
    """Both rings of one load and the microseconds of up, down and place, or of both products and place.

    Of nearly equal ones those of most rows are taken. What is timed is uniform routing; an
    expert that many more tokens choose is read once per block of its rows.
    """
    choices = []
    rings = [case for case in cases if case.product.startswith("ring_")]

    def fastest(product: str, block: int) -> tuple[Case, float] | None:
        return best([case for case in rings if (case.product, case.cut[-1]) == (product, block)], results)

    for block in sorted({case.cut[-1] for case in rings}):
        place = results.get(Case("place", experts, 0, cases[0].load, (block,)).key)
        up, down, both = (fastest(f"ring_{name}", block) for name in ("up", "down", "both"))
        apart = [(up[0], down[0], [up[1], down[1]])] if up and down else []
        for first, second, times in [*apart, *([(both[0], both[0], [both[1]])] if both else [])]:
            if isinstance(place, float):
                times = [*times, round(place, 1)]
                choices.append((round(sum(times), 1), block, (ring_of(first), ring_of(second)), times))
    if not choices:
        return None
    least = min(choice[0] for choice in choices)
    alike = [choice for choice in choices if choice[0] <= ALIKE * least]
    *_, rings_of_both, times = min(alike, key=lambda choice: (-choice[1], choice[0]))
    return rings_of_both, times
