"""Many swarms on one engine: their turns are sampled together, token in and token out, whatever the clock says."""

import dataclasses
import json

import pytest

from kimi_jax.agents.batched_model import BatchedModel, EpisodeModel
from kimi_jax.agents.finder import Finder, question
from kimi_jax.agents.orchestration import PlannedRun, play, settings, write_corpus
from kimi_jax.config import preset
from kimi_jax.data.conversation import ARGUMENTS, CALL, CALL_END, CALLS, CALLS_END
from kimi_jax.infer.request import Completion
from kimi_jax.rl.swarm_trajectory import trajectory
from tests.serve.server import byte_tokenizer

TOKENIZER = byte_tokenizer()
END = TOKENIZER.special_id("<|im_end|>")


class Engine:
    """Assigns all lines of the question at the same time, then cites the calls. `batches`: requests of each run."""

    version = 3
    config = dataclasses.replace(preset("demo"), media_placeholder_token_id=TOKENIZER.media_pad_id)

    def __init__(self, ends_with=END):
        self.batches, self.ends_with = [], ends_with

    def run(self, requests):
        self.batches.append(requests)
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        prompt = TOKENIZER.decode(request.token_ids)
        if CALL in prompt:
            text = " ".join(str(i) for i in range(prompt.count(CALL)))
        else:
            names = [line[2:] for line in prompt.splitlines() if line[:2] in ("1 ", "2 ")]
            names[-1] = names[-1].partition("<|im_end|>")[0]
            text = CALLS + "".join(self._call(i, name) for i, name in enumerate(names)) + CALLS_END
        ids = (*TOKENIZER.encode(text, allow_special_tokens=True), self.ends_with)
        return Completion(ids, (-0.5,) * len(ids), "stop", len(request.token_ids), 0, ())

    @staticmethod
    def _call(i, name):
        arguments = json.dumps({"agent": "finder", "prompt": name})
        return f"{CALL}functions.assign_task:{i}{ARGUMENTS}{arguments}{CALL_END}"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def played(engine, corpus, episodes=3, max_length=4096):
    batch = BatchedModel(engine, TOKENIZER, max_length)
    asked = [question("wide", i, 2) for i in range(episodes)]
    runs = [PlannedRun(q, EpisodeModel(batch, i, f"seed/{i}"), Finder()) for i, q in enumerate(asked)]
    return play(runs, corpus, settings(20, 4, 512))


def test_turns_of_all_episodes_are_sampled_in_one_call_in_their_order(corpus):
    engine = Engine()
    assert [p.item_f1 for p in played(engine, corpus)] == [1.0, 1.0, 1.0]
    assert [len(batch) for batch in engine.batches] == [3, 3]
    seeds = [request.sampling.seed for batch in engine.batches for request in batch]
    assert len(set(seeds)) == 6
    again = Engine()
    played(again, corpus)
    assert [r.sampling.seed for batch in again.batches for r in batch] == seeds


def test_trajectory_is_one_context_of_the_ids_that_were_sampled(corpus):
    engine = Engine()
    tree = trajectory(played(engine, corpus, episodes=1)[0].events)
    (context,) = tree.contexts()
    sampled = [segment for segment in tree.segments if segment.sampled.any()]
    assert len(context) == 4 and len(sampled) == 2
    first, second = (batch[0].token_ids.tolist() for batch in engine.batches)
    assert second[: len(first) + len(sampled[0].tokens)] == [*first, *sampled[0].tokens.tolist()]
    assert {int(v) for segment in sampled for v in segment.versions} == {3}


def test_media_pad_ends_an_episode_before_it_is_recorded(corpus):
    (run,) = played(Engine(ends_with=TOKENIZER.media_pad_id), corpus, episodes=1)
    assert run.result.status == "error" and not any(e.kind == "step" for e in run.events)


def test_conversation_without_room_ends_its_episode(corpus):
    (run,) = played(Engine(), corpus, episodes=1, max_length=64)
    assert run.result.status == "error" and "64 tokens" in run.events[-1].detail["note"]


def test_failing_engine_ends_every_episode_and_the_runs_come_back(corpus):
    class Broken(Engine):
        def run(self, requests):
            raise RuntimeError("out of pages")

    runs = played(Broken(), corpus)
    assert [run.result.status for run in runs] == ["error"] * 3
    assert all("out of pages" in run.events[-1].detail["note"] for run in runs)


def test_signal_while_sampling_ends_all_runs_and_comes_out_as_it_was_raised(corpus):
    class Interrupted(BaseException):
        pass

    class Interrupting(Engine):
        def run(self, requests):
            if self.batches:
                raise Interrupted
            return super().run(requests)

    with pytest.raises(Interrupted):
        played(Interrupting(), corpus)
