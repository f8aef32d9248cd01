"""python -m kimi_jax.eval.conversations --before=runs/demo --after=runs/sft_demo: what SFT has changed.

Held-out questions of easy-VQA (shape and colour) are asked through the released chat template, as `configs/sft/demo.py`
trains them. An answer counts as well formed if the model ended it itself and it is one of the possible answers, and as
correct if it is the right one; the control asks about a white image. Writes OUT/conversations.json with the numbers and
OUT/conversations.html with conversations and their images.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from absl import app, flags
from etils import epath
from PIL import Image as PILImage
from rich.console import Console
from rich.table import Table

from kimi_jax import cli
from kimi_jax.config import ConfigError
from kimi_jax.data.reply import parse_reply
from kimi_jax.data.sources.demo_chat import question_message
from kimi_jax.data.sources.demo_image import VQA_ANSWERS, vqa_image, vqa_records
from kimi_jax.eval.tasks import shuffled
from kimi_jax.infer.engine import Engine
from kimi_jax.infer.generate import Chat, chat_request
from kimi_jax.infer.request import Sampling
from kimi_jax.model import Model, load

SHOWN = 24  # conversations on the page
TOKENS_OF_AN_ANSWER = 16  # at most; the longest right one has a few
STYLE = """body{font:15px/1.45 system-ui,sans-serif;max-width:64em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.35em .8em;border-bottom:1px solid #ddd;text-align:left}
.c{display:flex;gap:1em;padding:.8em 0;border-bottom:1px solid #eee}
img{width:96px;height:96px;image-rendering:pixelated}
.u{color:#555}.ok{color:#00705a}.no{color:#b3401a}code{background:#f3f3f3;padding:0 .25em}"""


@dataclass(frozen=True)
class Question:
    """One question about one image. image: its number in the validation split."""

    image: int
    question: str
    gold: str


@dataclass(frozen=True)
class Answered:
    """What a model answered. text: its whole answer; finished: it ended the answer itself."""

    text: str
    finished: bool

    @property
    def well_formed(self) -> bool:
        """Whether the answer is one of the possible ones, and nothing else."""
        return self.finished and self.text.strip() in VQA_ANSWERS


@dataclass(frozen=True)
class Score:
    """Shares of the questions. stderr: standard error of `correct`."""

    model: str
    image: str
    well_formed: float
    correct: float
    stderr: float
    n: int


def questions_of(limit: int) -> list[Question]:
    """Held-out questions whose answer is a shape or a colour, in a fixed random order."""
    asked = [Question(r.image, q, a) for r in vqa_records("validation") for q, a in r.questions if a in VQA_ANSWERS]
    return shuffled(asked, limit)


def ask(model: Model, questions: Sequence[Question], blank: bool = False) -> list[Answered]:
    """The greedy answers of a model, all requests batched. blank: a white image in place of each."""
    engine = Engine(model, slots=16, max_sequence_length=256)
    sampling = Sampling(temperature=0.0, max_new_tokens=TOKENS_OF_AN_ANSWER)
    requests = []
    for asked in questions:
        pixels = vqa_image("validation", asked.image)
        message = question_message(asked.question, np.full_like(pixels, 255) if blank else pixels)
        requests.append(chat_request(Chat([message], thinking=False), model.tokenizer, model.config, sampling))
    answers = []
    for completion in engine.run(requests):
        reply = parse_reply(completion.token_ids, model.tokenizer, thinking=False)
        answers.append(Answered(reply.content, reply.finished))
    return answers


def score(model: str, image: str, questions: Sequence[Question], answers: Sequence[Answered]) -> Score:
    """Format and correctness apart."""
    right = [a.well_formed and a.text.strip() == q.gold for q, a in zip(questions, answers, strict=True)]
    share = float(np.mean(right))
    error = float(np.sqrt(share * (1 - share) / len(right)))
    return Score(model, image, float(np.mean([a.well_formed for a in answers])), share, error, len(right))


def page(scores: Sequence[Score], questions: Sequence[Question], answers: dict[str, list[Answered]]) -> str:
    """The page: the table, then conversations with their images. answers: by name of the model."""
    rows = "".join(
        f"<tr><td>{s.model}</td><td>{s.image}</td><td>{s.well_formed:.3f}</td>"
        f"<td>{s.correct:.3f} ± {s.stderr:.3f}</td><td>{s.n}</td></tr>"
        for s in scores
    )
    head = "<tr><th>model<th>image<th>well formed<th>correct<th>n</tr>"
    shown = "".join(_conversation(i, asked, answers) for i, asked in enumerate(questions[:SHOWN]))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Conversations</title><style>{STYLE}</style>"
        f"<h1>Image questions asked in conversations</h1><table>{head}{rows}</table>{shown}</html>"
    )


def _conversation(number: int, asked: Question, answers: dict[str, list[Answered]]) -> str:
    file = io.BytesIO()
    PILImage.fromarray(vqa_image("validation", asked.image)).save(file, "png")
    uri = base64.b64encode(file.getvalue()).decode()
    message = html.escape(question_message(asked.question)["content"][0]["text"])
    lines = []
    for name, given in answers.items():
        answer = given[number]
        right = answer.well_formed and answer.text.strip() == asked.gold
        end = "" if answer.finished else " (not ended)"
        lines.append(f"<div class={'ok' if right else 'no'}>{name}: <code>{html.escape(answer.text)}</code>{end}</div>")
    return (
        f'<div class=c><img alt="" src="data:image/png;base64,{uri}"><div><div class=u>user: {message}</div>'
        f"{''.join(lines)}<div class=u>right answer: {html.escape(asked.gold)}</div></div></div>"
    )


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("before", "runs/demo", "Workdir of the model before SFT.")
    flags.DEFINE_string("after", "runs/sft_demo", "Workdir of the model after SFT.")
    flags.DEFINE_string("out", "", "Folder of the results; default: that of --after.")
    flags.DEFINE_integer("limit", 300, "Questions.", lower_bound=1)


def main(argv: Sequence[str]) -> None:
    """Runs the command line; exits with a message and status 1 when it cannot."""
    f = flags.FLAGS
    if len(argv) > 1:
        raise SystemExit(f"error: unexpected argument {argv[1]!r}   (--help for more)")
    cli.enable_compilation_cache()
    questions = questions_of(f.limit)
    scores, answers = [], {}
    for name, workdir in (("before SFT", f.before), ("after SFT", f.after)):
        try:
            model = load(workdir, "float32")
        except (ConfigError, ValueError, OSError) as error:
            raise SystemExit(f"error: {error}") from error
        answers[name] = ask(model, questions)
        scores.append(score(name, "as it is", questions, answers[name]))
        scores.append(score(name, "white (control)", questions, ask(model, questions, blank=True)))
    table = Table("model", "image", "well formed", "correct", "n")
    for s in scores:
        table.add_row(s.model, s.image, f"{s.well_formed:.3f}", f"{s.correct:.3f} ± {s.stderr:.3f}", str(s.n))
    Console().print(table)
    out = epath.Path(f.out or f.after)
    out.mkdir(parents=True, exist_ok=True)
    (out / "conversations.json").write_text(json.dumps([dataclasses.asdict(s) for s in scores], indent=1))
    (out / "conversations.html").write_text(page(scores, questions, answers))
    print(f"{out / 'conversations.html'}: {min(SHOWN, len(questions))} conversations")


if __name__ == "__main__":
    define_flags()
    app.run(main)
