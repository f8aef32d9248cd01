"""One agent: a loop of model turns, the calls that each turn issues, and the envelope that its parent gets at the end.

An agent sees its system prompt, its task, and its own calls with their results. Children run concurrently, each wrapped
so that nothing but cancellation leaves it: whatever happens to one is a status in its envelope.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import anyio

from kimi_jax.agents import context
from kimi_jax.agents.briefs import Briefs
from kimi_jax.agents.budget import BudgetExceeded, Ledger
from kimi_jax.agents.config import ASSIGN_TASK, CREATE_SUBAGENT, LAST_STEP, READ_OUTPUT
from kimi_jax.agents.events import NOTHING, ROOT, Event, Kind, Status, Usage
from kimi_jax.agents.journal import canonical_json
from kimi_jax.agents.model import Call, Message, Response
from kimi_jax.agents.runtime import FATAL, NO_TOOLS, Declared, Failed, Runtime, Stopped, ask, recorded
from kimi_jax.agents.scheduler import Lease
from kimi_jax.agents.tools import ToolError, ToolResult, check_arguments

MAX_CONFIGURATIONS = 256  # of one agent
MAX_NAME, MAX_PROMPT = 64, 100_000  # characters
MAX_KEPT = 1 << 24  # characters of a result that can be read on
MAX_SOURCES = 100  # that are kept of one result
PARTIAL = 1000  # characters of the last results that a stopped agent hands over


@dataclass(frozen=True)
class Envelope:
    """All that a parent gets back. summary: bounded; output: where the whole text is (`read_output`), if it was longer.

    usage: of the agent and all its descendants.
    """

    agent: str
    status: Status
    summary: str
    sources: tuple[str, ...] = ()
    usage: Usage = NOTHING
    steps: int = 0
    output: int | None = None

    def content(self) -> str:
        """The tool message. As JSON, what the child wrote stays a quoted text."""
        fields: dict[str, Any] = {"status": self.status, "summary": self.summary, "sources": list(self.sources)}
        if self.output is not None:
            fields["whole_summary"] = f"read_output(number={self.output}, offset={len(self.summary)})"
        return json.dumps({**fields, "steps": self.steps, "tokens": self.usage.tokens}, ensure_ascii=False)


class Agent:
    """See the module. usage: of this agent and its descendants; sources: what they consulted, in order."""

    def __init__(
        self, runtime: Runtime, name: str, configuration: str, system: str, brief: str, ledger: Ledger, lease: Lease
    ):
        self.runtime, self.name, self.configuration = runtime, name, configuration
        self.system, self.brief, self.ledger, self.lease = system, brief, ledger, lease
        self.parent: Agent | None = None
        self.stage = self.steps = self.clock = self.depth = 0
        self.usage, self.sources = Usage(), dict[str, None]()
        self.started, self.replayed, self.local_time = False, False, 0.0
        self.envelope = Envelope(name, "not_started", "")
        self._restart([{"role": "system", "content": system}, {"role": "user", "content": brief}])
        self._text = ""
        self._configurations = dict(runtime.config.subagents)
        self._briefs = Briefs()

    # -------------------------------------------------------------------------------------------------- one whole life

    async def run(self) -> None:
        """From the queue to the envelope. Raises nothing but cancellation."""
        status: Status = "aborted"
        note = ""
        try:
            if await self._begin():
                with self.lease.scope:
                    status = await self._loop()
                if self.lease.scope.cancelled_caught:
                    status = self.lease.expired or "timeout"
            else:
                status = "not_started"
        except Stopped as stop:
            status = stop.status
        except BudgetExceeded as error:
            status, note = "budget", str(error)
        except Failed as error:
            status, note = error.status, str(error)
        except FATAL as error:
            self.runtime.fail(error)
        except Exception as error:
            status, note = "error", f"{type(error).__name__}: {error}"
        finally:
            if status == "aborted" and not self.started:
                status = "not_started"
            running_for = self.lease.running_for
            self.lease.release()
            self._end(status, note, running_for)

    async def _begin(self) -> bool:
        """Waits for a slot; False if the time of the swarm was over before there was one."""
        queued = self.runtime.now()
        if self.parent:
            # only an agent that got no slot has an outcome here; in a new run there is none to look for
            journal = self.runtime.journal
            key = journal.next_key(self.name, "queue") if journal.mode != "new" else None
            if key and journal.peek(key):
                return False
            with anyio.move_on_at(self.ledger.deadline) as waiting:
                await self.lease.acquire()
            if waiting.cancelled_caught:
                key = key or journal.next_key(self.name, "queue")
                self.runtime.remember(key, {"not_started": True, "time": self.runtime.now(), "duration": 0.0})
                return False
        else:
            await self.lease.acquire()
        self.started = True
        detail = {"agent": self.configuration, "system": self.system, "brief": self.brief}
        self._emit("start", duration=self.runtime.now() - queued, detail=detail)
        return True

    async def _loop(self) -> Status:
        while True:
            await self._make_room()
            last = self._steps_left() <= 1
            tools = NO_TOOLS if last else self.runtime.declared(self._may_spawn())
            response = await self._step(tools, LAST_STEP if last else "")
            self._append(response.message())
            if last or not response.calls:
                self.steps += 1
                if not response.text.strip():
                    raise Failed("budget" if last else "error", "it ended with an empty answer")
                return "budget" if last and response.calls else "ok"
            await self._act(response.calls)
            self.steps += 1

    def _steps_left(self) -> float:
        config = self.runtime.config
        own = (config.subagent_steps if self.parent else config.orchestrator_steps) - self.steps
        # what siblings leave depends on the schedule, so only the orchestrator, which has none, looks at all steps
        shared = self.ledger.critical_left if self.parent else self.ledger.left("steps")
        return min(own, self.ledger.critical_left, shared)

    async def _step(self, tools: Declared, more: str = "") -> Response:
        """One turn of the model. more: a message of the user's role that is not kept."""
        messages = context.shown(self._messages, self.runtime.config.context)
        if more:
            messages.append({"role": "user", "content": more})
        response, duration = await ask(self, messages, tools, more)
        self.usage += response.usage
        self._counted, self._uncounted = response.usage.tokens, len(self._messages) + 1
        self._text = response.text.strip() or self._text
        detail: dict[str, Any] = {"text": response.text, "finish": response.finish}
        if response.reasoning:
            detail["reasoning"] = response.reasoning
        if response.calls:
            detail["calls"] = [{"name": call.name, "arguments": call.arguments} for call in response.calls]
        if response.tokens:
            detail["tokens"] = dict(response.tokens)
        self._emit("step", usage=response.usage, detail=detail, duration=duration)
        return response

    async def _make_room(self) -> None:
        """Replaces the history where the context policy says so."""
        config = self.runtime.config.context
        if not context.is_full(self._counted, config):
            return
        summary = None
        if config.policy == "summary" and self._steps_left() > 2:
            summary = (await self._step(NO_TOOLS, context.SUMMARISE)).text
            self.steps += 1
        self._restart(context.restarted(self._messages, summary))

    def _restart(self, messages: Sequence[Message]) -> None:
        self._messages: list[Message] = []
        self._history = hashlib.sha256()  # of the messages, so that a turn costs what is new and not what there is
        self._counted, self._uncounted = 0, 0  # tokens of the last request and its answer; messages they cover
        for message in messages:
            self._append(message)

    @property
    def history(self) -> str:
        """Stands for all messages in a request's identity."""
        return self._history.hexdigest()

    def prompt_bound(self, messages: Sequence[Message], tools: Declared) -> int:
        """Most tokens that a request can have: what the last one had, and a token for each byte that is new."""
        known = self._counted > 0 and self._uncounted <= len(messages)
        new = messages[self._uncounted :] if known else messages
        return (self._counted if known else tools.size) + sum(map(_most_tokens, new))

    # ------------------------------------------------------------------------------------------------- calls of a turn

    def _may_spawn(self) -> bool:
        return self.depth < self.runtime.config.max_depth

    async def _act(self, calls: Sequence[Call]) -> None:
        """Makes the calls of one turn, all at the same time, and appends their results in order."""
        results: list[ToolResult | None] = [None] * len(calls)
        children: dict[int, Agent] = {}
        for i, call in enumerate(calls):
            if call.name in ("create_subagent", "assign_task") and self._may_spawn():
                made = self._orchestrate(call, children)
                if isinstance(made, Agent):
                    children[i] = made
                else:
                    results[i] = made
        others = [i for i in range(len(calls)) if i not in children and results[i] is None]
        if children:
            self.lease.release()
        ends: dict[int, tuple[float, float]] = {}
        stops: list[Exception] = []
        replayed = [self.replayed]

        async def run_tool(i: int) -> None:
            try:
                results[i], ends[i] = await self._call_tool(calls[i])
                replayed.append(self.replayed)
            except (Stopped, *FATAL) as error:  # out of the task group, where it would come as a group
                stops.append(error)

        if not children and len(others) == 1:
            await run_tool(others[0])
        elif children or others:
            async with anyio.create_task_group() as tasks:
                for child in children.values():
                    tasks.start_soon(child.run)
                for i in others:
                    tasks.start_soon(run_tool, i)
        if stops:
            raise stops[0]
        if children:
            self.ledger.critical_steps += max(child.ledger.critical_steps for child in children.values())
            await self.lease.acquire(first=True)
        self.replayed = all(replayed) and all(child.replayed for child in children.values())
        for i, call in enumerate(calls):
            if i in children:
                content = self._join(children[i])
            else:
                content = self._finish_call(call, results[i], ends.get(i))
            self._append({"role": "tool", "tool_call_id": call.id, "content": content})

    async def _call_tool(self, call: Call) -> tuple[ToolResult, tuple[float, float]]:
        if call.name == "read_output":
            return self._read_output(call), (self.local_time, 0.0)

        async def live() -> dict[str, Any]:
            result = await self.runtime.tools.call(call.name, call.arguments)
            tool = self.runtime.tools.tools.get(call.name)
            text = self._bounded(result.text, tool.max_chars if tool else PARTIAL)
            return {"text": text, "sources": list(result.sources)[:MAX_SOURCES], "status": result.status}

        outcome = await recorded(self, call.name[:100], ["tool", call.name, call.arguments], live)
        result = ToolResult(outcome["text"], tuple(outcome["sources"]), outcome["status"])
        return result, (outcome["time"], outcome["duration"])

    def _bounded(self, text: str, limit: int) -> str:
        if len(text) <= limit:
            return text
        number = self.runtime.journal.keep(self.name, text[:MAX_KEPT])
        return f"{text[:limit]}\n[cut after {limit} of {len(text)} characters; read_output(number={number}) reads on]"

    def _read_output(self, call: Call) -> ToolResult:
        try:
            arguments = check_arguments(call.arguments, READ_OUTPUT["parameters"])
            number, offset = arguments["number"], max(arguments["offset"], 0)
            found = self.runtime.journal.output(number) if 0 < number < 1 << 40 else None
            if found is None or not f"{found[0]}/".startswith(f"{self.name}/"):
                raise ToolError(f"no result of yours or of your subagents has the number {number}")
        except ToolError as error:
            return ToolResult(f"error: {error}"[:PARTIAL], (), "refused")
        limit = self.runtime.config.max_summary
        text = found[1][offset : offset + limit]
        return ToolResult(f"{text}\n[characters {offset} to {offset + len(text)} of {len(found[1])}]")

    def _finish_call(self, call: Call, result: ToolResult | None, end: tuple[float, float] | None) -> str:
        assert result is not None
        self.sources |= dict.fromkeys(result.sources)
        time, duration = end or (None, 0.0)
        detail: dict[str, Any] = {"name": call.name, "arguments": call.arguments, "result": result.text}
        if result.sources:
            detail["sources"] = list(result.sources)
        self._emit("tool", status=result.status, detail=detail, duration=duration, time=time)
        return result.text

    # ------------------------------------------------------------------------------------------------------- subagents

    def _orchestrate(self, call: Call, children: dict[int, "Agent"]) -> "Agent | ToolResult":
        """create_subagent, or assign_task up to the child that will run."""
        try:
            if call.name == "create_subagent":
                return self._create(check_arguments(call.arguments, CREATE_SUBAGENT["parameters"]))
            arguments = check_arguments(call.arguments, ASSIGN_TASK["parameters"])
            return self._assign(arguments["agent"], arguments["prompt"], children)
        except ToolError as error:
            return ToolResult(f"error: {error}"[:PARTIAL], (), "refused")

    def _create(self, arguments: dict[str, str]) -> ToolResult:
        name, prompt = arguments["name"], arguments["system_prompt"]
        if not 0 < len(name) <= MAX_NAME or len(prompt) > MAX_PROMPT:
            raise ToolError(f"a name has 1 to {MAX_NAME} characters, a system prompt at most {MAX_PROMPT}")
        if name in self._configurations:
            raise ToolError(f"there is an agent {name!r} already; names are unique. assign_task can use it again")
        if len(self._configurations) >= MAX_CONFIGURATIONS:
            raise ToolError(f"there are {MAX_CONFIGURATIONS} agents already; use one of them")
        self._configurations[name] = prompt
        return ToolResult(f"The agent {name!r} can be given tasks now.")

    def _assign(self, name: str, brief: str, children: dict[int, "Agent"]) -> "Agent":
        if name not in self._configurations:
            known = ", ".join(self._configurations) or "none yet"
            raise ToolError(f"there is no agent {name[:MAX_NAME]!r}; created with create_subagent: {known}")
        if not brief.strip() or len(brief) > MAX_PROMPT:
            raise ToolError(f"a task has 1 to {MAX_PROMPT} characters, not {len(brief)}")
        if len(children) >= self.runtime.config.max_children:
            raise ToolError(f"{len(children)} tasks in one turn are the most; assign this one in the next")
        same = self._briefs.duplicate(name, brief)
        if same:
            raise ToolError(f"this is the task that {same} has already; assign what differs from it, or use its result")
        child_name = f"{self.name}/{self.steps}.{len(children)}"
        self._briefs.add(name, brief, child_name)
        group = next(iter(children.values())).ledger.parent if children else self.ledger.group()
        assert group is not None
        ledger = group.child()
        timeout = math.inf if self.runtime.journal.mode == "replay" else self.runtime.config.child_timeout
        lease = Lease(self.runtime.scheduler, self.runtime.clock, timeout, ledger.deadline)
        child = Agent(self.runtime, child_name, name, self._configurations[name], brief, ledger, lease)
        child.parent, child.depth, child.stage = self, self.depth + 1, self.steps
        child.local_time, child.replayed = self.local_time, self.replayed
        self._emit("spawn", detail={"child": child_name, "agent": name, "brief": brief})
        child.clock = self.clock
        return child

    def _join(self, child: "Agent") -> str:
        self.clock = max(self.clock, child.clock)
        self.local_time = max(self.local_time, child.local_time)
        self.usage += child.usage
        self.sources |= dict.fromkeys(child.envelope.sources)
        if child.envelope.status != "ok":
            self._briefs.remove(child.configuration, child.brief)
        self._emit("join", status=child.envelope.status, detail={"child": child.name})
        return child.envelope.content()

    # --------------------------------------------------------------------------------------------------------- the end

    def _end(self, status: Status, note: str, running_for: float) -> None:
        """Makes the envelope: the answer, or what there is of it."""
        text = self._text if status == "ok" else self._partial(status, note)
        limit = self.runtime.config.max_summary if self.parent else len(text)
        output = None
        if self.runtime.fatal is None and len(text) > limit:
            output = self.runtime.journal.keep(self.name, text)
        sources = tuple(self.sources)[: self.runtime.config.max_sources]
        self.envelope = Envelope(self.name, status, text[:limit], sources, self.usage, self.steps, output)
        detail = {"summary": text[:limit], "artefacts": list(sources), **({"note": note} if note else {})}
        try:
            self._emit("end", status=status, detail=detail, duration=running_for)
            if self.parent is None:
                self.runtime.journal.flush()
        except FATAL as error:
            self.runtime.fail(error)

    def _partial(self, status: Status, note: str) -> str:
        """What an agent that did not finish leaves: its last words, and the last results that it got."""
        results = [m["content"] for m in self._messages if m["role"] == "tool"][-3:]
        found = [self._text, *(f"Result: {text[:PARTIAL]}" for text in results)]
        begin = f"[not finished: {status}{f', {note}' if note else ''}]"
        return "\n".join([begin, *filter(None, found)])

    def _append(self, message: Message) -> None:
        self._messages.append(message)
        self._history.update(canonical_json(message))

    def _emit(
        self,
        kind: Kind,
        *,
        usage: Usage = NOTHING,
        status: Status = "ok",
        detail: dict[str, Any],
        duration: float = 0.0,
        time: float | None = None,
    ) -> None:
        self.clock += 1
        if time is None:
            time = self.local_time if self.replayed else self.runtime.now()
        self.local_time = max(self.local_time, time)
        self.runtime.emit(
            Event(
                id=self.runtime.num_events,
                time=time,
                agent=self.name,
                parent=self.parent.name if self.parent else None,
                kind=kind,
                stage=self.stage,
                usage=usage,
                status=status,
                detail=detail,
                step=self.steps,
                clock=self.clock,
                duration=duration,
            )
        )


def _most_tokens(message: Message) -> int:
    """A token for each byte, and some for what the chat template puts around a message and each of its calls."""
    calls = [call["function"] for call in message.get("tool_calls", ())]
    texts = [message["content"], message.get("reasoning_content", ""), message.get("tool_call_id", "")]
    texts += [text for call in calls for text in (call["name"], call["arguments"])]
    return 16 * (1 + len(calls)) + sum(
        len(text) if text.isascii() else len(text.encode("utf-8", "replace")) for text in texts
    )


def make_root(runtime: Runtime, question: str) -> Agent:
    """The orchestrator of a run, which needs no slot."""
    config, budget = runtime.config, runtime.config.budget
    # in a replay no time passes, and what it ended is recorded; a resumed run has used some already
    left = math.inf if runtime.journal.mode == "replay" else max(budget.seconds - runtime.journal.elapsed, 0)
    ledger = Ledger(replace(budget, seconds=left), runtime.clock)
    lease = Lease(None, runtime.clock, math.inf, ledger.deadline)
    root = Agent(runtime, ROOT, ROOT, config.system_prompt, question, ledger, lease)
    root.replayed = runtime.journal.mode != "new"
    return root
