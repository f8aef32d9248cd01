"""Plots of the sweep, from its results alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.swarm_robustness.simulate import FAULTS
from experiments.swarm_robustness.verdicts import LOSS, quality

Row = dict[str, Any]
COLOURS = {"half": "#d98c1f", "parallel": "#1f5fa8", "checked": "#3b8f4e"}
FAMILY_COLOURS = {"wide": "#1f5fa8", "longdoc": "#3b8f4e", "download": "#7a4fa3", "mixed": "#d98c1f", "trap": "#b5363c",
                  "deep": "#777777"}  # fmt: skip


def draw(rows: Sequence[Row], folder: Path) -> None:
    """Writes faults.png (gain and change of item F1 by level, tasks `wide`) and scale.png (gain of `parallel`)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    _faults(pyplot, [r for r in rows if r["sweep"] == "fault" and r["family"] == "wide"], folder / "faults.png")
    _scale(pyplot, [r for r in rows if r["sweep"] == "scale" and r["policy"] == "parallel"], folder / "scale.png")


def _faults(pyplot: Any, rows: Sequence[Row], path: Path) -> None:
    figure, axes = pyplot.subplots(2, len(FAULTS), figsize=(15, 4.8), sharey="row", layout="constrained")
    for column, (fault, (_, levels)) in enumerate(FAULTS.items()):
        for policy, colour in COLOURS.items():
            line = [
                next(r for r in rows if (r["fault"], r["level"], r["policy"]) == (fault, x, policy)) for x in levels
            ]
            _points(axes[0, column], line, ("gain", "gain_low", "gain_high"), colour, policy)
            _points(axes[1, column], line, ("f1_change", "f1_low", "f1_high"), colour, policy)
        axes[0, column].set_title(fault.replace("_", " "))
        axes[0, column].axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes[0, column].set_xticks(range(5), [])
        axes[1, column].set_xticks(range(5), [f"{x:g}" for x in levels])
        axes[1, column].set_ylim(-1.05, 0.05)
    axes[0, 0].set_ylabel("gain in time over\none agent (log)")
    axes[0, 0].set_yscale("log")
    axes[0, 0].set_yticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
    axes[0, 0].minorticks_off()
    axes[1, 0].set_ylabel("change of item F1")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.supxlabel(
        f"level of the fault; hollow: more than {LOSS:g} of item F1 is lost, so that a gain in time says nothing"
    )
    figure.savefig(path, dpi=90, metadata={"Software": None})
    pyplot.close(figure)


def _points(axis: Any, line: Sequence[Row], names: tuple[str, str, str], colour: str, label: str) -> None:
    """A line with its band; points whose quality is lost are hollow."""
    values, low, high = ([row[name] for row in line] for name in names)
    axis.plot(range(len(line)), values, color=colour, linewidth=1.3, label=label)
    axis.fill_between(range(len(line)), low, high, color=colour, alpha=0.2, linewidth=0)
    for i, (row, value) in enumerate(zip(line, values, strict=True)):
        inner = "white" if quality(row) == "lost" else colour
        axis.plot(i, value, marker="o", markersize=4, color=colour, markerfacecolor=inner, zorder=3)


def _scale(pyplot: Any, rows: Sequence[Row], path: Path) -> None:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for axis, name, other, fixed in ((left, "slots", "items", 12), (right, "items", "slots", 32)):
        ends: dict[tuple[float, float], list[str]] = {}  # families whose lines end in one place share a name
        for family, colour in FAMILY_COLOURS.items():
            line = sorted((r for r in rows if r["family"] == family and r[other] == fixed), key=lambda r: r[name])
            axis.plot([r[name] for r in line], [r["gain"] for r in line], color=colour, marker="o", markersize=3)
            axis.fill_between(
                [r[name] for r in line], [r["gain_low"] for r in line], [r["gain_high"] for r in line], color=colour,
                alpha=0.2, linewidth=0,
            )  # fmt: skip
            ends.setdefault((line[-1][name], round(line[-1]["gain"], 1)), []).append(family)
        heights: dict[float, float] = {}
        span = max(r["gain"] for r in rows)
        for place, height in sorted(ends):
            found = ends[place, height]
            heights[place] = max(height, heights.get(place, -span) + 0.05 * span)
            axis.annotate(", ".join(found), (place * 1.1, heights[place]), va="center", fontsize=8,
                          color=FAMILY_COLOURS[found[0]])  # fmt: skip
        values = sorted({r[name] for r in rows if r[other] == fixed})
        axis.set_xscale("log", base=2)
        axis.set_xticks(values, [str(v) for v in values])
        axis.minorticks_off()
        axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axis.set_xlim(values[0] * 0.9, values[-1] * 2.2)
    left.set_xlabel("slots (12 items)")
    right.set_xlabel("items (32 slots)")
    left.set_ylabel("gain in time over one agent")
    figure.savefig(path, dpi=90, metadata={"Software": None})
    pyplot.close(figure)
