"""Muon against AdamW at matched update RMS: tokens to a loss, at four learning rates each.

Source: Moonlight report (arXiv 2502.16982), sections 2.2 and 3.2.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np

from experiments.fusion_timing import model
from experiments.harness import UNDECIDED, Claim, Experiment, ResultsTable, Score, Verdict, judge, locked
from experiments.muon_adamw import figures
from kimi_jax import config as c
from kimi_jax.data.vocabulary import tokenizer_for

DATA = Path("runs/experiments/muon_adamw/data")
RATES = {"2e-3": 2e-3, "4e-3": 4e-3, "8e-3": 8e-3, "1.6e-2": 1.6e-2}
CURVE = "wiki_bpb/bits_per_byte"
EVERY = 5  # steps between two evaluations of held-out text
TARGET = 0.75  # of AdamW's steps: its score then is the one that Muon has to reach
WIDE = {
    "model.hidden_size": 192, "model.intermediate_size": 512, "model.num_attention_heads": 8,
    "model.moe.moe_intermediate_size": 192,
}  # fmt: skip


def base(steps: int = 160) -> c.TrainConfig:
    """A run on text at a constant rate, so that every point of its curve is that of a shorter run."""
    sources = {
        "wiki": c.SourceConfig(path="wiki", weight=8.0),
        "python": c.SourceConfig(path="python"),
        "factbook": c.SourceConfig(path="factbook"),
    }
    return c.TrainConfig(
        steps=steps,
        model=dataclasses.replace(model(), vision=None),
        data=c.DataConfig(
            sources=sources, tokenizer=str(DATA / "tokenizer.json"), sequence_length=1024, rows_per_pack=1,
            num_packs=1, vision_ratio=((0.0, 0.0),), buffer_size=96, num_workers=0,
        ),
        optimizer=c.OptimizerConfig(peak_lr=8e-3, final_lr=0.0, warmup_steps=min(20, steps // 4), decay_fraction=0.0),
        checkpoint=c.CheckpointConfig(interval=max(1, steps // 2), keep=1),
        eval=c.EvalConfig(tasks=("wiki_bpb",), interval=EVERY, limit=12, final_limit=12),
    )  # fmt: skip


def pod() -> c.TrainConfig:
    """The same rows for Moonlight 16B-A3B."""
    from configs.pods import get_config

    return c.freeze(get_config("moonlight_16b_a3b@v5p-512"))


def _row(matrices: str, rate: float, wide: bool = False) -> dict[str, object]:
    at_cpu = {**(WIDE if wide else {}), "optimizer.peak_lr": rate}
    at_pod = {"optimizer.peak_lr": rate / 20, "optimizer.final_lr": 0.0, "optimizer.decay_fraction": 0.0}
    return {"optimizer.matrices": matrices, "cpu": at_cpu, "smoke": at_cpu, "pod": at_pod}


ROWS = {f"{kind}_{name}": _row(kind, rate) for name, rate in RATES.items() for kind in ("muon", "adamw")}
ROWS |= {f"muon_4x_{name}": _row("muon", RATES[name], wide=True) for name in ("4e-3", "8e-3", "1.6e-2")}


def prepare(config: c.TrainConfig) -> None:
    """Trains the tokenizer that all runs read."""
    if Path(config.data.tokenizer) == DATA / "tokenizer.json":
        with locked(DATA / "lock"):
            tokenizer_for(config, config.data.tokenizer, config.model.vocab_size)


# -------------------------------------------------------------------------------------------------------------- claims


def best(table: ResultsTable, prefix: str) -> str | None:
    """The row of a kind with the fewest bits a byte at the end, of those that ran all seeds that any of them ran."""
    rows = [row for row in table.experiment.rows if row.rsplit("_", 1)[0] == prefix and table.seeds(row)]
    most = max((len(table.seeds(row)) for row in rows), default=0)
    means = {r: np.mean(list(table.values(r, CURVE).values())) for r in rows if len(table.seeds(r)) == most}
    return min(means, key=lambda row: means[row]) if means else None


def tokens_ratio(table: ResultsTable) -> dict[int, float]:
    """Seed -> steps that Muon needs for the score that AdamW has after TARGET of its steps, over those steps.

    Each at its best rate. A run of Muon that never gets there counts as if it did with its last step.
    """
    muon, adamw = best(table, "muon"), best(table, "adamw")
    ratios = {}
    for seed in sorted(set(table.seeds(muon)) & set(table.seeds(adamw))) if muon and adamw else []:
        reference, curve = table.curve(adamw, seed, CURVE), table.curve(muon, seed, CURVE)
        step, target = next(point for point in reference if point[0] >= TARGET * reference[-1][0])
        reached = steps_to(curve, target)
        ratios[seed] = (curve[-1][0] if reached is None else reached) / step
    return ratios


def steps_to(curve: list[tuple[int, float]], target: float) -> float | None:
    """The step at which a falling curve first comes down to the target, between its points; None if it never does."""
    for (step, score), (after, then) in itertools.pairwise(curve):
        if then <= target:
            return after if score <= target else step + (after - step) * (score - target) / (score - then)
    return None


def fewer_tokens(table: ResultsTable) -> Verdict:
    """Muon needs fewer tokens: one less the ratio is above 0."""
    return judge([1 - ratio for ratio in tokens_ratio(table).values()])


def rates_transfer(table: ResultsTable) -> Verdict:
    """The best rate of the small model is the best one at four times the size: how much the best other one is worse."""
    small = best(table, "muon")
    rate = small.rsplit("_", 1)[1] if small else ""
    rows = [row for row in ROWS if row.startswith("muon_4x_") and table.seeds(row)]
    if f"muon_4x_{rate}" not in rows or len(rows) < 2:
        return Verdict(UNDECIDED, None)
    own = table.values(f"muon_4x_{rate}", CURVE)
    others = [table.values(row, CURVE) for row in rows if row != f"muon_4x_{rate}"]
    seeds = set(own).intersection(*others)
    return judge([min(other[seed] for other in others) - own[seed] for seed in sorted(seeds)])


EXPERIMENT = Experiment(
    name="muon_adamw",
    question="How many tokens does Muon save over AdamW?",
    source="Moonlight report (arXiv 2502.16982), sections 2.2 and 3.2",
    setting=(
        "The report scales Muon's updates to the RMS that AdamW's have, so that both take the same learning rates, and "
        "finds that Muon needs about half of the tokens. Here that is the language model of the fusion-timing "
        "experiment (0.8 million parameters) on Wikipedia, code and World Factbook, 160 steps of 1,024 tokens, warm-up "
        "and then a constant rate, so that each point of a curve is the end of a shorter run. `optimizer.matrices` "
        "says what updates matrices; embeddings, norms and the rest have AdamW in both. What is "
        "compared is how many tokens Muon needs for the bits a byte that AdamW has after three quarters of its steps, "
        "each at the best of its rates. Rows `4x` are the same at twice the width."
    ),
    base={"smoke": lambda: base(steps=10), "cpu": base, "pod": pod},
    rows=ROWS,
    seeds=(0, 1, 2),
    scores=(Score(CURVE, "Wikipedia bits/byte at the end", False),),
    claims=(
        Claim("Muon needs fewer tokens for the loss that AdamW has after three quarters of its own (difference: the "
              "share of tokens saved)",
              fewer_tokens),
        Claim("The best rate of the small model is the best one at four times the size (difference: bits a byte)",
              rates_transfer),
    ),
    prepare=prepare,
    curves=(CURVE,),
    plots=figures.draw,
    captions=figures.CAPTIONS,
    notes=(
        "The best rate of each optimizer is chosen by the same scores, on the same seeds, that the claims use; with "
        "neighbouring rates this close that favours neither by much, but it is not a held-out choice."
    ),
)  # fmt: skip
