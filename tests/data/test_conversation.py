"""Chat: the golden prompts, prompts that strangers' text cannot break out of, replies of every shape taken apart."""

import json
import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessage

import kimi_jax as kimi
from kimi_jax.data.conversation import Mark, apply_chat_template, opens_reasoning, with_released_ids
from kimi_jax.data.kimi_tokenizer import SPECIALS, KimiTokenizer
from kimi_jax.data.reply import Delta, Reply, ReplyParser, ToolCall, parse_reply
from kimi_jax.data.tokenizer import Tokenizer, train_tokenizer
from tests.environment import FIXTURES, shared
from tests.serve.server import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> KimiTokenizer:
    return kimi.load_tokenizer(shared("kimi_tokenizer"))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Tokenizer:
    return train_tokenizer(["tool user assistant"] * 9, 300, tmp_path_factory.mktemp("small") / "tokenizer.json")


# ------------------------------------------------------------------------------------------------------------- template


def test_golden_prompts(tokenizer):
    goldens = json.loads((FIXTURES / "template_golden.json").read_text())["chats"]
    assert len(goldens) >= 10
    for name, golden in goldens.items():
        args = {key: value for key, value in golden["args"].items() if key != "tools_ts_str"}
        assert tokenizer.apply_chat_template(**args) == golden["text"], name
        assert tokenizer.apply_chat_template(**args, tokenize=True) == golden["ids"], name


def test_generation_prompt_follows_unless_the_answer_is_there():
    asked = [{"role": "user", "content": "q"}]
    answered = [*asked, {"role": "assistant", "content": "a"}]
    header = "<|im_assistant|>assistant<|im_middle|><think>"
    assert apply_chat_template(asked).endswith(header)
    assert not apply_chat_template(asked, add_generation_prompt=False).endswith(header)
    assert not apply_chat_template(answered).endswith(header)
    assert apply_chat_template(answered, add_generation_prompt=True).endswith(header)
    assert apply_chat_template(asked, thinking=False).endswith(header + "</think>")


def test_names_stand_in_headers_and_other_roles_speak_as_the_system():
    text = apply_chat_template([
        {"role": "developer", "content": "d"},
        {"role": "user", "name": "Ann", "content": None},
        {"role": "tool", "tool_call_id": "x", "content": [{"type": "text", "text": "t"}]},
    ], add_generation_prompt=False)  # fmt: skip
    assert text == (
        "<|im_system|>developer<|im_middle|>d<|im_end|><|im_user|>Ann<|im_middle|><|im_end|>"
        "<|im_system|>tool<|im_middle|>## Return of x\nt<|im_end|>"
    )


def call(name: str, arguments: object = "{}", **more: object) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


def test_calls_without_an_id_are_numbered_over_the_conversation():
    messages = [
        {"role": "assistant", "content": "", "tool_calls": [call("f"), call("g", None)]},
        {"role": "assistant", "content": "", "tool_calls": [call("f", {"ü": 1})]},
    ]
    text = apply_chat_template(messages)
    assert "<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}<|tool_call_end|>" in text
    assert "<|tool_call_begin|>functions.g:1<|tool_call_argument_begin|>{}<|tool_call_end|>" in text
    assert '<|tool_call_begin|>functions.f:2<|tool_call_argument_begin|>{"ü": 1}<|tool_call_end|>' in text


