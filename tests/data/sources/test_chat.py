"""Chat sources: every layout of a row gives the same conversation, in JSON lines and in parquet; bad rows are named."""

import base64
import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

from kimi_jax import config as c  # noqa: E402
from kimi_jax.config import ChatConfig, ConfigError, SourceConfig, freeze  # noqa: E402
from kimi_jax.data import BadRecord  # noqa: E402
from kimi_jax.data.conversation import apply_chat_template, encode  # noqa: E402
from kimi_jax.data.example import Image, Text, Turns, Video  # noqa: E402
from kimi_jax.data.image import decode  # noqa: E402
from kimi_jax.data.packing import unpack  # noqa: E402
from kimi_jax.data.pipeline import BatchStream  # noqa: E402
from kimi_jax.data.sources import open_source  # noqa: E402
from kimi_jax.data.sources.chat_row import read_row  # noqa: E402
from kimi_jax.data.vocabulary import _texts as texts_of  # noqa: E402
from tests.data.sources.media import clip, png, write_jsonl  # noqa: E402
from tests.data.synthetic import settings, tokenizer  # noqa: E402

PLAIN = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long."},
]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."},
            {"from": "human", "value": "Bye"}, {"from": "gpt", "value": "So long."}]  # fmt: skip
CALLED = [
    {"role": "user", "content": "Weather in Rome?"},
    {"role": "assistant", "content": None,
     "tool_calls": [{"id": "call_9", "type": "function", "function": {"name": "w", "arguments": '{"city": "Rome"}'}}]},
    {"role": "tool", "tool_call_id": "call_9", "content": "20"},
    {"role": "assistant", "content": "20 degrees."},
]  # fmt: skip
TOOL = {"type": "function", "function": {"name": "w", "parameters": {"type": "object", "properties": {}}}}


def text(example) -> str:
    return "".join(part.text if isinstance(part, Text) else f"<{type(part).__name__}>" for part in example.parts)


def learned(example) -> str:
    return "|".join(part.text for part in example.parts if isinstance(part, Text) and part.loss_weight)


def opened(folder, rows, kind, **chat):
    """The rows as a source of JSON lines or parquet."""
    if kind == "jsonl":
        path = write_jsonl(folder / "rows.jsonl", rows)
    else:
        path = folder / "rows.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
    return open_source(SourceConfig(kind="chat", path=str(path), chat=ChatConfig(**chat) if chat else None))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": PLAIN},
        {"conversations": SHAREGPT, "system": "Be brief."},
        {"conversations": [{"from": "system", "value": "Be brief."}, *SHAREGPT], "score": 3},
        {"conversation": PLAIN},
    ],
)
def test_layouts_read_as_the_same_conversation(tmp_path, kind, row):
    source = opened(tmp_path, [{"id": "k", **row}], kind)
    assert len(source) == 1 and source[0].key == "k"
    assert text(source[0]) == apply_chat_template(PLAIN, thinking=False)
    assert learned(source[0]) == "Hello.|<|im_end|>|So long.|<|im_end|>"
    assert pickle.loads(pickle.dumps(source))[0] == source[0]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), json.dumps([TOOL["function"]])])
def test_tools_and_calls_read_as_the_released_template_writes_them(tmp_path, kind, tools):
    sharegpt = [
        {"from": "human", "value": "Weather in Rome?"},
        {"from": "function_call", "value": '{"name": "w", "arguments": "{\\"city\\": \\"Rome\\"}"}'},
        {"from": "observation", "value": "20"},
        {"from": "gpt", "value": "20 degrees."},
    ]
    if kind == "parquet" and not isinstance(tools, str):
        pytest.skip("an empty object has no type in parquet: nested tools are written as JSON")
    for messages in (CALLED, sharegpt):
        (tmp_path / "x").mkdir(exist_ok=True)
        example = opened(tmp_path, [{"messages": messages, "tools": tools}], kind)[0]
        renamed = [dict(m) for m in CALLED]
        renamed[1] = {**CALLED[1], "tool_calls": [{**CALLED[1]["tool_calls"][0], "id": "functions.w:0"}]}
        renamed[2] = {**CALLED[2], "tool_call_id": "functions.w:0"}
        assert text(example) == apply_chat_template(renamed, [TOOL], thinking=False)
        assert 'functions.w:0|<|tool_call_argument_begin|>|{"city": "Rome"}' in learned(example)
        assert learned(example).endswith("|20 degrees.|<|im_end|>")


