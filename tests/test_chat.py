"""The terminal chat: what is said, shown and remembered, and the command as a user runs it."""

from __future__ import annotations

import dataclasses
import io
import os
import signal
import subprocess
import sys

import pytest

from kimi_jax.chat import DIM, PLAIN, ChatSession, talk
from kimi_jax.config import preset
from kimi_jax.infer.request import Sampling
from tests.environment import FIXTURES, REPO
from tests.serve.server import ScriptedEngine, byte_tokenizer, checkpoint

TOKENIZER = byte_tokenizer()


def said(prompt):
    """Reasons, then repeats the last message."""
    text = prompt.rsplit("<|im_middle|>", 2)[1].removesuffix("<|im_end|><|im_assistant|>assistant")
    return TOKENIZER.encode(("" if prompt.endswith("</think>") else "hm</think>") + f"you said {text}", True)


@pytest.fixture
def engine():
    engine = ScriptedEngine(TOKENIZER, said)
    engine.config = dataclasses.replace(preset("demo"), media_placeholder_token_id=TOKENIZER.media_pad_id)
    return engine


@pytest.fixture
def run(engine):
    """Lines in, (answers, notes, conversation) out."""

    def run(*lines, colours=False, **more):
        conversation = ChatSession(engine, TOKENIZER, Sampling(max_new_tokens=100), **more)
        out, notes = io.StringIO(), io.StringIO()
        run.failed = talk(conversation, iter(lines), out, notes, colours)
        return out.getvalue(), notes.getvalue(), conversation

    return run


def prompt(engine):
    return TOKENIZER.decode(engine.requests[max(engine.requests)].token_ids)


def test_conversation_is_remembered(run, engine):
    out, notes, conversation = run("one\n", "\n", "two\n", "/exit\n", "three\n", system="Be brief.")
    assert out == "you said one\nyou said two\n"
    assert notes == ""
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert conversation.messages[2]["content"] == "you said one"
    assert "Be brief." in prompt(engine) and "you said one" in prompt(engine)
    conversation.reset()
    assert [message["role"] for message in conversation.messages] == ["system"]


def test_reasoning_is_dimmed_in_a_terminal_and_left_out_elsewhere(run):
    assert run("one", colours=True)[0] == f"{DIM}hm{PLAIN}\nyou said one\n"
    assert run("one")[0] == "you said one\n"


def test_commands(run, engine):
    image = FIXTURES / "images/rgb_56x56.png"
    lines = (f"/image {image}", "what", "/thinking", "/image nowhere.png", "/reset", "x", "/?", "/image")
    out, notes, conversation = run(*lines)
    assert len(engine.requests[0].media) == 1
    assert not engine.requests[1].media
    assert prompt(engine).endswith("<think></think>")
    assert "what" not in prompt(engine)
    assert "nowhere.png: No such file" in notes
    assert notes.count("/exit") == 2
    assert run.failed == 0


def test_what_cannot_be_answered_is_said_and_forgotten(run, engine, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    out, notes, conversation = run(f"/image {tmp_path / 'bad.png'}", "what", "x" * 2000, "fine")
    assert "broken_image" in notes and "2000 tokens" not in out
    assert out == "you said fine\n"
    assert run.failed == 2
    assert len(conversation.messages) == 2


def test_cut_off_answer_says_so(run):
    out, notes, _ = run("x" * 200)
    assert "truncated" in notes


def test_ctrl_c_ends_the_answer_and_keeps_what_there_is(run, engine):
    before = signal.getsignal(signal.SIGINT)
    step, count = engine.step, 0

    def interrupted():
        nonlocal count
        count += 1
        if count == 15:
            os.kill(os.getpid(), signal.SIGINT)
        return step()

    engine.step = interrupted
    out, notes, conversation = run("one two three four")
    assert out.startswith("you said") and "four" not in out
    assert conversation.messages[-1]["content"] == out.strip("\n")
    assert engine.cancelled == [0]
    assert signal.getsignal(signal.SIGINT) is before


def test_command(tmp_path):
    """As a user runs it, piped: on the fixture's weights, with an image."""
    model = checkpoint(tmp_path / "tiny")
    image = FIXTURES / "images/rgb_56x56.png"
    command = [sys.executable, "-m", "kimi_jax.chat", f"--model={model}", f"--image={image}", "--nothinking"]
    command += ["--max_new_tokens=4", "--temperature=0", "--max_sequence_length=128", "--dtype=float32"]
    done = subprocess.run(command, input="hi\n/help\n", capture_output=True, text=True, cwd=REPO, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "/reset" in done.stderr
    assert done.stdout.endswith("\n")


@pytest.mark.parametrize("module", ["chat", "serve"])
def test_what_cannot_run_says_why(module, tmp_path):
    for arguments, reason in (([], "model"), ([f"--model={tmp_path}"], "no model")):
        command = [sys.executable, "-m", f"kimi_jax.{module}", *arguments]
        done = subprocess.run(command, input="", capture_output=True, text=True, cwd=REPO, timeout=600)
        assert done.returncode != 0
        assert reason in done.stderr + done.stdout
        assert "Traceback" not in done.stderr
