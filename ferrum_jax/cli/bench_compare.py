"""Two reports of `ferrum-jax bench`, row by row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ferrum_jax.cli.options import UsageError
from ferrum_jax.cli.output import table

RATES = ("tokens_per_second",)
SECONDS = (
    "first_token_seconds",
    "inter_token_p50_seconds",
    "inter_token_p99_seconds",
    "compile_seconds_cold",
    "compile_seconds_warm",
)


def read_report(path: str) -> dict[str, Any]:
    """A report that --json has printed.

    Args:
      path: of the file.

    Returns:
      The report.

    Raises:
      UsageError: the file cannot be read or is no such report.
    """
    try:
        report = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"--compare {path} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise UsageError(f"--compare {path} is no JSON ({error}); give what  bench --json  has printed.") from error
    try:
        list(_rows(report))  # now, not after minutes of measuring
    except (AttributeError, KeyError, TypeError) as error:
        raise UsageError(f"--compare {path} is no report of bench; give what  bench --json  has printed.") from error
    return report


def compare(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """New over old, for every row that both reports have.

    Args:
      new: a report.
      old: another.

    Returns:
      {"rows": [{"row", "ratios"}], "only_new", "only_old": names of rows, "differences": what else is not alike}.
    """
    before, now = dict(_rows(old)), dict(_rows(new))
    rows = []
    for name, values in now.items():
        if name in before:
            ratios = {key: values[key] / before[name][key] for key in values if before[name].get(key)}
            rows.append({"row": name, "ratios": ratios})
    keys = (
        "model",
        "layers",
        "dtype",
        "cache_dtype",
        "implementation",
        "lm_head_bits",
        "device",
        "versions",
        "new_tokens",
        "temperature",
    )
    differences = {key: [old[key], new[key]] for key in keys if key in old and key in new and old[key] != new[key]}
    return {
        "rows": rows,
        "only_new": [name for name in now if name not in before],
        "only_old": [name for name in before if name not in now],
        "differences": differences,
    }


def _rows(report: dict[str, Any]) -> Iterator[tuple[str, dict[str, float]]]:
    """(name, numbers) of what a report has measured."""
    for kind in ("decode", "prefill"):
        found = report[kind]
        if isinstance(found, dict):  # a report of one shape
            shape = " ".join(f"{key} {value}" for key, value in report.get("shapes", {}).items())
            yield f"{kind}, {shape}", {key: found[key] for key in RATES if key in found}
            continue
        for row in found:
            if row.get("fits"):
                shape = " x ".join(str(row[key]) for key in ("batch", "context", "prompt_tokens") if key in row)
                yield f"{kind} {shape}", {key: row[key] for key in (*RATES, *SECONDS) if row.get(key) is not None}
    scalars = ("first_token_seconds", "compile_seconds", "load_seconds", "peak_memory_bytes", "parameter_bytes")
    for key in scalars:
        if report.get(key):
            yield key, {key: report[key]}


def text_of_comparison(compared: dict[str, Any], path: str) -> str:
    """The comparison for people.

    Args:
      compared: from compare.
      path: of the old report.

    Returns:
      Lines.
    """
    lines = [f"new over {path}"]
    for key, (old, new) in compared["differences"].items():
        lines.append(f"not alike: {key} was {_short(old)}, is {_short(new)}")
    columns = list(dict.fromkeys(key for row in compared["rows"] for key in row["ratios"]))
    rate_like = [key for key in columns if key in (*RATES, *SECONDS)]
    rows = [
        (row["row"], *(f"{row['ratios'][key]:.2f}x" if key in row["ratios"] else "" for key in rate_like))
        for row in compared["rows"]
        if any(key in row["ratios"] for key in rate_like)
    ]
    if rows:
        names = [
            key.replace("_seconds", " s").replace("tokens_per_second", "tok/s").replace("_", " ") for key in rate_like
        ]
        lines.append(table(("", *names), rows))
    for row in compared["rows"]:
        for key, ratio in row["ratios"].items():
            if key not in rate_like:
                lines.append(f"{key.replace('_', ' ')} {ratio:.2f}x")
    for which, names in (
        ("only in the new report", compared["only_new"]),
        ("only in the old one", compared["only_old"]),
    ):
        if names:
            lines.append(f"{which}: {', '.join(names)}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    return ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else str(value)
