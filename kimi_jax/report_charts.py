"""The drawings of `kimi_jax.report`: metrics rows in, SVG bytes out. A curve whose keys are missing is left out.

Shape letters: L layers with attention, M layers with experts, E experts, T logged steps.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

INK, SOFT, LINE = "#1c2430", "#5b6675", "#e2e6eb"
COLOURS = {"text": "#2b5f9e", "image": "#c8741a", "video": "#1f8a7a", "all": "#5b6675"}
HEATMAP_LAYERS = 8  # at most; evenly spaced when the model has more
HEATMAP_STEPS = 80

Row = dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """One drawing. `wide` asks for the whole width of the page."""

    title: str
    caption: str
    svg: bytes
    wide: bool = False


def draw(rows: Sequence[Row], tau: float | None = None) -> list[Chart]:
    """All drawings that the rows allow, in the order of the page. `tau` is the threshold of QK-clip."""
    charts = [
        _lines(rows, {k: f"loss_{k}" for k in ("text", "image", "video")} | {"all": "loss"}, "Loss by modality",
               "nats a token, smoothed; raw values faint", "nats"),
        _evaluations(rows, lambda name: "bits" in name, "Bits per byte", "held-out text during training"),
        _evaluations(rows, lambda name: "bits" not in name, "Held-out scores", "during training"),
        _lines(rows, {"tokens": "tokens_per_s", "patches": "patches_per_s"}, "Throughput",
               "tokens and patches a second", "per second", zero=True),
        _lines(rows, {"MFU": "mfu"}, "Model FLOPs utilisation",
               "share of the measured dense matmul rate", "share", zero=True),
        _max_logits(rows, tau),
        _lines(rows, {"gradient": "grad_norm"}, "Gradient norm", "global, before clipping", "norm", log=True),
        _lines(rows, {"rate": "lr"}, "Learning rate", "warm-up, stable, decay", "", zero=True),
        _lines(rows, {"vision tokens": "vision_ratio", "token fill": "token_fill"}, "Packing",
               "share of vision tokens; share of positions that hold a token", "share", zero=True),
        _expert_load(rows),
    ]  # fmt: skip
    return [chart for chart in charts if chart is not None]


def series(rows: Sequence[Row], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of `key` where it is a finite number: two float arrays [T]."""
    points = [(r["step"], r[key]) for r in rows if isinstance(r.get(key), (int, float)) and np.isfinite(r[key])]
    pairs = np.asarray(points, float).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred running mean [T] -> [T] over at most `window` points, narrower at both ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    half = np.minimum(np.minimum(index, len(values) - 1 - index), window // 2)
    return (total[index + half + 1] - total[index - half]) / (2 * half + 1)


def _lines(rows: Sequence[Row], keys: dict[str, str], title: str, caption: str, unit: str,
           *, zero: bool = False, log: bool = False) -> Chart | None:  # fmt: skip
    found = {name: series(rows, key) for name, key in keys.items()}
    found = {name: (steps, values) for name, (steps, values) in found.items() if len(values) > 1}
    if len(found) > 1 and "all" in found:
        found.pop("all")  # the parts say more than their mean
    if not found:
        return None
    figure, axes = _figure()
    for i, (name, (steps, values)) in enumerate(found.items()):
        colour = COLOURS.get(name, ("#2b5f9e", "#c8741a")[i % 2])
        window = max(1, len(values) // 25)
        if window > 2:
            axes.plot(steps, values, color=colour, alpha=0.22, linewidth=0.8)
        axes.plot(steps, smooth(values, window), color=colour, linewidth=1.7, label=name)
    if len(found) > 1:
        axes.legend(frameon=False, fontsize=8.5, ncols=3, loc="best")
    if log and all((v > 0).all() for _, v in found.values()):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:.2g}")
    elif zero:
        axes.set_ylim(bottom=0, top=1.08 * max(np.quantile(v, 0.995) for _, v in found.values()) or 1)
    axes.set_ylabel(unit)
    return Chart(title, caption, _svg(figure))


def _evaluations(rows: Sequence[Row], wanted: Callable[[str], bool], title: str, caption: str) -> Chart | None:
    names = sorted({name for row in rows for name in row.get("eval") or {} if wanted(name)})
    flat = [{"step": row["step"], **row["eval"]} for row in rows if row.get("eval")]
    found = [(name, *series(flat, name)) for name in names]
    found = [(name, steps, values) for name, steps, values in found if len(values) > 1]
    if not found:
        return None
    import matplotlib

    figure, axes = _figure()
    colours = matplotlib.colormaps["tab10"]
    for i, (name, steps, values) in enumerate(found):
        axes.plot(steps, values, marker="o", markersize=3, linewidth=1.4, color=colours(i % 10), label=name)
    axes.legend(frameon=False, fontsize=7.5, ncols=2)
    return Chart(title, caption, _svg(figure))


def _max_logits(rows: Sequence[Row], tau: float | None) -> Chart | None:
    logged = [row for row in rows if row.get("max_logit") and None not in row["max_logit"]]
    if len(logged) < 2:
        return None
    import matplotlib

    steps = np.asarray([row["step"] for row in logged])
    values = np.asarray([row["max_logit"] for row in logged], float)  # [T, L]
    figure, axes = _figure()
    colours = matplotlib.colormaps["viridis"](np.linspace(0.05, 0.8, values.shape[1]))
    for layer, colour in enumerate(colours):
        named = layer in (0, values.shape[1] - 1) or values.shape[1] <= 6
        axes.plot(steps, values[:, layer], color=colour, linewidth=1.3, label=f"layer {layer}" if named else None)
    if tau:
        axes.axhline(tau, color="#a8321f", linewidth=1.2, linestyle="--", label=f"QK-clip at {tau:g}")
    axes.legend(frameon=False, fontsize=8, ncols=3)
    axes.set_ylim(0, 1.25 * max(values.max(), (tau or 0) if values.max() > (tau or 0) / 8 else 0))
    return Chart("Largest attention logit", "over all heads of a layer", _svg(figure))


def _expert_load(rows: Sequence[Row]) -> Chart | None:
    logged = [row for row in rows if row.get("expert_load")]
    if len(logged) < 2:
        return None
    load = np.asarray([row["expert_load"] for row in logged], float)  # [T, M, E]
    load = load / np.maximum(load.mean(-1, keepdims=True), 1e-9)
    steps = np.asarray([row["step"] for row in logged])
    chunks = np.array_split(np.arange(len(steps)), min(HEATMAP_STEPS, len(steps)))
    image = np.stack([load[chunk].mean(0) for chunk in chunks])  # [T', M, E]
    layers = np.unique(np.linspace(0, image.shape[1] - 1, min(HEATMAP_LAYERS, image.shape[1])).round().astype(int))
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        columns = min(4, len(layers))
        lines = -(-len(layers) // columns)
        figure = Figure(figsize=(12, 2.3 * lines + 0.3), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False).ravel()
        for axes in grid[len(layers) :]:
            axes.set_visible(False)
        for axes, layer in zip(grid, layers, strict=False):
            extent = (steps[0], steps[-1], image.shape[2] - 0.5, -0.5)
            drawn = axes.imshow(image[:, layer].T, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, extent=extent)
            axes.set_title(f"MoE layer {layer}", fontsize=9, color=INK, loc="left")
            axes.set_ylabel("expert")
            axes.grid(False)
        figure.colorbar(drawn, ax=grid[: len(layers)].tolist(), shrink=0.9, pad=0.01, label="load / mean load")
        caption = "1 (white) is an even share of the tokens, 0 an unused expert, 2 or more an overloaded one"
        return Chart("Expert load", caption, _svg(figure), wide=True)


_STYLE = {
    "font.family": "sans-serif", "font.size": 9, "text.color": INK, "image.interpolation": "nearest",
    "axes.edgecolor": "#b9c1cb", "axes.labelcolor": SOFT, "xtick.color": SOFT, "ytick.color": SOFT,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": LINE, "grid.linewidth": 0.7, "svg.hashsalt": "kimi_jax",
}  # fmt: skip


def _figure() -> tuple[Any, Any]:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6, 2.7), layout="constrained")
        axes = figure.subplots()
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("step")
        return figure, axes


def _svg(figure: Any) -> bytes:
    import matplotlib

    out = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
