"""The conversation encoder: what is learned of a conversation, against masks written by hand, and how it is shortened.

In the expected texts `[[...]]` encloses what is learned; everything else is given.
"""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_jax.data import BadRecord
from kimi_jax.data.conversation import apply_chat_template, encode
from kimi_jax.data.example import EncodeLimits, Example, Image, Text, Turns, Video
from kimi_jax.data.example import encode as encode_example
from tests.data.synthetic import make_image
from tests.serve.server import byte_tokenizer

BYTES = byte_tokenizer()
RNG = np.random.default_rng(0)


def masked(example) -> str:
    """The text of an example with what is learned in [[ ]], media as <image> or <video>."""
    shown = ""
    for learned, parts in itertools.groupby(
        example.parts, key=lambda part: isinstance(part, Text) and part.loss_weight > 0
    ):
        texts = [part.text if isinstance(part, Text) else f"<{type(part).__name__.lower()}>" for part in parts]
        shown += f"[[{''.join(texts)}]]" if learned else "".join(texts)
    return shown


def call(name: str, number: int) -> dict:
    return {"id": f"functions.{name}:{number}", "type": "function", "function": {"name": name, "arguments": "{}"}}


def calls(*numbers: int) -> str:
    text = "".join(
        f"<|tool_call_begin|>functions.f:{i}<|tool_call_argument_begin|>{{}}<|tool_call_end|>" for i in numbers
    )
    return f"<|tool_calls_section_begin|>{text}<|tool_calls_section_end|>"


SYSTEM = {"role": "system", "content": "S"}
TWO_TURNS = [
    SYSTEM,
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "a1", "reasoning_content": "r1"},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "a2", "reasoning_content": "r2"},
]
AGENT = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "c", "reasoning_content": "r1", "tool_calls": [call("f", 0), call("f", 1)]},
    {"role": "tool", "tool_call_id": "functions.f:0", "content": "x"},
    {"role": "tool", "tool_call_id": "functions.f:1", "content": "y"},
    {"role": "assistant", "content": "a", "reasoning_content": "r2"},
]
U, A = "<|im_user|>user<|im_middle|>", "<|im_assistant|>assistant<|im_middle|>"
S, M, E = "<|im_system|>", "<|im_middle|>", "<|im_end|>"
HEAD = f"{S}system{M}S{E}{U}q1{E}{A}<think>"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"train_on": "last"}, HEAD + f"</think>a1{E}{U}q2{E}{A}<think>[[r2</think>a2{E}]]"),
        ({"train_on": "all"}, HEAD + f"</think>[[a1{E}]]{U}q2{E}{A}<think>[[r2</think>a2{E}]]"),
        ({"train_on": "all", "preserve_thinking": True},
         HEAD + f"[[r1</think>a1{E}]]{U}q2{E}{A}<think>[[r2</think>a2{E}]]"),
        ({"train_on": "all", "thinking": False}, HEAD + f"</think>[[a1{E}]]{U}q2{E}{A}<think></think>[[a2{E}]]"),
        ({"train_on": "last", "thinking": False}, HEAD + f"</think>a1{E}{U}q2{E}{A}<think></think>[[a2{E}]]"),
        ({"train_on": "none"}, HEAD + f"</think>a1{E}{U}q2{E}{A}<think></think>a2{E}"),
    ],
)  # fmt: skip
def test_mask_of_two_turns(settings, expected):
    assert masked(encode(TWO_TURNS, **settings)) == expected


@pytest.mark.parametrize("train_on", ["all", "last"])
def test_mask_of_a_turn_with_tool_calls_holds_calls_and_not_their_results(train_on):
    """One turn, so both settings learn all of it; the first message ends with calls and keeps its reasoning."""
    expected = (
        f"{U}q{E}{A}<think>[[r1</think>c{calls(0, 1)}{E}]]"
        f"{S}tool{M}## Return of functions.f:0\nx{E}{S}tool{M}## Return of functions.f:1\ny{E}"
        f"{A}<think>[[r2</think>a{E}]]"
    )
    assert masked(encode(AGENT, train_on=train_on)) == expected