def test_ids_that_another_program_made_up_are_renumbered():
    messages = [
        {"role": "assistant", "content": "", "tool_calls": [call("f", id="call_a"), call("g", id="call_b")]},
        {"role": "tool", "tool_call_id": "call_b", "content": "B"},
        {"role": "tool", "tool_call_id": "lost", "content": "?"},
        {"role": "assistant", "content": "", "tool_calls": [call("g", id="call_a")]},
        {"role": "tool", "tool_call_id": "call_a", "content": "again"},
    ]
    new = with_released_ids(messages)
    assert [c["id"] for m in new for c in m.get("tool_calls", ())] == [
        "functions.f:0",
        "functions.g:1",
        "functions.g:2",
    ]
    assert [m["tool_call_id"] for m in new if m["role"] == "tool"] == ["functions.g:1", "lost", "functions.g:2"]
    assert messages[0]["tool_calls"][0]["id"] == "call_a"  # the caller's messages are untouched
    assert with_released_ids(new) == new


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([{"content": "x"}], r"messages\[0\] is no message"),
        ([{"role": "user", "content": [{"type": "audio"}]}], r"messages\[0\].content\[0\] is neither a text"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\].content\[0\]"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content\[0\]"),
        ([{"role": "assistant", "tool_calls": [{"id": "x"}]}], r"tool_calls\[0\] needs a function"),
        ([{"role": "assistant", "tool_calls": ["x"]}], r"tool_calls\[0\] needs a function"),
    ],
)
def test_messages_of_another_form_are_named(messages, match):
    with pytest.raises(ValueError, match=match):
        apply_chat_template(messages)


NAMES = [name for name, _ in SPECIALS.values()]
hostile = st.lists(st.sampled_from([*NAMES, "a", " ", "\n", "漢", "<|im_"]), max_size=8)


@given(hostile.map("".join), hostile.map("".join))
def test_text_of_strangers_stays_text_when_asked(tokenizer, user, result):
    """The safe ids hold exactly the template's own special tokens, and spell the same prompt."""
    messages = [
        {"role": "user", "name": user or None, "content": user},
        {"role": "assistant", "content": "", "reasoning_content": result, "tool_calls": [call("f", result)]},
        {"role": "tool", "tool_call_id": user, "content": [{"type": "text", "text": result}]},
    ]
    ids = tokenizer.apply_chat_template(messages, tokenize=True)
    assert tokenizer.decode(ids) == apply_chat_template(messages)
    benign = [
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "", "tool_calls": [call("f")]},
        {"role": "tool", "content": ""},
    ]
    special = [i for i in ids if i >= tokenizer.base_size]
    expected = tokenizer.apply_chat_template(benign, tokenize=True)
    assert special == [i for i in expected if i >= tokenizer.base_size]


@given(st.text(max_size=30), st.text(max_size=30))
def test_ids_are_those_of_the_released_class_on_harmless_text(tokenizer, user, result):
    """The released class reads the rendered text as a whole, special tokens by their spelling."""
    messages = [{"role": "user", "content": user}, {"role": "tool", "tool_call_id": "x", "content": result}]
    assume(not any(name in user or name in result for name in NAMES))
    ids = tokenizer.apply_chat_template(messages, tokenize=True)
    assert ids == tokenizer.encode(apply_chat_template(messages), allow_special_tokens=True)


def test_vocabulary_trained_here_takes_the_template_too(tmp_path):
    trained = train_tokenizer(["What is the colour? user assistant"] * 9, 300, tmp_path / "tokenizer.json")
    messages = [{"role": "user", "content": "What? [EOS]"}]
    text = apply_chat_template(messages)
    ids = trained.apply_chat_template(messages, tokenize=True)
    assert trained.decode(ids) == text and sum(i < 23 for i in ids) == 6  # user, middle, end, assistant, middle, think
    messages.append({"role": "assistant", "tool_calls": [call("f")]})
    ids = trained.apply_chat_template(messages, tokenize=True)
    assert trained.decode(ids) == apply_chat_template(messages)


@given(hostile.map("".join))
def test_trained_tokenizer_never_lets_a_tool_result_forge_a_call(small, result):
    messages = [{"role": "tool", "tool_call_id": "x", "content": result}]
    ids = small.apply_chat_template(messages, tokenize=True)
    assert [i for i in ids if i < 23] == [small.special_id(m) for m in
        ("<|im_system|>", "<|im_middle|>", "<|im_end|>", "<|im_assistant|>", "<|im_middle|>", "<think>")]  # fmt: skip
    ids = small.apply_chat_template([{"role": "assistant", "tool_calls": [call("f")]}], tokenize=True)
    assert ids.count(small.special_id("<|tool_call_begin|>")) == 1


