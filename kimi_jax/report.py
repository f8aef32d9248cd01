"""One self-contained page about a run: `python -m kimi_jax.report --workdir=runs/demo` writes `runs/demo/report.html`.

Reads from the workdir (a file or key that is missing leaves its part of the page out):

- `config.json`: the run's `TrainConfig` as nested JSON (`dataclasses.asdict`).
- `metrics.jsonl`: one row a log interval; `kimi_jax.train.metrics` says what is in it. What the data stream reports
  (`data`) is opened; rows of one step are merged.
- `eval.jsonl`: `{"step", "rows": [rows as in results.json]}` for every evaluation during training.
- `results.json`: a list of `{task, modality, metric, score, stderr, control, control_name, chance, n}`, optionally with
  `column`, `majority` and `controls: {name: score}` (`kimi_jax.eval.runner.Row`).
- `samples.json` (here or in `samples/`): a list of `{"task", "question", "gold", "answer", "control_answer" (optional),
  "images": [PNG paths relative to samples.json], "correct": bool}`; several images of one entry are shown as a strip.
"""

import base64
import dataclasses
import html
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from absl import app, flags, logging

from kimi_jax import report_charts
from kimi_jax.config import ConfigError, TrainConfig, diff, freeze
from kimi_jax.train.log import read_lines

_WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Folder of the run.")

STYLE = Path(__file__).with_name("report.css")
SAMPLES_SHOWN = 8  # of each task; the first ones of the file, so nothing is picked by its outcome
VERDICTS = {"above": "better than control", "even": "within 2 standard errors", "below": "worse than control", "": ""}
LOWER_IS_BETTER = ("bits", "nll", "loss", "perplexity", "error")

