"""One contestant of `benchmarks.swarm` in this process: prints a line of JSON.

    PYTHON benchmarks/swarm_contestants.py NAME AGENTS SLOTS SECONDS_A_CALL FOLDER

Every contestant runs AGENTS agents with at most SLOTS at a time. An agent makes three model turns: two call a tool, the
third answers; the model takes SECONDS_A_CALL. kimi_jax and bare write a durable journal (SQLite, WAL), the peers none.
A peer's interpreter has no kimi_jax, so each contestant imports what it needs itself.
"""

import asyncio
import json
import resource
import sqlite3
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

TURNS = 3


async def kimi_jax(agents: int, slots: int, delay: float, folder: Path) -> None:
    """The runtime with everything on: journal, budgets, checked arguments, trace."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from kimi_jax.agents.budget import Budget
    from kimi_jax.agents.config import SwarmConfig
    from kimi_jax.agents.events import Usage
    from kimi_jax.agents.model import Call, ModelRequest, Response, ScriptedModel
    from kimi_jax.agents.swarm import Swarm
    from kimi_jax.agents.tools import from_function

    async def lookup(word: str) -> str:
        """Looks a word up."""
        return f"{word} is known"

    async def answer(request: ModelRequest) -> Response:
        turn = sum(message["role"] == "assistant" for message in request.messages)
        usage = Usage(100, 10)
        if request.agent == "root":
            if turn == 0:
                call = Call("c", "create_subagent", '{"name": "worker", "system_prompt": "Work."}')
                return Response("", (call,), usage)
            if turn == 1:
                tasks = ({"agent": "worker", "prompt": f"task {i}"} for i in range(agents))
                return Response("", tuple(Call("c", "assign_task", json.dumps(task)) for task in tasks), usage)
            return Response("done", (), usage)
        if delay:
            await asyncio.sleep(delay)
        if turn < TURNS - 1:
            return Response("", (Call("c", "lookup", json.dumps({"word": f"w{turn}"})),), usage)
        return Response("an answer", (), usage)

    budget = Budget(steps=10 * agents, tokens=10_000 * agents, critical_steps=1000, cost=1e6, seconds=3600)
    config = SwarmConfig(max_parallel=slots, max_children=agents, budget=budget)
    swarm = Swarm(ScriptedModel(answer), [from_function(lookup)], config, folder / "kimi_jax.sqlite")
    result = await swarm.run("Q?")
    assert result.steps == 3 + TURNS * agents and set(result.outcomes.values()) == {"ok"}


async def bare(agents: int, slots: int, delay: float, folder: Path) -> None:
    """The least that one could write: a task group, a limiter, and a row for each turn."""
    import anyio

    db = sqlite3.connect(folder / "bare.sqlite", isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    db.execute("CREATE TABLE events (agent INTEGER, turn INTEGER, line TEXT)")
    limiter = anyio.CapacityLimiter(slots)

    async def agent(number: int) -> None:
        async with limiter:
            for turn in range(TURNS):
                await asyncio.sleep(delay)
                line = json.dumps({"agent": number, "turn": turn, "text": "an answer", "usage": [100, 10]})
                db.execute("INSERT INTO events VALUES (?, ?, ?)", (number, turn, line))

    async with anyio.create_task_group() as tasks:
        for number in range(agents):
            tasks.start_soon(agent, number)
    db.close()


async def openai_agents(agents: int, slots: int, delay: float, folder: Path) -> None:
    """openai-agents, tracing off."""
    from agents import Agent, Model, ModelResponse, Runner, Usage, function_tool, set_tracing_disabled
    from openai.types.responses import ResponseFunctionToolCall, ResponseOutputMessage, ResponseOutputText

    set_tracing_disabled(True)

    @function_tool
    async def lookup(word: str) -> str:
        """Looks a word up."""
        return f"{word} is known"

    class Scripted(Model):
        async def get_response(self, system_instructions, input, *rest, **more):  # type: ignore[no-untyped-def]
            if delay:
                await asyncio.sleep(delay)
            items = [] if isinstance(input, str) else input
            turn = sum(item.get("type") == "function_call" for item in items)
            if turn < TURNS - 1:
                output = ResponseFunctionToolCall(
                    type="function_call", call_id=f"c{turn}", name="lookup", arguments=json.dumps({"word": f"w{turn}"})
                )
            else:
                text = ResponseOutputText(type="output_text", text="an answer", annotations=[])
                output = ResponseOutputMessage(
                    id="m", type="message", role="assistant", status="completed", content=[text]
                )
            return ModelResponse(output=[output], usage=Usage(), response_id=None)

        def stream_response(self, *rest, **more):  # type: ignore[no-untyped-def]
            raise NotImplementedError

    worker = Agent(name="worker", instructions="Work.", model=Scripted(), tools=[lookup])
    gate = asyncio.Semaphore(slots)

    async def agent(number: int) -> None:
        async with gate:
            result = await Runner.run(worker, f"task {number}")
            assert result.final_output == "an answer"

    await asyncio.gather(*(agent(number) for number in range(agents)))


async def langgraph(agents: int, slots: int, delay: float, folder: Path) -> None:
    """A graph of a model node and a tool node, without a checkpointer."""
    from langchain_core.messages import AIMessage, HumanMessage
    from langchain_core.tools import tool
    from langgraph.graph import END, START, MessagesState, StateGraph
    from langgraph.prebuilt import ToolNode

    @tool
    async def lookup(word: str) -> str:
        """Looks a word up."""
        return f"{word} is known"

    async def model(state: MessagesState) -> dict:
        if delay:
            await asyncio.sleep(delay)
        turn = sum(isinstance(message, AIMessage) for message in state["messages"])
        if turn < TURNS - 1:
            call = {"name": "lookup", "args": {"word": f"w{turn}"}, "id": f"c{turn}"}
            return {"messages": [AIMessage("", tool_calls=[call])]}
        return {"messages": [AIMessage("an answer")]}

    def more(state: MessagesState) -> str:
        return "tools" if state["messages"][-1].tool_calls else END

    graph = StateGraph(MessagesState)
    graph.add_node("model", model)
    graph.add_node("tools", ToolNode([lookup]))
    graph.add_edge(START, "model")
    graph.add_conditional_edges("model", more, ["tools", END])
    graph.add_edge("tools", "model")
    worker = graph.compile()
    gate = asyncio.Semaphore(slots)

    async def agent(number: int) -> None:
        async with gate:
            state = await worker.ainvoke({"messages": [HumanMessage(f"task {number}")]})
            assert state["messages"][-1].content == "an answer"

    await asyncio.gather(*(agent(number) for number in range(agents)))


CONTESTANTS: dict[str, Callable[[int, int, float, Path], Awaitable[None]]] = {
    "kimi_jax": kimi_jax,
    "bare": bare,
    "openai_agents": openai_agents,
    "langgraph": langgraph,
}


def measure(name: str, agents: int, slots: int, delay: float, folder: Path) -> dict[str, float]:
    """Wall seconds, CPU milliseconds and kB of peak memory an agent, of a run after a small one that warms up."""
    (folder / "warm").mkdir()
    asyncio.run(CONTESTANTS[name](8, 8, 0.0, folder / "warm"))  # type: ignore[arg-type]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    asyncio.run(CONTESTANTS[name](agents, slots, delay, folder))  # type: ignore[arg-type]
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    return {"wall": wall, "cpu_ms": 1000 * cpu / agents, "kb": memory / agents}


if __name__ == "__main__":
    which, count, at_once, seconds, where = sys.argv[1:]
    print(json.dumps(measure(which, int(count), int(at_once), float(seconds), Path(where))))
