"""One process of the tests of an engine over many hosts: joins the others, then does the tasks of argv, by name.

  alike    every host calls its engine in the same way
  lead     host 0 asks, the others follow
  die      the same, but the last host kills itself in its second step; the others say how they end

More requests than slots: answers of different lengths, images, seeds and none, a group, a grammar, one that is
cancelled. Each task prints a line `RESULT` with JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys

import jax

jax.config.update("jax_platforms", "cpu")

import numpy as np  # noqa: E402

from kimi_jax import hosts, sharding  # noqa: E402
from kimi_jax.infer import lockstep  # noqa: E402
from kimi_jax.infer.engine import Engine  # noqa: E402
from kimi_jax.infer.request import Request, Sampling, TokenEvent  # noqa: E402
from tests.infer.test_engine import make_image, text, with_image  # noqa: E402
from tests.nn import tiny  # noqa: E402

CONFIG = dataclasses.replace(tiny.CONFIG, num_hidden_layers=2)  # one layer of experts, one without


class Even:
    """A grammar of even tokens."""

    def start(self) -> Even:
        return self

    def accept(self, token: int) -> None:
        assert token % 2 == 0

    def allowed(self) -> np.ndarray:
        return np.full(2, 0x55555555, np.uint32)


def requests() -> list[Request]:
    """Greedy and drawn, of several lengths; two show the same image, one has a grammar, one nobody's seed."""
    found = [Request(text(i, n), sampling=Sampling(0.0, max_new_tokens=2 + i)) for i, n in enumerate((3, 9, 20, 5, 12))]
    found += [Request(text(i, 6), sampling=Sampling(1.0, 0.9, seed=i, max_new_tokens=3)) for i in range(2)]
    found += [with_image(3, 5, make_image(1), 2), with_image(4, 14, make_image(1), 9)]
    found += [Request(text(7, 6), sampling=Sampling(1.0, seed=3, max_new_tokens=4), grammar=Even())]
    return [*found, Request(text(8, 6), sampling=Sampling(1.0, max_new_tokens=3))]


def make_engine() -> Engine:
    return Engine(
        CONFIG, tiny.params(CONFIG), slots=4, page_size=4, num_pages=40, max_sequence_length=64, chunks=(4,),
        mesh=sharding.serving_mesh() if jax.device_count() > 1 else None,
    )  # fmt: skip


def run(engine: Engine | lockstep.Leader) -> list[list]:
    """Of each request its tokens and how it ended; the last one is cancelled after three steps."""
    numbers = [engine.submit(request) for request in requests()]
    cancelled = engine.submit(Request(text(9, 30), sampling=Sampling(0.0, max_new_tokens=20)), ("here", "me"))
    found: dict[int, list[TokenEvent]] = {number: [] for number in (*numbers, cancelled)}
    for step in range(1000):
        if step == 3:
            engine.cancel(cancelled)
        for event in engine.step():
            found[event.request_id].append(event)
        if engine.idle:
            break
    return [[[e.token_id for e in found[n]], found[n][-1].finish_reason] for n in numbers]


def leave(why: str) -> None:
    """The ordinary way out would wait for the dead."""
    print("RESULT", json.dumps(why), flush=True)
    os._exit(hosts.RESTART)


def lead_or_follow(engine: Engine, links: list[lockstep.Link], dies: bool) -> list | None:
    if jax.process_index():
        if dies and jax.process_index() == jax.process_count() - 1:
            step, left = engine.step, [2]

            def fatal(tokens: int | None) -> list[TokenEvent]:
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return step(tokens)

            engine.step = fatal  # type: ignore[method-assign]
        return lockstep.follow(engine, links[0], leave)
    leader = lockstep.Leader(engine, links)
    leader.watch(lambda why: None)
    try:
        found = run(leader)
    except lockstep.HostLost as error:
        leave(str(error))
    leader.close()
    return found


def main(*tasks: str) -> None:
    hosts.start()
    engine = make_engine()
    for task in tasks:
        engine.set_params(tiny.params(CONFIG), version=0)  # forgets the prefixes of the task before
        result = run(engine) if task == "alike" else lead_or_follow(engine, lockstep.meet(), task == "die")
        print("RESULT", json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
