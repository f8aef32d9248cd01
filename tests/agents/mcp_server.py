"""An MCP server for the tests: `python mcp_server.py` over standard streams, or with a port over HTTP."""

import os
import sys
import time
from pathlib import Path

from mcp.server.mcpserver import MCPServer

server = MCPServer("test")


@server.tool()
def add(a: int, b: int = 5) -> str:
    """Adds two numbers."""
    return str(a + b)


@server.tool()
def large(megabytes: int) -> str:
    """A large text."""
    return "x" * (megabytes * 10**6)


@server.tool()
def fail() -> str:
    """Raises."""
    raise ValueError("no such thing")


@server.tool()
def hang(path: str) -> str:
    """Writes its process id into a file, and never answers."""
    Path(path + ".part").write_text(str(os.getpid()))
    os.rename(path + ".part", path)
    time.sleep(3600)
    return "never"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", port=int(sys.argv[1]))
    else:
        server.run("stdio")
