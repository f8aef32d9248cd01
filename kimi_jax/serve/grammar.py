"""What an answer may say, where a call says so: JSON by a schema, tool calls in the release's form.

Source: docs/released_model.md section 6 (the form of tool calls); llguidance (https://github.com/guidance-ai/llguidance)
computes on the host, from the bytes of every token, which of them may follow.

  answer   [reasoning </think>] JSON <|im_end|>
  calls    [reasoning </think>] <|tool_calls_section_begin|> call ... <|tool_calls_section_end|> <|im_end|>

Schemas come from strangers, and a short one can take minutes. So a grammar is first tried in a process of its own
(`grammar_trial`), which is ended when it takes too long or too much memory; what passes is compiled here, outside the
interpreter's lock, and kept. While an answer is written, every step is bounded by llguidance's limits and the whole by
seconds of CPU.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from kimi_jax.data.conversation import ARGUMENTS, CALL, CALL_END, CALLS, CALLS_END, END, THINK_END, opens_reasoning
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.data.tool_declaration import sort_keys
from kimi_jax.infer.request import Grammar, GrammarError, Matcher
from kimi_jax.serve.grammar_trial import make_matcher, make_tokenizer, problem_of
from kimi_jax.serve.protocol import ApiError, ChatCall

if TYPE_CHECKING:
    import llguidance

MAX_GRAMMAR = 1 << 16  # characters, all schemas of a call together
MAX_KEPT = 16  # compiled grammars; of a few MB, at worst of 100
TRIAL_SECONDS, START_SECONDS = 3.0, 120.0
FIRST_SECONDS, TOKEN_SECONDS = 1.0, 0.01  # of CPU that the masks of an answer may take: at all, and for each token
SPACES = r"[ \n\r\t]{0,20}"  # between the parts of JSON; a model that loses its way must not write blanks for ever
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")


def grammar_text(call: ChatCall, tokenizer: Tokenizer) -> str | None:
    """The grammar of a call's answers in llguidance's Lark, None if they are free. Raises ApiError(400)."""
    if call.schema is None and not call.must_call:
        return None
    if call.messages[-1].get("partial"):
        raise ApiError(400, "an answer that continues a partial message cannot follow a schema", "messages")

    def mark(name: str) -> str:
        return f"<[{tokenizer.special_id(name)}]>"

    forms, rules = [], []
    if call.schema is not None and not call.must_call:
        forms.append("json")
        rules.append(f"json: %json {_schema(call.schema)}")
    names = call.must_call or [tool["function"]["name"] for tool in call.tools or ()]
    if names:
        forms.append("calls")
        first = sum(len(message.get("tool_calls") or ()) for message in call.messages)
        rules += _call_rules(call, names, first, mark)
    reasoning = f"REASONING {mark(THINK_END)} " if opens_reasoning(call.messages, call.thinking) else ""
    rules += [r"REASONING: /(.|\n)*/"] if reasoning else []
    text = "\n".join([f"start: {reasoning}({' | '.join(forms)})", *rules])
    if len(text) > MAX_GRAMMAR:
        raise ApiError(400, f"the schemas have more than {MAX_GRAMMAR} characters", code="invalid_schema")
    return text


def _call_rules(call: ChatCall, names: Sequence[str], first: int, mark: Callable[[str], str]) -> list[str]:
    """One call or several; the first has the number that comes next in the conversation."""
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in call.tools or ()}
    rules, firsts, others = [], [], []
    for i, name in enumerate(dict.fromkeys(names)):
        if not _NAME.fullmatch(name):
            raise ApiError(400, f"the function name {name!r:.100} is not of letters, digits and _.-", "tools")
        rules.append(f"arguments_{i}: %json {_schema({'type': 'object', **sort_keys(schemas[name])})}")
        firsts.append(f'"functions.{name}:{first}" {mark(ARGUMENTS)} arguments_{i}')
        others.append(f'"functions.{name}:" NUMBER {mark(ARGUMENTS)} arguments_{i}')
    more = f" other{{0,{call.most_calls - 1}}}" if call.most_calls > 1 else ""
    rules.append(f"calls: {mark(CALLS)} first{more} {mark(CALLS_END)}")
    rules.append(f"first: {mark(CALL)} ({' | '.join(firsts)}) {mark(CALL_END)}")
    if more:
        rules += [f"other: {mark(CALL)} ({' | '.join(others)}) {mark(CALL_END)}", "NUMBER: /[0-9]{1,4}/"]
    return rules


def _schema(schema: Mapping[str, Any]) -> str:
    return json.dumps({**schema, "x-guidance": {"whitespace_pattern": SPACES}})


class Grammars:
    """Compiles grammars for one tokenizer, in a thread of its own one at a time, and keeps some; `close` ends it."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._kept: dict[str, Grammar] = {}
        self._thread = ThreadPoolExecutor(1, "grammar")
        # the thread's
        self._trial: subprocess.Popen[bytes] | None = None
        self._vocabulary: dict[str, Any] = {}
        self._tokens: llguidance.LLTokenizer | None = None

    async def compile(self, text: str) -> Grammar:
        """The grammar of a text in Lark. Raises ApiError(400) for one that is wrong, or too large to follow."""
        found = self._kept.get(text)  # the thread may drop it at any time
        if found is not None:
            return found
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._compile, text)

    def close(self) -> None:
        """Ends thread and process."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._trial is not None:
            _end(self._trial)

    def _compile(self, text: str) -> Grammar:
        if self._tokens is None:
            self._vocabulary = _vocabulary(self._tokenizer)
            self._tokens = make_tokenizer(self._vocabulary, self._tokenizer.encode)
        self._try(text)
        while len(self._kept) >= MAX_KEPT:
            del self._kept[next(iter(self._kept))]
        self._kept[text] = _Compiled(make_matcher(self._tokens, text))
        return self._kept[text]

    def _try(self, text: str) -> None:
        """Compiles it in the other process, which is ended if it does not answer in time."""
        if self._trial is None or self._trial.poll() is not None:
            self._trial = self._start()
        answer = _ask(self._trial, text, TRIAL_SECONDS)
        if not answer:
            _end(self._trial)
            self._trial = None
            raise ApiError(400, "the schema takes too much time or memory to follow", code="invalid_schema")
        problem = json.loads(answer)
        if problem is not None:
            raise ApiError(400, f"the schema cannot be followed: {problem}", code="invalid_schema")

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "kimi_jax.serve.grammar_trial"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if not _ask(process, self._vocabulary, START_SECONDS):
            _end(process)
            raise RuntimeError("the process that tries grammars does not start")
        return process


def _ask(process: subprocess.Popen[bytes], question: Any, seconds: float) -> bytes:
    """The line that it answers; b"" if it does not in time, or ends."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError), selectors.DefaultSelector() as selector:
        process.stdin.write(json.dumps(question).encode() + b"\n")
        process.stdin.flush()
        selector.register(process.stdout, selectors.EVENT_READ)
        return process.stdout.readline() if selector.select(seconds) else b""
    return b""


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with contextlib.suppress(BrokenPipeError):  # of what it was told and did not read
        process.communicate()