def test_media_of_every_spelling(tmp_path):
    """Paths, data URIs, placeholders with a list, parts without a value, parts with a number; bytes in parquet."""
    image, movie = png(28, 28), clip(frames=2)
    (tmp_path / "a.png").write_bytes(image)
    (tmp_path / "m.mp4").write_bytes(movie)
    uri = "data:image/png;base64," + base64.b64encode(image).decode()
    answer = {"role": "assistant", "content": "ok"}
    ask = {"type": "text", "text": "what?"}
    own = [{"type": "image", "image": "a.png"}, {"type": "video", "video": "m.mp4"}, ask]
    mixed = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "video"}, ask]
    beside = [
        {"messages": [{"role": "user", "content": "<image>\n<video>what?"}, answer], "images": ["a.png"],
         "videos": ["m.mp4"]},
        {"messages": [{"role": "user", "content": own}, answer]},
        {"messages": [{"role": "user", "content": mixed}, answer], "video": "m.mp4"},
    ]  # fmt: skip
    numbered = [{"type": kind, "index": 0, "text": None} for kind in ("image", "video")] + [{"index": None, **ask}]
    inside = [
        {"messages": [{"role": "user", "content": numbered},
                      {"role": "assistant", "content": [{"type": "text", "text": "ok", "index": None}]}],
         "images": [{"bytes": image, "path": "a.png"}], "videos": [movie]},
    ]  # fmt: skip
    sources = [opened(tmp_path, beside, "jsonl"), opened(tmp_path, inside, "parquet")]
    for source in sources:
        for i in range(len(source)):
            example = source[i]
            assert text(example).startswith("<|im_user|>user<|im_middle|><Image>\n<Video>\nwhat?<|im_end|>")
            image, video = (part for part in example.parts if not isinstance(part, Text))
            assert isinstance(image, Image) and decode(image.image).size == (28, 28) and isinstance(video, Video)
            assert learned(example) == "ok|<|im_end|>"


@pytest.mark.parametrize(
    ("row", "chat", "expected"),
    [
        ({}, {}, "r</think>a"),
        ({"thinking": False}, {}, "a"),
        ({}, {"thinking": False}, "a"),
        ({"thinking": True}, {"thinking": False}, "r</think>a"),
    ],
)
def test_thinking_is_the_rows_word_then_the_settings(tmp_path, row, chat, expected):
    """A `<think>` block in the content, as many data sets have it, is reasoning."""
    said = [{"role": "assistant", "content": "a", "reasoning_content": "r"},
            {"role": "assistant", "content": "<think>\nr\n</think>\n\na"}]  # fmt: skip
    rows = [{"messages": [{"role": "user", "content": "q"}, answer], **row} for answer in said]
    source = opened(tmp_path, rows, "jsonl", **chat)
    for i in range(2):
        assert learned(source[i]).replace("|<|im_end|>", "").replace("|", "") == expected


def test_train_on_last_and_preserve_thinking(tmp_path):
    messages = [
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "a1", "reasoning": "r1"},
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "a2", "reasoning": "r2"},
    ]  # fmt: skip
    rows = [{"messages": messages}, {"messages": messages, "preserve_thinking": True}]
    assert learned(opened(tmp_path, rows, "jsonl")[0]) == "a1|<|im_end|>|r2|</think>|a2|<|im_end|>"
    assert learned(opened(tmp_path, rows, "jsonl")[1]) == "r1|</think>|a1|<|im_end|>|r2|</think>|a2|<|im_end|>"
    last = opened(tmp_path, rows, "jsonl", train_on="last", too_long="refuse")
    assert learned(last[0]) == "r2|</think>|a2|<|im_end|>" and last[0].turns.keep == "all"
    assert opened(tmp_path, rows, "jsonl", train_on="last")[0].turns.keep == "last"
    assert opened(tmp_path, rows, "jsonl")[0].turns.keep == "first"


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def showing(value) -> dict:
    """A row that shows one image."""
    return {"messages": [{"role": "user", "content": [{"type": "image", "image": value}]}, ANSWER]}


