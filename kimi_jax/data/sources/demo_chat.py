"""The demo's data as conversations: questions about an image over several turns, and sums. Answers are one word.

For `configs/sft/demo.py`. The images, questions and splits are those of the pre-training sources; only the form is new:
the released chat template instead of `Q: ... A: ...`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kimi_jax.data.conversation import encode
from kimi_jax.data.example import Example, Image
from kimi_jax.data.sources.demo_base import generator
from kimi_jax.data.sources.demo_image import EasyVQA, augment, choose_questions, vqa_image
from kimi_jax.data.sources.demo_text import operand_pairs, problem

INSTRUCTION = "Answer in one word."
SUMS_A_CONVERSATION = 4


def question_message(question: str, pixels: np.ndarray | None = None) -> dict[str, Any]:
    """What a user asks, in training and in evaluation alike; pixels: uint8 [h, w, 3] of an image to show with it."""
    text = {"type": "text", "text": f"{question} {INSTRUCTION}"}
    return {"role": "user", "content": [text] if pixels is None else [{"type": "image", "image": pixels}, text]}


def conversation(asked: Sequence[tuple[str, str]], key: str, pixels: np.ndarray | None = None) -> Example:
    """Questions and answers as one conversation; the image is shown with the first question."""
    messages = []
    for number, (question, answer) in enumerate(asked):
        shown = pixels if number == 0 else None
        messages += [question_message(question, shown), {"role": "assistant", "content": answer}]
    return encode(messages, thinking=False, train_on="all", media=lambda part: Image(part["image"]), key=key)


@dataclass(frozen=True)
class VQAChat:
    """One image of easy-VQA a conversation, with two or three questions."""

    split: str

    def __len__(self) -> int:
        return len(EasyVQA(self.split))

    def __getitem__(self, i: int) -> Example:
        vqa = EasyVQA(self.split).vqa(i)
        asked = choose_questions(vqa, generator("chat_vqa", self.split, i))
        pixels = vqa_image(self.split, vqa.image)
        if self.split == "train":
            pixels = augment(pixels, generator("chat_vqa/pixels", self.split, i))
        return conversation(asked, f"chat_vqa/{self.split}/{vqa.image}/{i}", pixels)

    def record(self, i: int) -> Example:
        """The text of item i."""
        asked = choose_questions(EasyVQA(self.split).vqa(i), generator("chat_vqa", self.split, i))
        return conversation(asked, f"chat_vqa/{self.split}/{i}")


@dataclass(frozen=True)
class SumsChat:
    """Four sums or differences a conversation."""

    split: str

    def __len__(self) -> int:
        return 20 * len(operand_pairs(self.split))

    def __getitem__(self, i: int) -> Example:
        rng = generator("chat_sums", self.split, i)
        pairs = operand_pairs(self.split)
        chosen = [pairs[k] for k in rng.integers(len(pairs), size=SUMS_A_CONVERSATION)]
        asked = [problem(a, b, "+-"[int(rng.integers(2))]) for a, b in chosen]
        return conversation(asked, f"chat_sums/{self.split}/{i}")
