"""Asks a model about held-out scenes, in words and in images, and scores format, reading and answer apart.

Conditions: the scene in words, which the instructions were taught with; its image; a white image and another question's
image, the controls; the image with the tool, whose programs run in the sandbox over its pixels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.zero_vision_sft import programs
from experiments.zero_vision_sft.data import in_words, with_image
from experiments.zero_vision_sft.scenes import KINDS, Asked, asked
from kimi_jax.data.reply import Reply, parse_reply
from kimi_jax.eval.agent import AgentEpisode, EpisodeLimits, engine_replies, run
from kimi_jax.infer.engine import Engine
from kimi_jax.infer.generate import Chat, chat_request
from kimi_jax.infer.request import Sampling
from kimi_jax.model import Model, load
from kimi_jax.sandbox.session import Session
from kimi_jax.sandbox.tool import run_tool

QUESTIONS, BY_TOOL = 120, 32  # of each condition
TOKENS = 64  # of a reply, at most; the longest right one has some forty
SAID = re.compile(r"(?P<seen>.*)\. so: (?P<answer>[^.]*)", re.DOTALL)
BLANK, OTHER = "blank image", "another question's image"


@dataclass(frozen=True)
class Said:
    """A reply taken apart; None where it has not the form that was taught."""

    seen: str | None
    answer: str | None

    @classmethod
    def of(cls, answer: Reply) -> Said:
        """Of a reply that the model ended itself."""
        found = SAID.fullmatch(answer.content.strip()) if answer.finished and not answer.tool_calls else None
        return cls(found["seen"], found["answer"].strip()) if found else cls(None, None)


def things_read(seen: str | None, question: Asked) -> float:
    """F1 of the things that were named, word for word, against those of the scene."""
    named, there = set((seen or "").split(", ")) - {""}, {thing.words for thing in question.scene.things}
    return 2 * len(named & there) / (len(named) + len(there))


def scores(condition: str, questions: Sequence[Asked], said: Sequence[Said]) -> dict[str, tuple[float, int]]:
    """CONDITION/format, /scene (read without an error), /things (F1), /correct, and /correct of each kind."""
    pairs = list(zip(questions, said, strict=True))
    right = [s.answer == q.answer for q, s in pairs]

    def mean(values: Sequence[float]) -> tuple[float, int]:
        return float(np.mean(values)), len(values)

    kinds = {kind: [r for r, q in zip(right, questions, strict=True) if q.kind == kind] for kind in KINDS}
    return {
        f"{condition}/format": mean([s.seen is not None for s in said]),
        f"{condition}/scene": mean([s.seen == q.scene.words for q, s in pairs]),
        f"{condition}/things": mean([things_read(s.seen, q) for q, s in pairs]),
        f"{condition}/correct": mean(right),
        **{f"{condition}/{kind}": mean(found) for kind, found in kinds.items() if found},
    }


def measure(workdir: Path) -> Mapping[str, tuple[float, int]]:
    """All scores of the weights in a workdir. Raises SandboxError where the tool's walls are missing."""
    model = load(workdir, "float32")
    questions = [asked("held-out", "validation", i) for i in range(QUESTIONS)]
    images = [question.scene.image for question in questions]
    found = scores("words", questions, ask(model, questions, None))
    # the next question of the same kind: an image that could have been asked about in these words
    others = images[len(KINDS) :] + images[: len(KINDS)]
    white = [np.full_like(image, 255) for image in images]
    for name, shown in (("image", images), (f"image/{BLANK}", white), (f"image/{OTHER}", others)):
        found |= scores(name, questions, ask(model, questions, shown))
    return found | by_tool(model, questions[:BY_TOOL])


def ask(model: Model, questions: Sequence[Asked], images: Sequence[np.ndarray] | None) -> list[Said]:
    """Greedy replies, all together. images: None where the scene is given in words."""
    engine = Engine(model.config, model.params, slots=32, max_sequence_length=256, chunks=(32, 128), tokens_per_call=8)
    requests = []
    for number, question in enumerate(questions):
        content: Any = in_words(question) if images is None else with_image(images[number], question)
        chat = Chat([{"role": "user", "content": content}], thinking=False)
        requests.append(chat_request(chat, model.tokenizer, model.config, _greedy()))
    return [Said.of(parse_reply(c.token_ids, model.tokenizer, thinking=False)) for c in engine.run(requests)]


def by_tool(model: Model, questions: Sequence[Asked]) -> dict[str, tuple[float, int]]:
    """tool/calls: an episode has a call that ran; tool/correct: the answer is right, and so for each kind."""
    engine = Engine(model.config, model.params, slots=1, max_sequence_length=256, chunks=(32, 128))
    replies = engine_replies(engine, model.tokenizer, _greedy(), thinking=False)
    called, right = [], []
    with Session() as session:
        for question in questions:
            session.put({"image_1": question.scene.image})
            messages = [{"role": "user", "content": with_image(question.scene.image, question, by_tool=True)}]
            episode = run(replies, messages, {"ipython": _tool(session)}, limits=EpisodeLimits(turns=3, calls=1))
            called.append(any(call.result == "ok" for call in episode.calls))
            right.append(_answer(episode) == question.answer)
    kinds = {kind: [r for r, q in zip(right, questions, strict=True) if q.kind == kind] for kind in KINDS}
    found = {"tool/calls": called, "tool/correct": right, **{f"tool/{kind}": each for kind, each in kinds.items()}}
    return {name: (float(np.mean(values)), len(values)) for name, values in found.items() if values}


def _tool(session: Session) -> Callable[[str], list[dict[str, Any]]]:
    """What runs a call, behind the programs: a session whose process was replaced has lost what ran before."""
    before = Path(programs.__file__).read_text()
    return lambda code: run_tool(session, {"code": f"{before}\n{code}"})


def _answer(episode: AgentEpisode) -> str:
    return episode.answer.strip().removeprefix("so: ").strip()


def _greedy() -> Sampling:
    return Sampling(temperature=0.0, max_new_tokens=TOKENS)