def test_tool_results_of_calls_with_one_id_go_to_the_calls_in_order():
    for old in ("functions.f:0", "call_1", "", None):
        messages = [
            {"role": "assistant", "content": None, "tool_calls": [call("f", id=old), call("g", id=old)]},
            {"role": "tool", "tool_call_id": old, "content": "1"},
            {"role": "tool", "tool_call_id": old, "content": "2"},
        ]
        assert [m["tool_call_id"] for m in with_released_ids(messages)[1:]] == ["functions.f:0", "functions.g:1"]
        with pytest.raises(ValueError, match=r"messages\[3\].tool_call_id"):
            with_released_ids([*messages, messages[2]])
    with pytest.raises(ValueError, match="of no call"):  # its call was left out; another one has its id now
        with_released_ids([{"role": "assistant", "tool_calls": [call("f", id="functions.f:3")]},
                           {"role": "tool", "tool_call_id": "functions.f:0", "content": "?"}])  # fmt: skip


USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"role": "assistant", "function_call": {"name": "f"}}, "function_call"),
        ({"role": "function", "name": "f", "content": "42"}, "role"),
        ({"role": "assistant", "content": "y", "reasoning_contents": "PLAN"}, "reasoning_contents"),
        ({"role": "user", "contents": "hello"}, "contents"),
        ({"role": "user", "reasoning_content": "hello"}, "reasoning_content"),
        ({"role": "assistant", "refusal": "no"}, "refusal"),
        ({"role": "assistant", "reasoning": "a", "reasoning_content": "b"}, "reasoning"),
        ({"role": "assistant", "tool_calls": [{"id": "x", "function": {"name": "f", "argument": "{}"}}]},
         r"tool_calls\[0\].function.argument"),
        ({"role": "user", "content": [{"type": "input_image", "text": "c"}]}, r"content\[0\].type"),
        ({"role": "user", "content": [{"type": "text", "text": "c", "image_url": "u"}]}, r"content\[0\].image_url"),
        ({"role": "user", "content": "x", "partial": True}, "partial"),
        ({"role": "assistant", "partial": True, "tool_calls": [{"function": {"name": "f"}}]}, "partial"),
    ],
)  # fmt: skip
def test_message_fields_without_a_meaning_are_refused_by_name(message, field):
    with pytest.raises(ValueError, match=rf"messages\[1\]\.{field}"):
        apply_chat_template([USER, message])


