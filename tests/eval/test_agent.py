"""The agent loop: answers, tool calls, every way a call can go wrong, and bounds; scripted, then on engines."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_jax.config import preset
from kimi_jax.data.conversation import ARGUMENTS, CALL, CALL_END, CALLS, CALLS_END
from kimi_jax.data.reply import Reply, ToolCall, parse_reply
from kimi_jax.eval.agent import CallResult, ContextFull, EpisodeLimits, Outcome, engine_replies, run
from kimi_jax.infer.engine import Engine
from kimi_jax.infer.request import Sampling
from tests.serve.server import ScriptedEngine, byte_tokenizer, load_checkpoint

TOKENIZER = byte_tokenizer()
ASK = [{"role": "user", "content": "How much is 2 + 3?"}]


def add(a: int, b: int) -> int:
    return a + b


def called(name: str, arguments: str, number: int = 0) -> ToolCall:
    ids = TOKENIZER.encode(f"{CALLS}{CALL}functions.{name}:{number}{ARGUMENTS}{arguments}{CALL_END}{CALLS_END}", True)
    return parse_reply(ids, TOKENIZER, thinking=False).tool_calls[0]


def script(*replies: Reply):
    """Gives the replies one after the other, and keeps what it was asked."""
    left, asked = list(replies), []

    def generate(messages, declarations):
        asked.append(list(messages))
        return left.pop(0)

    generate.asked = asked
    return generate


def calling(*calls: ToolCall, finished: bool = True) -> Reply:
    return Reply(tool_calls=calls, finished=finished)


ANSWER = Reply("so", "5", finished=True)


def test_agent_calls_a_tool_and_answers():
    replies = script(calling(called("add", '{"a": 2, "b": 3}')), ANSWER)
    episode = run(replies, ASK, {"add": add})
    assert (episode.outcome, episode.answer, episode.turns) == (Outcome.ANSWERED, "5", 2)
    assert [m["role"] for m in episode.messages] == ["user", "assistant", "tool", "assistant"]
    assert episode.messages[2] == {"role": "tool", "tool_call_id": "functions.add:0", "content": "5"}
    assert replies.asked[1] == list(episode.messages[:3])  # the model sees the result before it answers
    assert [call.result for call in episode.calls] == [CallResult.OK]
    assert ASK == [{"role": "user", "content": "How much is 2 + 3?"}]


def broken():
    raise OSError("no disk")


@pytest.mark.parametrize(
    ("call", "result", "says"),
    [
        (called("mul", "{}"), CallResult.UNKNOWN_TOOL, "there is no tool 'mul', only ['add', 'broken', 'odd']"),
        (called("add", "{"), CallResult.BAD_ARGUMENTS, "not JSON"),
        (called("add", "[1]"), CallResult.BAD_ARGUMENTS, "not an object"),
        (called("add", '{"a": 1}'), CallResult.BAD_ARGUMENTS, "missing a required argument: 'b'"),
        (called("add", '{"a": 1, "b": 2, "c": 3}'), CallResult.BAD_ARGUMENTS, "unexpected keyword argument 'c'"),
        (called("add", '{"a": 1, "b": "x"}'), CallResult.FAILED, "TypeError"),
        (called("broken", "{}"), CallResult.FAILED, "OSError: no disk"),
        (called("odd", "{}"), CallResult.FAILED, "not JSON serializable"),
    ],
)
def test_call_that_goes_wrong_is_a_result_that_the_model_reads(call, result, says):
    episode = run(script(calling(call), ANSWER), ASK, {"add": add, "broken": broken, "odd": object})
    assert episode.calls[0].result == result and episode.outcome == Outcome.ANSWERED
    assert says in episode.messages[2]["content"] and episode.messages[2]["content"].startswith("error: ")


def test_results_are_cut_off_and_say_so():
    tools = {"long": lambda: "x" * 1000, "parts": lambda: [{"type": "text", "text": "y" * 30}] * 3}
    calls = calling(called("long", "{}"), called("parts", "{}", 1))
    episode = run(script(calls, ANSWER), ASK, tools, limits=EpisodeLimits(characters=40))
    assert episode.messages[2]["content"] == "x" * 40 + "\n[truncated: 1,000 characters, 40 are shown]"
    texts = [part["text"] for part in episode.messages[3]["content"]]
    assert texts == ["y" * 30, "y" * 10 + "\n[truncated: 30 characters, 10 are shown]"]


def test_images_come_back_as_parts_and_broken_ones_are_failures():
    image = {"type": "image", "image": np.zeros((28, 28, 3), np.uint8)}
    tools = {
        "crop": lambda: [image, {"type": "text", "text": "t"}],
        "many": lambda: [image] * 9,
        "bad": lambda: [{"type": "image", "image": b"no image"}],
        "path": lambda: [{"type": "image", "image": "/etc/passwd"}],
    }
    calls = calling(*(called(name, "{}", i) for i, name in enumerate(tools)))
    episode = run(script(calls, ANSWER), ASK, tools)
    assert [call.result for call in episode.calls] == [CallResult.OK, *[CallResult.FAILED] * 3]
    assert episode.messages[2]["content"][0] is image
    assert "more than 8 images" in episode.messages[3]["content"]


def test_calls_beyond_the_limit_of_a_message_are_not_run():
    ran = []
    calls = calling(*(called("f", "{}", i) for i in range(4)))
    episode = run(script(calls, ANSWER), ASK, {"f": lambda: ran.append(1)}, limits=EpisodeLimits(calls=2))
    assert len(ran) == 2 and [call.result for call in episode.calls] == ["ok", "ok", "refused", "refused"]
    assert sum(message["role"] == "tool" for message in episode.messages) == 4  # every call has a result


def test_agent_that_never_answers_is_stopped():
    replies = script(*[calling(called("add", '{"a": 2, "b": 3}'))] * 3)
    episode = run(replies, ASK, {"add": add}, limits=EpisodeLimits(turns=3))
    assert (episode.outcome, episode.answer, episode.turns) == (Outcome.OUT_OF_TURNS, "", 3)


@pytest.mark.parametrize(
    "reply", [Reply(content="The sum i"), calling(called("add", '{"a": 1, "b": 1}'), finished=False)]
)
def test_reply_that_is_cut_off_ends_the_episode(reply):
    episode = run(script(reply), ASK, {"add": add})
    assert episode.outcome == Outcome.CUT_OFF and not episode.calls and episode.answer == reply.content


def test_full_context_ends_the_episode():
    def full(messages, declarations):
        raise ContextFull("too long")

    episode = run(full, ASK, {})
    assert (episode.outcome, episode.turns, episode.messages) == (Outcome.CONTEXT_FULL, 0, tuple(ASK))


MARKS = (*map(str, (CALLS, CALL, ARGUMENTS, CALL_END, CALLS_END)), "<|im_end|>")


@given(st.lists(st.sampled_from([*MARKS, "functions.f:0", "{}", "{", "x"]), max_size=12), st.integers(1, 3))
def test_agent_survives_whatever_a_model_writes(words, turns):
    """Replies parsed of arbitrary tokens: an episode always ends with an outcome, and every call that counts has a
    result."""
    ids = TOKENIZER.encode("".join(words), allow_special_tokens=True)

    def replies(messages, declarations):
        return parse_reply(ids, TOKENIZER, thinking=False)

    episode = run(replies, ASK, {"f": lambda: "y"}, limits=EpisodeLimits(turns=turns, calls=2))
    assert episode.outcome in set(Outcome) and episode.turns <= turns
    assert sum(message["role"] == "tool" for message in episode.messages) == len(episode.calls)


NUMBER = {"type": "integer"}
PARAMETERS = {"type": "object", "properties": {"a": NUMBER, "b": NUMBER}, "required": ["a", "b"]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": PARAMETERS}}


def test_agent_over_tokens():
    """The whole way through prompts and token ids: the call is read from special tokens, its result stands in the next
    prompt, and the earlier reasoning of the turn is kept there."""

    def scripted(prompt: str):
        if "## Return of functions.add:0\n5<|im_end|>" in prompt:
            return TOKENIZER.encode("good</think>It is 5.", True)
        call = f'{CALL}functions.add:0{ARGUMENTS}{{"a": 2, "b": 3}}{CALL_END}'
        return TOKENIZER.encode(f"let me add</think>{CALLS}{call}{CALLS_END}", True)

    engine = ScriptedEngine(TOKENIZER, scripted)
    engine.config, engine.max_sequence_length = preset("demo"), 1000
    replies = engine_replies(engine, TOKENIZER, Sampling(max_new_tokens=200))
    episode = run(replies, ASK, {"add": add}, [TOOL])
    assert episode.outcome == Outcome.ANSWERED and episode.answer == "It is 5."
    second = TOKENIZER.decode(engine.requests[1].token_ids)
    assert second.startswith("<|im_system|>tool_declare<|im_middle|>") and "<think>let me add</think>" in second
    short = engine_replies(engine, TOKENIZER, Sampling(max_new_tokens=200), max_tokens=40)
    assert run(short, ASK, {}, [TOOL]).outcome == Outcome.CONTEXT_FULL


def test_agent_on_the_tiny_real_engine(tmp_path):
    """Random weights answer nonsense: the episode still ends as it must, twice the same."""
    model = load_checkpoint(tmp_path / "tiny")
    engine = Engine(model.config, model.params, slots=1, max_sequence_length=512)
    sampling = Sampling(temperature=0.0, max_new_tokens=12)
    image = {"type": "image", "image": np.zeros((28, 28, 3), np.uint8)}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": "What?"}]}]
    replies = engine_replies(engine, model.tokenizer, sampling, thinking=False)
    episodes = [run(replies, messages, {"add": add}, [TOOL], EpisodeLimits(turns=2)) for _ in range(2)]
    assert episodes[0].outcome in (Outcome.CUT_OFF, Outcome.ANSWERED, Outcome.OUT_OF_TURNS)
    assert json.dumps(episodes[0].messages[1:]) == json.dumps(episodes[1].messages[1:]) and engine.idle
