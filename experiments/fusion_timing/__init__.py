"""When vision joins: early, mid or late fusion at identical numbers of vision and text tokens.

Source: Kimi K2.5 report (arXiv 2602.02276), section 2.1, Table 1, and appendix B.1, Figure 9.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from experiments.fusion_timing import figures, scenes
from experiments.harness import Claim, Experiment, ResultsTable, Score, above, better, equivalent, judge, locked
from kimi_jax import config as c
from kimi_jax.data.vocabulary import tokenizer_for
from kimi_jax.train.log import read_rows

DATA = Path("runs/experiments/fusion_timing/data")
SCENES = 4096
EVERY = 4  # steps between two evaluations of held-out text
CURVE = "wiki_bpb/bits_per_byte"
SWITCHES = {50: 0.5, 80: 0.8}  # after these shares of training the text score is looked at for a dip
TOLERANCE = 0.002  # relative difference of token budgets between rows that are compared
MAIN = ("early", "mid", "late")


def model() -> c.ModelConfig:
    """The demo's model, narrower: 0.9 million parameters, one dense and one expert layer."""
    demo = c.preset("demo")
    assert demo.vision and demo.moe and demo.rope_scaling
    return dataclasses.replace(
        demo, hidden_size=96, intermediate_size=256, num_hidden_layers=2, q_lora_rank=None, kv_lora_rank=32,
        qk_nope_head_dim=16, v_head_dim=24, max_position_embeddings=1024,
        rope_scaling=dataclasses.replace(demo.rope_scaling, factor=8.0),
        moe=dataclasses.replace(demo.moe, n_routed_experts=4, moe_intermediate_size=96),
        vision=dataclasses.replace(demo.vision, hidden_size=64, intermediate_size=192),
    )  # fmt: skip


