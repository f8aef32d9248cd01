"""The project's own engine and server under a swarm: tool calls from tokens, ids for RL, shared prefixes."""

import dataclasses
import json

import anyio
import pytest

from kimi_jax.agents.config import SwarmConfig
from kimi_jax.agents.journal import read_run
from kimi_jax.agents.local_model import LocalModel
from kimi_jax.agents.model import Call, EndpointModel, ModelError, ModelRequest, RateLimited
from kimi_jax.agents.swarm import Swarm
from kimi_jax.agents.tools import from_function
from kimi_jax.config import preset
from kimi_jax.data.conversation import ARGUMENTS, CALL, CALL_END, CALLS, CALLS_END
from kimi_jax.infer.engine import Engine
from kimi_jax.infer.line import NOBODY
from kimi_jax.rl.swarm_trajectory import trajectory
from tests.agents.scripts import orchestrator, turn
from tests.serve.server import ScriptedEngine, byte_tokenizer, load_checkpoint, serving

TOKENIZER = byte_tokenizer()


class SwarmEngine(ScriptedEngine):
    """Speaks for the orchestrator and its subagents, by what stands in the prompt."""

    def __init__(self, children):
        super().__init__(TOKENIZER, self.speak)
        self.children = children
        self.config = dataclasses.replace(preset("demo"), media_placeholder_token_id=TOKENIZER.media_pad_id)

    def submit(self, request, caller=NOBODY):
        number = len(self.requests)
        self.requests[number] = request
        said = self.script(TOKENIZER.decode(request.token_ids))
        self.left[number] = [*said, TOKENIZER.special_id("<|im_end|>")]
        return number

    def speak(self, prompt):
        turn = prompt.count(CALL)
        if "You lead." not in prompt:
            text = "I counted."
        elif turn == 0:
            text = call("create_subagent", [{"name": "counter", "system_prompt": "You count."}])
        elif turn == 1:
            text = call("assign_task", [{"agent": "counter", "prompt": f"Count {i}."} for i in range(self.children)])
        else:
            text = f"All {prompt.count('I counted.')} have counted."
        return TOKENIZER.encode("hm</think>" + text, allow_special_tokens=True)


def call(name, arguments):
    calls = (f"{CALL}functions.{name}:{i}{ARGUMENTS}{json.dumps(a)}{CALL_END}" for i, a in enumerate(arguments))
    return f"{CALLS}{''.join(calls)}{CALLS_END}"


def swarm_of(model, path=None):
    return Swarm(model, config=SwarmConfig(system_prompt="You lead.", max_parallel=8), journal=path)


def test_local_model_runs_a_swarm_and_its_record_is_what_rl_trains_on(tmp_path):
    engine = SwarmEngine(5)
    path = tmp_path / "run.sqlite"

    async def main():
        async with LocalModel(engine, TOKENIZER, "tiny") as model:
            model.version = 7
            return await swarm_of(model, path).run("How many?")

    result = anyio.run(main)
    assert result.answer == "All 5 have counted." and set(result.outcomes.values()) == {"ok"}
    record = trajectory(read_run(path)[1])
    sampled = [s.tokens[s.sampled].tolist() for s in record.segments if s.sampled.any()]
    assert sampled[-1] == [*TOKENIZER.encode("hm</think>All 5 have counted.", True), TOKENIZER.special_id("<|im_end|>")]
    assert sum(segment.frozen for segment in record.segments) == 5
    assert {int(v) for s in record.segments for v in s.versions[s.sampled]} == {7}
    assert record.num_sampled() == sum(len(s) for s, seg in zip(sampled, drawn(record), strict=True) if not seg.frozen)
    prompts = {tuple(request.token_ids.tolist()) for request in engine.requests.values()}
    contexts = [sum((record.segments[i].tokens.tolist() for i in path), []) for path in record.contexts()]  # noqa: RUF017
    assert all(any(tuple(c[: len(p)]) == p for c in contexts) for p in prompts), "the prompts are those that were read"


def drawn(record):
    return [segment for segment in record.segments if segment.sampled.any()]


def test_local_model_refuses_what_the_engine_refuses():
    async def main(engine, waiting=256):
        async with LocalModel(engine, TOKENIZER, "tiny", waiting=waiting) as model:
            return await model.complete(ModelRequest("root", [{"role": "user", "content": "x" * 5000}], [], 100))

    engine = ScriptedEngine(TOKENIZER, lambda prompt: [])
    engine.config = SwarmEngine(0).config
    with pytest.raises(ModelError, match="more than 1000"):
        anyio.run(main, engine)
    with pytest.raises((RateLimited, ModelError)):
        anyio.run(main, engine, 0)


def test_serve_answers_a_swarm_over_http(tmp_path):
    engine = SwarmEngine(12)

    async def main(address):
        model = EndpointModel(f"{address}/v1", "")
        try:
            await model.take_first_name()
            return await swarm_of(model, tmp_path / "run.sqlite").run("How many?")
        finally:
            await model.aclose()

    with serving(engine, TOKENIZER, engine.config) as address:
        result = anyio.run(main, address)
    assert result.answer == "All 12 have counted." and set(result.outcomes.values()) == {"ok"}
    assert result.usage.prompt_tokens == sum(len(r.token_ids) for r in engine.requests.values())


@pytest.mark.slow
def test_serve_shares_the_prefixes_of_32_conversations(tmp_path, record_property):
    """32 subagents of four turns each on the real engine: what the prefix cache gives, and the most that it could."""
    model = load_checkpoint(tmp_path / "model")
    engine = Engine(model.config, model.params, slots=32, max_sequence_length=4096)
    events = []

    def lookup(word: str) -> str:
        """Looks a word up."""
        return f"{word}: " + "a result of a few words " * 8

    async def main(address):
        endpoint = EndpointModel(f"{address}/v1", "tiny", timeout=600.0)

        async def children(request):  # random weights call no tool, so their answers get a call
            answer = await endpoint.complete(dataclasses.replace(request, max_tokens=16))
            number = turn(request)
            calls = (Call(f"call_{number}", "lookup", json.dumps({"word": f"w{number}"})),) if number < 3 else ()
            return dataclasses.replace(answer, text=answer.text.strip() or "-", calls=calls)

        script = orchestrator([f"task {i}" for i in range(32)], children)
        swarm = Swarm(script, [from_function(lookup)], SwarmConfig(max_parallel=32), observers=[events.append])
        try:
            return await swarm.run("Q?"), swarm.runtime.scheduler.peak
        finally:
            await endpoint.aclose()

    with serving(engine, model.tokenizer, model.config) as address:
        result, peak = anyio.run(main, address)
        stats = engine.stats()
    assert set(result.outcomes.values()) == {"ok"} and len(result.outcomes) == 33 and peak == 32
    prompts = {}
    for event in events:
        if event.kind == "step" and event.parent:
            prompts.setdefault(event.agent, []).append(event.usage.prompt_tokens)
    assert {len(sizes) for sizes in prompts.values()} == {4}
    total = stats["prefix_hit_tokens"] + stats["prefill_tokens"]
    assert total == sum(map(sum, prompts.values()))
    share = stats["prefix_hit_tokens"] / total
    # all first prompts are one but for the task, and every later one begins with the one before
    most = (sum(sum(sizes[:-1]) for sizes in prompts.values()) + sum(sizes[0] for sizes in prompts.values())) / total
    print(f"{share:.0%} of {total:,} prompt tokens came from the prefix cache, of at most about {most:.0%}")
    record_property("share of prompt tokens from the prefix cache", share)
    record_property("most that it could be", most)
    assert share > 0.5
