"""Which bounds of a token's probability ratio hold when rollouts are stale: K2.5's, PPO's, GRPO's, none.

Source: Kimi K2.5 report (arXiv 2602.02276), section 5.1, equation 1.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments.config import settings_of
from experiments.harness import Claim, Experiment, Score, better, locked
from experiments.token_clip import figures
from kimi_jax import config as c
from kimi_jax.data.vocabulary import tokenizer_for
from kimi_jax.train.log import read_rows

DATA = Path("runs/experiments/token_clip/data")
START = DATA / "start"  # workdir of the supervised model that every run begins with
SCORE = "count/reward"
STALE, PASSES = 4, 2  # iterations between drawing and training; times that an iteration's groups are trained on


def start() -> c.TrainConfig:
    """The supervised run of make rl-demo, in this experiment's folder."""
    config = settings_of("rl/count_sft.py")
    data = dataclasses.replace(config.data, tokenizer=str(DATA / "tokenizer.json"))
    return dataclasses.replace(config, workdir=str(START), data=data)


def base(iterations: int = 60) -> c.TrainConfig:
    """Counting by reward as in make rl-demo, at half the prompts and twice the rate, from stale rollouts."""
    config = settings_of("rl/count.py")
    assert config.rl is not None
    rollout = dataclasses.replace(config.rl.rollout, prompts=32, max_staleness=STALE, passes=PASSES)
    rows, bins = rollout.prompts * rollout.samples, ((64, rollout.prompts // 4),)
    return dataclasses.replace(
        config,
        steps=iterations * PASSES,
        log_interval=PASSES,
        init_from=c.InitFromConfig(path=str(START)),
        data=dataclasses.replace(
            config.data, tokenizer=str(DATA / "tokenizer.json"), rows_per_pack=rows, vision_bins=bins
        ),
        optimizer=dataclasses.replace(config.optimizer, peak_lr=1e-3, final_lr=1e-3),
        checkpoint=c.CheckpointConfig(interval=0, keep=1),
        eval=c.EvalConfig(tasks=("count",), interval=max(1, iterations // 6) * PASSES, limit=256, final_limit=512),
        rl=dataclasses.replace(config.rl, rollout=rollout),
    )


ROWS: dict[str, Mapping[str, object]] = {
    "k2_5": {},
    "k2_5_fresh": {"rl.rollout.max_staleness": 0},
    "k2_5_narrow": {"rl.policy.alpha": 0.8, "rl.policy.beta": 1.28},
    "k2_5_tau_0": {"rl.policy.tau": 0.0},
    "ppo": {"rl.policy.loss": "ppo", "rl.policy.low": 0.2, "rl.policy.high": 0.28},
    "ppo_wide": {"rl.policy.loss": "ppo", "rl.policy.low": 0.5, "rl.policy.high": 1.0},
    "grpo": {
        "rl.policy.loss": "ppo", "rl.policy.low": 0.2, "rl.policy.high": 0.2, "rl.policy.deviation": True,
    },
    "none": {"rl.policy.loss": "none"},
}  # fmt: skip


def prepare(config: c.TrainConfig) -> None:
    """Trains the tokenizer and the supervised model, once; another process waits for the first."""
    from kimi_jax.train import loop

    with locked(DATA / "lock"):
        supervised = start()
        tokenizer_for(supervised, supervised.data.tokenizer, supervised.model.vocab_size)
        if loop.run(supervised):
            raise RuntimeError(f"the supervised run in {START} did not come to its end")


def measure(workdir: Path) -> dict[str, tuple[float, int]]:
    """The final accuracy; over the run, reward while training, share of masked tokens, drift from the sampler."""
    rows = read_rows(workdir / "metrics.jsonl")
    n = len(rows)
    (final,) = json.loads((workdir / "results.json").read_text())
    return {
        SCORE: (final["score"], final["n"]),
        f"{SCORE}/white image": (final["control"], final["n"]),
        "reward": (float(np.mean([row["data"]["reward_mean"] for row in rows])), n),
        "below": (float(np.mean([row["below"] for row in rows])), n),
        "above": (float(np.mean([row["above"] for row in rows])), n),
        "mismatch_kl": (float(np.mean([row["mismatch_kl"] for row in rows])), n),
        "max_log_ratio": (float(np.max([row["max_log_ratio"] for row in rows])), n),
    }


EXPERIMENT = Experiment(
    name="token_clip",
    question="Which bounds on a token's ratio hold when rollouts are stale?",
    source="Kimi K2.5 report (arXiv 2602.02276), section 5.1, equation 1",
    setting=(
        "K2.5 gives no policy gradient to a token whose probability ratio has left [alpha, beta], whatever the sign of "
        "its advantage, and pulls it back by tau times the squared log-ratio. PPO bounds the ratio on one side only, "
        "the one that the advantage pushes to. Here a model of 0.36 million parameters that counts discs in rendered "
        f"images (`make rl-demo`) goes on by reward: 60 iterations of 32 prompts with 8 answers, {PASSES} passes each, "
        f"rollouts drawn {STALE} iterations before they are trained on (`k2_5_fresh`: in the same iteration), learning "
        "rate 1e-3, twice that of the demo. Answers have three tokens, so sequence effects play no part. Every run "
        "begins with the same supervised model; seeds change the problems and what is drawn."
    ),
    base={"smoke": lambda: base(iterations=3), "cpu": base},
    rows=ROWS,
    seeds=(0, 1, 2),
    scores=(
        Score(SCORE, "accuracy, 512 held-out images", True, control=f"{SCORE}/white image"),
        Score("reward", "reward while training, mean", True),
        Score("below", "masked, ratio below 1", False),
        Score("above", "masked, ratio above 1", False),
        Score("mismatch_kl", "KL(sampler, policy)", False),
        Score("max_log_ratio", "largest log-ratio", False),
    ),
    claims=(
        Claim("Stale rollouts: K2.5's bounds give a higher reward than no bounds", better("reward", "k2_5", "none")),
        Claim("They give a higher reward than PPO's usual ones (0.8, 1.28)", better("reward", "k2_5", "ppo")),
        Claim("They give a higher reward than PPO with bounds of the same width", better("reward", "k2_5", "ppo_wide")),
        Claim("Wide bounds of K2.5 give a higher reward than narrow ones", better("reward", "k2_5", "k2_5_narrow")),
        Claim("tau keeps the policy nearer to its sampler", better("mismatch_kl", "k2_5", "k2_5_tau_0")),
        Claim("Fresh rollouts give a higher reward than stale ones", better("reward", "k2_5_fresh", "k2_5")),
    ),
    prepare=prepare,
    measure=measure,
    curves=(SCORE,),
    plots=figures.draw,
    captions=figures.CAPTIONS,
)  # fmt: skip
