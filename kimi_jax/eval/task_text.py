"""Tasks with text only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from kimi_jax.data.example import Text
from kimi_jax.data.sources import demo_text as texts
from kimi_jax.data.sources.demo_base import generator, prompt
from kimi_jax.eval import scorers
from kimi_jax.eval.tasks import Control, EvalTask, Question, register, shuffled

# ------------------------------------------------------------------------------------------------------------ knowledge


def _capitals(limit: int) -> list[Question]:
    named = [c for c in texts.countries() if c.capital]
    questions = []
    for country in shuffled(named, limit):
        rng = generator("factbook_capital", "validation", named.index(country))
        others = [c.capital for c in named if c.region == country.region and c.capital != country.capital]
        if len(set(others)) < 3:
            others = [c.capital for c in named if c.capital != country.capital]
        wrong = rng.choice(sorted(set(others)), size=3, replace=False).tolist()
        wrong.insert(int(rng.integers(4)), country.capital)
        choices = tuple(map(texts.capital_reply, wrong))
        shown = texts.capital_prompt(country.name) + " …"
        context = (Text(texts.capital_prompt(country.name), 0.0),)
        questions.append(Question(context, texts.capital_reply(country.capital), choices, shown, country.name))
    return questions


def _without_country(question: Question, index: int) -> Question:
    return dataclasses.replace(question, context=(Text("The capital of the country is", 0.0),))


register(
    EvalTask(
        name="factbook_capital",
        column="text_knowledge",
        modality="text",
        kind="choice",
        metrics=("accuracy",),
        doc="Capitals of the World Factbook: likelihood of the right one among four of the same region, as the end of "
        "a sentence. Closed book: the training text states every capital, the choice is never seen. Control: the same "
        "choices without the country's name (likelier names, not knowledge).",
        build=_capitals,
        chance=lambda questions, metric: 0.25,
        controls=(Control("without the country", change=_without_country),),
    )
)

# ------------------------------------------------------------------------------------------------------------ reasoning


def _sums(limit: int) -> list[Question]:
    problems = [texts.problem(a, b, sign) for a, b in texts.operand_pairs("validation") for sign in "+-"]
    unique = sorted(set(problems))
    return [
        Question((Text(prompt(question), 0.0),), gold, (), question, question)
        for question, gold in shuffled(unique, limit)
    ]


register(
    EvalTask(
        name="arithmetic",
        column="text_reasoning",
        modality="text",
        kind="generate",
        metrics=("exact_match",),
        doc="Sums and differences of numbers up to 30; no question with these two operands, in either order, was "
        "trained on. Greedy generation, exact match. Control: the model's answer to another question.",
        build=_sums,
        chance=lambda questions, metric: float(np.mean([1 / 61 if "+" in q.shown else 1 / 31 for q in questions])),
        controls=(Control("answer to another question", other_answers=True),),
        max_new_tokens=4,
        report_majority=True,
    )
)

# ----------------------------------------------------------------------------------------------------------------- code

CONTEXT_LINES = 8
CONTEXT_CHARACTERS = 320


def _next_lines(limit: int) -> list[Question]:
    """One question for each of several places of every held-out file."""
    questions = []
    for name, text in texts.python_files("validation"):
        lines = text.split("\n")
        usable = [k for k in range(CONTEXT_LINES, len(lines)) if 8 <= len(lines[k].strip()) <= 60]
        rng = generator(f"python_next_line/{name}", "validation", 0)
        for k in rng.permutation(usable)[:20]:
            others = sorted({lines[j] for j in usable if abs(j - k) > CONTEXT_LINES} - {lines[k]})
            if len(others) < 3:
                continue
            choices = rng.choice(others, size=3, replace=False).tolist()
            choices.insert(int(rng.integers(4)), lines[k])
            before = ("\n".join(lines[k - CONTEXT_LINES : k]) + "\n")[-CONTEXT_CHARACTERS:]
            context = (Text(f"# {name}\n{before}", 0.0),)
            written = tuple(c + "\n" for c in choices)
            questions.append(Question(context, lines[k] + "\n", written, f"{name}, line {k + 1}:\n{before}", name))
    return shuffled(questions, min(limit, 400))


def _without_context(question: Question, index: int) -> Question:
    return dataclasses.replace(question, context=(Text("# code\n", 0.0),))


register(
    EvalTask(
        name="python_next_line",
        column="code",
        modality="text",
        kind="choice",
        metrics=("accuracy",),
        doc="Held-out files of the Python standard library: which line comes next, the real one or one of three from "
        "elsewhere in the same file? Likelihood a byte, at most 400 questions. Control: the same lines without what "
        "stands before them.",
        build=_next_lines,
        chance=lambda questions, metric: 0.25,
        controls=(Control("without the lines before", change=_without_context),),
        by_length=True,
    )
)

# -------------------------------------------------------------------------------------------------------- held-out text


def _documents(source: Callable[[str], Sequence[str]]) -> Callable[[int], list[Question]]:
    def build(limit: int) -> list[Question]:
        chosen = shuffled(source("validation"), min(limit, 400))
        return [Question((), text, (), text.split("\n")[0], text.split("\n")[0]) for text in chosen]

    return build


def _unigram(source: Callable[[str], Sequence[str]]) -> Callable[[Sequence[Question], str], float]:
    return lambda questions, metric: scorers.unigram_bits_per_byte(source("train"), [q.gold for q in questions])


LZMA = Control("LZMA", score=lambda questions: scorers.compressed_bits_per_byte([q.gold for q in questions]))

for _name, _source, _what in (
    ("wiki", texts.wiki_documents, "Leads of held-out Wikipedia articles"),
    ("factbook", texts.factbook_documents, "World Factbook sections of held-out countries"),
    ("python", texts.python_documents, "Held-out files of the Python standard library"),
):
    register(
        EvalTask(
            name=f"{_name}_bpb",
            column="language_modelling",
            modality="text",
            kind="text",
            metrics=("bits_per_byte",),
            doc=f"{_what}, at most 400 documents: bits per byte, lower is better. Control: LZMA on the same text; "
            "chance: byte frequencies of the training text.",
            build=_documents(_source),
            chance=_unigram(_source),
            controls=(LZMA,),
        )
    )
