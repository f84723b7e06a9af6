"""Draw what moe_layer.py measured on a GPU: python kernels/bench/plot_moe_layer.py RESULT.json

    python kernels/bench/moe_layer.py --json > result.json && python kernels/bench/plot_moe_layer.py result.json

Time per layer over tokens, both on logarithmic scales: measured, Marlin's recorded line, and the floor. Needs
matplotlib. The file is the same for the same numbers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "docs" / "images"
BLUE, ORANGE, GREY = "#1f5fa8", "#c2571a", "#8a8a8a"
MODELS = {"qwen3-30b-a3b": "Qwen3-30B-A3B", "mixtral-8x7b": "Mixtral-8x7B"}
# Nobody needs more ticks than the numbers that are usually asked for.
TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000)


def short(device: str) -> str:
    """A device's name for a file.

    >>> short("NVIDIA H100 80GB HBM3"), short("NVIDIA L40S")
    ('h100', 'nvidia-l40s')
    """
    return next((n for n in ("h100", "h200") if n in device.lower()), device.lower().replace(" ", "-"))


def draw(found: dict[str, Any]) -> Any:
    """The figure of one result."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "moe_layer", "font.size": 10, "font.family": "DejaVu Sans"}
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullLocator, ScalarFormatter

    rows = found["rows"]
    tokens = [row["tokens"] for row in rows]
    measured = [row["microseconds"] for row in rows]
    floor = [row["floor_microseconds"] for row in rows]
    marlin = [(row["tokens"], row["marlin_microseconds"]) for row in rows if row["marlin_microseconds"]]
    figure, axes = plt.subplots(figsize=(7.6, 4.4), layout="constrained")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lowest = min(floor) / 1.6
    axes.fill_between(tokens, lowest, floor, color=GREY, alpha=0.13, linewidth=0)
    axes.plot(tokens, floor, color=GREY, linewidth=1.2)
    if marlin:
        dashes = (0, (5, 2))
        axes.plot(*zip(*marlin, strict=True), color=ORANGE, linewidth=1.6, linestyle=dashes, marker="s", markersize=4)
    axes.plot(tokens, measured, color=BLUE, linewidth=2.2, marker="o", markersize=5)
    _name_lines(axes, tokens, measured, floor, marlin)
    axes.set_xlim(tokens[0] / 1.25, tokens[-1] * 1.25)
    top = max([*measured, *(time for _, time in marlin)]) * 1.6
    axes.set_ylim(lowest, top)
    axes.set_xticks(tokens, [f"{count:,}" for count in tokens])
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.set_yticks([tick for tick in TICKS if lowest <= tick <= top])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(color="#e3e3e3", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("tokens in the step")
    times = dict(marlin)
    for count, time in zip(tokens, measured, strict=True):
        if count in times:
            # Its own row under the ticks: beside the lines it would cross the floor.
            at = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "top", "fontsize": 9}
            axes.text(count, -0.075, f"{times[count] / time:.2f}x", color=BLUE, **at)
    if marlin:
        axes.xaxis.labelpad = 16
        axes.set_xlabel("tokens in the step, and how many times as fast as Marlin")
    axes.set_ylabel("time per layer, µs")
    name = found["config"].removesuffix(".toml")
    name = MODELS.get(name, name)
    routing = "" if found["routing"] == "uniform" else f", routing: {found['routing']}"
    date = f", {found['date']}" if found.get("date") else ""
    axes.set_title(f"One expert layer of {name}{routing}", loc="left", fontsize=11, fontweight="bold", pad=20)
    subtitle = f"{found['device']}, jax {found['jax']}{date}; lower is better"
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, fontsize=9, color="#555555")
    return figure


def _name_lines(
    axes: Any, tokens: list[int], measured: list[float], floor: list[float], marlin: list[tuple[int, float]]
) -> None:
    """A name beside each line, so that no legend has to be read."""

    def name(text: str, at: tuple[float, float], color: str, x: int, y: int, where: str) -> None:
        how: dict[str, Any] = {"textcoords": "offset points", "ha": where, "va": "center", "fontsize": 9.5}
        if color == BLUE:  # the floor's line passes behind
            how["bbox"] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
        axes.annotate(text, at, xytext=(x, y), color=color, **how)

    near = max(0, len(tokens) - 3)
    name("floor: weights read once,\nor the products", (tokens[near], floor[near]), GREY, 0, -40, "center")
    if marlin:
        name("Marlin (vLLM 0.24),\nexperts already chosen", marlin[len(marlin) // 2], ORANGE, -8, 24, "right")
    name("ferrum_jax", (tokens[0], measured[0]), BLUE, 0, -12, "left")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="what moe_layer.py --json printed on a GPU")
    parser.add_argument("--out", type=Path, default=None, help="a file ending in .svg or .png")
    options = parser.parse_args(arguments)
    try:
        found = json.loads(options.result.read_text("utf-8").splitlines()[-1])
        [*_] = (row["floor_microseconds"] for row in found["rows"])
    except (OSError, ValueError, LookupError) as error:
        parser.error(f"{options.result} is not what moe_layer.py --json prints on a GPU: {error!r}")
    out = options.out or FOLDER / f"moe_layer_{short(found['device'])}.svg"
    out.parent.mkdir(parents=True, exist_ok=True)
    dates = {"Date": None} if out.suffix == ".svg" else {}
    draw(found).savefig(out, dpi=160, metadata=dates)
    print(out)


if __name__ == "__main__":
    main()