@pytest.mark.parametrize(
    ("row", "reason", "match"),
    [
        ("no json", "bad_json", ""),
        ({"text": "a"}, "bad_messages", "none of messages"),
        ({"messages": []}, "bad_messages", "none of messages"),
        ({"messages": "hi"}, "bad_messages", "none of messages"),
        ({"messages": ["hi"]}, "bad_messages", r"messages\[0\] is no object"),
        ({"messages": [USER]}, "bad_messages", "nothing that the assistant wrote"),
        ({"messages": [{"role": "usr", "content": "q"}, ANSWER]}, "bad_messages", "not 'usr'"),
        ({"messages": [{"role": "user", "content": {"a": 1}}, ANSWER]}, "bad_messages", r"messages\[0\].content"),
        ({"messages": [{"role": "user", "contents": "q"}, ANSWER]}, "bad_messages", "did you mean 'content'"),
        ({"messages": [USER, {**ANSWER, "partial": True}]}, "bad_messages", "partial"),
        ({"messages": [USER, ANSWER], "tool": []}, "bad_messages", "nearly 'tools'"),
        ({"messages": [USER, ANSWER], "tools": "{"}, "bad_messages", "not JSON"),
        ({"messages": [USER, ANSWER], "tools": "[" * 100_000}, "bad_messages", "not JSON"),
        ({"messages": [USER, ANSWER], "tools": [1]}, "bad_messages", "list of objects"),
        ({"messages": [USER, ANSWER], "thinking": "yes"}, "bad_messages", "true or false"),
        ({"messages": [USER, ANSWER], "images": ["a.png"]}, "placeholder_mismatch", "1 images"),
        (showing(None), "placeholder_mismatch", "no image"),
        (showing("../a.png"), "unsafe_path", ""),
        (showing("/etc/passwd"), "unsafe_path", ""),
        (showing("https://x/a.png"), "unsafe_path", ""),
        (showing("no.png"), "missing_file", ""),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "bad_messages", "not JSON"),
        ({"conversations": [{"from": "function_call", "value": "3"}]}, "bad_messages", "object with name"),
        ({"messages": [USER, {"role": "tool", "content": "x"}, ANSWER]}, "bad_messages", "no call without id waits"),
        ({"messages": PLAIN, "system": "Be long."}, "bad_messages", "system"),
        ({"messages": [USER, {"role": "assistant", "content": "a", "name": 3}]}, "bad_messages", "name"),
    ],
)  # fmt: skip
def test_malformed_rows_are_named(tmp_path, row, reason, match):
    source = opened(tmp_path, [row], "jsonl")
    with pytest.raises(BadRecord, match=match or reason) as bad:
        source[0]
    assert bad.value.reason == reason and bad.value.key == "rows.jsonl:1"


def test_parquet_path_without_bytes_is_refused(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "<image>q"}, ANSWER], "images": [{"bytes": None, "path": "a.png"}]}
    ]
    with pytest.raises(BadRecord) as bad:
        opened(tmp_path, rows, "parquet")[0]
    assert bad.value.reason == "unsafe_path"


FIELDS = (
    "role", "content", "type", "text", "image", "tool_calls", "function", "name", "arguments", "id", "from", "value",
    "index", "url", "reasoning_content", "tool_call_id",
)  # fmt: skip
WORDS = ("<image>", "user", "assistant", "image", "text")
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=4) | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=12,
)
ROW = st.sampled_from(["messages", "conversations", "tools", "system", "images", "thinking"])


@given(st.dictionaries(ROW, json_values, max_size=4))
def test_any_json_is_a_conversation_or_a_bad_record(tmp_path_factory, row):
    folder = tmp_path_factory.mktemp("any")
    source = opened(folder, [row], "jsonl")
    try:
        example = source[0]
    except BadRecord:
        return
    assert learned(example) and example.turns


def test_source_without_conversations_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"FILE.jsonl or FILES.parquet"):
        open_source(SourceConfig(kind="chat", path=str(tmp_path)))
    with pytest.raises(ConfigError, match="none of the columns messages"):
        opened(tmp_path, [{"text": "a"}], "parquet")
    with pytest.raises(ConfigError, match="chat is for kind 'chat'"):
        freeze({"chat": {"train_on": "last"}, "kind": "jsonl"}, SourceConfig)


