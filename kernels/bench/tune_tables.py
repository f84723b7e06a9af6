"""The tables that tune.py writes: made of its results, found where the kernels look for them, and shown to people."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tune_cases as cases_of
import tune_parts
import tune_rings
from tune_cases import Case

from ferrum_kernels import triton_tiles

NOTE = (
    "tile: rows of a block, outputs, warps, stages, blocks of weights per turn; load: most pairs per expert, or most "
    "rows; microseconds: up, down and place, or of each shape; cut: of products in parts, outputs and rows of a "
    "program, warps, stages, blocks per turn, programs, null: whole; their microseconds: with the norm that reads them"
)
RING_NOTE = (
    "load: most pairs per expert; null for up and down: the Triton kernels; the rest as of mosaic_matmul.Ring; "
    "microseconds: up, down and place, or where warps are alone of both products in one kernel and place"
)


def make_table(
    options: argparse.Namespace,
    sizes: tuple[int, int, int],
    cases: Sequence[Case],
    results: Mapping[str, Any],
    device: str,
    old: Any,
) -> dict[str, Any]:
    """The table of a device; what was not measured is as in the old table.

    Args:
      options: its loads, rows and the name of its config.
      sizes: hidden size, intermediate size, experts.
      cases: that were to be measured.
      results: of the log.
      device: its kind.
      old: the table so far, for a new device that of its relative.
    """
    _, f, experts = sizes
    parts = tune_parts.part_rows(cases, results, options.parts)
    return {
        **old,
        **_of_what(options, sizes, device),
        "note": NOTE,
        "few": cases_of.few_rows(cases, results, old["few"], f),
        "experts": cases_of.expert_rows(cases, results, options.loads, experts) or old["experts"],
        "rows": cases_of.row_rows(cases, results, options.rows) or old["rows"],
        "parts": old["parts"] if parts is None else parts,
    }


def make_rings(
    options: argparse.Namespace,
    sizes: tuple[int, int, int],
    cases: Sequence[Case],
    results: Mapping[str, Any],
    device: str,
    old: Any,
    loads: Sequence[float],
) -> dict[str, Any]:
    """The table of the Mosaic GPU kernels; see `make_table` and `tune.candidates`."""
    rows = tune_rings.ring_rows(cases, results, loads, sizes[2])
    return {**old, **_of_what(options, sizes, device), "note": RING_NOTE, "experts": rows or old["experts"]}


def _of_what(options: argparse.Namespace, sizes: tuple[int, int, int], device: str) -> dict[str, str]:
    d, f, experts = sizes
    shapes = f"{options.config.stem}: {experts} experts of {d} x {2 * f} and {f} x {d}, 4 bits, groups of 128"
    return {"device": device, "date": datetime.date.today().isoformat(), "shapes": shapes}


def file_of(backend: str, device_kind: str) -> Path:
    """The file of a kind of device, its family's where there is one; as the kernels find it.

    >>> file_of("nvidia", "NVIDIA H100 80GB HBM3").name, file_of("mosaic", "NVIDIA Imaginary").name
    ('nvidia-h100.json', 'mosaic-imaginary.json')
    """
    name = triton_tiles.name_of(backend, device_kind)
    return triton_tiles.file_of(backend, device_kind) or triton_tiles.FOLDER / f"{name}.json"


def text_of(table: dict[str, Any]) -> str:
    """A table for people."""
    lines = [f"{table['device']}, {table['shapes']}"]
    parts = [
        ("few: outputs", "outputs", table.get("few", {"cuts": []})["cuts"]),
        ("pairs per expert", "load", table["experts"]),
        ("rows", "load", table.get("rows", [])),
        ("rows in parts", "load", table.get("parts", [])),
    ]
    for title, name, entries in parts:
        for entry in entries:
            us = " ".join(f"{t:8.1f}" for t in entry.get("microseconds", []))
            cuts = (f"{k} {entry[k]!s:22}" for k in ("up", "down", "tile", "cut") if k in entry)
            lines.append(f"{title:16} <= {entry[name]!s:8} {' '.join(cuts):54} {us} us")
    return "\n".join(lines)
