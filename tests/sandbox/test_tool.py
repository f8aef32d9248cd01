"""The tool as an agent loop uses it: declaration, arguments, message parts, images of a conversation; the pool."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import warnings

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_jax.data import BadRecord
from kimi_jax.data.conversation import apply_chat_template
from kimi_jax.data.tool_declaration import declare_tools
from kimi_jax.sandbox import walls
from kimi_jax.sandbox.limits import SandboxError, SandboxLimits
from kimi_jax.sandbox.pool import Pool
from kimi_jax.sandbox.session import Session
from kimi_jax.sandbox.tool import IPYTHON, BadArguments, conversation_images, message_parts, read_code, run_tool
from tests.sandbox.machines import SMALL, wait_until_gone


@pytest.fixture(scope="module")
def strongest():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return walls.choose()


@pytest.fixture(scope="module")
def session(strongest):
    with Session(strongest, SMALL) as opened:
        yield opened


def png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    PIL.Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def test_tool_is_declared_in_typescript():
    text = declare_tools([IPYTHON])
    assert "type ipython = (_: {" in text and "code: string" in text


def test_tool_result_is_the_content_of_a_message(session: Session):
    image = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Crop it."}]}]
    session.put(conversation_images(messages))
    call = {"id": "functions.ipython:0", "function": {"name": "ipython", "arguments": '{"code": "image_1[:10]"}'}}
    content = run_tool(session, call["function"]["arguments"])
    assert [part["type"] for part in content] == ["image"]
    assert (content[0]["image"] == image[:10]).all()
    messages += [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": content},
    ]
    assert "<|media_pad|>" in apply_chat_template(messages, tools=[IPYTHON]).rpartition("## Return of")[2]
    assert list(conversation_images(messages)) == ["image_1", "image_2"]


def test_tool_says_when_there_is_no_output(session: Session):
    assert run_tool(session, {"code": "y = 1"}) == [{"type": "text", "text": "(no output)"}]


@pytest.mark.parametrize(
    "arguments",
    ["", "{", "[]", '"code"', "{}", '{"code": 1}', '{"code": "1", "x": 2}', '{"code": "1", "code": "2"}', "[" * 10**5,
     {"code": None}, {}, '{"code": "' + "x" * 10**6],
)  # fmt: skip
def test_tool_answers_malformed_arguments_in_words(session: Session, arguments):
    (part,) = run_tool(session, arguments)
    assert part["text"].startswith("Error: ") and len(part["text"]) < 500


@given(st.text(max_size=50))
def test_any_code_comes_through_its_json(code: str):
    assert read_code(json.dumps({"code": code}), SandboxLimits()) == code


@given(st.text(max_size=50))
def test_any_arguments_are_code_or_bad_arguments(text: str):
    with contextlib.suppress(BadArguments):
        assert isinstance(read_code(text, SandboxLimits()), str)


def test_images_of_a_conversation_are_numbered_in_their_order():
    image = np.full((5, 6, 3), 9, np.uint8)
    uri = "data:image/png;base64," + base64.b64encode(png(image)).decode()
    messages = [
        {"role": "system", "content": "plain"},
        {
            "role": "user",
            "content": [{"type": "image", "image": PIL.Image.fromarray(image)}, {"type": "text", "text": "x"}],
        },
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": uri}}, {"type": "image", "image": png(image)}],
        },
    ]
    found = conversation_images(messages)
    assert list(found) == ["image_1", "image_2", "image_3"]
    assert all((pixels == image).all() for pixels in found.values())
    with pytest.raises(BadRecord, match="only data URIs"):
        conversation_images([{"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}])


def test_pool_gives_every_conversation_a_fresh_session(strongest):
    async def conversation(pool: Pool, number: int) -> str:
        async with pool.session({"image_1": np.full((2, 2, 3), number, np.uint8)}) as session:
            before = await session.run("'seen' in globals()")
            assert before.text == "False\n"
            await session.run("seen = int(image_1.max())")
            return message_parts(await session.run("seen"))[0]["text"]

    async def main() -> list[str]:
        async with Pool(2, strongest, SMALL) as pool:
            return await asyncio.gather(*(conversation(pool, i) for i in range(5)))

    assert asyncio.run(main()) == [f"{i}\n" for i in range(5)]


def test_pool_ends_what_a_cancelled_call_runs(strongest):
    async def main() -> None:
        async with Pool(1, strongest, SMALL) as pool:
            started = asyncio.Event()
            pids = []

            async def stuck() -> None:
                async with pool.session() as session:
                    pids.append(session._session.pid)
                    started.set()
                    await session.run("while True: pass")

            task = asyncio.create_task(stuck())
            await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            async with pool.session() as other:  # its replacement
                assert (await other.run("1")).text == "1\n"
                assert other._session.pid != pids[0]
            wait_until_gone(pids[0])

    asyncio.run(main())


def test_pool_tells_who_asks_that_a_session_did_not_start(strongest):
    async def main() -> None:
        async with Pool(1, strongest, SMALL, preload=("no_such_module",)) as pool:
            for _ in range(2):
                with pytest.raises(SandboxError, match="no_such_module"):
                    async with pool.session():
                        pass

    asyncio.run(main())
    with pytest.raises(ValueError, match="at least one"):
        Pool(0, strongest)