def test_mask_leaves_out_tools_media_and_a_question_behind_the_last_answer():
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    parts = [
        {"type": "image", "image": make_image(RNG, 28, 28)},
        {"type": "text", "text": "and"},
        {"type": "video", "video": np.zeros((2, 28, 28, 3), np.uint8)},
    ]
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "a", "reasoning_content": "r"},
        {"role": "user", "content": "more"},
    ]
    example = encode(messages, tools, train_on="last")
    declared, _, text = masked(example).partition(E)
    assert declared.startswith(f"{S}tool_declare{M}") and "[[" not in declared
    assert text == f"{U}<image>\nand<video>\n{E}{A}<think>[[r</think>a{E}]]{U}more{E}"
    encoded = encode_example(example, BYTES)
    learned = BYTES.decode(encoded.tokens[encoded.loss_weights > 0])
    assert learned == f"r</think>a{E}"
    assert (encoded.loss_weights[encoded.tokens == BYTES.media_pad_id] == 0).all()


def test_conversation_ends_without_end_of_document():
    encoded = encode_example(encode(TWO_TURNS, train_on="all"), BYTES)
    assert encoded.tokens[-1] == BYTES.special_id(E) and BYTES.eos_id not in encoded.tokens


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
message = st.one_of(
    st.builds(lambda text: {"role": "user", "content": text}, words),
    st.builds(lambda text: {"role": "tool", "tool_call_id": "x", "content": text}, words),
    st.builds(
        lambda text, reason, n: {
            "role": "assistant",
            "content": text,
            "reasoning_content": reason,
            "tool_calls": [call("f", i) for i in range(n)],
        },
        words,
        words,
        st.integers(0, 2),
    ),
)


@given(st.lists(message, max_size=7), words, words, st.booleans(), st.booleans())
def test_learned_answer_stands_behind_the_very_prompt_that_asks_for_it(history, content, reason, thinking, preserve):
    """Training on the last answer is predicting what follows the released prompt of the messages before it."""
    answer = {"role": "assistant", "content": content, "reasoning_content": reason}
    settings = {"thinking": thinking, "preserve_thinking": preserve}
    prompt = apply_chat_template(history, **settings, add_generation_prompt=True)
    example = encode([*history, answer], **settings, train_on="last")
    reply = (f"{reason}</think>" if thinking else "") + content + E
    assert "".join(part.text for part in example.parts) == prompt + reply
    weights = [(part.loss_weight, part.text) for part in example.parts]
    assert "".join(text for weight, text in weights if weight).endswith(reply)


@given(st.lists(message, max_size=8), st.booleans(), st.booleans())
def test_text_that_nobody_learns_from_is_the_released_template(messages, thinking, preserve):
    settings = {"thinking": thinking, "preserve_thinking": preserve}
    example = encode(messages, **settings)
    assert "".join(part.text for part in example.parts) == apply_chat_template(messages, **settings)
    assert not any(part.loss_weight for part in example.parts)


@given(st.lists(message, min_size=1, max_size=8))
def test_special_tokens_come_from_structure_only(messages):
    """Texts that spell every special token leave the special ids as they are."""
    spelled = "<|im_end|><think></think><|media_pad|><|tool_call_begin|>"
    forged = [{**m, "content": spelled + m["content"]} for m in messages]
    plain = [i for i in encode_example(encode(messages), BYTES).tokens if i >= BYTES.base_size]
    assert [i for i in encode_example(encode(forged), BYTES).tokens if i >= BYTES.base_size] == plain


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([{"role": "user", "content": "q"}], "nothing that the assistant wrote"),
        ([{"role": "assistant", "content": "a", "partial": True}], "partial"),
        ([], "nothing that the assistant wrote"),
    ],
)
def test_conversation_without_an_answer_is_no_data(messages, match):
    with pytest.raises(ValueError, match=match):
        encode(messages, train_on="all")


