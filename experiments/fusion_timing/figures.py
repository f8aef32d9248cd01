"""The figures of the fusion-timing experiment: text and what happens to it at the switch, and vision by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from experiments.harness import ResultsTable

COLOURS = {"early": "#2b5f9e", "mid": "#c8741a", "late": "#1f8a7a", "text_only": "#5b6675"}
LABELS = {"early": "early, 10:90", "mid": "mid, 20:80 from 50 %", "late": "late, 50:50 from 80 %"}
CURVE = "wiki_bpb/bits_per_byte"


def draw(table: ResultsTable, folder: Path) -> None:
    """Writes the PNG files that the records allow into `folder`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    if not all(set(table.seeds(row)) & set(table.seeds("early")) for row in LABELS):
        return
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), width_ratios=(1.5, 1))
    _text(left, table)
    _difference(right, table)
    figure.tight_layout()
    figure.savefig(folder / "text.png", dpi=130, metadata={"Software": ""})
    plt.close(figure)


CAPTIONS = {
    "text.png": "Left: bits a byte of held-out Wikipedia from 40 % of training on, every 4 steps, mean over "
    "seeds, each seed faint; lines down mark the switches. Right: the same less early fusion at the same step and "
    "seed, mean and standard error: above 0 is worse than early fusion."
}


def _curves(table: ResultsTable, row: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps [T] and scores [seeds, T] at the steps that all seeds have."""
    curves = [dict(table.curve(row, seed, CURVE)) for seed in table.seeds(row)]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return np.array(steps), np.array([[curve[step] for step in steps] for curve in curves])


def _text(axes: Any, table: ResultsTable) -> None:
    for row, label in LABELS.items():
        steps, scores = _curves(table, row)
        late = steps >= steps[-1] * 0.4
        axes.plot(steps[late], scores[:, late].T, color=COLOURS[row], alpha=0.18, linewidth=0.7)
        axes.plot(steps[late], scores[:, late].mean(0), color=COLOURS[row], linewidth=1.5, label=label)
    for share in (0.5, 0.8):
        axes.axvline(share * steps[-1], color="#9aa3ad", linewidth=0.8, linestyle=":")
    axes.set(xlabel="step", ylabel="bits a byte, held-out Wikipedia")
    axes.legend(frameon=False)


def _difference(axes: Any, table: ResultsTable) -> None:
    early = {seed: dict(table.curve("early", seed, CURVE)) for seed in table.seeds("early")}
    for row in ("mid", "late"):
        both = [seed for seed in table.seeds(row) if seed in early]
        curves = {seed: dict(table.curve(row, seed, CURVE)) for seed in both}
        steps = sorted(set.intersection(*(set(curves[seed]) & set(early[seed]) for seed in both)))
        steps = [step for step in steps if step >= 0.4 * steps[-1]]
        gaps = np.array([[curves[seed][step] - early[seed][step] for step in steps] for seed in both])
        mean, error = gaps.mean(0), gaps.std(0, ddof=1) / len(both) ** 0.5 if len(both) > 1 else 0 * gaps[0]
        axes.plot(steps, mean, color=COLOURS[row], linewidth=1.5)
        axes.fill_between(steps, mean - error, mean + error, color=COLOURS[row], alpha=0.2, linewidth=0)
    axes.axhline(0, color=COLOURS["early"], linewidth=1)
    for share in (0.5, 0.8):
        axes.axvline(share * steps[-1], color="#9aa3ad", linewidth=0.8, linestyle=":")
    axes.set(xlabel="step", ylabel="bits a byte above early fusion")
