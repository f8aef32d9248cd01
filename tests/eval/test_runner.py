"""The runner with made-up models: one that knows all answers, one that knows nothing, one that is blind."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from kimi_jax import sharding
from kimi_jax.config import DataConfig, MeshConfig, TrainConfig, preset
from kimi_jax.data.example import Image, Text
from kimi_jax.data.tokenizer import train_tokenizer
from kimi_jax.eval import packed, runner, scorers, tasks
from kimi_jax.eval.__main__ import table, write_rows, write_samples
from kimi_jax.eval.tasks import Control, EvalTask, Question
from kimi_jax.nn.kimi import init_params
from kimi_jax.nn.param import unbox
from tests.eval.scripted import ScriptedEngine

NAMES = ("red", "green", "blue", "grey")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    text = "Q: which colour is it?\nA: red\nA: green\nA: blue\nA: grey\n0 1 2 3 4 5 6 7 8 9\nsome text to be scored"
    return train_tokenizer([text] * 20, 400, tmp_path_factory.mktemp("tokenizer") / "t.json")


def config(tokenizer, **data):
    values = {"sequence_length": 64, "num_packs": 2, "vision_bins": ((16, 2), (64, 1))} | data
    return TrainConfig(
        model=dataclasses.replace(preset("demo"), vocab_size=tokenizer.vocab_size), data=DataConfig(**values)
    )


def lookup(rule, tokenizer):
    """A stand-in for the compiled model: `rule(document, text so far) -> next token or None (no idea)`.

    It sees what the model sees: tokens, segments and, for media, the mean pixel of the document's features' patches.
    """

    def apply(params, batch, ends, candidates):
        v = tokenizer.vocab_size
        rows, length = batch.tokens.shape
        logp = np.full((rows, length, v), -np.log(v), np.float32)
        for r in range(rows):
            for t in range(length):
                segment = batch.segment_ids[r, t]
                if segment == 0:
                    continue
                here = (batch.segment_ids[r, : t + 1] == segment).nonzero()[0]
                text = tokenizer.decode([int(i) for i in batch.tokens[r, here] if i != tokenizer.media_pad_id], True)
                token = rule(_brightness(batch, r, here), text)
                if token is not None:
                    logp[r, t] = -20.0
                    logp[r, t, token] = -1e-6
        nll = -np.take_along_axis(logp, batch.targets[..., None], axis=-1)[..., 0]
        return nll, logp.argmax(-1), np.take_along_axis(logp.reshape(-1, v)[ends], candidates, axis=-1)

    return apply


def writing(rule, tokenizer):
    """The same stand-in for the engine; without an idea it writes the first token."""

    def next_token(request, made):
        seen = np.concatenate([item.patches for item in request.media]).mean() if request.media else None
        ids = [int(i) for i in (*request.token_ids, *made) if i != tokenizer.media_pad_id]
        return rule(seen, tokenizer.decode(ids, True)) or 0

    return ScriptedEngine(next_token)


def stand_in(rule, tokenizer):
    """A scorer whose model is the rule, for likelihoods and for texts."""
    return packed.Scorer(None, config(tokenizer), tokenizer, lookup(rule, tokenizer), engine=writing(rule, tokenizer))


def _brightness(batch, row, here):
    slots = batch.feature_index[row, here]
    slots = slots[slots >= 0]
    if not len(slots):
        return None
    small, large = batch.vision
    flat = [b.patches[2 * row : 2 * row + 2] if b is small else b.patches[row : row + 1] for b in (small, large)]
    windows = np.concatenate([p.reshape(-1, 4 * p.shape[-1]) for p in flat])
    return float(windows[slots].mean())


def colour_task(kind="choice", **changes):
    """Images whose brightness names the colour; the question alone says nothing."""

    def build(limit):
        return [
            Question(
                (Image(np.full((28, 28 * (1 + i % 2), 3), 60 * (i % 4), np.uint8)), Text("Q: which colour is it?\nA:")),
                f" {NAMES[i % 4]}",
                tuple(f" {n}" for n in NAMES) if kind == "choice" else (),
                f"number {i}",
            )
            for i in range(limit)
        ]

    task = EvalTask(
        "colour", "vision_knowledge", "image", kind, tasks.METRICS[kind], "d", build, lambda q, m: 0.25,
        (Control("blank image", change=tasks.blank_image),), max_new_tokens=6, report_majority=True,
    )  # fmt: skip
    return dataclasses.replace(task, **changes)


def sighted(tokenizer, says=lambda brightness: NAMES[round(brightness / 60) % 4]):
    """Knows the answer from the image, token by token, then ends the line."""

    def rule(brightness, text):
        if brightness is None or "A:" not in text:
            return None
        answer = tokenizer.encode(f" {says(brightness)}\n")
        done = tokenizer.encode(text.split("A:")[1]) if text.split("A:")[1] else []
        return answer[len(done)] if len(done) < len(answer) and done == answer[: len(done)] else None

    return rule


# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["choice", "generate"])
def test_model_that_sees_scores_one_and_its_blank_control_does_not(tokenizer, kind):
    samples = []
    rows = runner.run_task(stand_in(sighted(tokenizer), tokenizer), colour_task(kind), 12, samples)
    assert [r.score for r in rows] == [1.0] * len(rows) and rows[0].stderr == 0.0
    assert rows[0].control == 0.25 and rows[0].majority == 0.25  # white reads as the first name: right for 3 of 12
    assert len(samples) == runner.SAMPLES and all(s.correct and s.media[0].shape[0] == 28 for s in samples)
    assert {s.control_answer for s in samples} == {"red"} and samples[1].gold == "green"


def test_model_that_knows_nothing_takes_the_first_choice_and_writes_nothing_right(tokenizer):
    scorer = stand_in(lambda b, t: None, tokenizer)
    same_length = colour_task(by_length=False)
    score = runner.run_task(scorer, same_length, 12)[0].score
    # with the same number of tokens in each name, all are equally likely: the first, right once in four
    lengths = {len(tokenizer.encode(f" {n}")) for n in NAMES}
    assert score == 0.25 or len(lengths) > 1
    assert runner.run_task(scorer, colour_task("generate"), 8)[0].score == 0.0


def test_blind_model_gains_nothing_over_its_control(tokenizer):
    scorer = stand_in(sighted(tokenizer, says=lambda b: "blue"), tokenizer)
    row = runner.run_task(scorer, colour_task(), 16)[0]
    assert row.score == row.control == row.chance == 0.25


def test_answer_to_another_question_is_a_control(tokenizer):
    task = colour_task("generate", controls=(Control("other", other_answers=True),), metrics=("exact_match",))
    row = runner.run_task(stand_in(sighted(tokenizer), tokenizer), task, 12)[0]
    assert (row.score, row.control, row.control_name) == (1.0, 0.0, "other")


def test_bits_per_byte_of_a_uniform_model(tokenizer):
    """log2(V) bits a token over the bytes of the scored tokens, also where a text takes several rows."""
    texts = ["some text to be scored, of words", "zqxjv " * 60]
    task = colour_task("text", build=lambda n: [Question((), t) for t in texts], modality="text",
                       controls=(Control("LZMA", score=lambda q: 9.0),), metrics=("bits_per_byte",))  # fmt: skip
    settings = config(tokenizer)
    row = runner.run_task(packed.Scorer(None, settings, tokenizer, lookup(lambda b, t: None, tokenizer)), task, 2)[0]
    tokens = [tokenizer.encode(t) for t in texts]
    assert len(tokens[1]) > settings.data.sequence_length
    pieces = [t[i : i + 64] for t in tokens for i in range(0, len(t), 64)]
    bytes_ = sum(tokenizer.token_bytes(p[1:]) for p in pieces)
    expected = sum(len(p) - 1 for p in pieces) * np.log2(tokenizer.vocab_size) / bytes_
    np.testing.assert_allclose(row.score, expected, rtol=1e-6)  # sums of float32
    assert row.control == 9.0


def test_choices_of_several_tokens_are_scored_whole(tokenizer):
    """One candidate token and a whole continuation are two ways to the same comparison."""
    digits = tuple(f" {d}" for d in "0123456789")  # a space, then the digit: one document with ten candidates
    mixed = (" 7", " 31", " 7 4")  # of different lengths: a document each
    question = Question((Text("some text"),), " 7", digits)
    logits = np.random.default_rng(0).normal(size=(tokenizer.vocab_size, tokenizer.vocab_size)).astype(np.float32)
    table_ = logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def bigram(params, batch, ends, candidates):
        logp = table_[batch.tokens]
        nll = -np.take_along_axis(logp, batch.targets[..., None], axis=-1)[..., 0]
        return nll, logp.argmax(-1), np.take_along_axis(logp.reshape(-1, logp.shape[-1])[ends], candidates, axis=-1)

    scorer = packed.Scorer(None, config(tokenizer), tokenizer, bigram)
    assert (
        len(scorer._documents(question)) == 1
        and len(scorer._documents(dataclasses.replace(question, choices=mixed))) == 3
    )

    def by_hand(choice):
        ids = tokenizer.encode("some text")[-1:] + tokenizer.encode(choice)
        return float(sum(table_[a, b] for a, b in itertools.pairwise(ids)))

    for choices in (digits, mixed):
        expected = scorers.pick([by_hand(c) for c in choices])
        assert scorer.choose([dataclasses.replace(question, choices=choices)], by_length=False) == [expected]


def test_many_documents_share_a_batch_and_none_is_lost(tokenizer):
    calls = []

    def counting(params, batch, ends, candidates):
        calls.append(int((batch.segment_ids > 0).sum()))
        return np.full(batch.tokens.shape, 2.0), batch.targets, np.zeros(candidates.shape)

    scorer = packed.Scorer(None, config(tokenizer), tokenizer, counting)
    documents = [scorer.encode((Text("some"),), " red" * (1 + k % 9)) for k in range(40)]
    scored = scorer.score(documents)
    assert len(scored) == 40 and all(s.greedy for s in scored)
    for document, result in zip(documents, scored, strict=True):
        assert result.nll == 2.0 * document.loss_weights.sum()
    assert len(calls) < 20 and sum(calls) == sum(len(d.tokens) for d in documents)


def test_text_that_is_too_long_loses_its_beginning(tokenizer):
    scorer = packed.Scorer(None, config(tokenizer), tokenizer, lookup(lambda b, t: None, tokenizer))
    document = scorer.encode((Text("some text " * 100),), " red")
    assert len(document.tokens) == 64 and document.loss_weights.sum() == len(tokenizer.encode(" red"))


def test_text_only_models_skip_tasks_with_images(tokenizer):
    blind = config(tokenizer)
    blind = dataclasses.replace(blind, model=dataclasses.replace(blind.model, vision=None))
    apply = lookup(lambda b, t: None, tokenizer)
    assert runner.evaluate(None, blind, ["easyvqa_open"], 4, tokenizer=tokenizer, apply=apply) == []


@pytest.mark.parametrize("devices", [1, 8])
def test_texts_are_those_of_repeated_full_forward_passes(tokenizer, devices, monkeypatch):
    """Greedy, with and without an image, by the engine over the mesh of the run; the next token of a pass is the
    candidate that the packed model gives the most. Float32: random weights have no ties that close."""
    real = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda mesh: real(mesh, jax.devices()[:devices]))
    settings = config(tokenizer, num_packs=8)
    model = dataclasses.replace(settings.model, num_hidden_layers=2, dtype="float32", initializer_range=0.2)
    settings = dataclasses.replace(settings, model=model, mesh=MeshConfig(devices))
    params = jax.jit(lambda: unbox(init_params(model, jax.random.key(0))))()
    scorer = packed.Scorer(params, settings, tokenizer)
    ids = list(range(tokenizer.vocab_size))
    tokens = [scorer.encode((Text(text),)) for text in ("some text", "which colour is it?\nA:")]
    contexts = [*tokens, scorer.encode((Image(np.full((28, 56, 3), 90, np.uint8)), Text("which colour")))]
    texts = scorer.generate(contexts, 4, stop=("\n", "q"))
    for context, text in zip(contexts, texts, strict=True):
        made = []
        while len(made) < 4 and tokenizer.eos_id not in made:
            longer = np.concatenate([context.tokens, np.array(made, np.int32)])
            document = scorer.from_tokens(longer, np.zeros(len(longer)), context)
            pieces = [ids[k : k + packed.MAX_CANDIDATES] for k in range(0, len(ids), packed.MAX_CANDIDATES)]
            scored = scorer.score([document] * len(pieces), pieces)
            made.append(int(np.argmax(np.concatenate([each.candidates for each in scored]))))
        whole = tokenizer.decode([i for i in made if i != tokenizer.eos_id], True)
        assert text == whole.split("\n")[0].split("q")[0]


def test_generation_leaves_out_the_beginning_of_a_text_that_fills_the_row(tokenizer):
    asked = []
    engine = ScriptedEngine(lambda request, made: asked.append(len(request.token_ids)) or 0)
    scorer = packed.Scorer(None, config(tokenizer), tokenizer, lookup(lambda b, t: None, tokenizer), engine=engine)
    long = scorer.encode((Text("some text " * 100),))
    scorer.generate([long], 4)
    scorer.generate([long], 60)
    assert (len(long.tokens), set(asked)) == (64, {60, 32})


def test_rows_and_samples_are_written_for_the_report(tokenizer, tmp_path):
    import json

    from PIL import Image as PILImage

    scorer = packed.Scorer(None, config(tokenizer), tokenizer, lookup(sighted(tokenizer), tokenizer))
    samples = []
    rows = runner.run_task(scorer, colour_task(), 4, samples)
    write_rows(rows, tmp_path / "results.json")
    write_samples(samples, tmp_path / "samples")
    row = json.loads((tmp_path / "results.json").read_text())[0]
    assert {"task", "modality", "metric", "score", "stderr", "control", "chance"} <= set(row) and row["score"] == 1.0
    entries = json.loads((tmp_path / "samples" / "samples.json").read_text())
    assert entries[3]["gold"] == entries[3]["answer"] == "grey" and entries[3]["correct"] is True
    with PILImage.open(tmp_path / "samples" / entries[3]["images"][0]) as image:
        assert image.size == (56, 28)
    assert table(rows).row_count == 1
