"""Plots of the sweep, from its results alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.swarm_robustness.simulate import FAULTS

Row = dict[str, Any]
COLOURS = {"mixed": "#d98c1f", "parallel": "#1f5fa8", "checked": "#3b8f4e"}
FAMILY_COLOURS = {"wide": "#1f5fa8", "longdoc": "#3b8f4e", "download": "#7a4fa3", "mixed": "#d98c1f", "trap": "#b5363c",
                  "deep": "#777777"}  # fmt: skip


def draw(rows: Sequence[Row], folder: Path) -> None:
    """Writes faults.png (gain and item F1 by level, one fault a column, tasks `wide`) and scale.png."""
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
            for axis, name, low, high in (
                (axes[0, column], "gain", "gain_low", "gain_high"),
                (axes[1, column], "item_f1", None, None),
            ):
                axis.plot(range(5), [r[name] for r in line], color=colour, marker="o", markersize=3, label=policy)
                if low:
                    axis.fill_between(
                        range(5), [r[low] for r in line], [r[high] for r in line], color=colour, alpha=0.2
                    )
        axes[0, column].set_title(fault.replace("_", " "))
        axes[0, column].axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes[0, column].set_xticks(range(5), [])
        axes[1, column].set_xticks(range(5), [f"{x:g}" for x in levels])
        axes[1, column].set_ylim(0, 1.05)
    axes[0, 0].set_ylabel("gain in time over\none agent (log)")
    axes[0, 0].set_yscale("log")
    axes[0, 0].set_yticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
    axes[0, 0].minorticks_off()
    axes[1, 0].set_ylabel("item F1")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.supxlabel("level of the fault")
    figure.savefig(path, dpi=90, metadata={"Software": None})
    pyplot.close(figure)


def _scale(pyplot: Any, rows: Sequence[Row], path: Path) -> None:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for axis, name, other, fixed in ((left, "slots", "items", 12), (right, "items", "slots", 8)):
        ends: dict[str, float] = {}
        for family, colour in FAMILY_COLOURS.items():
            line = sorted((r for r in rows if r["family"] == family and r[other] == fixed), key=lambda r: r[name])
            axis.plot([r[name] for r in line], [r["gain"] for r in line], color=colour, marker="o", markersize=3)
            ends[family] = line[-1]["gain"]
        height = -1.0
        for family in sorted(ends, key=ends.__getitem__):  # names of lines that end together stand above one another
            height = max(ends[family], height + 0.3)
            axis.annotate(family, (line[-1][name] * 1.1, height), va="center", color=FAMILY_COLOURS[family], fontsize=8)
        values = sorted({r[name] for r in rows if r[other] == fixed})
        axis.set_xscale("log", base=2)
        axis.set_xticks(values, [str(v) for v in values])
        axis.minorticks_off()
        axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axis.set_xlim(values[0] * 0.9, values[-1] * 1.9)
    left.set_xlabel("slots (12 items)")
    right.set_xlabel("items (8 slots)")
    left.set_ylabel("gain in time over one agent")
    figure.savefig(path, dpi=90, metadata={"Software": None})
    pyplot.close(figure)
