"""One process of the test that kills a run inside an orchestrator's episodes: real training, engine and swarm runtime.

argv: JSON with workdir, folder (corpus and tokenizer), steps, kill (SIGKILL in this turn of a subagent, counted from 1;
0: never). First turns are forced to two tasks at the same time, later ones are drawn freely, and a run is worth what
the length of its answer says: something to learn from, of an untrained model. Prints `RESULT` and JSON: status, digest
of the parameters, mean number of subagents and of rewards of each iteration.
"""

import json
import os
import signal
import sys
from pathlib import Path

from kimi_jax import config as c
from kimi_jax.agents.finder import FINDER, Finder
from kimi_jax.agents.orchestration import FinishedRun
from kimi_jax.config_rl import OrchestratorConfig, RLConfig, RolloutConfig, TaskConfig
from kimi_jax.data.conversation import ARGUMENTS, CALL, CALL_END
from kimi_jax.data.tokenizer import load_tokenizer
from kimi_jax.rl import run as running
from kimi_jax.rl import worker
from tests.rl.learning_program import digest_of
from tests.rl.scripted import MODEL, ForcedEngine, turn
from tests.rl.tiny_run import OPTIMIZER


def configure(wanted: dict) -> c.TrainConfig:
    folder = Path(wanted["folder"])
    rollout = RolloutConfig(
        prompts=2, samples=4, max_new_tokens=128, slots=8, tokens_per_call=8, repeat_period=0, max_draws=1.0,
        drop_uninformative=False,
    )  # fmt: skip
    rl = RLConfig(
        {"wide": TaskConfig("orchestrate", path="wide/2"), "chain": TaskConfig("orchestrate", path="chain/2")},
        rollout, orchestrator=OrchestratorConfig(corpus=str(folder / "corpus"), turns=3, anneal=4),
    )  # fmt: skip
    data = c.DataConfig(
        tokenizer=str(folder / "tokenizer.json"), sequence_length=512, num_packs=1, rows_per_pack=8, vision_bins=()
    )
    return c.TrainConfig(
        workdir=wanted["workdir"], steps=wanted["steps"], log_interval=1, model=MODEL, data=data, optimizer=OPTIMIZER,
        rl=rl, checkpoint=c.CheckpointConfig(interval=2), mesh=c.MeshConfig(1),
    )  # fmt: skip


def task(country: str, number: int) -> list[str]:
    arguments = json.dumps({"agent": FINDER, "prompt": country})
    return [CALL, f"functions.assign_task:{number}", ARGUMENTS, arguments, CALL_END]


def kill_at(turn_of_subagent: int) -> None:
    """Kills this process when so many turns of subagents have begun, while their siblings are at work."""
    complete, count = Finder.complete, 0

    async def counted(self, request):
        nonlocal count
        count += 1
        if count == turn_of_subagent:
            os.kill(os.getpid(), signal.SIGKILL)
        return await complete(self, request)

    Finder.complete = counted  # type: ignore[method-assign]


def main() -> None:
    wanted = json.loads(sys.argv[1])
    if wanted["kill"]:
        kill_at(wanted["kill"])
    config = configure(wanted)
    ForcedEngine.tokenizer = load_tokenizer(config.data.tokenizer)
    ForcedEngine.first = turn(ForcedEngine.tokenizer, "", [task("Ghana", 0), task("Togo", 1)])
    worker.Engine = ForcedEngine  # type: ignore[misc]
    FinishedRun.item_f1 = property(lambda self: len(self.result.answer) % 7 / 6)  # type: ignore[assignment]
    status = running.run(config)
    rows = [json.loads(line)["data"] for line in (Path(wanted["workdir"]) / "metrics.jsonl").read_text().splitlines()]
    found = {name: [row[name] for row in rows] for name in ("subagents", "reward_mean")}
    print("RESULT", json.dumps({"status": status, "digest": digest_of(Path(wanted["workdir"]))} | found))


if __name__ == "__main__":
    main()