def base(steps: int = 240) -> c.TrainConfig:
    """One run on a core: `steps` of 1,024 tokens, Wikipedia, code and the Factbook beside captioned scenes."""
    sources = {
        "wiki": c.SourceConfig(path="wiki", weight=8.0),
        "python": c.SourceConfig(path="python"),
        "factbook": c.SourceConfig(path="factbook"),
        "scenes": c.SourceConfig(kind="jsonl", path=str(DATA / "scenes.jsonl"), vision=True),
    }
    return c.TrainConfig(
        steps=steps,
        model=model(),
        data=c.DataConfig(
            sources=sources, tokenizer=str(DATA / "tokenizer.json"), sequence_length=1024, rows_per_pack=1,
            num_packs=1, vision_bins=((576, 1),), exact_vision_ratio=True, buffer_size=192, num_workers=0,
        ),
        optimizer=c.OptimizerConfig(peak_lr=8e-3, final_lr=1.6e-4, warmup_steps=min(20, steps // 4),
                                    decay_fraction=0.2),
        checkpoint=c.CheckpointConfig(interval=max(1, steps // 4), keep=1),
        eval=c.EvalConfig(tasks=("wiki_bpb",), interval=EVERY, limit=12, final_limit=12),
    )  # fmt: skip


def pod() -> c.TrainConfig:
    """The same rows for Kimi K2.5 on 1,024 chips: no captioned scenes there, but the run's own sources."""
    from configs.pods import get_config

    config = c.freeze(get_config("kimi_k2_5@v5p-2048"))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, exact_vision_ratio=True))


def _bins(ratio: float) -> dict[str, object]:
    """Bins that hold a vision ratio with room to spare; they decide how fast a step is, and nothing else."""
    cpu = {"data.vision_bins": ((576, {0.0: 1, 0.1: 1, 0.2: 2, 0.5: 5}[ratio]),)}
    packs = {0.0: 1, 0.1: 2, 0.2: 4, 0.5: 9}[ratio]  # of 4096 patches, for four rows of 4,096 tokens
    return {"cpu": cpu, "smoke": cpu, "pod": {"data.vision_bins": ((4096, packs),)}}


def _row(begin: float, ratio: float, **more: object) -> dict[str, object]:
    schedule = ((0.0, ratio),) if begin == 0 else ((0.0, 0.0), (begin, ratio))
    return {"data.vision_ratio": schedule, **_bins(ratio), **more}


ROWS = {
    "early": _row(0.0, 0.1),
    "mid": _row(0.5, 0.2),
    "late": _row(0.8, 0.5),
    "text_only": {
        "data.vision_ratio": ((0.0, 0.0),), "cpu": {"steps": 216, **_bins(0.0)["cpu"]}, "smoke": {"steps": 7},
    },
    "early_constant_rate": _row(0.0, 0.1, **{"optimizer.decay_fraction": 0.0}),
    "late_constant_rate": _row(0.8, 0.5, **{"optimizer.decay_fraction": 0.0}),
    "mid_10": _row(0.5, 0.1),
    "late_10": _row(0.8, 0.1),
    "late_20": _row(0.8, 0.2),
}  # fmt: skip


def prepare(config: c.TrainConfig) -> None:
    """Writes the scenes and the tokenizer that all runs read, and knows the tasks."""
    scenes.register_tasks()
    if Path(config.data.tokenizer) == DATA / "tokenizer.json":
        with locked(DATA / "lock"):
            scenes.write(DATA, SCENES)
            tokenizer_for(config, config.data.tokenizer, config.model.vocab_size)


def measure(workdir: Path) -> dict[str, tuple[float, int]]:
    """Token counters of the run's end, and the dip of held-out text after each of SWITCHES."""
    data = read_rows(workdir / "metrics.jsonl")[-1]["data"]
    steps = read_rows(workdir / "metrics.jsonl")[-1]["step"]
    found = {"vision_tokens": (float(data["vision_tokens"]), 1)}
    found["text_tokens"] = (float(data["tokens"] - data["vision_tokens"]), 1)
    curve = [
        (line["step"], row["score"])
        for line in read_rows(workdir / "eval.jsonl")
        for row in line["rows"]
        if f"{row['task']}/{row['metric']}" == CURVE
    ]
    for name, share in SWITCHES.items():
        if dipped := dip(sorted(curve), round(share * steps)):
            found[f"dip_{name}"], found[f"recovery_{name}"] = (dipped[0], 1), (dipped[1], 1)
    return found


def dip(curve: list[tuple[int, float]], switch: int) -> tuple[float, float] | None:
    """(depth, length) of a dip in (step, bits per byte): the worst score after the switch less the one at it, and the
    steps until the score is back; a dip that lasts to the end has the length of what is left. None without both sides.
    """
    before = [score for step, score in curve if step <= switch]
    after = [(step, score) for step, score in curve if step > switch]
    if not before or not after:
        return None
    level = before[-1]
    depth = max(score for _, score in after) - level
    above_level = [step for step, score in after if score > level]
    back = [step for step, score in after if not above_level or step > above_level[-1]]
    end = back[0] if back else after[-1][0]
    return depth, float(end - switch) if above_level else 0.0


def check(table: ResultsTable) -> list[str]:
    """Raises ValueError if the token budgets of the three main rows differ by TOLERANCE or more."""
    lines = []
    for name in ("vision_tokens", "text_tokens"):
        found = [v for row in MAIN for v in table.values(row, name).values()]
        if not found:
            continue
        spread = (max(found) - min(found)) / max(found)
        if spread >= TOLERANCE:
            raise ValueError(f"{name} of {', '.join(MAIN)} differ by {spread:.2%}, more than {TOLERANCE:.1%}")
        lines.append(
            f"Budgets, from the runs' own counters: {name.replace('_', ' ')} of {', '.join(MAIN)} over all seeds lie "
            f"between {min(found):,.0f} and {max(found):,.0f}, a difference of {spread:.3%} (allowed: {TOLERANCE:.1%})."
        )
    return lines


# -------------------------------------------------------------------------------------------------------------- claims

VISION = ("scene_colour", "scene_shape", "scene_relation")
SEEN = "mean accuracy on colour, shape and relation"


def vision(table: ResultsTable, row: str) -> dict[int, float]:
    """Seed -> mean accuracy over the tasks of VISION, which weigh the same."""
    each = [table.values(row, f"{task}/accuracy") for task in VISION]
    return {seed: sum(values[seed] for values in each) / len(each) for seed in each[0]}


def sees_better(row: str, than: str):
    """Claim on the mean of the vision tasks, paired over seeds."""

    def judged(table: ResultsTable):
        a, b = vision(table, row), vision(table, than)
        return judge([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())])

    return judged


