"""python -m kimi_jax.eval --workdir=runs/demo [--tasks=all] [--limit=1000] [--out=results.json]: scores a checkpoint.

Prints a table of score, control and chance, and writes the same rows as JSON. `--list` describes the tasks. Started on
several hosts (kimi_jax.hosts) it uses the devices of all of them; host 0 prints and writes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import numpy as np
from absl import app, flags
from etils import epath
from PIL import Image as PILImage
from rich.console import Console
from rich.table import Table

from kimi_jax.eval.runner import EvalSample, Row, evaluate
from kimi_jax.eval.tasks import resolve


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("workdir", "runs/demo", "Folder of the run whose newest checkpoint is scored.")
    flags.DEFINE_integer("step", None, "Score the checkpoint of this step instead of the newest.")
    flags.DEFINE_string("tasks", "all", "Names joined by commas, or all.")
    flags.DEFINE_integer("limit", 1000, "Questions a task, at most.", lower_bound=2)
    flags.DEFINE_string("out", "", "JSON file for the rows; default: WORKDIR/results.json.")
    flags.DEFINE_bool("list", False, "Describe the tasks and exit.")


def table(rows: Sequence[Row]) -> Table:
    """The results as they are printed."""
    out = Table("column", "task", "metric", "score", "control", "chance", "majority", "n")
    for row in rows:
        controls = "\n".join(f"{value:.3f} {name}" for name, value in row.controls.items())
        majority = "" if row.majority is None else f"{row.majority:.3f}"
        score = f"[bold]{row.score:.3f}[/] ± {row.stderr:.3f}"
        out.add_row(row.column, row.task, row.metric, score, controls, f"{row.chance:.3f}", majority, str(row.n))
    return out


def write_rows(rows: Sequence[Row], path: epath.PathLike) -> None:
    """Rows as a JSON list; the file is whole or not there."""
    path = epath.Path(path)
    _write_text(path, json.dumps([dataclasses.asdict(row) for row in rows], indent=1))


def write_samples(samples: Sequence[EvalSample], folder: epath.PathLike) -> None:
    """`samples.json` and its PNG files, as the report reads them (kimi_jax.report)."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for i, sample in enumerate(samples):
        names = []
        for k, pixels in enumerate(sample.media):
            names.append(f"{sample.task}_{i:03d}_{k}.png")
            with (folder / names[-1]).open("wb") as file:
                PILImage.fromarray(np.asarray(pixels)).save(file, format="PNG")
        entry = {f.name: getattr(sample, f.name) for f in dataclasses.fields(sample) if f.name != "media"}
        entries.append({**entry, "images": names})
    _write_text(folder / "samples.json", json.dumps(entries, indent=1, ensure_ascii=False))


def _write_text(path: epath.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f"{path.name}.partial"
    partial.write_text(text)
    partial.replace(path)


def main(argv: Sequence[str]) -> None:
    """Runs the command line; exits with a message and status 1 when it cannot."""
    f = flags.FLAGS
    if len(argv) > 1:
        raise SystemExit(f"error: unexpected argument {argv[1]!r}   (--help for more)")
    try:
        tasks = resolve(f.tasks)
    except KeyError as error:
        raise SystemExit(f"error: {error.args[0]}") from error
    if f.list:
        for task in tasks:
            Console().print(f"[bold]{task.name}[/] ({task.column}, {', '.join(task.metrics)}): {task.doc}")
        return
    from kimi_jax import cli, hosts
    from kimi_jax.config import ConfigError
    from kimi_jax.infer import lockstep
    from kimi_jax.train import adapters

    lockstep.join()
    cli.enable_compilation_cache()
    try:
        config, params, frozen = adapters.load_run(f.workdir, f.step)
    except (FileNotFoundError, ConfigError) as error:
        raise SystemExit(f"error: {error}") from error
    samples: list[EvalSample] = []
    rows = evaluate(params, config, [task.name for task in tasks], f.limit, samples=samples, frozen=frozen)
    if not hosts.is_first():
        return
    Console().print(table(rows))
    out = f.out or str(epath.Path(f.workdir) / "results.json")
    write_rows(rows, out)
    write_samples(samples, epath.Path(f.workdir) / "samples")
    print(f"{len(rows)} rows in {out}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
