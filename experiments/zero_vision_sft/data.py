"""The files that the runs read: captioned scenes and stories of pre-training, conversations of SFT in words, by the
tool, and about images.

A scene stands between "scene: " and a full stop, in words or as an image: in pre-training, where it is said again in
words, and in what a user asks. (Where pre-training has images at the beginning of documents only, no instruction in
words reached them: one run, 0.02 of the things read.) Every reply has one form, so that format, reading and answer can
be scored apart: "SCENE. so: ANSWER", or a call of the tool and then "so: ANSWER".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

from experiments.zero_vision_sft.scenes import VISUAL, Asked, asked, asked_visually, scene, story
from kimi_jax.data.sources.demo_base import generator
from kimi_jax.train.log import write_atomic

BEFORE = "scene: "  # what stands before a scene
TOOL = "use ipython: "  # before a question that is to be answered by the tool
FEW, MANY = 1, len(VISUAL)
COUNTS = {"captions": 6000, "stories": 6000, "words": 4000, "tool": 1000, "few": 2000, "many": 2000}


def reply(words: str, answer: str) -> str:
    """What the assistant says: what is seen, and the answer."""
    return f"{words}. so: {answer}"


def in_words(question: Asked, by_tool: bool = False) -> str:
    """What the user says when the scene is given in words."""
    return f"{BEFORE}{question.scene.words}{after(question, by_tool)}"


def after(question: Asked, by_tool: bool = False) -> str:
    """What stands behind the scene, in words or as an image."""
    return f".\n{TOOL if by_tool else ''}{question.question}"


def with_image(image: Any, question: Asked, by_tool: bool = False) -> list[dict[str, Any]]:
    """What the user says when the scene is an image, which stands where the words did."""
    text = {"type": "text", "text": after(question, by_tool)}
    return [{"type": "text", "text": BEFORE}, {"type": "image", "image": image}, text]


def call(question: Asked) -> dict[str, Any]:
    """The assistant's message that calls the tool."""
    function = {"name": "ipython", "arguments": json.dumps({"code": f"print({question.program})"})}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def _chat(key: str, *messages: dict[str, Any]) -> dict[str, Any]:
    return {"id": key, "messages": list(messages), "thinking": False}


def _user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _words(i: int, folder: Path) -> dict[str, Any]:
    question = asked("words", "train", i)
    said = {"role": "assistant", "content": reply(question.scene.words, question.answer)}
    return _chat(f"words-{i}", _user(in_words(question)), said)


def _tool(i: int, folder: Path) -> dict[str, Any]:
    """A call of the tool beside a scene in words: what the program would see is known."""
    question = asked("tool", "train", i)
    return _chat(
        f"tool-{i}", _user(in_words(question, by_tool=True)), call(question),
        {"role": "tool", "tool_call_id": "functions.ipython:0", "content": f"{question.answer}\n"},
        {"role": "assistant", "content": f"so: {question.answer}"},
    )  # fmt: skip


def _visual(templates: int) -> Callable[[int, Path], dict[str, Any]]:
    def row(i: int, folder: Path) -> dict[str, Any]:
        question = asked_visually("train", i, templates)
        name = f"visual-{templates}-{i}.png"
        PILImage.fromarray(question.scene.image).save(folder / name)
        said = {"role": "assistant", "content": reply(question.scene.words, question.answer)}
        return _chat(name, _user(with_image(name, question)), said)

    return row


def _caption(i: int, folder: Path) -> dict[str, Any]:
    shown = scene(generator("zero_vision_sft/caption", "train", i))
    PILImage.fromarray(shown.image).save(folder / f"caption-{i}.png")
    said = {"text": f". again: {shown.words}."}
    return {"id": f"caption-{i}", "parts": [{"text": BEFORE, "loss": 0}, {"image": f"caption-{i}.png"}, said]}


def _story(i: int, folder: Path) -> dict[str, Any]:
    return {"id": f"story-{i}", "text": story(i)}


ROWS: dict[str, Callable[[int, Path], dict[str, Any]]] = {
    "captions": _caption, "stories": _story, "words": _words, "tool": _tool, "few": _visual(FEW),
    "many": _visual(MANY),
}  # fmt: skip


def write(folder: Path) -> None:
    """Writes every file of COUNTS that is not there yet; each is whole or not there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in COUNTS.items():
        path = folder / f"{name}.jsonl"
        if not path.exists():
            write_atomic(path, "".join(_lines(name, count, folder)))


def _lines(name: str, count: int, folder: Path) -> Iterator[str]:
    for i in range(count):
        yield json.dumps(ROWS[name](i, folder)) + "\n"
