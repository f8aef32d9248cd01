"""The figure of the optimizer experiment: curves at each rate, and the final score over rates."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments.harness import ResultsTable

COLOURS = {"muon": "#1f8a7a", "adamw": "#c8741a"}
CURVE = "wiki_bpb/bits_per_byte"
CAPTIONS = {
    "rates.png": "Left: bits a byte of held-out Wikipedia, mean over seeds, one line a learning rate (darker: higher). "
    "Right: the same at the end over the learning rate, each seed a point."
}


def draw(table: ResultsTable, folder: Path) -> None:
    """Writes the PNG file, if any row of each optimizer has records."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    done = [row for row in table.experiment.rows if table.seeds(row)]
    rows = {kind: [row for row in done if row.rsplit("_", 1)[0] == kind] for kind in COLOURS}
    if not all(rows.values()):
        return
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), width_ratios=(1.5, 1))
    for kind, members in rows.items():
        for k, row in enumerate(members):
            curves = [dict(table.curve(row, seed, CURVE)) for seed in table.seeds(row)]
            steps = sorted(set.intersection(*(set(curve) for curve in curves)))
            mean = np.mean([[curve[step] for step in steps] for curve in curves], axis=0)
            left.plot(steps, mean, color=COLOURS[kind], alpha=0.35 + 0.6 * (k + 1) / len(members), linewidth=1.2,
                      label=kind if k == len(members) - 1 else None)  # fmt: skip
        found = [(float(row.rsplit("_", 1)[1]), v) for row in members for v in table.values(row, CURVE).values()]
        right.plot(*np.array(found).T, "o", color=COLOURS[kind], alpha=0.6, markersize=4)
        rates = sorted({rate for rate, _ in found})
        right.plot(rates, [np.mean([v for r, v in found if r == rate]) for rate in rates], color=COLOURS[kind])
    left.set(xlabel="step", ylabel="bits a byte, held-out Wikipedia")
    left.legend(frameon=False)
    right.set(xlabel="learning rate", ylabel="bits a byte at the end", xscale="log")
    figure.tight_layout()
    figure.savefig(folder / "rates.png", dpi=130, metadata={"Software": ""})
    plt.close(figure)
