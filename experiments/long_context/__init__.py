"""What long-context mid-training gives, and what position interpolation has to do with it: a fact found again at 1, 2
and 4 times the length of joint pre-training, in text and in video.

Source: Kimi K2.5 report (arXiv 2602.02276), Table 3 and the section on joint long-context mid-training.
"""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path

from experiments.fusion_timing import model as narrow_model
from experiments.harness import HERE, Claim, Experiment, Score, above_control, better, equivalent, locked
from kimi_jax import config as c
from kimi_jax.data.sources.demo_long import TOKENS
from kimi_jax.data.vocabulary import tokenizer_for

DATA = Path("runs/experiments/long_context/data")
STAGES = {name: runpy.run_path(str(HERE.parent / f"configs/pretrain/{name}.py")) for name in ("joint", "long")}
STEPS = {"smoke": (4, 2, 2), "cpu": (600, 60, 60)}  # of the joint stage, at twice its length, at four times
BATCH = 2048  # tokens of a step
TEXT, VIDEO = "needle_text", "needle_video"


def stage(scale: str, name: str) -> c.TrainConfig:
    """A stage of configs/pretrain at the size of this experiment, in the folder of its seed, "{seed}" in its paths.

    name: "joint", "2x-yarn", "2x-plain", "4x-yarn", "4x-plain"; "short" goes on with the joint stage instead.
    """
    length, _, positions = name.partition("-")
    is_long = length in ("2x", "4x")
    config = c.freeze(STAGES["long" if is_long else "joint"]["get_config"](*([length] if is_long else [])))
    folder = DATA / scale / "{seed}"
    before = {"joint": "", "short": "joint", "2x": "joint", "4x": f"2x-{positions}"}[length]
    joint, twice, four_times = STEPS[scale]
    steps = {"joint": joint, "short": twice + four_times, "2x": twice, "4x": four_times}[length]
    scaling = config.model.rope_scaling if positions == "yarn" else None
    # only what the questions need: text and captions to stay a language model that sees, and facts to find again
    weights = {"wiki": 1.0, TEXT: 2.0, "scenes": 1.0, VIDEO: 4.0} | ({"long_documents": 0.1} if is_long else {})
    sources = {k: dataclasses.replace(config.data.sources[k], weight=w) for k, w in weights.items()}
    data = dataclasses.replace(
        config.data, sources=sources, tokenizer=str(DATA / "tokenizer.json"), num_workers=0,
        rows_per_pack=BATCH // config.data.sequence_length, vision_ratio=((0.0, 0.04),), vision_bins=((144, 12),),
    )  # fmt: skip
    rate = 8e-3 if length == "joint" else 1.6e-3
    return dataclasses.replace(
        config,
        workdir=str(folder / name),
        steps=steps,
        model=dataclasses.replace(
            narrow_model(),
            num_hidden_layers=3,
            rope_scaling=scaling,
            max_position_embeddings=config.data.sequence_length,
        ),
        data=data,
        init_from=c.InitFromConfig(path=str(folder / before) if before else ""),
        optimizer=dataclasses.replace(
            config.optimizer, peak_lr=rate, final_lr=rate / 10, warmup_steps=min(20, steps // 4)
        ),
        checkpoint=c.CheckpointConfig(interval=0, keep=1),
        eval=c.EvalConfig(),
    )  # fmt: skip


def of_seed(config: c.TrainConfig, seed: int) -> c.TrainConfig:
    """The run that begins with the weights of its own seed."""
    return dataclasses.replace(config, init_from=c.InitFromConfig(path=config.init_from.path.format(seed=seed)))


def prepare(config: c.TrainConfig) -> None:
    """Trains the stages before, once; another process that needs them waits."""
    place = Path(config.init_from.path)
    if not place.is_relative_to(DATA):
        return
    scale, seed, name = place.parts[-3:]
    with locked(DATA / "lock"):
        joint = stage(scale, "joint")
        tokenizer_for(joint, joint.data.tokenizer, joint.model.vocab_size)
    with locked(place.parent / "lock"):
        _train(scale, name, int(seed))


def _train(scale: str, name: str, seed: int) -> None:
    from kimi_jax.train import loop

    if name != "joint":
        _train(scale, "joint", seed)
    config = of_seed(stage(scale, name), seed)
    data = dataclasses.replace(config.data, seed=seed)
    workdir = config.workdir.format(seed=seed)
    if loop.run(dataclasses.replace(config, workdir=workdir, data=data, seed=seed)):
        raise RuntimeError(f"the stage in {workdir} did not come to its end")


def pod() -> c.TrainConfig:
    """The last stage of Kimi K2.5: 262,144 tokens on 1,024 chips."""
    return c.freeze(STAGES["long"]["get_config"]("64x@v5p-2048"))


def _starting(name: str, positions: c.YarnConfig | None) -> dict[str, object]:
    """Changes of a row that is scored as the run `name` ends."""
    path = {scale: {"init_from.path": str(DATA / scale / "{seed}" / name)} for scale in STEPS}
    return {"model.rope_scaling": positions and dataclasses.asdict(positions), **path}


def _short(scale: str) -> dict[str, object]:
    short = stage(scale, "short")
    sources = {f"data.sources.{TEXT}.path": f"{TEXT}_256", f"data.sources.{VIDEO}.path": f"{VIDEO}_256"}
    shape = {name: getattr(short.data, name) for name in ("sequence_length", "rows_per_pack")}
    return {
        "init_from.path": short.init_from.path, "steps": short.steps, **{f"data.{k}": v for k, v in shape.items()},
        **sources, "data.sources.long_documents": None,
    }  # fmt: skip


def _short_pod() -> dict[str, object]:
    """As many tokens of both long stages in rows of the joint stage."""
    data, before = pod().data, c.freeze(STAGES["joint"]["get_config"]("v5p-2048"))
    length = before.data.sequence_length
    tokens = sum(tokens for _, tokens in STAGES["long"]["POD"].values())
    steps = round(tokens / (data.num_packs * data.sequence_length))
    rows = data.sequence_length // length
    return {
        "init_from.path": before.workdir, "steps": steps, "data.sequence_length": length, "data.rows_per_pack": rows,
        "data.sources.long_text": None, "data.sources.long_video": None,
    }  # fmt: skip


INTERPOLATED = c.YarnConfig(factor=4.0, original_max_position_embeddings=TOKENS[0])
PLAIN: dict[str, object] = {s: {"init_from.path": stage(s, "4x-plain").init_from.path} for s in STEPS}
ROWS: dict[str, dict[str, object]] = {
    "before": _starting("joint", None),
    "before_yarn": _starting("joint", INTERPOLATED),
    "yarn": {},
    "plain": {"model.rope_scaling": None, **PLAIN, "pod": {"init_from.path": "runs/pretrain-long-8x-plain"}},
    "short": {"model.rope_scaling": None, "smoke": _short("smoke"), "cpu": _short("cpu"), "pod": _short_pod()},
}
TASKS = tuple(f"{kind}_{tokens}" for kind in (TEXT, VIDEO) for tokens in TOKENS)
CONTROLS = {TEXT: "without the sentence", VIDEO: "without the frame"}

# -------------------------------------------------------------------------------------------------------------- claims


def _claims() -> tuple[Claim, ...]:
    found = []
    for kind, what in ((TEXT, "text"), (VIDEO, "video")):
        four = f"{kind}_{TOKENS[2]}/accuracy"
        control = f"{four}/{CONTROLS[kind]}"
        found += [
            Claim(f"At 4 times the length a fact in {what} is found above the control, after training with YaRN",
                  above_control(four, "yarn", control)),
            Claim(f"... and more often than before the stage ({what}, 4x)", better(four, "yarn", "before")),
            Claim(f"... and more often than by interpolation without training ({what}, 4x)",
                  better(four, "yarn", "before_yarn")),
            Claim(f"... and more often than after the same training without interpolation ({what}, 4x)",
                  better(four, "yarn", "plain")),
            Claim(f"... and more often than after as many tokens of short rows ({what}, 4x)",
                  better(four, "yarn", "short")),
            Claim(f"At the old length the stage costs less than 0.05 of what is found ({what}, 1x)",
                  equivalent(f"{kind}_{TOKENS[0]}/accuracy", "yarn", "short", 0.05)),
        ]  # fmt: skip
    bits = equivalent("wiki_bpb/bits_per_byte", "yarn", "short", 0.05)
    return (*found, Claim("Short held-out text differs by less than 0.05 bits a byte from the short rows'", bits))


EXPERIMENT = Experiment(
    name="long_context",
    question="What does long-context mid-training give, and what position interpolation?",
    source="Kimi K2.5 report (arXiv 2602.02276), Table 3 and the section on joint long-context mid-training",
    setting=(
        "The report extends the context step by step by YaRN, on long text and long video beside shorter data, and "
        "names no ablation. Here a model of 1.1 million parameters is trained jointly on rows of 256 tokens "
        "(configs/pretrain/joint.py, from random weights), then on rows of 512 and of 1,024 (configs/pretrain/long.py) "
        "at 2,048 tokens a step. What is asked is one fact: a number that a text of Wikipedia leads says somewhere, or "
        "the colour of one frame of a grey video; it stands anywhere, and the question at the end. `before` is the "
        "model before the stage, `before_yarn` the same with the factor applied and nothing trained, `yarn` the stage, "
        "`plain` the stage without interpolation, `short` as many tokens of 256-token rows."
    ),
    base={"smoke": lambda: stage("smoke", "4x-yarn"), "cpu": lambda: stage("cpu", "4x-yarn"), "pod": pod},
    rows=ROWS,
    seeds=(0, 1, 2),
    by_seed=of_seed,
    untrained=("before", "before_yarn"),
    scores=(
        *(
            Score(f"{kind}_{tokens}/accuracy", f"{kind.removeprefix('needle_')}, {tokens // TOKENS[0]}x", True,
                  f"{kind}_{tokens}/accuracy/{CONTROLS[kind]}", digits=2)
            for kind in (TEXT, VIDEO) for tokens in TOKENS
        ),
        Score("wiki_bpb/bits_per_byte", "Wikipedia bits/byte", False),
    ),
    claims=_claims(),
    tasks=(*TASKS, "wiki_bpb"),
    limit=100,
    scoring={"data.sequence_length": TOKENS[2], "data.rows_per_pack": 2, "data.vision_bins": ((144, 14),)},
    prepare=prepare,
    notes=(
        "Chance is 0.10 in text and 0.17 in video; the control asks about the same document without the fact. Weights "
        "before the stage are trained by `prepare`, once a seed, and are not part of the minutes of a run."
    ),
)  # fmt: skip