NEXT = (
    ("Use the environment that make demo made", "source .venv/bin/activate"),
    ("Look at what the run was fed", "python -m kimi_jax.data inspect --config=configs/demo.py"),
    ("Turn your own JSONL and media into training data", "python -m kimi_jax.data build SRC.jsonl DST"),
    (
        "Change anything from the command line",
        "python -m kimi_jax.train --config=configs/demo.py --config.workdir=runs/mine --config.steps=2000",
    ),
    ("Evaluate a checkpoint again, with more questions", "python -m kimi_jax.eval --workdir=runs/demo"),
    ("Watch the curves of several runs", "pip install tensorboard && tensorboard --logdir runs"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LoggedRun:
    """Everything the page shows. `rows` are ordered by step."""

    workdir: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    results: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    sample_dir: Path


# -------------------------------------------------------------------------------------------------------------- reading


def load(workdir: str | Path) -> LoggedRun:
    """What the run left in `workdir`. Raises FileNotFoundError if the folder is not there or holds no run."""
    folder = Path(workdir)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; give the workdir of a run: --workdir=runs/demo")
    sample_dir = folder if (folder / "samples.json").exists() else folder / "samples"
    results = _read_json(folder / "results.json", [])
    run = LoggedRun(
        workdir=folder,
        config=_read_json(folder / "config.json", {}),
        rows=with_evaluations(read_rows(folder / "metrics.jsonl"), read_rows(folder / "eval.jsonl")),
        results=results["rows"] if isinstance(results, dict) else results,
        samples=_read_json(sample_dir / "samples.json", []),
        sample_dir=sample_dir,
    )
    if not (run.rows or run.results):
        raise FileNotFoundError(f"{folder} has neither metrics.jsonl nor results.json: nothing was trained there yet")
    return run


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL log, one a step, ascending; `speed` and `data` are opened. Other lines are left out."""
    merged: dict[int, dict[str, Any]] = {}
    rows, odd = read_lines(path)
    left_out = len(odd)
    for _, row in rows:
        try:
            opened = row.pop("data", {}) | row.pop("speed", {}) | row
            merged.setdefault(int(row["step"]), {}).update(opened)
        except (ValueError, KeyError, TypeError, OverflowError):
            left_out += 1
    if left_out:
        logging.warning("%s: left out %d lines that are not rows", path, left_out)
    return [merged[step] for step in sorted(merged)]


def with_evaluations(rows: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The metrics rows and, in between, rows `{"step", "eval": {name: score}}`, ascending by step."""
    extra = []
    for evaluation in evaluations:
        rows_of = [row for row in evaluation.get("rows") or [] if isinstance(row, dict) and "task" in row]
        tasks = [row["task"] for row in rows_of]
        scores = {}
        for row in rows_of:
            alone = tasks.count(row["task"]) == 1 and not lower_is_better(row)
            scores[row["task"] if alone else f"{row['task']} ({row['metric']})"] = row.get("score")
        extra.append({"step": evaluation["step"], "eval": scores})
    return sorted([*rows, *extra], key=lambda row: row["step"])


def _read_json(path: Path, default: Any) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else default


# --------------------------------------------------------------------------------------------------------------- scores


def lower_is_better(row: dict[str, Any]) -> bool:
    """Whether a small score is a good one, told from the name of the metric."""
    return any(word in str(row.get("metric", "")).lower() for word in LOWER_IS_BETTER)


def gain(row: dict[str, Any]) -> float | None:
    """By how much the score beats its control (positive is better); None without a control."""
    if not (_finite(row.get("control")) and _finite(row.get("score"))):
        return None
    return (row["control"] - row["score"]) if lower_is_better(row) else (row["score"] - row["control"])


def other_controls(row: dict[str, Any]) -> dict[str, float]:
    """The controls beside the main one, by name: those of `controls`, and the most frequent answer (`majority`)."""
    found = {name: value for name, value in (row.get("controls") or {}).items() if name != row.get("control_name")}
    if row.get("majority") is not None:
        found.setdefault("majority", row["majority"])
    return {name.replace("_", " "): value for name, value in found.items() if name != row.get("control_name")}


def verdict(row: dict[str, Any]) -> str:
    """`above`, `even` or `below` its control, by two standard errors of the score; empty without a control."""
    margin = gain(row)
    if margin is None:
        return ""
    if abs(margin) <= 2 * (row.get("stderr") or 0.0):
        return "even"
    return "above" if margin > 0 else "below"


def print_table(run: LoggedRun) -> None:
    """The scores in the terminal, and what to do next."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=110)  # in a file nothing has to wrap
    table = Table(title=f"{run.workdir}: held-out scores", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("task")
    table.add_column("metric")
    for name in ("score", "control", "chance", "gain"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("control is")
    for row in run.results:
        margin = gain(row)
        cells = (row.get("task", ""), row.get("metric", ""), with_error(row), number(row.get("control")),
                 number(row.get("chance")), "–" if margin is None else f"{margin:+.3f}",
                 row.get("control_name") or "–")  # fmt: skip
        table.add_row(*(str(cell).replace("_", " ") for cell in cells))
    if run.results:
        console.print(table)
    console.print("What to do next:")
    for what, command in NEXT:
        console.print(f"  {what}:\n    [bold]{command}[/bold]", highlight=False, soft_wrap=True)


def number(value: float | None) -> str:
    """Three decimals, or a dash."""
    return f"{value:.3f}" if _finite(value) else "–"


def with_error(row: dict[str, Any]) -> str:
    """The score and its standard error."""
    return number(row.get("score")) + (f" ± {row['stderr']:.3f}" if row.get("stderr") is not None else "")


# ----------------------------------------------------------------------------------------------------------------- page


def render(run: LoggedRun) -> str:
    """The page as one HTML string; every image is inside."""
    title = f"{run.workdir.name}: report of a kimi_jax run"
    body = [
        f"<header><h1>kimi_jax run: {esc(run.workdir.name)}</h1><p class=lead>{esc(_subtitle(run))}</p></header>",
        _facts(run),
        _scores(run.results),
        _samples(run),
        _curves(run),
        _time(run.rows),
        _settings(run.config),
        _next(),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{esc(title)}</title><style>{STYLE.read_text()}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _subtitle(run: LoggedRun) -> str:
    model = run.config.get("model", {})
    moe = model.get("moe")
    parts = ["Kimi K2.5 architecture trained by kimi_jax"]
    if model:
        experts = f", {moe['n_routed_experts']} experts, top {moe['num_experts_per_tok']}" if moe else ", dense"
        vision = (
            f", vision tower {model['vision']['num_hidden_layers']} x {model['vision']['hidden_size']}"
            if model.get("vision")
            else ""
        )
        parts.append(f"{model['num_hidden_layers']} layers of width {model['hidden_size']}{experts}{vision}")
    return "; ".join(parts) + "."


def _facts(run: LoggedRun) -> str:
    rows = [row for row in run.rows if "eval" not in row]
    facts: list[tuple[str, str]] = []
    if rows:
        facts.append(("steps", f"{rows[-1]['step']:,}"))
    if _values(rows, "tokens_seen"):
        facts.append(("tokens seen", _short(_values(rows, "tokens_seen")[-1])))
    timed = [row for row in rows if row.get("step_s") is not None]
    if timed:
        steps = [b["step"] - a for a, b in zip([0, *(row["step"] for row in timed)], timed, strict=False)]
        seconds = sum(n * row["step_s"] for n, row in zip(steps, timed, strict=True))
        facts.append(("in training steps", f"{seconds / 60:.1f} min"))
    for key, name, show in (
        ("tokens_per_s", "tokens/s, median", lambda v: f"{v:,.0f}"),
        ("patches_per_s", "patches/s, median", lambda v: f"{v:,.0f}"),
        ("mfu", "of matmul rate (MFU)", lambda v: f"{v:.1%}"),
        ("token_fill", "token fill", lambda v: f"{v:.1%}"),
        ("vision_ratio", "vision tokens", lambda v: f"{v:.1%}"),
    ):
        values = sorted(_values(rows, key))
        if values:
            facts.append((name, show(values[len(values) // 2])))
    if _values(rows, "goodput_run"):
        facts.append(("goodput", f"{_values(rows, 'goodput_run')[-1]:.1%}"))
    for key, name in (("dropped", "tokens dropped"), ("clipped_heads", "heads clipped (QK-clip)")):
        if _values(rows, key):
            facts.append((name, f"{sum(_values(rows, key)):,.0f}"))
    cells = "".join(f"<div><dd>{esc(value)}</dd><dt>{esc(name)}</dt></div>" for name, value in facts)
    return f"<dl class=facts>{cells}</dl>" if facts else ""


def _scores(results: Sequence[dict[str, Any]]) -> str:
    if not results:
        return _section("Scores", "<p class=note>No results.json yet: the final evaluation has not run.</p>")
    lines = []
    for row in results:
        margin, state = gain(row), verdict(row)
        control_name = f"<small>{words_of(row['control_name'])}</small>" if row.get("control_name") else ""
        control_name += "".join(f"<small>{esc(k)} {number(v)}</small>" for k, v in other_controls(row).items())
        arrow = "<small>lower is better</small>" if lower_is_better(row) else ""
        words = VERDICTS[state]
        lines.append(
            f"<tr><td><b>{words_of(row.get('task', ''))}</b><small>{_column(row)}</small></td>"
            f"<td>{words_of(row.get('metric', ''))}{arrow}</td><td class=n>{esc(row.get('n', '–'))}</td>"
            f"<td class=n><b>{number(row.get('score'))}</b><small>{_plus_minus(row)}</small></td>"
            f"<td class=n>{number(row.get('control'))}{control_name}</td><td class=n>{number(row.get('chance'))}</td>"
            f"<td class='n {state}'>{'–' if margin is None else f'{margin:+.3f}'}<small>{words}</small></td>"
            f"<td>{_bar(row)}</td></tr>"
        )
    head = "".join(
        f"<th{' class=n' if name in ('n', 'score', 'control', 'chance', 'gain') else ''}>{name}</th>"
        for name in ("task", "metric", "n", "score", "control", "chance", "gain", "")
    )
    note = (
        "<p class=note>Held-out questions. The control answers the same questions with the evidence taken away (a "
        "blank image, one frame instead of the clip, the most frequent answer); a score means something only above its "
        "control. Gain is the distance to the control, positive when better. In the drawing the bar is the score with "
        "two standard errors, the thick mark the control, the dotted line chance.</p>"
    )
    return _section(
        "Scores",
        f"{note}<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>",
    )


def _column(row: dict[str, Any]) -> str:
    return words_of(", ".join(dict.fromkeys(str(row[k]) for k in ("column", "modality") if row.get(k))))


def _plus_minus(row: dict[str, Any]) -> str:
    return f"± {row['stderr']:.3f}" if row.get("stderr") is not None else ""


def _bar(row: dict[str, Any]) -> str:
    """The score between 0 and 1 as a small drawing; nothing for other scales."""
    score = row.get("score")
    if not _finite(score) or lower_is_better(row) or not 0 <= score <= 1:
        return ""
    width, marks = 150, []
    error = 2 * (row.get("stderr") or 0.0)
    low, high = max(0.0, score - error), min(1.0, score + error)
    if _finite(row.get("chance")):
        x = row["chance"] * width
        marks.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="22" class=chance />')
    if _finite(row.get("control")):
        x = row["control"] * width
        marks.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="2" y2="20" class=control />')
    marks.append(f'<line x1="{low * width:.1f}" x2="{high * width:.1f}" y1="11" y2="11" class=error />')
    return (
        f'<svg class=bar width="{width}" height="22" role="img" aria-label="score {score:.3f}">'
        f'<rect width="{width}" height="8" y="7" rx="2" class=track />'
        f'<rect width="{score * width:.1f}" height="8" y="7" rx="2" class="fill {verdict(row)}" />'
        f"{''.join(marks)}</svg>"
    )


def _samples(run: LoggedRun) -> str:
    by_task: dict[str, list[dict[str, Any]]] = {}
    for sample in run.samples:
        by_task.setdefault(str(sample.get("task", "")), []).append(sample)
    if not by_task:
        return ""
    parts = []
    for task, samples in by_task.items():
        shown = samples[:SAMPLES_SHOWN]
        right = sum(bool(s.get("correct")) for s in shown)
        controls = [r["control_name"] for r in run.results if r.get("task") == task and r.get("control_name")]
        cards = "".join(_card(sample, run.sample_dir, controls[0] if controls else "control") for sample in shown)
        parts.append(
            f"<h3>{esc(task)} <span>{right} of these {len(shown)} right</span></h3><div class=cards>{cards}</div>"
        )
    note = "<p class=note>The first held-out questions of each task, in file order; none was picked by its outcome.</p>"
    return _section("What it answers", note + "".join(parts))


def _card(sample: dict[str, Any], folder: Path, control_name: str) -> str:
    images = [(folder / name) for name in sample.get("images") or []]
    strip = "".join(
        f'<img alt="frame {i + 1}" src="{_uri("png", path.read_bytes())}">'
        for i, path in enumerate(images)
        if path.exists()
    )
    if any(not path.exists() for path in images):
        strip += "<small>an image is missing</small>"
    media = f"<div class='media{' frames' if len(images) > 1 else ''}'>{strip}</div>" if strip else ""
    right = bool(sample.get("correct"))
    mark = "<span class='mark right'>✓ right</span>" if right else "<span class='mark wrong'>✗ wrong</span>"
    answer = f"<div><dt>model</dt><dd>{esc(sample.get('answer', '')) or '<i>nothing</i>'} {mark}</dd></div>"
    gold = f"<div><dt>correct</dt><dd>{esc(sample.get('gold', ''))}</dd></div>"
    control = sample.get("control_answer")
    control = f"<div><dt>{words_of(control_name)}</dt><dd>{esc(control)}</dd></div>" if control is not None else ""
    wide = " wide" if len(images) > 2 else ""
    question = f"<p class=q>{esc(sample.get('question', ''))}</p>"
    return f"<article class='card{wide}'>{media}{question}<dl>{answer}{gold}{control}</dl></article>"


def _curves(run: LoggedRun) -> str:
    charts = report_charts.draw(run.rows, tau=run.config.get("optimizer", {}).get("qk_clip_tau"))
    if not charts:
        return ""
    figures = "".join(
        f"<figure{' class=wide' if chart.wide else ''}>"
        f"<figcaption><b>{esc(chart.title)}</b> {esc(chart.caption)}</figcaption>"
        f'<img alt="{esc(chart.title)}" src="{_uri("svg+xml", chart.svg)}"></figure>'
        for chart in charts
    )
    return _section("Training", f"<div class=figures>{figures}</div>")


def _settings(config: dict[str, Any]) -> str:
    if not config:
        return ""
    try:
        lines = diff(freeze(config), TrainConfig())
    except ConfigError:  # written by another version of the code: show it as it is
        lines = json.dumps(config, indent=1).splitlines()
    text = esc("\n".join(lines))
    return _section(
        "Settings",
        f"<details><summary>{len(lines)} settings that differ from the defaults</summary><pre>{text}</pre></details>",
    )


def _next() -> str:
    items = "".join(f"<li>{esc(what)}<pre>{esc(command)}</pre></li>" for what, command in NEXT)
    return _section("What to do next", f"<ol class=next>{items}</ol>")


def _time(rows: Sequence[dict[str, Any]]) -> str:
    """What the wall time of the run went into, as of its last row; nothing for runs that did not say."""
    known = [row["seconds"] for row in rows if row.get("seconds")]
    if not known:
        return ""
    total = max(sum(known[-1].values()), 1e-9)
    lines = "".join(
        f"<tr><td>{words_of(name)}</td><td class=n>{value / 60:.1f}</td><td class=n>{value / total:.1%}</td></tr>"
        for name, value in known[-1].items()
    )
    note = (
        "<p class=note>Goodput is the share of steps. Restarts are included: `away` lies between a checkpoint and the "
        "start that went on from it.</p>"
    )
    head = "<thead><tr><th></th><th class=n>minutes</th><th class=n>share</th></tr></thead>"
    return _section("Wall time", f"{note}<div class=scroll><table>{head}<tbody>{lines}</tbody></table></div>")


def _section(title: str, body: str) -> str:
    return f"<section><h2>{esc(title)}</h2>{body}</section>"


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def esc(value: Any) -> str:
    """Text made safe for HTML."""
    return html.escape(str(value))


def words_of(name: Any) -> str:
    """A name of the code as words, made safe for HTML."""
    return esc(str(name).replace("_", " "))


def _finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _values(rows: Iterable[dict[str, Any]], key: str) -> list[float]:
    return [row[key] for row in rows if _finite(row.get(key))]


def _short(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.0f}"


def main(argv: Sequence[str]) -> None:
    """Writes the page and prints the table."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}; the folder goes into --workdir")
    try:
        run = load(_WORKDIR.value)
    except FileNotFoundError as error:
        raise SystemExit(f"kimi_jax.report: {error}") from None
    page = run.workdir / "report.html"
    page.write_text(render(run), encoding="utf-8")
    print_table(run)
    print(f"\nThe full report: {page}")


if __name__ == "__main__":
    app.run(main)
