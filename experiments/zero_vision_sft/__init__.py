"""Whether instructions in words alone wake vision: no SFT, zero-vision SFT, text-vision SFT with few or many templates.

Source: Kimi K2.5 report (arXiv 2602.02276), the section on zero-vision SFT.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from experiments.fusion_timing import model as narrow_model
from experiments.harness import Claim, Experiment, ResultsTable, Score, above, above_control, better, locked
from experiments.zero_vision_sft import asking, data
from kimi_jax import config as c
from kimi_jax.data.vocabulary import tokenizer_for
from kimi_jax.train.log import read_rows

DATA = Path("runs/experiments/zero_vision_sft/data")
SHARES = {"low": 0.06, "high": 0.25}  # of vision tokens in pre-training, all of them in captioned images
SFT_SEEDS = 3  # seeds of SFT on each of two pre-training runs: seeds 0 to 2 and 3 to 5
STEPS = {"smoke": (6, 3), "cpu": (800, 200)}  # of pre-training, of SFT
VISUAL = 0.1  # vision tokens of text-vision SFT: about half of its conversations show an image
TOLERANCE = 0.02  # relative difference of the tokens of SFT between rows


def pretraining(scale: str, share: str, seed: int) -> c.TrainConfig:
    """The joint pre-training that a row starts from: captioned scenes beside stories in words."""
    folder, steps = DATA / scale, STEPS[scale][0]
    sources = {
        "stories": c.SourceConfig(kind="jsonl", path=str(DATA / "stories.jsonl")),
        "captions": c.SourceConfig(kind="jsonl", path=str(DATA / "captions.jsonl"), vision=True),
    }
    model = dataclasses.replace(
        narrow_model(), vocab_size=512, num_hidden_layers=3, rope_scaling=None, max_position_embeddings=256
    )
    return c.TrainConfig(
        workdir=str(folder / f"{share}-{seed}"),
        steps=steps,
        seed=seed,
        model=model,
        data=c.DataConfig(
            sources=sources, tokenizer=str(DATA / "tokenizer.json"), sequence_length=256, rows_per_pack=8, num_packs=1,
            vision_bins=((64, 40),), vision_ratio=((0.0, SHARES[share]),), buffer_size=128, num_workers=0, seed=seed,
        ),
        optimizer=c.OptimizerConfig(peak_lr=8e-3, final_lr=4e-4, warmup_steps=min(20, steps // 4), decay_fraction=0.3),
        checkpoint=c.CheckpointConfig(interval=max(1, steps // 4), keep=1),
    )  # fmt: skip


def base(scale: str) -> c.TrainConfig:
    """SFT in words: half of the conversations have the scene in words, half call the tool without seeing anything."""
    start, steps = pretraining(scale, "high", 0), STEPS[scale][1]
    chat = c.SourceConfig(kind="chat", path=str(DATA / "words.jsonl"), chat=c.ChatConfig(thinking=False))
    sources = {"words": chat, "tool": dataclasses.replace(chat, path=str(DATA / "tool.jsonl"), weight=0.35)}
    return dataclasses.replace(
        start,
        steps=steps,
        init_from=c.InitFromConfig(path=str(DATA / scale / "high-{pretraining}")),
        data=dataclasses.replace(start.data, sources=sources, vision_ratio=((0.0, 0.0),), vision_bins=((64, 1),)),
        optimizer=dataclasses.replace(
            start.optimizer, peak_lr=3e-3, final_lr=1e-4, warmup_steps=min(10, steps // 3), decay_fraction=0.8
        ),
        checkpoint=c.CheckpointConfig(interval=0, keep=1),
    )


def _rows() -> dict[str, dict[str, object]]:
    rows: dict[str, dict[str, object]] = {}
    for share in SHARES:
        start: dict[str, object] = {s: {"init_from.path": str(DATA / s / f"{share}-{{pretraining}}")} for s in STEPS}
        rows[f"none_{share}"] = start
        rows[f"zero_{share}"] = start
    for templates in ("few", "many"):  # at the high share only: the share's part is asked of SFT in words
        source = {"kind": "chat", "path": str(DATA / f"{templates}.jsonl"), "vision": True, "chat.thinking": False}
        visual = {f"data.sources.visual.{name}": value for name, value in source.items()}
        shape = {"data.vision_ratio": ((0.0, VISUAL),), "data.vision_bins": ((64, 18),)}
        rows[f"{templates}_high"] = {**rows["zero_high"], **visual, **shape}
    return rows


ROWS = _rows()
TRAINED = tuple(row for row in ROWS if not row.startswith("none"))


def of_seed(config: c.TrainConfig, seed: int) -> c.TrainConfig:
    """The run that begins with the pre-training run of its seed."""
    path = config.init_from.path.format(pretraining=seed // SFT_SEEDS)
    return dataclasses.replace(config, init_from=c.InitFromConfig(path=path))


def prepare(config: c.TrainConfig) -> None:
    """Writes the data and the tokenizer, and pre-trains what the run begins with, once; others wait."""
    from kimi_jax.train import loop

    place = Path(config.init_from.path)
    scale, name = place.parts[-2:]
    share, _, seed = name.partition("-")
    before = pretraining(scale, share, int(seed))
    with locked(DATA / "lock"):
        data.write(DATA)
        sources = {**before.data.sources, **config.data.sources}
        both = dataclasses.replace(before, data=dataclasses.replace(before.data, sources=sources))
        tokenizer_for(both, before.data.tokenizer, before.model.vocab_size, max_bytes=2_000_000)
    with locked(place.with_suffix(".lock")):
        if loop.run(before):
            raise RuntimeError(f"the pre-training in {place} did not come to its end")


def measure(workdir: Path) -> dict[str, tuple[float, int]]:
    """What `asking` finds, and the tokens of SFT."""
    counted = read_rows(workdir / "metrics.jsonl")[-1]["data"]
    return {**asking.measure(workdir), "tokens": (float(counted["tokens"]), 1)}


def check(table: ResultsTable) -> list[str]:
    """Raises ValueError if the trained rows differ in tokens by TOLERANCE or more."""
    found = [v for row in TRAINED for v in table.values(row, "tokens").values()]
    if not found:
        return []
    spread = (max(found) - min(found)) / max(found)
    if spread >= TOLERANCE:
        raise ValueError(f"tokens of SFT differ by {spread:.2%}, more than {TOLERANCE:.0%}")
    return [f"Tokens of SFT, from the runs' own counters, lie between {min(found):,.0f} and {max(found):,.0f}."]


# -------------------------------------------------------------------------------------------------------------- claims


ANSWER, READ = "image/correct", "image/things"
CLAIMS = (
    Claim("Precondition: after zero-vision SFT the instructions are mastered in words (above 0.9 correct)",
          above("words/correct", "zero_high", 0.9)),
    Claim("Precondition: so they are after text-vision SFT with many templates",
          above("words/correct", "many_high", 0.9)),
    Claim("Zero-vision SFT answers visual questions that it never saw, better than about another question's image",
          above_control(ANSWER, "zero_high", f"image/{asking.OTHER}/correct")),
    Claim("It names what is in the image, better than with another question's image",
          above_control(READ, "zero_high", f"image/{asking.OTHER}/things")),
    Claim("It answers better than the model without SFT", better(ANSWER, "zero_high", "none_high")),
    Claim("It answers better than text-vision SFT with few templates", better(ANSWER, "zero_high", "few_high")),
    Claim("It answers better than text-vision SFT with many templates", better(ANSWER, "zero_high", "many_high")),
    Claim("Text-vision SFT answers better with many templates than with few", better(ANSWER, "many_high", "few_high")),
    Claim("More captions in pre-training: zero-vision SFT answers better", better(ANSWER, "zero_high", "zero_low")),
    Claim("More captions in pre-training: it names more of what is there", better(READ, "zero_high", "zero_low")),
    Claim("With the tool, zero-vision SFT answers better than without",
          above_control("tool/correct", "zero_high", ANSWER)),
    Claim("The tool does not need the captions: with few of them it is right in more than half of the answers",
          above("tool/correct", "zero_low", 0.5)),
)  # fmt: skip


def _seen(name: str, label: str) -> Score:
    return Score(f"image/{name}", label, True, f"image/{asking.OTHER}/{name}", digits=2)


EXPERIMENT = Experiment(
    name="zero_vision_sft",
    question="Do instructions in words alone wake vision?",
    source="Kimi K2.5 report (arXiv 2602.02276), the section on zero-vision SFT",
    setting=(
        "The report finds that SFT on text alone, in which image operations are programs for the ipython tool, wakes "
        "visual abilities, and that text-vision SFT with human-made visual trajectories does worse. Here a model of a "
        "million parameters is pre-trained on stories about scenes of one to three things (a shape or a digit, its "
        "size, colour and place) beside captioned scenes, whose image stands where a story has the words; then SFT "
        "teaches in words to say what is there and to answer: counting, localisation, size comparison, reading, and "
        "the same by a call of a program. "
        "`none` is the start, `zero` SFT in words, `few` and `many` have, for the same tokens, half of their "
        "conversations about images, by 1 or 8 templates of other questions (colour, shape, presence, what is where). "
        f"`low` and `high` are vision shares of {SHARES['low']:.0%} and {SHARES['high']:.0%} of the tokens of "
        "pre-training. Afterwards the four kinds of questions are asked about images, for the first time."
    ),
    base={scale: (lambda scale=scale: base(scale)) for scale in STEPS},
    rows=ROWS,
    seeds=tuple(range(2 * SFT_SEEDS)),
    by_seed=of_seed,
    untrained=tuple(row for row in ROWS if row not in TRAINED),
    scores=(
        Score("words/correct", "in words: correct", True, digits=2),
        Score("words/format", "in words: format", True, digits=2),
        _seen("format", "image: format"),
        _seen("scene", "whole scene read"),
        _seen("things", "things read, F1"),
        _seen("correct", "image: correct"),
        *(_seen(kind, kind) for kind in ("count", "where", "size", "read")),
        Score(f"image/{asking.BLANK}/correct", "blank image: correct", True, digits=2),
        Score("tool/calls", "tool: calls that ran", True, digits=2),
        Score("tool/correct", "tool: correct", True, digits=2),
        Score("tokens", "tokens", True, digits=0),
    ),
    claims=CLAIMS,
    prepare=prepare,
    measure=measure,
    check=check,
    notes=(
        "In brackets: the same questions beside another question's image of the same kind, which keeps the format that "
        "a blank image may break. Seeds 0 to 2 and 3 to 5 are three runs of SFT each on one of two pre-training runs: "
        "the six are not independent draws of pre-training: intervals speak of SFT on these two. With the tool the "
        "programs see the image and the model has to ask the right one and to copy what comes back. Not here: the "
        "limits of transfer from general to medical and satellite images, which need real data of each domain in "
        "pre-training."
    ),
)  # fmt: skip
