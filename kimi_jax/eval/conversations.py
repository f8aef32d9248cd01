"""python -m kimi_jax.eval.conversations --before=runs/demo --after=runs/sft_demo: what SFT has changed.

Held-out questions of easy-VQA (shape and colour) are asked through the released chat template, as `configs/sft/demo.py`
trains them. An answer counts as well formed if the model ended it itself and it is one of the possible answers, and as
correct if it is the right one; the control asks about a white image. Writes OUT/conversations.json with the numbers and
OUT/conversations.html with conversations and their images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

from kimi_jax import cli, hosts
from kimi_jax.data.reply import parse_reply
from kimi_jax.data.sources.demo_chat import question_message
from kimi_jax.data.sources.demo_image import VQA_ANSWERS, vqa_image, vqa_records
from kimi_jax.eval import before_after
from kimi_jax.eval.tasks import shuffled
from kimi_jax.infer import lockstep
from kimi_jax.infer.engine import Engine
from kimi_jax.infer.generate import Chat, chat_request
from kimi_jax.infer.request import Sampling
from kimi_jax.model import Model, load_alike

SHOWN = 24  # conversations on the page
TOKENS_OF_AN_ANSWER = 16  # at most; the longest right one has a few


@dataclass(frozen=True)
class ImageQuestion:
    """One question about one image. image: its number in the validation split."""

    image: int
    question: str
    gold: str


@dataclass(frozen=True)
class ImageAnswer:
    """What a model answered. text: its whole answer; finished: it ended the answer itself."""

    text: str
    finished: bool

    @property
    def well_formed(self) -> bool:
        """Whether the answer is one of the possible ones, and nothing else."""
        return self.finished and self.text.strip() in VQA_ANSWERS


@dataclass(frozen=True)
class FormatScore:
    """Shares of the questions. stderr: standard error of `correct`."""

    model: str
    image: str
    well_formed: float
    correct: float
    stderr: float
    n: int


def questions_of(limit: int) -> list[ImageQuestion]:
    """Held-out questions whose answer is a shape or a colour, in a fixed random order."""
    asked = [
        ImageQuestion(r.image, q, a) for r in vqa_records("validation") for q, a in r.questions if a in VQA_ANSWERS
    ]
    return shuffled(asked, limit)


def ask(model: Model, questions: Sequence[ImageQuestion], blank: bool = False) -> list[ImageAnswer]:
    """The greedy answers of a model, all requests batched. blank: a white image in place of each."""
    engine = Engine(model.config, model.params, slots=16, max_sequence_length=256, mesh=model.mesh)
    sampling = Sampling(temperature=0.0, max_new_tokens=TOKENS_OF_AN_ANSWER)
    requests = []
    for asked in questions:
        pixels = vqa_image("validation", asked.image)
        message = question_message(asked.question, np.full_like(pixels, 255) if blank else pixels)
        requests.append(chat_request(Chat([message], thinking=False), model.tokenizer, model.config, sampling))
    answers = []
    for completion in engine.run(requests):
        reply = parse_reply(completion.token_ids, model.tokenizer, thinking=False)
        answers.append(ImageAnswer(reply.content, reply.finished))
    return answers


def is_correct(asked: ImageQuestion, answer: ImageAnswer) -> bool:
    """Whether it is well formed and the right one."""
    return answer.well_formed and answer.text.strip() == asked.gold


def score(model: str, image: str, questions: Sequence[ImageQuestion], answers: Sequence[ImageAnswer]) -> FormatScore:
    """Format and correctness apart."""
    right = [is_correct(q, a) for q, a in zip(questions, answers, strict=True)]
    share = float(np.mean(right))
    error = float(np.sqrt(share * (1 - share) / len(right)))
    return FormatScore(model, image, float(np.mean([a.well_formed for a in answers])), share, error, len(right))


def page(
    scores: Sequence[FormatScore], questions: Sequence[ImageQuestion], answers: dict[str, list[ImageAnswer]]
) -> str:
    """The page: the table, then conversations with their images. answers: by name of the model."""
    rows = [(s.model, s.image, s.well_formed, f"{s.correct:.3f} ± {s.stderr:.3f}", s.n) for s in scores]
    table = before_after.table(("model", "image", "well formed", "correct", "n"), rows)
    shown = "".join(_conversation(i, asked, answers) for i, asked in enumerate(questions[:SHOWN]))
    return before_after.document("Conversations", "Image questions asked in conversations", table + shown)


def _conversation(number: int, asked: ImageQuestion, answers: dict[str, list[ImageAnswer]]) -> str:
    given = [
        before_after.ShownAnswer(name, a.text, is_correct(asked, a), "" if a.finished else " (not ended)")
        for name, a in ((name, each[number]) for name, each in answers.items())
    ]
    text = question_message(asked.question)["content"][0]["text"]
    pixels = vqa_image("validation", asked.image)
    return before_after.question([pixels], f"user: {text}", asked.gold, before_after.answers(given))


def main(argv: Sequence[str]) -> None:
    """Runs the command line; exits with a message and status 1 when it cannot."""
    f = flags.FLAGS
    if len(argv) > 1:
        raise SystemExit(f"error: unexpected argument {argv[1]!r}   (--help for more)")
    lockstep.join()
    cli.enable_compilation_cache()
    questions = questions_of(f.limit)
    scores, answers = [], {}
    for name, workdir in (("before SFT", f.before), ("after SFT", f.after)):
        try:
            model = load_alike(workdir, "float32", "float", sharded=False)
        except ValueError as error:
            raise SystemExit(f"error: {error}") from error
        answers[name] = ask(model, questions)
        scores.append(score(name, "as it is", questions, answers[name]))
        scores.append(score(name, "white (control)", questions, ask(model, questions, blank=True)))
    if not hosts.is_first():
        return
    table = Table("model", "image", "well formed", "correct", "n")
    for s in scores:
        table.add_row(s.model, s.image, f"{s.well_formed:.3f}", f"{s.correct:.3f} ± {s.stderr:.3f}", str(s.n))
    Console().print(table)
    numbers = [dataclasses.asdict(s) for s in scores]
    path = before_after.write(f.out or f.after, "conversations", numbers, page(scores, questions, answers))
    print(f"{path}: {min(SHOWN, len(questions))} conversations")


if __name__ == "__main__":
    before_after.define_flags("runs/demo", "runs/sft_demo", 300, "Questions.")
    app.run(main)
