"""lm-eval drives a tiny model of ours on local tasks: multiple choice, generation and rolling log-likelihood.

Runs in its own environment (`make test-lm-eval`): lm-eval brings torch. No network: tasks are YAML and JSONL files that
the test writes.
"""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from kimi_jax.config import DataConfig, TrainConfig, preset
from kimi_jax.data.tokenizer import train_tokenizer
from kimi_jax.packed_batch import padding
from tests.eval.scripted import ScriptedEngine

pytestmark = pytest.mark.lm_eval
lm_eval = pytest.importorskip("lm_eval", reason="needs the extra [lm_eval]: make test-lm-eval")

COLOURS = {"sky": "blue", "grass": "green", "blood": "red", "snow": "white"}
TASKS = {
    "colour_choice": """
task: colour_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "The colour of {{thing}} is"
doc_to_target: answer
doc_to_choice: ["blue", "green", "red", "white"]
metric_list: [{metric: acc}]
""",
    "colour_write": """
task: colour_write
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
generation_kwargs: {until: ["."], max_gen_toks: 8, do_sample: false}
doc_to_text: "The colour of {{thing}} is"
doc_to_target: " {{colour}}"
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "colour_text": """
task: colour_text
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "The colour of {{thing}} is {{colour}}."
metric_list: [{metric: bits_per_byte}]
""",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    text = " ".join(f"The colour of {t} is {c}." for t, c in COLOURS.items())
    return train_tokenizer([text] * 30, 400, tmp_path_factory.mktemp("tokenizer") / "t.json")


@pytest.fixture
def task_manager(tmp_path, monkeypatch):
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    data = tmp_path / "colours.jsonl"
    rows = [{"thing": t, "colour": c, "answer": list(COLOURS.values()).index(c)} for t, c in COLOURS.items()]
    data.write_text("\n".join(map(json.dumps, rows)))
    for name, text in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(text.replace("DATA", str(data)).lstrip())
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


def config(tokenizer):
    model = dataclasses.replace(preset("demo"), vocab_size=tokenizer.vocab_size, vision=None, num_hidden_layers=2)
    return TrainConfig(model=model, data=DataConfig(sequence_length=32, num_packs=8, vision_bins=()))


def run(lm, task_manager, name):
    results = lm_eval.simple_evaluate(lm, tasks=[name], task_manager=task_manager, bootstrap_iters=0, log_samples=False)
    return {k.split(",")[0]: v for k, v in results["results"][name].items() if isinstance(v, float)}


def knowing(tokenizer):
    """A stand-in for the compiled model that has learned the four sentences by heart."""
    sentences = [tokenizer.encode(f"The colour of {t} is {c}.") for t, c in COLOURS.items()]

    def apply(params, batch, ends, candidates):
        v = tokenizer.vocab_size
        logp = np.full((*batch.tokens.shape, v), -math.log(v), np.float32)
        for r, t in np.argwhere(batch.segment_ids > 0):
            seen = batch.tokens[r, t - batch.positions[r, t] : t + 1].tolist()
            for sentence in sentences:
                if sentence[: len(seen)] == seen and len(seen) < len(sentence):
                    logp[r, t] = -30.0
                    logp[r, t, sentence[len(seen)]] = 0.0
        nll = -np.take_along_axis(logp, batch.targets[..., None], axis=-1)[..., 0]
        return nll, logp.argmax(-1), np.take_along_axis(logp.reshape(-1, v)[ends], candidates, axis=-1)

    return apply


def writing(tokenizer):
    """The same stand-in for the engine."""
    sentences = [tokenizer.encode(f"The colour of {t} is {c}.") for t, c in COLOURS.items()]

    def next_token(request, made):
        seen = [*request.token_ids.tolist(), *made]
        return next((s[len(seen)] for s in sentences if s[: len(seen)] == seen and len(seen) < len(s)), 0)

    return ScriptedEngine(next_token)


def test_model_that_knows_scores_one_through_lm_eval(tokenizer, task_manager):
    from kimi_jax.eval.lm_eval_adapter import KimiLM

    lm = KimiLM(None, config(tokenizer), tokenizer, knowing(tokenizer), engine=writing(tokenizer))
    assert run(lm, task_manager, "colour_choice")["acc"] == 1.0
    assert run(lm, task_manager, "colour_write")["exact_match"] == 1.0


def test_real_model_gives_lm_eval_its_own_log_likelihoods(tokenizer, task_manager):
    """Bits per byte that lm-eval reports = those of logits computed here without packing (float32: 1e-4)."""
    from kimi_jax.eval.lm_eval_adapter import KimiLM
    from kimi_jax.nn import kimi, param

    settings = config(tokenizer)
    params = param.unbox(kimi.init_params(settings.model, jax.random.key(0)))
    lm = KimiLM(params, settings, tokenizer)
    reported = run(lm, task_manager, "colour_text")["bits_per_byte"]
    model = kimi.KimiK25(settings.model)
    bits, size = 0.0, 0
    for thing, colour in COLOURS.items():
        text = f"The colour of {thing} is {colour}."
        ids = np.array([[tokenizer.eos_id, *tokenizer.encode(text)]], np.int32)
        batch = padding(1, ids.size, 1, settings.model.pad_token_id)
        batch.tokens[:], batch.positions[:], batch.segment_ids[:] = ids, np.arange(ids.size), 1
        logits, _ = model.apply({"params": params}, batch)
        logp = jax.nn.log_softmax(logits[0, :-1])
        bits -= float(np.take_along_axis(np.asarray(logp), ids[0, 1:, None], axis=-1).sum()) / math.log(2)
        size += len(text.encode())
    np.testing.assert_allclose(reported, bits / size, rtol=1e-4)
    choice = run(lm, task_manager, "colour_choice")["acc"]
    assert 0.0 <= choice <= 1.0


def test_sampling_is_refused_and_contexts_keep_their_spaces(tokenizer):
    from lm_eval.api.instance import Instance

    from kimi_jax.eval.lm_eval_adapter import KimiLM

    lm = KimiLM(None, config(tokenizer), tokenizer, knowing(tokenizer))

    def ask(kind, *arguments):
        return [Instance(request_type=kind, doc={}, arguments=arguments, idx=0)]

    with pytest.raises(ValueError, match="greedily"):
        lm.generate_until(ask("generate_until", "The", {"until": ["."], "do_sample": True, "temperature": 1.0}))
    (moved,) = lm.loglikelihood(ask("loglikelihood", "The colour of sky is ", "blue"))
    (plain,) = lm.loglikelihood(ask("loglikelihood", "The colour of sky is", " blue"))
    assert moved == plain == (0.0, True)
    ((wrong, greedy),) = lm.loglikelihood(ask("loglikelihood", "The colour of sky is", " red"))
    assert wrong <= -30.0 and greedy is False