def test_message_dumped_by_the_official_client_is_accepted():
    dump = ChatCompletionMessage.model_validate({
        "role": "assistant", "content": None, "reasoning_content": "why", "annotations": [],
        "tool_calls": [{"id": "functions.f:0", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }).model_dump()  # fmt: skip
    assert dump["refusal"] is None and dump["audio"] is None and "function_call" in dump
    text = apply_chat_template([USER, dump])
    assert "<think>why</think>" in text and "functions.f:0" in text
    renamed = {("reasoning" if key == "reasoning_content" else key): value for key, value in dump.items()}
    assert apply_chat_template([USER, renamed]) == text


@pytest.mark.parametrize(
    ("message", "thinking", "end"),
    [
        ({"content": "The sum is"}, True, "<think></think>The sum is"),
        ({"content": "The sum is", "reasoning_content": "r"}, True, "<think>r</think>The sum is"),
        ({"content": "", "reasoning_content": "First"}, True, "<think>First"),
        ({"content": ""}, False, "<think></think>"),
    ],
)
def test_partial_message_is_continued(message, thinking, end):
    messages = [USER, {"role": "assistant", "partial": True, **message}]
    text = apply_chat_template(messages, thinking=thinking, add_generation_prompt=True)
    assert text.endswith("<|im_end|><|im_assistant|>assistant<|im_middle|>" + end)
    assert opens_reasoning(messages, thinking) == ("</think>" not in end)


# ---------------------------------------------------------------------------------------------------------------- reply

CALLS, CALLS_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
MARKS = (
    "<think>", "</think>", CALLS, CALLS_END, "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>",
    "<|im_end|>",
)  # fmt: skip
BYTES = byte_tokenizer()


def in_pieces(text: str) -> list[str]:
    """A text in which markers are spelled, as the pieces that the parser takes."""
    return [
        Mark(piece) if piece in MARKS else piece
        for piece in re.split("(" + "|".join(map(re.escape, MARKS)) + ")", text)
    ]


def parsed(text: str, thinking: bool = True) -> Reply:
    """The reply of special tokens and text, by way of their ids."""
    ids = []
    for piece in in_pieces(text):
        ids += [BYTES.special_id(piece)] if isinstance(piece, Mark) else BYTES.encode(piece)
    return parse_reply(ids, BYTES, thinking)


def one(call_id: str, arguments: str) -> str:
    return f"<|tool_call_begin|>{call_id}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"


def test_reasoning_answer_and_calls():
    calls = one("functions.get_weather:0", '{"city": "Paris"}') + one("functions.a.b-c:12", "")
    reply = parsed(f"why</think>so {CALLS}{calls}{CALLS_END}<|im_end|>ignored")
    assert reply == Reply("why", "so ", (
        ToolCall("functions.get_weather:0", "get_weather", '{"city": "Paris"}'),
        ToolCall("functions.a.b-c:12", "a.b-c", ""),
    ), (), True)  # fmt: skip
    assert [c.parsed for c in reply.tool_calls] == [{"city": "Paris"}, {}]


def test_call_that_leaks_out_of_an_unclosed_think_is_a_call():
    """The users' most frequent complaint (docs/released_model.md section 8, item 5)."""
    reply = parsed(f"I will look.{CALLS}{one('functions.f:0', '{}')}{CALLS_END}<|im_end|>")
    assert (reply.reasoning, reply.content) == ("I will look.", "")
    assert [c.name for c in reply.tool_calls] == ["f"]
    assert reply.problems == ("a tool call before </think>",)
    # without the section's mark, and with a late </think>
    reply = parsed(f"I will look.{one('functions.f:0', '{}')}</think>Done")
    assert (reply.reasoning, reply.content, len(reply.tool_calls)) == ("I will look.", "Done", 1)


@pytest.mark.parametrize(
    ("text", "thinking", "reasoning", "content"),
    [
        ("a</think>b", True, "a", "b"),
        ("a</think>b", False, "", "a</think>b"),  # nothing is open: the model speaks of the mark
        ("</think>b", False, "", "b"),
        ("b", False, "", "b"),
        ("<think>a</think>b", True, "a", "b"),
        ("<think>a</think>b", False, "a", "b"),
        ("a <think> b</think>c <think>", True, "a <think> b", "c <think>"),
        ("never closed", True, "never closed", ""),
        ("a</think>b</think>c", True, "a", "b</think>c"),
        ("", True, "", ""),
        ("a</thi", True, "a</thi", ""),
        ("a</think>b<|im_end|>c</think>", True, "a", "b"),
    ],
)
def test_where_reasoning_ends(text, thinking, reasoning, content):
    reply = parsed(text, thinking)
    assert (reply.reasoning, reply.content) == (reasoning, content)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ('{"a": 1', "not JSON"),
        ("[1]", "a JSON list"),
        ("null", "a JSON NoneType"),
        ('{"a": NaN}', "NaN is not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not JSON"),
        ("{'a': 1}", "not JSON"),
    ],
)
def test_malformed_arguments_are_reported_not_raised(arguments, error):
    (found,) = parsed(f"{CALLS}{one('functions.f:0', arguments)}{CALLS_END}", False).tool_calls
    assert error in found.error and found.parsed is None and found.arguments == arguments


@pytest.mark.parametrize(
    ("text", "arguments", "error"),
    [
        ("<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{", "{", "cut off"),
        ("<|tool_call_begin|>functions.f:0", "", "cut off"),
        ("<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}<|im_end|>", "{}", ""),
        (f"<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{{{CALLS_END}", "{", CALLS_END),
        ("<|tool_call_begin|>functions.f:0<|tool_call_end|>", "", ""),
        ("<|tool_call_begin|><|tool_call_argument_begin|>{}<|tool_call_end|>", "{}", "without a name"),
        (one("f", "{}"), "{}", ""),
        (one(" functions.f:0\n", "{}"), "{}", ""),
    ],
)
def test_calls_that_are_cut_off_or_misnamed(text, arguments, error):
    reply = parsed(CALLS + text, False)
    (found,) = reply.tool_calls
    assert found.arguments == arguments and (error in found.error if error else not found.error)
    assert found.name == "f" or error == "without a name"


