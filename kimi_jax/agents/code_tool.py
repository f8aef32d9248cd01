"""Model-written Python as a tool of the swarm, run by whatever keeps a process behind walls (`kimi_jax.sandbox`).

    async with Pool(size=4) as pool:
        swarm = Swarm(model, [*corpus.tools(), code_tool(pool)])

Every call gets a fresh interpreter, so that no agent sees what another one left behind; agents of a swarm share nothing
but what their parent tells them.
"""

from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, runtime_checkable

from kimi_jax.agents.tools import Tool, ToolResult


class CodeResult(Protocol):
    """What a call printed and what its last expression was; status is `ok`, or why it is not."""

    @property
    def text(self) -> str: ...

    @property
    def status(self) -> str: ...


class CodeSession(Protocol):
    """One interpreter."""

    async def run(self, code: str) -> Any: ...


@runtime_checkable
class CodeSessions(Protocol):
    """Gives out interpreters, each for one conversation; `kimi_jax.sandbox.pool.Pool` is one."""

    def session(self) -> AbstractAsyncContextManager[Any]: ...


def code_tool(sessions: CodeSessions, timeout: float = 60.0) -> Tool:
    """The tool `python`. timeout: seconds of a call, the wait for an interpreter included."""

    async def run(arguments: dict[str, Any]) -> ToolResult:
        async with sessions.session() as session:
            result: CodeResult = await session.run(arguments["code"])
        status = {"ok": "ok", "timeout": "timeout"}.get(result.status, "error")
        return ToolResult(result.text or "(no output)", (), status)  # type: ignore[arg-type]

    description = (
        "Run Python code in a fresh interpreter: nothing is kept from call to call. What the code prints and the value "
        "of its last expression come back. There is no network, and no other program can be started."
    )
    properties = {"code": {"type": "string", "description": "The Python code."}}
    schema = {"type": "object", "properties": properties, "required": ["code"]}
    return Tool("python", description, schema, run, timeout)