CLAIMS = (
    Claim(f"Early fusion at 10:90 sees better than mid fusion at 20:80 ({SEEN})", sees_better("early", "mid")),
    Claim(f"Early fusion at 10:90 sees better than late fusion at 50:50 ({SEEN})", sees_better("early", "late")),
    Claim("Early fusion has fewer bits a byte of held-out Wikipedia than mid fusion",
          better("wiki_bpb/bits_per_byte", "early", "mid", lower=True)),
    Claim("Early fusion has fewer bits a byte of held-out Wikipedia than late fusion",
          better("wiki_bpb/bits_per_byte", "early", "late", lower=True)),
    Claim("Early and late fusion differ by less than 0.02 bits a byte of held-out Wikipedia",
          equivalent("wiki_bpb/bits_per_byte", "early", "late", 0.02)),
    Claim("Text dips when vision joins at 80 %: a deeper dip there in late than in early fusion, which has no switch",
          better("dip_80", "late", "early")),
    Claim("Text dips when vision joins at 50 %: a deeper dip there in mid than in early fusion, which has no switch",
          better("dip_50", "mid", "early")),
    Claim("The dip of late fusion is one in itself: held-out bits a byte rise above those at the switch",
          above("dip_80", "late", 0.0)),
    Claim("Late fusion dips at a constant learning rate too, so that the decay is not what makes the dip",
          better("dip_80", "late_constant_rate", "early_constant_rate")),
    Claim(f"At a ratio of 10:90, joining at the start sees better than joining at 50 % ({SEEN}; less vision in all)",
          sees_better("early", "mid_10")),
    Claim(f"From 80 % on, a ratio of 50:50 sees better than 20:80 ({SEEN}; more vision in all)",
          sees_better("late", "late_20")),
    Claim("Early fusion costs no text: fewer than 0.02 bits a byte from a run on the same text tokens alone",
          equivalent("wiki_bpb/bits_per_byte", "early", "text_only", 0.02)),
)  # fmt: skip


def _accuracy(task: str, label: str) -> Score:
    return Score(f"{task}/accuracy", label, True, f"{task}/accuracy/blank image", digits=2)


EXPERIMENT = Experiment(
    name="fusion_timing",
    question="When should vision join pre-training?",
    source="Kimi K2.5 report (arXiv 2602.02276), section 2.1, Table 1, and appendix B.1, Figure 9",
    setting=(
        "The report varies when vision tokens join and at which ratio to text, with the totals of both fixed: "
        "early (0 %, 10:90), mid (50 %, 20:80) and late (80 %, 50:50). Here that is a model of 0.9 million "
        "parameters, 240 steps of 1,024 tokens, Muon with warm-up, constant rate and decay over the last fifth; "
        "Wikipedia, standard-library code and World Factbook beside captioned scenes that are rendered (two "
        "coloured shapes and where they stand, or a printed digit). Vision tokens are exact by construction "
        "(`data.exact_vision_ratio`), text tokens fill the rest of the rows. Beyond the report: both factors "
        "alone (`mid_10`, `late_10`, `late_20` have *less* vision in all), a constant learning rate, because the "
        "late switch falls together with the decay, and a run on the same text without vision. Held-out text is "
        "scored every 4 steps."
    ),
    base={"smoke": lambda: base(steps=8), "cpu": base, "pod": pod},
    rows=ROWS,
    seeds=(0, 1, 2, 3, 4),
    scores=(
        _accuracy("scene_colour", "colour"),
        _accuracy("scene_shape", "shape"),
        _accuracy("scene_relation", "relation"),
        _accuracy("scene_digit", "printed digit"),
        Score("wiki_bpb/bits_per_byte", "Wikipedia bits/byte", False),
        Score("factbook_bpb/bits_per_byte", "Factbook bits/byte", False),
        Score("python_bpb/bits_per_byte", "code bits/byte", False),
        Score("dip_50", "dip after 50 %", False),
        Score("dip_80", "dip after 80 %", False),
        Score("recovery_50", "steps to recover, 50 %", False, digits=0),
        Score("recovery_80", "steps to recover, 80 %", False, digits=0),
        Score("vision_tokens", "vision tokens", True, digits=0),
        Score("text_tokens", "text tokens", True, digits=0),
    ),
    claims=CLAIMS,
    tasks=("scene_colour", "scene_shape", "scene_relation", "scene_digit", "wiki_bpb", "factbook_bpb", "python_bpb"),
    limit=200,
    scoring={"data.vision_bins": ((576, 5),)},
    prepare=prepare,
    measure=measure,
    check=check,
    curves=(CURVE,),
    plots=figures.draw,
    captions=figures.CAPTIONS,
    notes=(
        "The dip is the worst held-out score after the switch less the score at it, in bits a byte; in rows "
        "without a switch the same is measured at the same steps, which says what noise alone gives. The report's"
        " six columns are benchmarks of a model of another size. Here vision knowledge is colour and shape, "
        "vision reasoning the relation, OCR the printed digit; text knowledge, reasoning and code are bits a "
        "byte: choices about capitals and sums were left out, because the larger model of the demo stays near their "
        "controls, and a task without room says nothing."
        " A column whose scores its control reaches says nothing about the rows."
    ),
)