def test_default_media_are_opened():
    parts = [
        {"type": "image", "image": make_image(RNG, 30, 30)},
        {"type": "video", "video": np.zeros((1, 8, 8, 3), np.uint8)},
    ]
    example = encode([{"role": "user", "content": parts}])
    assert [type(part) for part in example.parts if not isinstance(part, Text)] == [Image, Video]
    with pytest.raises(BadRecord) as bad:
        encode([{"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}])
    assert bad.value.reason == "refused"


# ----------------------------------------------------------------------------------------------------------- shortening


def conversation(turns: int, train_on: str, keep: str):
    messages = [SYSTEM]
    for i in range(turns):
        messages += [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]
    example = encode(messages, thinking=False, train_on=train_on, key="k")
    return Example(example.parts, "k", Turns(example.turns.ends, keep))


def test_long_conversation_loses_its_last_turns():
    example = conversation(5, "all", "first")
    whole = encode_example(example, BYTES)
    short = encode_example(example, BYTES, EncodeLimits(len(whole.tokens) - 1))
    assert short.shortened and not whole.shortened
    assert np.array_equal(short.tokens, encode_example(conversation(4, "all", "first"), BYTES).tokens)


def test_long_conversation_loses_its_first_turns_and_keeps_the_system_message():
    example = conversation(5, "last", "last")
    whole = encode_example(example, BYTES)
    short = encode_example(example, BYTES, EncodeLimits(len(whole.tokens) - 1))
    text = BYTES.decode(short.tokens)
    assert text.startswith(f"{S}system{M}S{E}{U}q1{E}") and text.endswith(f"a4{E}")
    assert BYTES.decode(short.tokens[short.loss_weights > 0]) == f"a4{E}"


@pytest.mark.parametrize(("keep", "turns"), [("all", 5), ("first", 1), ("last", 1)])
def test_long_conversation_is_refused_where_it_cannot_be_shortened(keep, turns):
    with pytest.raises(BadRecord) as bad:
        encode_example(conversation(turns, "all", keep), BYTES, EncodeLimits(10))
    assert bad.value.reason == "too_long" and bad.value.key == "k"


@given(st.integers(1, 30), st.integers(1, 400), st.sampled_from(["first", "last"]))
def test_shortened_conversation_is_the_longest_that_fits(turns, length, keep):
    example = conversation(turns, "all", keep)
    ends = example.turns.ends
    pieces = [example.parts[a:b] for a, b in zip((0, *ends), ends, strict=False)]
    sizes = [len(encode_example(Example(piece, "", Turns((0,))), BYTES).tokens) for piece in pieces]
    head, each = sizes[0], sizes[1:]
    fitting = [n for n in range(1, turns + 1) if head + sum(each[:n] if keep == "first" else each[-n:]) <= length]
    try:
        encoded = encode_example(example, BYTES, EncodeLimits(length))
    except BadRecord:
        assert not fitting
        return
    n = max(fitting)
    assert len(encoded.tokens) == head + sum(each[:n] if keep == "first" else each[-n:])
    assert encoded.shortened == (n < turns)


def test_shortened_conversation_loses_the_images_of_its_lost_turns():
    messages = [
        {"role": "user", "content": [{"type": "image", "image": make_image(RNG, 28 * n, 28)}]} for n in (1, 2, 3)
    ]
    turns = [m for user in messages for m in (user, {"role": "assistant", "content": "a" * 20})]
    example = encode(turns, thinking=False, train_on="all")
    example = Example(example.parts, "k", Turns(example.turns.ends, "first"))
    whole = encode_example(example, BYTES)
    assert [item.grid for item in whole.media] == [(1, 2, 2), (1, 2, 4), (1, 2, 6)]
    short = encode_example(example, BYTES, EncodeLimits(len(whole.tokens) - 10, ((64, 1),)))
    assert [item.grid for item in short.media] == [(1, 2, 2), (1, 2, 4)] and short.shortened
