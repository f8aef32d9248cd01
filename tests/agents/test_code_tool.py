"""The sandboxed code tool: results, errors, and nothing that is kept from call to call."""

import json
from contextlib import asynccontextmanager

import anyio
import pytest

from kimi_jax.agents.code_tool import code_tool
from kimi_jax.agents.tools import Toolset
from kimi_jax.sandbox.limits import SandboxError
from kimi_jax.sandbox.pool import Pool
from kimi_jax.sandbox.session import CellResult


class Fake:
    """Sessions whose answer is known."""

    def __init__(self, result):
        self.result, self.opened, self.closed = result, 0, 0

    @asynccontextmanager
    async def session(self):
        self.opened += 1
        try:
            yield self
        finally:
            self.closed += 1

    async def run(self, code):
        if self.result is None:
            await anyio.sleep_forever()
        return self.result


def call(tool, code):
    return anyio.run(Toolset.of(tool).call, "python", json.dumps({"code": code}))


@pytest.mark.parametrize(
    "result, text, status",
    [
        (CellResult("ok", ("4\n",)), "4\n", "ok"),
        (CellResult("ok", ()), "(no output)", "ok"),
        (CellResult("error", ("ZeroDivisionError",)), "ZeroDivisionError", "error"),
        (CellResult("timeout", ("interrupted",)), "interrupted", "timeout"),
        (CellResult("killed", ("memory",)), "memory", "error"),
    ],
)
def test_code_tool_gives_what_the_interpreter_says(result, text, status):
    fake = Fake(result)
    got = call(code_tool(fake), "2 + 2")
    assert (got.text, got.status) == (text, status) and fake.opened == fake.closed == 1


def test_code_tool_that_hangs_is_left_and_its_session_given_back():
    fake = Fake(None)
    assert call(code_tool(fake, timeout=0.01), "while True: pass").status == "timeout"
    assert fake.closed == 1


def test_code_tool_keeps_nothing_from_call_to_call():
    async def main():
        async with Pool(1) as pool:
            calls = Toolset.of(code_tool(pool))
            first = await calls.call("python", '{"code": "x = 6 * 7; print(x)"}')
            second = await calls.call("python", '{"code": "print(x)"}')
            return first, second

    try:
        first, second = anyio.run(main)
    except SandboxError as error:
        pytest.skip(f"no walls here: {error}")
    assert first.text.strip() == "42" and second.status == "error" and "NameError" in second.text