def test_settings_of_a_chat_source_from_the_command_line():
    config = c.override(c.TrainConfig(), {
        "data.sources.mine.kind": "chat", "data.sources.mine.chat.train_on": "last",
        "data.sources.mine.chat.thinking": False,
    })  # fmt: skip
    assert config.data.sources["mine"].chat == ChatConfig(train_on="last", thinking=False)
    with pytest.raises(ConfigError, match="one of all, last"):
        c.override(config, {"data.sources.mine.chat.train_on": "first"})


# ------------------------------------------------------------------------------------------------------------- packing


def rows_of(count: int) -> list[dict]:
    rng = np.random.default_rng(0)
    return [
        {"id": f"row-{i}", "messages": [m for j in range(int(rng.integers(1, 4))) for m in (
            {"role": "user", "content": f"the red circle {i} {j} " * int(rng.integers(1, 6))},
            {"role": "assistant", "content": f"answer {i} {j}"},
        )]}
        for i in range(count)
    ]  # fmt: skip


def test_packed_conversations_keep_their_masks_and_never_see_each_other(tmp_path):
    """What comes out of a batch is the conversation as the encoder made it: own segment, own positions, own mask."""
    trained = tokenizer(tmp_path)
    rows = rows_of(40)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    data, model = settings(
        tmp_path / "tokenizer.json", sources={"chat": SourceConfig(kind="chat", path=str(path))},
        vision_bins=(), vision_ratio=((0.0, 0.0),),
    )  # fmt: skip
    wanted = {}
    for row in rows:
        example = encode(row["messages"], thinking=False, train_on="all")
        ids = [(i, w) for part in example.parts for i, w in (
            [(trained.special_id(part.text), part.loss_weight)] if part.special
            else [(i, part.loss_weight) for i in trained.encode(part.text)]
        )]  # fmt: skip
        wanted[tuple(i for i, _ in ids)] = [w for _, w in ids]
    several = 0
    with BatchStream(data, model, 10) as stream:
        for _ in range(3):
            batch = next(stream)
            documents = list(unpack(batch))
            several += len(documents) > len(batch.tokens)
            for document in documents:
                weights = wanted[tuple(document.tokens.tolist())]
                assert document.loss_weights.tolist()[:-1] == weights[1:] and document.loss_weights[-1] == 0
                assert document.positions.tolist() == list(range(len(weights)))
        assert stream.report()["shortened"] == {} and not stream.report()["bad"]
    assert several == 3  # rows hold more than one conversation


@pytest.mark.parametrize(("too_long", "counted"), [("shorten", "shortened"), ("refuse", "bad")])
def test_too_long_conversations_are_shortened_or_refused_and_counted(tmp_path, too_long, counted):
    tokenizer(tmp_path)
    long = {"messages": [m for i in range(40) for m in (USER, {"role": "assistant", "content": f"answer {i}"})]}
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows_of(20), long])
    chat = ChatConfig(too_long=too_long)
    data, model = settings(
        tmp_path / "tokenizer.json", sources={"chat": SourceConfig(kind="chat", path=str(path), chat=chat)},
        vision_bins=(), vision_ratio=((0.0, 0.0),),
    )  # fmt: skip
    with BatchStream(data, model, 10) as stream:
        for _ in range(3):
            batch = next(stream)
            assert all(len(d.tokens) <= data.sequence_length for d in unpack(batch))
        report = stream.report()
    assert report[counted].keys() == {"chat"}
    if too_long == "refuse":
        assert report["bad"]["chat"].keys() == {"too_long"} and "rows.jsonl:21" in report["bad_examples"]["chat"][0]
        assert not report["shortened"]


def test_rows_that_no_file_holds_can_be_read_too():
    conversation = read_row({"messages": PLAIN, "preserve_thinking": True}, "k", lambda kind, value: value)
    assert conversation.messages == PLAIN and conversation.preserve_thinking and conversation.tools is None


def test_vocabulary_is_learned_from_texts_and_not_from_special_tokens(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": PLAIN}])
    source = SourceConfig(kind="chat", path=str(path))
    config = c.TrainConfig(data=c.DataConfig(sources={"chat": source}))
    found = list(texts_of(config, "chat", 10_000))
    assert "Hello." in found and not any("<|" in text or "think" in text for text in found)


def test_turns_of_a_record_are_those_of_the_example(tmp_path):
    source = opened(tmp_path, [{"messages": PLAIN}], "jsonl")
    assert source.record(0).turns == source[0].turns == Turns((5, 17, 29), "first")
