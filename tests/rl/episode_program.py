"""One process of the test that kills a run inside an episode: real training, engine and interpreters.

argv: JSON with workdir, tokenizer, steps, kill (SIGKILL when the results of this reply's calls have come, counted from
1; 0: never). First turns are forced to a call, later ones are drawn freely, and an answer is worth what its length
says: something to learn from, of an untrained model. Prints `RESULT` and JSON: status, digest of the parameters, counts
of calls of all iterations.
"""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

from kimi_jax import config as c
from kimi_jax.config import RLConfig, TaskConfig
from kimi_jax.config_rl import ToolConfig
from kimi_jax.rl import run as running
from kimi_jax.rl.episode import Interpreters
from kimi_jax.rl.tasks import Problem
from tests.rl.learning_program import digest_of
from tests.rl.scripted import MODEL, ForcedWorker, call, turn
from tests.rl.tiny_run import settings


class Worker(ForcedWorker):
    """Whose first turn sets a name and prints it."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.first = turn(self.tokenizer, "", [call("x = 6 * 7; print(x)")])


def configure(wanted: dict) -> c.TrainConfig:
    config = settings(
        Path(wanted["tokenizer"]).parent, wanted["workdir"], model=MODEL, prompts=2, samples=4, max_new_tokens=72,
        max_staleness=2, tokens_per_iteration=24, max_draws=3.0, drop_uninformative=True,
    )  # fmt: skip
    rl = RLConfig(
        {"toy": TaskConfig("product", tools=("ipython",))}, config.rl.rollout,
        tools=ToolConfig(turns=3, sessions=2, characters=200),
    )  # fmt: skip
    data = dataclasses.replace(config.data, sequence_length=512, rows_per_pack=8)
    return dataclasses.replace(
        config, steps=wanted["steps"], data=data, rl=rl, checkpoint=c.CheckpointConfig(interval=2)
    )


def kill_at(reply: int) -> None:
    """Kills this process when the calls of so many replies have given their results, before anybody has seen them."""
    finished, count = Interpreters.finished, 0

    def counted(self, wait):
        nonlocal count
        found = finished(self, wait)
        count += len(found)
        if count >= reply:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    Interpreters.finished = counted  # type: ignore[method-assign]


def main() -> None:
    wanted = json.loads(sys.argv[1])
    if wanted["kill"]:
        kill_at(wanted["kill"])
    running.RolloutWorker = Worker  # type: ignore[misc]
    Problem.reward = lambda self, answer: len(answer) % 7 / 6  # type: ignore[method-assign]
    status = running.run(configure(wanted))
    folder = Path(wanted["workdir"])
    rows = [json.loads(line)["data"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    counts = {
        name: sum(row[name] for row in rows) for name in ("tool_calls", "tool_errors", "tool_replayed", "tool_differed")
    }
    stale = sum(row["staleness"].get("1", 0) for row in rows)
    print("RESULT", json.dumps({"status": status, "digest": digest_of(folder), "stale": stale} | counts))


if __name__ == "__main__":
    main()
