"""The figure of the swarm experiment: accuracy under a limit of critical steps, and what the training rewarded."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments.harness import ResultsTable

COLOURS = {
    "start": "#999999", "outcome": "#4a6fa5", "annealed": "#1f8a7a", "constant": "#7cc4b8", "naive": "#c8741a",
    "naive_annealed": "#e3b04b", "weak": "#a23b72",
    "serial_start": "#bbbbbb", "serial_outcome": "#27408b", "serial_annealed": "#0b4d3f", "few_start": "#777777",
    "few_outcome": "#6ca6cd", "few_annealed": "#43cd80", "few_strong": "#2e8b57", "naive_strong": "#8b2500",
}  # fmt: skip
OTHER_STARTS = ("few_", "serial_")  # rows that would hide the others' curves
CAPTIONS = {
    "steps.png": "Left and middle: item F1 on 96 held-out questions under a limit of critical steps, mean over seeds "
    "(band: lowest to highest) of the rows from the first start; dashed: a script that assigns one task in a turn. "
    "Right: of the last iterations of training, the share of wide questions that were worked on one after the "
    "other (circles), and of subagents whose result was not used (crosses); points are seeds."
}


def draw(table: ResultsTable, folder: Path, limits: tuple[int, ...]) -> None:
    """Writes the PNG file, if any row has records."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in table.experiment.rows if table.seeds(row)]
    if not rows:
        return
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11.5, 3.6), width_ratios=(1, 1, 1.1))
    for axes, family in ((left, "wide"), (middle, "chain")):
        for row in [row for row in rows if not row.startswith(OTHER_STARTS)]:
            values = np.array([list(table.values(row, f"limit_{limit}/{family}/policy").values()) for limit in limits])
            axes.plot(limits, values.mean(axis=1), color=COLOURS[row], label=row, linewidth=1.4)
            axes.fill_between(
                limits, values.min(axis=1), values.max(axis=1), color=COLOURS[row], alpha=0.12, linewidth=0
            )
        serial = [np.mean(list(table.values(rows[0], f"limit_{limit}/{family}/serial").values())) for limit in limits]
        axes.plot(limits, serial, "--", color="#111111", label="one after the other", linewidth=1.2)
        axes.set(xlabel="limit of critical steps", ylabel="item F1", title=family, ylim=(-0.02, 1.02))
    left.legend(frameon=False, fontsize=7)
    trained = [row for row in rows if table.values(row, "train/collapsed")]
    for place, row in enumerate(trained):
        for task, shift, marker in (("train/collapsed", -0.12, "o"), ("train/unused", 0.12, "x")):
            found = list(table.values(row, task).values())
            label = task.removeprefix("train/") if place == 0 else None
            right.plot([place + shift] * len(found), found, marker, color=COLOURS[row], markersize=5, label=label)
    right.set(ylabel="share", ylim=(-0.02, 1.02))
    right.set_xticks(range(len(trained)), trained, rotation=35, ha="right")
    right.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(folder / "steps.png", dpi=130, metadata={"Software": ""})
    plt.close(figure)
