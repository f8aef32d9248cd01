"""python -m kimi_jax.rl.page --before=runs/rl_sft --after=runs/rl_count: what reinforcement learning has changed.

Held-out problems of the tasks of the later run are answered greedily by both models, with their images and with white
ones. Writes OUT/rl.json with the numbers, and OUT/rl.html: the table, the same problems before and after, and groups of
rollouts as the first model draws them, each with its reward and advantage. Tokens whose probability has changed by more
than the bounds of the run's loss allow are marked: they would have no policy gradient under the weights of the second.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

from kimi_jax import sharding
from kimi_jax.config import MeshConfig, TrainConfig
from kimi_jax.config_rl import PolicyConfig
from kimi_jax.eval import before_after
from kimi_jax.eval.runner import EvalSample, Row
from kimi_jax.rl import shaping
from kimi_jax.rl.episode import transcript
from kimi_jax.rl.evaluate import evaluate, images_of, question_of
from kimi_jax.rl.pending import PendingGroup
from kimi_jax.rl.rollout import settings
from kimi_jax.rl.tasks import open_task
from kimi_jax.rl.types import GIVEN
from kimi_jax.rl.worker import RolloutWorker
from kimi_jax.train import checkpoint

GROUPS = 6  # of rollouts on the page
NAMES = ("before", "after")


def page(
    rows: dict[str, list[Row]], shown: dict[str, list[EvalSample]], groups: Sequence[str], bounds: tuple[float, float]
) -> str:
    """The page. rows, shown: by NAMES. groups: as `rollouts` makes them. bounds: of the ratio of probabilities."""
    table = before_after.table(
        ("task", "model", "reward, greedy", "control", "", "always the most common answer", "n"),
        [
            (r.task, name, f"{r.score:.3f} ± {r.stderr:.3f}", r.control, r.control_name, r.chance, r.n)
            for name in NAMES
            for r in rows[name]
        ],
    )
    problems = "".join(_problem(*pair) for pair in zip(shown["before"], shown["after"], strict=True))
    body = (
        f"{table}<h2>The first held-out problems</h2>{problems}"
        f"<h2>Rollouts of the first model</h2><p>Each row is an answer that was drawn. A token is marked where "
        f"the second model's probability over the first one's lies <code class=low>below {bounds[0]:g}</code> or "
        f"<code class=high>above {bounds[1]:g}</code>; <code class=tool>grey</code> is what a tool gave.</p>"
        f"{''.join(groups)}"
    )
    return before_after.document("Reinforcement learning", "What the reward has taught", body)


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
    rewards = [group.problem.reward(worker.text(group, answer)) for answer in group.answers]
    lines = []
    for answer, now, reward, advantage in zip(group.answers, logp, rewards, shaping.advantages(rewards), strict=True):
        tokens = []
        for token, old, new, version in zip(answer.tokens, answer.logp, now, answer.versions, strict=True):
            text = html.escape(worker.tokenizer.decode([token]))
            if version == GIVEN:  # a tool's result
                tokens.append(f"<code class=tool>{text}</code>")
                continue
            ratio = math.exp(min(float(new) - old, 80.0))
            mark = "low" if ratio < bounds[0] else "high" if ratio > bounds[1] else ""
            tokens.append(f'<code class="{mark}" title="probability x {ratio:.3g}">{text}</code>')
        calls = f"<pre>{html.escape(transcript(answer.calls, ''))}</pre>" if answer.calls else ""
        lines.append(
            f"<tr><td>{''.join(tokens)}{calls}<td class=n>{reward:.2f}<td class=n>{advantage:+.2f}"
            f"<td>{answer.finish}</tr>"
        )
    head = "<tr><th>tokens<th>reward<th>advantage<th>end</tr>"
    problem = group.problem
    table = f"<table>{head}{''.join(lines)}</table>"
    return before_after.question(images_of(problem), question_of(problem), str(problem.truth), table)


def _problem(before: EvalSample, after: EvalSample) -> str:
    shown = [before_after.ShownAnswer(n, s.answer, s.correct) for n, s in zip(NAMES, (before, after), strict=True)]
    return before_after.question(after.media, after.question, after.gold, before_after.answers(shown))


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
    shown: dict[str, list[EvalSample]] = {name: [] for name in NAMES}
    try:
        for name in NAMES:
            rows[name] = evaluate(worker, params[name], config, ("all",), limit, samples=shown[name])
        groups = rollouts(worker, config, params["before"], params["after"])
    finally:
        worker.close()
    return rows, page(rows, shown, groups, bounds_of(rl.policy))


def main(argv: Sequence[str]) -> None:
    """Runs the command line; exits with a message and status 1 when it cannot."""
    f = flags.FLAGS
    rows, text = before_after.compared(argv, compare)
    table = Table("task", "model", "reward, greedy", "control", "constant answer", "n")
    for name in NAMES:
        for r in rows[name]:
            score, control = f"{r.score:.3f} ± {r.stderr:.3f}", f"{r.control:.3f} ({r.control_name})"
            table.add_row(r.task, name, score, control, f"{r.chance:.3f}", str(r.n))
    Console().print(table)
    found = {name: [dataclasses.asdict(r) for r in rows[name]] for name in NAMES}
    path = before_after.write(f.out or f.after, "rl", found, text)
    print(f"{path}: problems before and after, and rollouts")


if __name__ == "__main__":
    before_after.define_flags("runs/rl_sft", "runs/rl_count", 512, "Held-out problems a task.")
    app.run(main)
