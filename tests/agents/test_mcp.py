"""MCP servers, real ones: schemas come through, results are bounded, a killed server is an error and then back."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from kimi_jax.agents.config import SwarmConfig
from kimi_jax.agents.mcp_tools import McpServer
from kimi_jax.agents.model import ScriptedModel
from kimi_jax.agents.swarm import Swarm
from kimi_jax.agents.tools import ToolError, Toolset
from tests.agents.scripts import results, say, turn

pytest.importorskip("mcp")
SERVER = str(Path(__file__).with_name("mcp_server.py"))
STDIO = [sys.executable, SERVER]


async def wait_for(path):
    """Until the server has written the file; the test's own time limit bounds it."""
    with anyio.fail_after(30):
        while not path.exists():
            await anyio.sleep(0.01)
    return path.read_text()


def test_mcp_schema_comes_through_and_calls_are_answered(tmp_path):
    async def main(log):
        async with McpServer("calc", STDIO, log=log) as server:
            tools = {tool.name: tool for tool in server.tools}
            schema = tools["calc_add"].parameters
            assert schema["properties"]["a"]["type"] == "integer" and schema["required"] == ["a"]
            assert tools["calc_add"].declaration["description"] == "Adds two numbers."
            calls = Toolset.of(*server.tools)
            assert (await calls.call("calc_add", '{"a": 2}')).text == "7"
            assert (await calls.call("calc_add", '{"a": "x"}')).status == "refused"
            failed = await calls.call("calc_fail", "{}")
            assert failed.status == "error" and "calc_fail" not in failed.text and "fail" in failed.text

    with (tmp_path / "log").open("w") as log:
        anyio.run(main, log)
    assert "no such thing" in (tmp_path / "log").read_text(), "what the server writes to its standard error is kept"


def test_mcp_server_killed_in_mid_call_is_an_error_at_once_and_back_for_the_next(tmp_path, record_property):
    async def main():
        async with McpServer("calc", STDIO, timeout=600.0) as server:
            calls = Toolset.of(*server.tools)
            got = []

            async def call():
                got.append(await calls.call("calc_hang", f'{{"path": "{tmp_path}/pid"}}'))
                got.append(anyio.current_time())

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(call)
                pid = int(await wait_for(tmp_path / "pid"))
                killed = anyio.current_time()
                os.kill(pid, signal.SIGKILL)
            assert got[0].status == "error" and "ended during the call" in got[0].text
            print(f"{got[1] - killed:.3f} s from the kill to the error")
            record_property("seconds from the kill to the error", got[1] - killed)
            assert got[1] - killed < 60, "by the death of the server, not by the timeout of ten minutes"
            assert (await calls.call("calc_add", '{"a": 2}')).text == "7", "it was started again"

    anyio.run(main)


def test_mcp_server_that_hangs_is_left_by_the_tools_timeout(tmp_path):
    async def main():
        async with McpServer("calc", STDIO, timeout=0.3) as server:
            calls = Toolset.of(*server.tools)
            result = await calls.call("calc_hang", f'{{"path": "{tmp_path}/pid"}}')
            assert result.status == "timeout" and "0.3 s" in result.text

    anyio.run(main)


def test_mcp_result_of_ten_megabytes_is_cut_with_a_pointer():
    seen = []

    async def answer(request):
        script = [
            say("", ("calc_large", {"megabytes": 10})),
            say("", ("read_output", {"number": 1, "offset": 9_999_990})),
        ]
        if turn(request) < 2:
            return script[turn(request)]
        seen.extend(results(request))
        return say("end")

    async def main():
        async with McpServer("calc", STDIO) as server:
            return await Swarm(ScriptedModel(answer), server.tools, SwarmConfig()).run("Q?")

    assert anyio.run(main).status == "ok"
    assert len(seen[0]) < 21_000 and "cut after 20000 of 10000000 characters; read_output(number=1)" in seen[0]
    assert seen[1].startswith("x" * 10 + "\n[characters 9999990 to 10000000")


def test_mcp_over_http():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, SERVER, str(port)], stderr=subprocess.DEVNULL)

    async def main():
        with anyio.fail_after(60):
            while True:  # until it listens
                try:
                    await (await anyio.connect_tcp("127.0.0.1", port)).aclose()
                    break
                except OSError:
                    await anyio.sleep(0.05)
        async with McpServer("", f"http://127.0.0.1:{port}/mcp") as server:
            assert (await Toolset.of(*server.tools).call("add", '{"a": 2}')).text == "7"

    try:
        anyio.run(main)
    finally:
        process.kill()
        process.wait()


def test_mcp_server_that_does_not_start_says_so():
    async def main():
        async with McpServer("broken", [sys.executable, "-c", "raise SystemExit(3)"]):
            pass

    with pytest.raises(ToolError, match="server broken does not start"):
        anyio.run(main)
