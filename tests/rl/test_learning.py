"""Learning gates: a reward alone teaches what it should, and one that is never met teaches nothing.

Whole runs of the one trainer, each in a process of its own on one device. `make test` has the first; the others are
`slow`. Thresholds lie well below what was reached, because other processors round otherwise, and far above chance.
"""

import json
import os
import subprocess
import sys

import pytest

from kimi_jax.agents.orchestration import conversations, settings, write_corpus
from kimi_jax.data.tokenizer import train_tokenizer
from tests.environment import REPO
from tests.rl import scripted
from tests.rl.tiny_run import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("learning"))


def start(workdir, tokenizer, kind, steps, program="learning_program", **more):
    """The finished process, and its RESULT if it came so far."""
    wanted = {"workdir": str(workdir), "tokenizer": str(tokenizer), "kind": kind, "steps": steps} | more
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", f"tests.rl.{program}", json.dumps(wanted)]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    found = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return done, found[0] if found else None


def learn(workdir, tokenizer, kind, steps, **more):
    done, found = start(workdir, tokenizer, kind, steps, **more)
    assert found and found["status"] == 0, done.stderr[-3000:]
    return found


def test_copying_is_learned_from_an_untrained_model(tokenizer, tmp_path):
    """One of 8 symbols, of 320 tokens: chance is 0.003. Sampler and trainer agree: the k3 estimate stays below 1e-6."""
    found = learn(tmp_path, tokenizer, "copy", 40)
    assert found["rewards"][0] < 0.05 and max(found["rewards"]) > 0.5
    assert found["final"]["score"] > 0.5
    assert found["mismatch"] < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_copying_is_learned_with_every_seed(tokenizer, tmp_path, seed):
    """Seed 2 stays at 0.48, after 45 iterations and after 70: it has dropped half of the symbols, whose groups then say
    nothing. A constant answer is right once in eight times."""
    assert learn(tmp_path, tokenizer, "copy", 45, seed=seed)["final"]["score"] > 0.3


@pytest.mark.slow
def test_all_or_nothing_reward_that_is_never_met_teaches_nothing(tokenizer, tmp_path):
    """The control: with a prior of 1 in 10^10 there is nothing to reinforce; who learns this cheats."""
    found = learn(tmp_path, tokenizer, "reverse_sparse", 20, rollout={"max_new_tokens": 5, "max_draws": 1.0})
    assert max(found["rewards"]) == 0 and found["final"]["score"] < 0.02


@pytest.mark.slow
def test_killed_inside_a_rollout_a_run_ends_with_the_same_weights(tokenizer, tmp_path):
    """Answers in parts, groups that wait, Toggle's phase and the next problem are in the checkpoint: SIGKILL in the
    middle of an iteration between two checkpoints leaves no trace, bit for bit."""
    more = {
        "checkpoint": 2,
        "rollout": {"prompts": 8, "samples": 4, "max_new_tokens": 4, "max_staleness": 2, "tokens_per_iteration": 2},
        "toggle": {"period": 2, "threshold": 0.1},
    }  # fmt: skip
    expected = learn(tmp_path / "whole", tokenizer, "copy", 9, **more)
    done, found = start(tmp_path / "killed", tokenizer, "copy", 9, **more, kill=9)
    assert done.returncode == -9 and found is None
    assert learn(tmp_path / "killed", tokenizer, "copy", 9, **more)["digest"] == expected["digest"]


@pytest.mark.slow
def test_killed_inside_an_episode_a_run_ends_with_the_same_weights(tmp_path):
    """Calls whose results had come are lost with the process; those of the checkpoint are run again in fresh
    interpreters, as they are in the run that nobody kills. Bit for bit, although tools end in any order."""
    tokenizer = scripted.write_tokenizer(tmp_path)
    more = {"kind": "product", "steps": 6, "program": "episode_program"}
    done, expected = start(tmp_path / "whole", tokenizer, **more, kill=0)
    assert expected and expected["status"] == 0, done.stderr[-3000:]
    assert expected["tool_calls"] > 41 and expected["tool_errors"] == expected["tool_differed"] == 0
    assert expected["stale"] > 0  # episodes went on over several versions of the weights
    done, found = start(tmp_path / "killed", tokenizer, **more, kill=41)
    assert done.returncode == -9 and found is None
    assert any(folder.name.isdigit() for folder in (tmp_path / "killed" / "checkpoints").iterdir())
    done, found = start(tmp_path / "killed", tokenizer, **more, kill=0)
    assert found and found["digest"] == expected["digest"], done.stderr[-3000:]


@pytest.mark.slow
def test_killed_while_subagents_are_at_work_a_run_ends_with_the_same_weights(tmp_path):
    """Runs of a swarm begin again with their iteration, and make the same. SIGKILL comes in the fourth iteration, two
    after the checkpoint, in one of 16 subagents that are at work at the same time."""
    corpus = write_corpus(tmp_path / "corpus")
    told = conversations(6, corpus, settings(14, 6, 256), 1.0, seed=0)
    train_tokenizer([json.dumps(messages) for messages in told] * 20, scripted.VOCABULARY, tmp_path / "tokenizer.json")
    more = {"kind": "orchestrate", "steps": 6, "program": "orchestrator_program", "folder": str(tmp_path)}
    expected = learn(tmp_path / "whole", "", **more, kill=0)
    assert min(expected["subagents"]) >= 2 and len(set(expected["reward_mean"])) > 1
    done, found = start(tmp_path / "killed", "", **more, kill=170)
    assert done.returncode == -9 and found is None
    assert any(folder.name.isdigit() for folder in (tmp_path / "killed" / "checkpoints").iterdir())
    assert learn(tmp_path / "killed", "", **more, kill=0)["digest"] == expected["digest"]