def _vocabulary(tokenizer: Tokenizer) -> dict[str, Any]:
    """Arguments of `grammar_trial.Vocabulary`. Special tokens are those that stand for no bytes of text."""
    ids = range(tokenizer.vocab_size)
    return {
        "tokens": [base64.b64encode(tokenizer.decode_bytes([i])).decode() for i in ids],
        "special": [i for i in ids if tokenizer.token_bytes([i]) == 0],
        "end": tokenizer.special_id(END),
    }


class _Compiled:
    """A `request.Grammar`."""

    def __init__(self, matcher: llguidance.LLMatcher):
        self._matcher = matcher

    def start(self) -> Matcher:
        """Of one more answer."""
        return _Matcher(self._matcher.deep_copy())


class _Matcher:
    """A `request.Matcher`."""

    def __init__(self, matcher: llguidance.LLMatcher):
        self._matcher, self._spent, self._allowance = matcher, 0.0, FIRST_SECONDS

    def allowed(self) -> np.ndarray:
        """The end of the answer is among them once the grammar allows it."""
        begun = time.thread_time()
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        self._spent += time.thread_time() - begun
        self._allowance += TOKEN_SECONDS
        self._check()
        if self._spent > self._allowance:
            raise GrammarError(f"it took {self._spent:.1f} s to compute what may follow")
        if not mask.any():
            raise GrammarError("nothing may follow")
        return mask

    def accept(self, token: int) -> None:
        """See `request.Matcher`."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        problem = problem_of(self._matcher)
        if problem is not None:
            raise GrammarError(problem)
