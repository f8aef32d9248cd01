"""An MCP server as a child process: the transport of `mcp_tools.py`, with a limit on what one message may be.

Source: Model Context Protocol, 2025-11-25, transports (one JSON-RPC message a line, stderr is the server's log).
The transport of the mcp library has no such limit, and its time grows with the square of a line's length: 10 MB took
it half a minute here.
"""

import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, TextIO

import anyio
import anyio.abc

MAX_LINE = 1 << 26  # bytes of one message
GRACE = 0.5  # seconds that a server has to end by itself
_GONE = (anyio.ClosedResourceError, anyio.BrokenResourceError, OSError)


@asynccontextmanager
async def stdio_server(command: Sequence[str], log: TextIO) -> AsyncIterator[Any]:
    """(messages of the server, messages to it) while the context lasts; then the process and its children are killed.

    The messages end when the server does, or when it breaks the limit. Raises OSError if it cannot be started.
    """
    from mcp.client.stdio import get_default_environment

    process = await anyio.open_process(list(command), stderr=log, env=get_default_environment(), start_new_session=True)
    incoming, received = anyio.create_memory_object_stream[Any](0)
    to_send, outgoing = anyio.create_memory_object_stream[Any](0)
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_read, process, incoming)
            tasks.start_soon(_write, process, outgoing, incoming)
            try:
                yield received, to_send
            finally:
                tasks.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await _stop(process)
        for stream in (incoming, received, to_send, outgoing):
            stream.close()


async def _read(process: anyio.abc.Process, incoming: Any) -> None:
    assert process.stdout is not None
    parts: list[bytes] = []
    size = 0
    with incoming, suppress(*_GONE):
        async for chunk in process.stdout:
            *ends, rest = chunk.split(b"\n")
            for end in ends:
                await incoming.send(_message(b"".join([*parts, end])))
                parts, size = [], 0
            parts.append(rest)
            size += len(rest)
            if size > MAX_LINE:
                return


def _message(line: bytes) -> Any:
    """A message, or the error of a line that is none, as a value."""
    from mcp.shared.message import SessionMessage
    from mcp_types import jsonrpc_message_adapter

    try:
        return SessionMessage(jsonrpc_message_adapter.validate_json(line, by_name=False))
    except ValueError as error:
        return error


async def _write(process: anyio.abc.Process, outgoing: Any, incoming: Any) -> None:
    assert process.stdin is not None
    with outgoing:
        try:
            async for message in outgoing:
                line = message.message.model_dump_json(by_alias=True, exclude_unset=True) + "\n"
                await process.stdin.send(line.encode())
        except _GONE:
            incoming.close()  # so that nobody waits for an answer


async def _stop(process: anyio.abc.Process) -> None:
    assert process.stdin is not None
    with suppress(*_GONE):
        await process.stdin.aclose()
    with anyio.move_on_after(GRACE):
        await process.wait()
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with anyio.move_on_after(GRACE):
        await process.wait()
    with suppress(*_GONE):
        await process.aclose()
