"""PARL at small scale: which auxiliary rewards make an orchestrator parallel, and what parallelism buys in steps.

Source: Kimi K2.5 report (arXiv 2602.02276), sections 6.2 to 6.4, figure 8; docs/rl.md section 11.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.agent_swarm import context, figures
from experiments.config import settings_of
from experiments.harness import Claim, Experiment, ResultsTable, Score, Verdict, better, judge, locked
from kimi_jax import config as c
from kimi_jax.data.vocabulary import tokenizer_for
from kimi_jax.train.log import read_rows

DATA = Path("runs/experiments/agent_swarm/data")
CORPUS = DATA / "orchestrator"  # documents, and the conversations that the first start is trained on
START = DATA / "start"  # workdir of the supervised model that runs begin with
FEW = DATA / "few_start"  # of one that has seen few tasks assigned at the same time
SERIAL = DATA / "serial_start"  # of one that has hardly seen any
SMOKE_START = DATA / "smoke"  # a few steps
# share of a start's conversations that assign tasks at the same time
PARALLEL = {str(START): 0.3, str(FEW): 0.15, str(SERIAL): 0.05}
FAMILIES = ("wide", "chain", "mixed")
LIMITS = (4, 6, 8, 10, 12, 14, 18)  # critical steps of a run, for the curve of accuracy against latency
WEAK, STRONG = 0.6, 1.0  # share of the briefs that subagents are up to
TARGET = 0.5  # item F1 at which critical steps are compared
QUESTIONS, SMOKE = 96, 3  # held-out questions a family; steps of the smoke runs, which ask fewer
LAST = 10  # iterations at the end of training over which its measures are averaged


def conversations(workdir: str) -> Path:
    """Folder of the conversations that a start is trained on."""
    return {str(FEW): DATA / "few", str(SERIAL): DATA / "serial"}.get(workdir, CORPUS)


def start(workdir: str) -> c.TrainConfig:
    """The supervised run before configs/rl/orchestrate.py; a few steps of it for the smoke runs."""
    config = settings_of("rl/orchestrate_sft.py")
    path = conversations(workdir) / "conversations.jsonl"
    source = dataclasses.replace(config.data.sources["conversations"], path=str(path))
    data = dataclasses.replace(config.data, sources={"conversations": source}, tokenizer=str(DATA / "tokenizer.json"))
    steps = SMOKE if workdir == str(SMOKE_START) else config.steps
    return dataclasses.replace(config, workdir=workdir, steps=steps, data=data)


def base(iterations: int = 40, start: Path = START) -> c.TrainConfig:
    """configs/rl/orchestrate.py from this experiment's start, its auxiliary rewards annealed over three quarters."""
    config = settings_of("rl/orchestrate.py")
    assert config.rl is not None and config.rl.orchestrator is not None
    orchestrator = dataclasses.replace(
        config.rl.orchestrator, corpus=str(CORPUS / "corpus"), anneal=max(1, 3 * iterations // 4)
    )
    return dataclasses.replace(
        config,
        steps=iterations,
        init_from=c.InitFromConfig(path=str(start)),
        data=dataclasses.replace(config.data, tokenizer=str(DATA / "tokenizer.json")),
        checkpoint=c.CheckpointConfig(interval=0, keep=1),
        eval=c.EvalConfig(),
        rl=dataclasses.replace(config.rl, orchestrator=orchestrator),
    )


PARL = "rl.orchestrator."
OUTCOME = {PARL + "lambda_parallel": 0.0, PARL + "lambda_finish": 0.0}
ROWS: dict[str, Mapping[str, Any]] = {
    "start": {},
    "outcome": OUTCOME,
    "annealed": {},
    "constant": {PARL + "anneal": 0},
    "naive": {PARL + "anneal": 0, PARL + "reward_useless": True},
    "naive_annealed": {PARL + "reward_useless": True},
    "weak": {PARL + "reliability": ((0, WEAK),)},
    "serial_start": {"init_from.path": str(SERIAL)},
    "serial_outcome": {"init_from.path": str(SERIAL), **OUTCOME},
    "serial_annealed": {"init_from.path": str(SERIAL)},
    "few_start": {"init_from.path": str(FEW)},
    "few_outcome": {"init_from.path": str(FEW), **OUTCOME},
    "few_annealed": {"init_from.path": str(FEW)},
    "few_strong": {"init_from.path": str(FEW), PARL + "lambda_parallel": 2.0},
    "naive_strong": {PARL + "anneal": 0, PARL + "reward_useless": True, PARL + "lambda_parallel": 2.0},
}


def prepare(config: c.TrainConfig) -> None:
    """Writes the corpus and the conversations and trains the supervised model, once; other processes wait."""
    from kimi_jax.agents import orchestration
    from kimi_jax.train import loop

    with locked(DATA / "lock"):
        for workdir in (str(START), config.init_from.path):
            if not (conversations(workdir) / "conversations.jsonl").exists():
                orchestration.write(conversations(workdir), parallel=PARALLEL[workdir])
        first, supervised = start(str(START)), start(config.init_from.path)
        tokenizer_for(first, first.data.tokenizer, first.model.vocab_size)  # one for all starts
        if loop.run(supervised):
            raise RuntimeError(f"the supervised run in {supervised.workdir} did not come to its end")


# ------------------------------------------------------------------------------------------------------------- measures


def measure(workdir: Path) -> dict[str, tuple[float, int]]:
    """Held-out runs with the final weights, under every limit of critical steps; and the log of the training."""
    from kimi_jax.rl.orchestrator import OrchestratorWorker
    from kimi_jax.train import adapters

    config, params, _ = adapters.load_run(str(workdir))
    if config.rl is None:  # the supervised start: with the settings of what follows
        config = dataclasses.replace(base(), workdir=config.workdir)
    assert config.rl is not None
    worker = OrchestratorWorker(config, config.rl)
    worker.set_params(params, 0)
    found = held_out(worker, config.rl.tasks, QUESTIONS if config.steps > SMOKE else 4)
    worker.close()
    rows = read_rows(workdir / "metrics.jsonl")
    return {**found, **(of_log(rows) if "r_parallel" in rows[-1].get("data", {}) else {})}


def held_out(worker: Any, tasks: Mapping[str, c.TaskConfig], limit: int) -> dict[str, tuple[float, int]]:
    """Item F1, critical steps, width and subagents a family; with weak subagents; under each limit of critical steps,
    beside a script that assigns one task in a turn."""
    from kimi_jax.rl.orchestrator import means

    found: dict[str, tuple[float, int]] = {}
    for family in FAMILIES:
        questions = worker.open_task(tasks[family], "validation")
        asked = [questions[i] for i in range(limit)]
        for name, reliability in (("", STRONG), ("weak/", WEAK)):
            for metric, value in means(worker.answer(asked, reliability)).items():
                found[f"{name}{family}/{metric}"] = value, limit
        for steps in LIMITS:
            for name, runs in (("policy", worker.answer(asked, STRONG, steps)),
                               ("serial", worker.one_by_one(asked, steps))):  # fmt: skip
                found[f"limit_{steps}/{family}/{name}"] = means(runs)["item_f1"], limit
    for metric in ("item_f1", "critical_steps", "subagents"):
        for name in ("", "weak/"):
            found[f"{name}{metric}"] = float(np.mean([found[f"{name}{f}/{metric}"][0] for f in FAMILIES])), limit
    return found


def of_log(rows: list[dict[str, Any]]) -> dict[str, tuple[float, int]]:
    """Of the training: means over its last iterations, and the detectors' verdicts on the whole of it."""
    from kimi_jax.agents import detectors

    data = [row["data"] for row in rows]
    names = ("r_parallel", "r_finish", "collapsed", "no_gain", "unused", "duplicate", "on_chains", "subagents")
    found = {f"train/{name}": float(np.mean([d[name] for d in data[-LAST:]])) for name in names}
    rises = [detectors.rise([d[name] for d in data]) for name in ("r_parallel", "r_finish", "item_f1")]
    useless = max(found[f"train/{name}"] for name in ("no_gain", "unused", "duplicate", "on_chains"))
    found |= {
        "train/spurious": float(detectors.pays(*rises) and useless > 0.5),
        "train/serial": float(found["train/collapsed"] > 0.5),
    }
    return {name: (value, len(rows)) for name, value in found.items()}


def steps_to(table: ResultsTable, row: str, seed: int, family: str, column: str, target: float = TARGET) -> float:
    """Critical steps at which item F1 reaches the target, between two limits by a straight line; infinite if it does
    not within the largest."""
    values = [table.values(row, f"limit_{limit}/{family}/{column}").get(seed, 0.0) for limit in LIMITS]
    for i, value in enumerate(values):
        if value >= target:
            if i == 0:
                return float(LIMITS[0])
            low, high = LIMITS[i - 1], LIMITS[i]
            return low + (high - low) * (target - values[i - 1]) / (value - values[i - 1])
    return float("inf")


def reduction(row: str, family: str) -> Any:
    """Claim that the serial script needs more critical steps for the same item F1: the ratio is above 1.

    A policy that does not reach the target counts 0; a script that does not counts as if it did at the largest limit.
    """

    def judged(table: ResultsTable) -> Verdict:
        seeds = table.seeds(row)
        serial = [min(steps_to(table, row, seed, family, "serial"), float(LIMITS[-1])) for seed in seeds]
        policy = [steps_to(table, row, seed, family, "policy") for seed in seeds]
        return judge([s / p for s, p in zip(serial, policy, strict=True)], 1.0)

    return judged


EXPERIMENT = Experiment(
    name="agent_swarm",
    question="When does an orchestrator learn to work in parallel, and what does that buy?",
    source="Kimi K2.5 report (arXiv 2602.02276), sections 6.2 to 6.4, figure 8",
    setting=(
        "A K2.5-shaped model of 1.0 million parameters assigns the lines of a question to scripted subagents that "
        "search and read the World Factbook, by the real runtime of the swarm (docs/rl.md section 11), and cites the "
        "rows that came back. Runs begin with the same supervised model, of whose 3,000 conversations 30 % "
        "assign tasks at the same time; then 40 iterations of 8 questions with 8 runs each. `outcome` has no auxiliary "
        "reward; `annealed` has r_parallel (0.3) and r_finish (0.2), which fall to zero over 30 iterations; `constant` "
        "keeps them; `naive` keeps them and counts subagents whose results are never used, `naive_annealed` counts "
        f"those too and anneals; `weak` is annealed, with subagents that are up to {WEAK:.0%} of their briefs. "
        "Questions name four countries (wide), two of which one is a neighbour of the other (chain), or both (mixed). "
        "Seeds change the questions and what is drawn. Two claims are judged by the share of subagents whose result is "
        "not used, which was chosen after the runs: the detectors' largest sign, which they were to be judged by, is "
        "mostly the share without a gain in steps, and a chain that is rightly done in order has no other. With weak "
        "subagents that share counts those that found nothing. Frozen subagents are scripts; trainable ones are not "
        "part of this experiment."
    ),
    base={"smoke": lambda: base(SMOKE, SMOKE_START), "cpu": base},
    rows=ROWS,
    seeds=(0, 1, 2),
    untrained=("start", "serial_start", "few_start"),
    scores=(
        *(Score(f"{family}/item_f1", f"item F1, {family}", True) for family in FAMILIES),
        Score("weak/item_f1", f"item F1, subagents {WEAK:.0%}", True),
        Score("critical_steps", "critical steps", False, digits=1),
        Score("subagents", "subagents a run", False, digits=1),
        Score("train/collapsed", "wide, one after the other", False),
        Score("train/unused", "results that are not used", False),
        Score("train/serial", "serial collapse", False, digits=2),
        Score("train/spurious", "spurious parallelism", False, digits=2),
    ),
    claims=(
        Claim("Annealed auxiliary rewards raise item F1 over the start", better("item_f1", "annealed", "start")),
        Claim("They end with a higher item F1 than the outcome alone", better("item_f1", "annealed", "outcome")),
        Claim(
            "The outcome alone works on wide questions one after the other more often",
            better("train/collapsed", "annealed", "outcome", lower=True),
        ),
        Claim(
            "A reward that counts every subagent leaves more results unused than one that counts used ones",
            better("train/unused", "naive", "constant"),
        ),
        Claim("Annealing takes those away", better("train/unused", "naive_annealed", "naive", lower=True)),
        Claim(
            "From a start with 15 % in parallel, the outcome alone ends in serial collapse more often than with "
            "annealed rewards",
            better("train/collapsed", "few_annealed", "few_outcome", lower=True),
        ),
        Claim(
            "From that start, an annealed r_parallel with the weight 2 ends in it less often than the outcome alone",
            better("train/collapsed", "few_strong", "few_outcome", lower=True),
        ),
        Claim(
            "And answers in fewer critical steps",
            better("critical_steps", "few_strong", "few_outcome", lower=True),
        ),
        Claim(
            "From a start with 5 % too, annealed rewards of the usual weight end in it less often",
            better("train/collapsed", "serial_annealed", "serial_outcome", lower=True),
        ),
        Claim(
            "A naive reward that outweighs the outcome leaves more results unused than one that counts used ones",
            better("train/unused", "naive_strong", "constant"),
        ),
        Claim(
            f"For item F1 {TARGET} on wide questions, a script that works one after the other needs more critical "
            "steps than the annealed policy (ratio above 1, by straight lines between the limits; the report finds "
            "3 to 4.5)",
            reduction("annealed", "wide"),
        ),
        Claim("On mixed questions too", reduction("annealed", "mixed")),
        Claim(
            "Trained with weak subagents, it is better with weak ones than what was trained with able ones",
            better("weak/item_f1", "weak", "annealed"),
        ),
        Claim("It is worse with able ones", better("item_f1", "annealed", "weak")),
    ),
    prepare=prepare,
    measure=measure,
    plots=lambda table, folder: figures.draw(table, folder, LIMITS),
    captions=figures.CAPTIONS,
    notes=context.section(read_rows(context.RESULTS)),
)  # fmt: skip