@given(st.lists(st.sampled_from([
    "</think>", "<think>", CALLS, CALLS_END, "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>",
    "<|im_end|>", "functions.f:0", "{}", "{", " ", "a", "<", "<|", "</", "<|tool_call", "漢",
]), max_size=25), st.booleans(), st.data())  # fmt: skip
def test_stream_cut_anywhere_gives_the_same_reply(words, thinking, data):
    text = "".join(words)
    whole = parsed(text, thinking)
    parser, deltas = ReplyParser(thinking), []
    for piece in in_pieces(text):
        if isinstance(piece, Mark):
            deltas += parser.feed(piece)
            continue
        while piece:
            size = data.draw(st.integers(1, 12))
            deltas += parser.feed(piece[:size])
            piece = piece[size:]
    deltas += parser.close()
    assert parser.reply == whole
    assert "".join(d.reasoning for d in deltas) == whole.reasoning
    assert "".join(d.content for d in deltas) == whole.content
    for i, found in enumerate(whole.tool_calls):
        mine = [d for d in deltas if d.call == i]
        assert (mine[0].id, mine[0].name) == (found.id, found.name) and not any(d.id for d in mine[1:])
        assert "".join(d.arguments for d in mine) == found.arguments
    assert max((d.call for d in deltas), default=-1) == len(whole.tool_calls) - 1


def test_stream_gives_text_as_soon_as_it_is_certain():
    parser = ReplyParser()
    assert parser.feed("Let me <") == [Delta(reasoning="Let me <")]
    assert parser.feed("b> see</th") == [Delta(reasoning="b> see</th")]
    assert parser.feed(Mark("</think>")) == []
    assert parser.feed("Yes") == [Delta(content="Yes")]
    assert [parser.feed(Mark(mark)) for mark in (CALLS, "<|tool_call_begin|>")] == [[], []]
    assert parser.feed("functions.f:0") == []
    assert parser.feed(Mark("<|tool_call_argument_begin|>")) == [Delta(call=0, id="functions.f:0", name="f")]
    assert parser.feed('{"a"') == [Delta(call=0, arguments='{"a"')]
    assert parser.reply.tool_calls == ()
    assert parser.feed(": 1}") == [Delta(call=0, arguments=": 1}")]
    assert parser.feed(Mark("<|tool_call_end|>")) == []
    assert parser.reply.tool_calls[0].parsed == {"a": 1}
    assert parser.close() == []


@given(st.lists(st.sampled_from([*MARKS, "functions.f:0", "{}", "a", "漢"]), max_size=12).map("".join), st.booleans())
def test_reply_markers_spelled_with_ordinary_tokens_are_text(text, thinking):
    reply = parse_reply(BYTES.encode(text), BYTES, thinking)
    assert reply == (Reply(reasoning=text) if thinking else Reply(content=text))


words = st.text(alphabet=st.characters(exclude_characters="<|", exclude_categories=["Cs"]), max_size=20)


@given(words, words, st.lists(st.tuples(st.from_regex(r"[a-z_.]{1,8}", fullmatch=True), st.dictionaries(words, words)),
                              max_size=3))  # fmt: skip
def test_what_the_template_writes_is_read_back(reasoning, content, calls):
    message = {"role": "assistant", "content": content, "reasoning_content": reasoning,
               "tool_calls": [call(name, json.dumps(args)) for name, args in calls]}  # fmt: skip
    text = apply_chat_template([message], preserve_thinking=True)
    start = "<|im_assistant|>assistant<|im_middle|><think>"
    reply = parsed(text.removeprefix(start))
    assert (reply.reasoning, reply.content, reply.problems, reply.finished) == (reasoning, content, (), True)
    assert [(c.name, c.parsed) for c in reply.tool_calls] == calls
    assert [c.id for c in reply.tool_calls] == [f"functions.{name}:{i}" for i, (name, _) in enumerate(calls)]
    assert apply_chat_template([reply.message()], preserve_thinking=True) == text
