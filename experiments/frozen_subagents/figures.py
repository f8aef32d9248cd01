"""The figure of the experiment: item F1 through training, and what subagents come back with."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments.harness import ResultsTable

COLOURS = {"start": "#999999", "frozen": "#1f8a7a", "trained": "#c8741a"}
CAPTIONS = {
    "training.png": "Left: item F1 of the runs of training, averaged over 5 iterations; a line is a seed. Middle: on "
    "held-out questions, with the subagents of the training (circles) and with those of the other row (crosses). "
    "Right: shares of held-out subagents that came back with the right row (circles) and without a row "
    "(crosses). Points are seeds."
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
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11.5, 3.6), width_ratios=(1.3, 1, 1))
    for row in rows:
        for number, seed in enumerate(table.seeds(row)):
            values = _curve(table, row, seed)
            left.plot(np.arange(len(values)), values, color=COLOURS[row], label="" if number else row, linewidth=1.3)
    left.set(xlabel="iteration that the average begins with", ylabel="item F1 in training")
    if any(line.get_label() in COLOURS for line in left.lines):
        left.legend(frameon=False)
    for axes, tasks in (
        (middle, ("item_f1", "swapped/item_f1")),
        (right, ("right_row", "no_row")),
    ):
        for place, row in enumerate(rows):
            for task, shift, marker in zip(tasks, (-0.1, 0.1), "ox", strict=True):
                found = list(table.values(row, task).values())
                axes.plot([place + shift] * len(found), found, marker, color=COLOURS[row], markersize=6)
        axes.set_xticks(range(len(rows)), rows)
        axes.set_xlim(-0.5, len(rows) - 0.5)
    middle.set(ylabel="item F1, held out")
    right.set(ylabel="share of subagents", ylim=(-0.02, 1.02))
    figure.tight_layout()
    figure.savefig(folder / "training.png", dpi=130, metadata={"Software": ""})
    plt.close(figure)


def _curve(table: ResultsTable, row: str, seed: int) -> list[float]:
    """Item F1 through training."""
    values: list[float] = []
    while found := table.values(row, f"curve/{len(values)}"):
        if seed not in found:
            break
        values.append(found[seed])
    return values
