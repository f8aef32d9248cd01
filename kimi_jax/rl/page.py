"""python -m kimi_jax.rl.page --before=runs/rl_sft --after=runs/rl_count: what reinforcement learning has changed.

Held-out problems of the tasks of the later run are answered greedily by both models, with their images and with white
ones. Writes OUT/rl.json with the numbers, and OUT/rl.html: the table, the same problems before and after, and groups of
rollouts as the first model draws them, each with its reward and advantage. Tokens whose probability has changed by more
than the bounds of the run's loss allow are marked: they would have no policy gradient under the weights of the second.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags
from etils import epath
from PIL import Image as PILImage
from rich.console import Console
from rich.table import Table

from kimi_jax import cli, sharding
from kimi_jax.config import ConfigError, MeshConfig, TrainConfig
from kimi_jax.config_rl import PolicyConfig
from kimi_jax.data.example import Image, Text
from kimi_jax.eval.runner import Row, Sample
from kimi_jax.rl import shaping
from kimi_jax.rl.evaluate import evaluate
from kimi_jax.rl.rollout import settings
from kimi_jax.rl.tasks import Problem, open_task
from kimi_jax.rl.worker import PendingGroup, RolloutWorker
from kimi_jax.train import checkpoint

GROUPS = 6  # of rollouts on the page
NAMES = ("before", "after")
STYLE = """body{font:15px/1.45 system-ui,sans-serif;max-width:64em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.35em .8em;border-bottom:1px solid #ddd;text-align:left}
.p{display:flex;gap:1em;padding:.8em 0;border-bottom:1px solid #eee}
img{width:84px;height:84px;image-rendering:pixelated;border:1px solid #ddd}
.q{color:#555}.ok{color:#00705a}.no{color:#b3401a}code{background:#f3f3f3;padding:0 .25em;margin-right:2px}
.low{background:#ffd9c7}.high{background:#cfe3ff}td.n{text-align:right;font-variant-numeric:tabular-nums}"""


def page(
    rows: dict[str, list[Row]], shown: dict[str, list[Sample]], groups: Sequence[str], bounds: tuple[float, float]
) -> str:
    """The page. rows, shown: by NAMES. groups: as `rollouts` makes them. bounds: of the ratio of probabilities."""
    lines = "".join(
        f"<tr><td>{html.escape(r.task)}<td>{name}<td class=n>{r.score:.3f} ± {r.stderr:.3f}<td class=n>{r.control:.3f}"
        f"<td>{html.escape(r.control_name)}<td class=n>{r.chance:.3f}<td class=n>{r.n}</tr>"
        for name in NAMES
        for r in rows[name]
    )
    head = "<tr><th>task<th>model<th>reward, greedy<th>control<th><th>always the most common answer<th>n</tr>"
    problems = "".join(_problem(*pair) for pair in zip(shown["before"], shown["after"], strict=True))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Reinforcement learning</title><style>{STYLE}</style>"
        f"<h1>What the reward has taught</h1><table>{head}{lines}</table>"
        f"<h2>The first held-out problems</h2>{problems}"
        f"<h2>Rollouts of the first model</h2><p>Each row is an answer that was drawn. A token is marked where "
        f"the second model's probability over the first one's lies <code class=low>below {bounds[0]:g}</code> or "
        f"<code class=high>above {bounds[1]:g}</code>.</p>{''.join(groups)}</html>"
    )


def rollouts(worker: RolloutWorker, config: TrainConfig, before: Any, after: Any) -> list[str]:
    """Groups drawn by the first weights, as HTML, marked by the ratio of the second ones to them."""
    rl = settings(config)
    name = next(iter(rl.tasks))
    task = open_task(rl.tasks[name], "validation")
    groups = [worker.begin(name, i, task[i], rl.rollout.samples, config.seed) for i in range(min(GROUPS, len(task)))]
    worker.set_params(before, 0)
    worker.draw(groups)
    worker.set_params(after, 1)
    scored = worker.score(groups)
    return [_group(worker, group, logp, bounds_of(rl.policy)) for group, logp in zip(groups, scored, strict=True)]


def bounds_of(policy: PolicyConfig) -> tuple[float, float]:
    """The ratios beyond which the loss may drop a token."""
    return (1 - policy.low, 1 + policy.high) if policy.loss in ("ppo", "gspo") else (policy.alpha, policy.beta)


def _group(worker: RolloutWorker, group: PendingGroup, logp: Sequence[np.ndarray], bounds: tuple[float, float]) -> str:
    rewards = [group.problem.reward(worker.text(answer)) for answer in group.answers]
    lines = []
    for answer, now, reward, advantage in zip(group.answers, logp, rewards, shaping.advantages(rewards), strict=True):
        tokens = []
        for token, old, new in zip(answer.tokens, answer.logp, now, strict=True):
            ratio = math.exp(min(float(new) - old, 80.0))
            mark = "low" if ratio < bounds[0] else "high" if ratio > bounds[1] else ""
            text = html.escape(worker.tokenizer.decode([token]))
            tokens.append(f'<code class="{mark}" title="probability x {ratio:.3g}">{text}</code>')
        lines.append(
            f"<tr><td>{''.join(tokens)}<td class=n>{reward:.2f}<td class=n>{advantage:+.2f}<td>{answer.finish}</tr>"
        )
    head = "<tr><th>tokens<th>reward<th>advantage<th>end</tr>"
    truth = html.escape(str(group.problem.truth))
    return (
        f"<div class=p>{_image_tags(_images(group.problem))}<div><div class=q>{html.escape(_question(group.problem))} "
        f"({truth})</div><table>{head}{''.join(lines)}</table></div></div>"
    )


def _problem(before: Sample, after: Sample) -> str:
    answers = "".join(
        f"<div class={'ok' if s.correct else 'no'}>{name}: <code>{html.escape(s.answer) or '&nbsp;'}</code></div>"
        for name, s in zip(NAMES, (before, after), strict=True)
    )
    return (
        f"<div class=p>{_image_tags(after.media)}<div><div class=q>{html.escape(after.question)} "
        f"({html.escape(after.gold)})</div>{answers}</div></div>"
    )


def _question(problem: Problem) -> str:
    return "".join(part.text for part in problem.parts if isinstance(part, Text)).strip()


def _images(problem: Problem) -> list[np.ndarray]:
    return [np.asarray(part.image) for part in problem.parts if isinstance(part, Image)]


def _image_tags(images: Sequence[np.ndarray]) -> str:
    out = []
    for image in images:
        file = io.BytesIO()
        PILImage.fromarray(image).save(file, "png")
        out.append(f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">')
    return "".join(out)


def compare(before: str, after: str, limit: int) -> tuple[dict[str, list[Row]], str]:
    """(rows by NAMES, the page) of two workdirs; the later one has the tasks.

    Raises ConfigError, OSError, ValueError for a folder that is no such workdir.
    """
    mesh = sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
    config, weights = checkpoint.load(after, mesh=mesh)
    rl = settings(config)
    worker = RolloutWorker(config, rl.rollout, rl.policy.temperature)
    params = {"before": checkpoint.load(before, mesh=mesh)[1], "after": weights}
    rows: dict[str, list[Row]] = {}
    shown: dict[str, list[Sample]] = {name: [] for name in NAMES}
    for name in NAMES:
        rows[name] = evaluate(worker, params[name], config, ("all",), limit, samples=shown[name])
    groups = rollouts(worker, config, params["before"], params["after"])
    return rows, page(rows, shown, groups, bounds_of(rl.policy))


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("before", "runs/rl_sft", "Workdir of the model before.")
    flags.DEFINE_string("after", "runs/rl_count", "Workdir of the run of reinforcement learning.")
    flags.DEFINE_string("out", "", "Folder of the results; default: that of --after.")
    flags.DEFINE_integer("limit", 512, "Held-out problems a task.", lower_bound=2)


def main(argv: Sequence[str]) -> None:
    """Runs the command line; exits with a message and status 1 when it cannot."""
    f = flags.FLAGS
    if len(argv) > 1:
        raise SystemExit(f"error: unexpected argument {argv[1]!r}   (--help for more)")
    cli.enable_compilation_cache()
    try:
        rows, text = compare(f.before, f.after, f.limit)
    except (ConfigError, ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    table = Table("task", "model", "reward, greedy", "control", "constant answer", "n")
    for name in NAMES:
        for r in rows[name]:
            score, control = f"{r.score:.3f} ± {r.stderr:.3f}", f"{r.control:.3f} ({r.control_name})"
            table.add_row(r.task, name, score, control, f"{r.chance:.3f}", str(r.n))
    Console().print(table)
    out = epath.Path(f.out or f.after)
    out.mkdir(parents=True, exist_ok=True)
    found = {name: [dataclasses.asdict(r) for r in rows[name]] for name in NAMES}
    (out / "rl.json").write_text(json.dumps(found, indent=1))
    (out / "rl.html").write_text(text)
    print(f"{out / 'rl.html'}: problems before and after, and rollouts")


if __name__ == "__main__":
    define_flags()
    app.run(main)
