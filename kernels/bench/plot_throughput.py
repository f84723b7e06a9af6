"""Draw what `ferrum-jax bench` measured of decode: python kernels/bench/plot_throughput.py RESULT.json

    ferrum-jax bench MODEL --batch 1,4,16,32,64,128,256 --json > result.json

Tokens per second over batch, both on logarithmic scales, a line for every context: measured, the roofline of the same
report (what reading live weights and cache allows), and vLLM's recorded line. Needs matplotlib. The file is the same
for the same numbers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plot_moe_layer import short

FOLDER = Path(__file__).parents[2] / "docs" / "images"
COLOURS = ("#1f5fa8", "#2e8b6f", "#7a4fa3")
ORANGE, GREY = "#c2571a", "#8a8a8a"
# vLLM 0.24 with Marlin, Qwen3-30B-A3B GPTQ-Int4 shapes, context 192 to 320, on one H200: batch, tokens per second.
VLLM = ((1, 234), (4, 777), (16, 2135), (32, 3616), (64, 6366), (128, 11_200), (256, 15_882))
VLLM_CONTEXT = 256
VLLM_LAYERS = 48
TICKS = (10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000, 300_000)


def by_context(report: dict[str, Any]) -> dict[int, list[dict[str, Any]]]:
    """The rows of decode that fit, by context, in the order of their batch.

    Raises:
      SystemExit: there are none.
    """
    lines: dict[int, list[dict[str, Any]]] = {}
    rows = report["decode"] if isinstance(report["decode"], list) else []
    for row in sorted((row for row in rows if row["fits"]), key=lambda row: row["batch"]):
        lines.setdefault(row["context"], []).append(row)
    if not lines:
        raise SystemExit(
            "the report has no rows of decode; make it with  ferrum-jax bench MODEL --batch 1,4,16 --json."
        )
    return dict(sorted(lines.items()))


def draw(report: dict[str, Any]) -> Any:
    """The figure of one report."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams |= {"svg.hashsalt": "throughput", "font.size": 10, "font.family": "DejaVu Sans"}
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullLocator

    lines = by_context(report)
    figure, axes = plt.subplots(figsize=(7.6, 4.6), layout="constrained")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    batches = sorted({row["batch"] for rows in lines.values() for row in rows})
    values: list[float] = []
    for (context, rows), colour in zip(lines.items(), COLOURS, strict=False):
        x = [row["batch"] for row in rows]
        y = [row["tokens_per_second"] for row in rows]
        values += y
        axes.plot(x, y, color=colour, linewidth=2.2, marker="o", markersize=5, label=f"measured, context {context:,}")
        if all(row["roofline_tokens_per_second"] for row in rows):
            roof = [row["roofline_tokens_per_second"] for row in rows]
            values += roof
            axes.plot(x, roof, color=colour, linewidth=1.1, alpha=0.55, label=f"roofline, context {context:,}")
    if report["layers"] == VLLM_LAYERS and VLLM_CONTEXT in lines:
        dashes = (0, (5, 2))
        label = "vLLM 0.24 on an H200, context 256"
        axes.plot(
            *zip(*VLLM, strict=True),
            color=ORANGE,
            linewidth=1.6,
            linestyle=dashes,
            marker="s",
            markersize=4,
            label=label,
        )
        values += [rate for _, rate in VLLM]
        _ratios(axes, lines[VLLM_CONTEXT])
    low, high = min(values) / 1.5, max(values) * 1.5
    axes.set_ylim(low, high)
    axes.set_xlim(batches[0] / 1.25, batches[-1] * 1.25)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    ticks = [tick for tick in TICKS if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(color="#e3e3e3", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    axes.set_ylabel("tokens per second, all rows")
    name = Path(report["model"]).stem
    axes.set_title(f"Decode: {name}, {report['layers']} layers", loc="left", fontsize=11, fontweight="bold", pad=20)
    drawn = f", sampled at temperature {report['temperature']:g}" if report.get("temperature") else ""
    subtitle = f"{report['device']['kind']}, jax {report['versions']['jax']}, {report['date']}{drawn}; higher is better"
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, fontsize=9, color="#555555")
    return figure


def _ratios(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Under each batch, how many times as fast as vLLM."""
    recorded = dict(VLLM)
    for row in rows:
        if row["batch"] in recorded:
            ratio = row["tokens_per_second"] / recorded[row["batch"]]
            at = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "top", "fontsize": 9}
            axes.text(row["batch"], -0.075, f"{ratio:.2f}x", color=COLOURS[0], **at)
    axes.xaxis.labelpad = 16
    axes.set_xlabel("batch, and how many times as fast as vLLM's recorded line")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read a report, write the picture, print where it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="what  ferrum-jax bench --json  has printed for several batches")
    parser.add_argument("--out", type=Path, help="file, .svg or .png; without it docs/images/throughput_DEVICE.svg")
    parser.add_argument("--name", help="of the model, in the title")
    options = parser.parse_args(arguments)
    try:
        report = json.loads(options.result.read_text("utf-8"))
        report["decode"], report["device"]["kind"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        parser.error(
            f"{options.result} is no report of  ferrum-jax bench --json  ({error}); make one, and name its file."
        )
    if options.name:
        report["model"] = options.name
    out = options.out or FOLDER / f"throughput_{short(report['device']['kind'])}.svg"
    out.parent.mkdir(parents=True, exist_ok=True)
    figure = draw(report)
    figure.savefig(out, dpi=150, metadata={"Date": None} if out.suffix == ".svg" else None)
    print(out)


if __name__ == "__main__":
    main()
