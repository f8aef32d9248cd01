"""Tools of any MCP server: a command that speaks over its standard streams, or a URL (streamable HTTP).

    async with McpServer("files", ["python", "server.py"]) as server:
        swarm = Swarm(model, server.tools)

A server that dies during a call is an error of that call at once, and is started again for the next. One that hangs is
left by the tool's timeout. The command runs with the rights of this program and an environment of a few harmless
variables: an MCP server is a program that you choose to run.
"""

import json
import logging
import re
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self, TextIO

import anyio

from kimi_jax.agents.mcp_stdio import stdio_server
from kimi_jax.agents.tools import MAX_ERROR, Tool, ToolError, ToolResult

CONNECT_SECONDS = 60.0
MAX_TOOLS = 256
MAX_DESCRIPTION, MAX_SCHEMA = 4000, 20_000  # characters
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class McpServer:
    """A connection, made on entering and again whenever it is needed. tools: those of the server, named PREFIX_NAME.

    timeout: seconds of one call; max_chars: of a result that a model sees; log: where what a command writes to its
    standard error goes. Entering raises ToolError.
    """

    def __init__(
        self,
        prefix: str,
        target: str | Sequence[str],
        *,
        timeout: float = 60.0,
        max_chars: int = 20_000,
        log: TextIO = sys.stderr,
    ):
        self.prefix, self.target, self._log = prefix, target, log
        self.tools: list[Tool] = []
        self._timeout, self._max_chars = timeout, max_chars
        self._stack = AsyncExitStack()
        self._lock = anyio.Lock()
        self._client: Any = None
        self._lost = anyio.Event()
        self._tasks: Any = None

    async def __aenter__(self) -> Self:
        self._tasks = await self._stack.enter_async_context(anyio.create_task_group())
        try:
            client = await self._connected()
            for tool in (await client.list_tools()).tools[:MAX_TOOLS]:
                self.tools.append(self._tool(tool))
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tasks.cancel_scope.cancel()
        await self._stack.__aexit__(None, None, None)

    def _tool(self, tool: Any) -> Tool:
        name = f"{self.prefix}_{tool.name}" if self.prefix else tool.name
        schema = dict(tool.input_schema)
        if not _NAME.fullmatch(name) or len(json.dumps(schema)) > MAX_SCHEMA:
            raise ToolError(f"the tool {name[:100]!r} of {self.prefix} has a name or a schema that models cannot take")

        async def run(arguments: dict[str, Any]) -> ToolResult:
            return await self._call(tool.name, arguments)

        return Tool(name, (tool.description or "")[:MAX_DESCRIPTION], schema, run, self._timeout, self._max_chars)

    async def _call(self, name: str, arguments: dict[str, Any]) -> ToolResult:
        from mcp import MCPError
        from mcp_types import CONNECTION_CLOSED

        client = await self._connected()
        try:
            result = await client.call_tool(name, arguments)
        except MCPError as error:
            if error.error.code == CONNECTION_CLOSED:
                self._drop(client)
                raise ToolError(
                    f"the server {self.prefix} ended during the call; the next one starts it again"
                ) from error
            raise ToolError(f"{name}: {error.error.message}"[:MAX_ERROR]) from error
        except Exception as error:  # a broken pipe, an answer of another form
            self._drop(client)
            raise ToolError(f"the server {self.prefix} failed: {type(error).__name__}: {error}"[:MAX_ERROR]) from error
        return ToolResult(_text(result), (), "error" if result.is_error else "ok")

    # -------------------------------------------------------------------------------------------------- the connection

    async def _connected(self) -> Any:
        """The client, connected. Raises ToolError."""
        async with self._lock:
            if self._client is None:
                try:
                    with anyio.fail_after(CONNECT_SECONDS):
                        await self._tasks.start(self._hold)
                except TimeoutError:
                    raise ToolError(f"the server {self.prefix} did not answer within {CONNECT_SECONDS:g} s") from None
                except Exception as error:
                    raise ToolError(f"the server {self.prefix} does not start: {error!r}"[:MAX_ERROR]) from error
            return self._client

    def _drop(self, client: Any) -> None:
        """This connection is lost; whoever comes next makes another."""
        if self._client is client:
            self._client = None
            self._lost.set()

    async def _hold(self, *, task_status: Any) -> None:
        """Keeps one connection open, in a task of its own, because it has to be closed where it was opened."""
        from mcp import Client

        lost = self._lost = anyio.Event()
        started = False
        target: Any = self.target
        if not isinstance(target, str):
            target = stdio_server(target, self._log)
        try:
            async with Client(target) as client:
                self._client, started = client, True
                task_status.started()
                await lost.wait()
        except Exception as error:
            if not started:
                raise RuntimeError(f"{type(error).__name__}: {error}") from error
            logging.debug("the connection to %s ended with %r", self.prefix, error)


def _text(result: Any) -> str:
    """The texts of a result; anything else is named, not shown."""
    parts = [part.text if part.type == "text" else f"[{part.type}, not shown]" for part in result.content]
    if not parts and result.structured_content is not None:
        parts = [json.dumps(result.structured_content)]
    return "\n".join(parts)
