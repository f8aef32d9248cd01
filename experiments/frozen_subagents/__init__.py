"""Frozen or trainable subagents: is a swarm that is trained end to end worse, or less stable?

Source: Kimi K2.5 report (arXiv 2602.02276), section 6.2, which freezes subagents to avoid ambiguous credit assignment
and unstable training; docs/rl.md section 12.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.config import settings_of
from experiments.frozen_subagents import figures
from experiments.harness import Claim, Experiment, Score, better, locked
from kimi_jax import config as c
from kimi_jax.data.vocabulary import tokenizer_for
from kimi_jax.train.log import read_rows

DATA = Path("runs/experiments/frozen_subagents/data")
SWARM = DATA / "orchestrator"  # documents, and the conversations that the start is trained on
START = DATA / "start"  # workdir of the supervised model that every run begins with
FAMILIES = ("wide", "chain", "mixed")
ITERATIONS, SMOKE = 24, 3
PROMPTS, SAMPLES = 4, 8
QUESTIONS = 64  # held-out questions a family; the smoke runs ask fewer
AVERAGED = 5  # iterations of a running mean, over which rises and falls are measured


def start(workdir: str) -> c.TrainConfig:
    """The supervised run, on conversations of orchestrators and of subagents; a few steps of it for the smoke runs."""
    config = settings_of("rl/orchestrate_sft.py")
    source = dataclasses.replace(config.data.sources["conversations"], path=str(SWARM / "conversations.jsonl"))
    data = dataclasses.replace(config.data, sources={"conversations": source}, tokenizer=str(DATA / "tokenizer.json"))
    steps = config.steps if workdir == str(START) else SMOKE
    return dataclasses.replace(config, workdir=workdir, steps=steps, data=data)


def base(iterations: int = ITERATIONS, start: Path = START) -> c.TrainConfig:
    """configs/rl/orchestrate.py from this experiment's start, with fewer questions an iteration, frozen subagents."""
    config = settings_of("rl/orchestrate.py")
    assert config.rl is not None and config.rl.orchestrator is not None
    orchestrator = dataclasses.replace(
        config.rl.orchestrator, corpus=str(SWARM / "corpus"), anneal=max(1, 3 * iterations // 4), subagents="frozen"
    )
    rollout = dataclasses.replace(config.rl.rollout, prompts=PROMPTS, samples=SAMPLES)
    return dataclasses.replace(
        config,
        steps=iterations,
        init_from=c.InitFromConfig(path=str(start)),
        data=dataclasses.replace(config.data, tokenizer=str(DATA / "tokenizer.json"), rows_per_pack=PROMPTS * SAMPLES),
        checkpoint=c.CheckpointConfig(interval=0, keep=1),
        eval=c.EvalConfig(),
        rl=dataclasses.replace(config.rl, rollout=rollout, orchestrator=orchestrator),
    )


ROWS: dict[str, Mapping[str, Any]] = {
    "start": {},
    "frozen": {},
    # as many tokens again, those of the subagents, are trained on
    "trained": {"rl.orchestrator.subagents": "trained", "data.rows_per_pack": 2 * PROMPTS * SAMPLES},
}


def prepare(config: c.TrainConfig) -> None:
    """Writes the corpus and the conversations and trains the supervised model, once; other processes wait."""
    from kimi_jax.agents import orchestration
    from kimi_jax.train import loop

    with locked(DATA / "lock"):
        if not (SWARM / "conversations.jsonl").exists():
            orchestration.write(SWARM, subagents=True)
        supervised = start(config.init_from.path)
        tokenizer_for(supervised, supervised.data.tokenizer, supervised.model.vocab_size)
        if loop.run(supervised):
            raise RuntimeError(f"the supervised run in {supervised.workdir} did not come to its end")


# ------------------------------------------------------------------------------------------------------------- measures


def measure(workdir: Path) -> dict[str, tuple[float, int]]:
    """Held-out runs of the final weights with the subagents of their training, and with those of the other row; and the
    log of the training."""
    from kimi_jax.train import adapters

    config, params, _ = adapters.load_run(str(workdir))
    trained = config.rl is not None
    if not trained:  # the supervised start: with the settings of what follows
        smoke = config.steps <= SMOKE
        config = dataclasses.replace(base(SMOKE if smoke else ITERATIONS, workdir), workdir=config.workdir)
    assert config.rl is not None and config.rl.orchestrator is not None
    limit = QUESTIONS if config.steps > SMOKE else 2
    own = config.rl.orchestrator.subagents
    found = held_out(config, params, own, "", limit)
    if trained:
        found |= held_out(config, params, "frozen" if own == "trained" else "trained", "swapped/", limit)
        found |= of_log(read_rows(workdir / "metrics.jsonl"))
    return found


def held_out(config: c.TrainConfig, params: Any, subagents: str, name: str, limit: int) -> dict[str, tuple[float, int]]:
    """Item F1 a family and over all, with the most probable turns; shares of subagents with the right row, and with
    none. Names begin with `name`."""
    from kimi_jax.rl.orchestrator import OrchestratorWorker, means

    assert config.rl is not None and config.rl.orchestrator is not None
    orchestrator = dataclasses.replace(config.rl.orchestrator, subagents=subagents)
    worker = OrchestratorWorker(config, dataclasses.replace(config.rl, orchestrator=orchestrator))
    worker.set_params(params, 0)
    runs = {}
    for family in FAMILIES:
        questions = worker.open_task(config.rl.tasks[family], "validation")
        runs[family] = worker.answer([questions[i] for i in range(limit)])
    worker.close()
    found = {f"{name}{family}/item_f1": means(each)["item_f1"] for family, each in runs.items()}
    found |= {f"{name}{metric}": value for metric, value in means([r for each in runs.values() for r in each]).items()}
    return {task: (value, limit) for task, value in found.items()}


def of_log(rows: list[dict[str, Any]]) -> dict[str, tuple[float, int]]:
    """Of the training: the largest fall of item F1, and the last entropies, of means over AVERAGED iterations."""
    curves = {
        metric: running_mean([row["data"][metric] for row in rows], AVERAGED)
        for metric in ("item_f1", "no_row", "right_row", "entropy", "subagent_entropy")
    }
    found = {f"train/{metric}": float(curve[-1]) for metric, curve in curves.items()}
    found["train/fall"] = largest_fall(curves["item_f1"])
    found |= {f"curve/{i}": float(value) for i, value in enumerate(curves["item_f1"])}
    return {name: (value, len(rows)) for name, value in found.items()}


def running_mean(values: list[float], width: int) -> np.ndarray:
    """Means over `width` values in a row, or over all where there are fewer."""
    width = min(width, len(values))
    return np.convolve(values, np.full(width, 1 / width), mode="valid")


def largest_fall(values: np.ndarray) -> float:
    """The most by which a value lies below an earlier one."""
    return float(np.max(np.maximum.accumulate(values) - values))


EXPERIMENT = Experiment(
    name="frozen_subagents",
    question="Does training the subagents too help or harm?",
    source="Kimi K2.5 report (arXiv 2602.02276), section 6.2",
    setting=(
        "A K2.5-shaped model of 1.0 million parameters plays both parts, told apart by the system prompt: the "
        "orchestrator of [agent_swarm](../agent_swarm/README.md), and each subagent, which gets a brief, searches the "
        "World Factbook (a result is the area and the borders of one country), and answers with a row or with `none` "
        "(docs/rl.md section 12). The supervised start has learned from 3,000 scripted conversations of each part, in "
        f"which subagents find nothing for 10 % of the briefs. Then {ITERATIONS} iterations of {PROMPTS} questions "
        f"with {SAMPLES} runs each, auxiliary rewards annealed over three quarters. `frozen`: subagents are drawn by "
        "the weights of the start, and their tokens are observations with loss mask 0. `trained`: they are drawn by "
        "the policy, their tokens have loss mask 1 and the advantage of the whole run. Both rows see the same "
        "questions. Held-out questions are answered with the most probable turns, by the subagents of the training; "
        "*swapped* means by those of the other row: the start's for `trained`, the policy's for `frozen`. A fall is "
        f"that of item F1 in training, averaged over {AVERAGED} iterations, below an earlier value. Entropies are "
        "mean surprises of the sampled tokens at the end of training, in nats. The model is small, its task has "
        "one right row for each brief, and 24 iterations are few: what the report avoids may need longer training. "
        "Seen after the runs: the share of right rows rises by about as much as the share without a row falls, so most "
        "of what trained subagents gain may be that they unlearn to give up, which the conversations of the start "
        "teach them. The rows differ in the number of trained tokens too."
    ),
    base={"smoke": lambda: base(SMOKE, DATA / "smoke"), "cpu": base},
    rows=ROWS,
    seeds=(0, 1, 2),
    untrained=("start",),
    scores=(
        *(Score(f"{family}/item_f1", f"item F1, {family}", True) for family in FAMILIES),
        Score("item_f1", "item F1", True),
        Score("swapped/item_f1", "item F1, swapped", True),
        Score("right_row", "subagents with the right row", True),
        Score("no_row", "subagents without a row", False),
        Score("train/fall", "largest fall", False),
        Score("train/entropy", "entropy, orchestrator", True, digits=4),
        Score("train/subagent_entropy", "entropy, subagents", True, digits=4),
    ),
    claims=(
        Claim("With frozen subagents training raises item F1 over the start", better("item_f1", "frozen", "start")),
        Claim("With trained subagents too", better("item_f1", "trained", "start")),
        Claim("Trained subagents end with a higher item F1 than frozen ones", better("item_f1", "trained", "frozen")),
        Claim("They find the right row more often", better("right_row", "trained", "frozen")),
        Claim(
            "Training them is less stable: item F1 falls further within a run",
            better("train/fall", "trained", "frozen"),
        ),
        Claim(
            "They lose entropy that frozen ones keep",
            better("train/subagent_entropy", "trained", "frozen", lower=True),
        ),
    ),
    prepare=prepare,
    measure=measure,
    plots=figures.draw,
    captions=figures.CAPTIONS,
)
