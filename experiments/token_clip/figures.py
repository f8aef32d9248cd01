"""The figure of the token-clip experiment: accuracy through training, and what was masked."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments.harness import ResultsTable

CURVE = "count/reward"
COLOURS = {
    "k2_5": "#1f8a7a", "k2_5_fresh": "#111111", "k2_5_narrow": "#7cc4b8", "k2_5_tau_0": "#4a6fa5", "ppo": "#c8741a",
    "ppo_wide": "#e3b04b", "grpo": "#a23b72", "none": "#999999",
}  # fmt: skip
CAPTIONS = {
    "accuracy.png": "Left: accuracy on 256 held-out images through training, mean over seeds (band: lowest to "
    "highest). Right: share of generated tokens without policy gradient, mean over the run, by the side of ratio 1; "
    "points are seeds."
}


def draw(table: ResultsTable, folder: Path) -> None:
    """Writes the PNG file, if any row has records."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in table.experiment.rows if table.seeds(row)]
    if not rows:
        return
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6), width_ratios=(1.4, 1))
    for row in rows:
        curves = [dict(table.curve(row, seed, CURVE)) for seed in table.seeds(row)]
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        values = np.array([[curve[step] for step in steps] for curve in curves])
        left.plot(steps, values.mean(axis=0), color=COLOURS[row], label=row, linewidth=1.4)
        left.fill_between(steps, values.min(axis=0), values.max(axis=0), color=COLOURS[row], alpha=0.12, linewidth=0)
    places = np.arange(len(rows))
    for task, shift, marker in (("below", -0.12, "v"), ("above", 0.12, "^")):
        for place, row in zip(places, rows, strict=True):
            found = list(table.values(row, task).values())
            right.plot([place + shift] * len(found), found, marker, color=COLOURS[row], alpha=0.7, markersize=5,
                       label=task if place == 0 else None)  # fmt: skip
    left.set(xlabel="step", ylabel="accuracy, held-out images")
    left.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    right.set(ylabel="share of tokens masked")
    right.set_xticks(places, rows, rotation=40, ha="right")
    right.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(folder / "accuracy.png", dpi=130, metadata={"Software": ""})
    plt.close(figure)
