"""From a conversation to tokens and back: what the engine is asked, what a reader is shown, and Model.generate."""

from __future__ import annotations

import dataclasses

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kimi_jax as kimi
from kimi_jax.config import preset
from kimi_jax.data import BadRecord
from kimi_jax.data.conversation import CALL, CALLS
from kimi_jax.data.image import normalise
from kimi_jax.data.reply import Delta, Reply, ReplyParser, parse_reply
from kimi_jax.data.tokenizer import train_tokenizer
from kimi_jax.infer.generate import Chat, ReplyStream, StopStrings, chat_request, stream
from kimi_jax.infer.request import Sampling, TokenEvent
from tests.serve.server import ScriptedEngine, byte_tokenizer, load_checkpoint

TOKENIZER = byte_tokenizer()
END = TOKENIZER.special_id("<|im_end|>")
STOP_IDS = (END,)


def events(tokens, reason="stop"):
    """The tokens one by one, the last one with a reason."""
    return [TokenEvent(0, int(t), -1.0, (), reason if i == len(tokens) - 1 else None) for i, t in enumerate(tokens)]


def shown(tokens, parser=None, stop=(), reason="stop", tokenizer=TOKENIZER):
    view = ReplyStream(tokenizer, STOP_IDS, parser, stop)
    deltas = [delta for event in events(tokens, reason) for delta in view.feed(event)]
    return deltas, view


# ------------------------------------------------------------------------------------------------------------- text out


@given(st.text(), st.lists(st.text(min_size=1, max_size=3), max_size=3), st.data())
def test_stop_strings_however_the_text_is_cut(text, stops, data):
    """The text up to the first stop string, and never a character that may have to be taken back."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    ends = [text.find(stop) for stop in stops if stop in text]
    want = text[: min(ends)] if ends else text
    filter_ = StopStrings(tuple(stops))
    got = ""
    for piece in pieces:
        got += filter_.feed(piece)
        assert want.startswith(got)
    assert got + filter_.close() == want
    assert filter_.stopped == bool(ends)


@given(st.text(max_size=20))
def test_characters_are_never_split(text):
    """Each token is a byte here."""
    deltas, view = shown([*TOKENIZER.encode(text, allow_special_tokens=False), END])
    clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert "".join(delta.content for delta in deltas) == clean == view.reply.content
    assert all("�" not in delta.content for delta in deltas) or "�" in clean
    assert view.finish_reason == "stop"


def test_bytes_that_are_no_text_and_a_cut_off_character():
    deltas, view = shown([0xFF, ord("a"), *"😀".encode()[:3]], reason="length")
    assert "".join(delta.content for delta in deltas) == "�a�"
    assert view.finish_reason == "length"


def test_ids_beyond_the_tokenizer_show_nothing():
    assert shown([ord("a"), TOKENIZER.vocab_size + 5, END])[1].reply.content == "a"


@pytest.mark.parametrize("thinking", [True, False])
def test_replies_are_taken_apart_as_the_parser_does(thinking):
    text = "why</think>because</think>" + f"{CALLS}{CALL}functions.f:0<|tool_call_argument_begin|>" + "{}"
    for reason, tail in (("stop", [END]), ("length", [])):
        tokens = TOKENIZER.encode(text, allow_special_tokens=True) + tail
        deltas, view = shown(tokens, ReplyParser(thinking), reason=reason)
        whole = parse_reply(tokens, TOKENIZER, thinking)
        assert view.reply == whole
        assert "".join(delta.content for delta in deltas) == whole.content
        assert "".join(delta.reasoning for delta in deltas) == whole.reasoning


def test_stop_strings_are_looked_for_in_the_answer_only():
    tokens = TOKENIZER.encode("a.b</think>c.d", allow_special_tokens=True)
    deltas, view = shown([*tokens, END], ReplyParser(True), stop=["."])
    assert (view.reply.reasoning, view.reply.content, view.finish_reason) == ("a.b", "c", "stop")
    assert view.feed(TokenEvent(0, ord("x"), -1.0, (), None)) == []


def test_what_may_begin_a_stop_string_comes_before_the_call_that_follows():
    tokens = TOKENIZER.encode(f"see ST{CALL}functions.f:0", allow_special_tokens=True)
    deltas, view = shown([*tokens, END], ReplyParser(False), stop=["STOP"])
    assert [d.content for d in deltas if d.content][-1] == "ST"
    assert deltas[-1] == Delta(call=0, id="functions.f:0", name="f")
    assert view.finish_reason == "stop"


@given(st.lists(st.sampled_from(["<|im_end|>", "</think>", "<think>", CALLS, CALL, "a"]), max_size=8).map("".join))
def test_stream_shows_spelled_markers_as_text(text):
    for thinking in (True, False):
        deltas, view = shown([*TOKENIZER.encode(text), END], ReplyParser(thinking))
        assert view.reply == (Reply(reasoning=text, finished=True) if thinking else Reply(content=text, finished=True))
        assert "".join(delta.reasoning + delta.content for delta in deltas) == text


def test_stop_string_that_spells_a_marker_stops_at_the_spelling_only():
    tokens = [*TOKENIZER.encode("why "), TOKENIZER.special_id("</think>"), *TOKENIZER.encode("so </think> x"), END]
    _, view = shown(tokens, ReplyParser(True), stop=["</think>"])
    assert (view.reply.reasoning, view.reply.content, view.finish_reason) == ("why ", "so ", "stop")


def test_our_own_tokenizer_streams_bytes_too(tmp_path):
    ours = train_tokenizer(["Grüße 😀, grüße 😀"], 280, tmp_path / "t.json")
    text = "Grüße 😀 <|im_end|>"
    assert ours.decode_bytes(ours.encode(text)) == text.encode()
    assert ours.decode_bytes([ours.special_id("<think>")]) == b"<think>"
    deltas, view = shown(ours.encode("😀ü"), tokenizer=ours, reason="length")
    assert [delta.content for delta in deltas if delta.content] == ["😀", "ü"]


# ----------------------------------------------------------------------------------------------------------- prompts in


def request(messages, vision=True, **more):
    config = preset("demo") if vision else preset("moonlight_16b_a3b")
    config = dataclasses.replace(config, media_placeholder_token_id=TOKENIZER.media_pad_id)
    return chat_request(Chat(messages, **more), TOKENIZER, config, Sampling(stop_ids=(5,)))


def test_conversation_becomes_its_prompt():
    messages = [{"role": "user", "content": "hi <|im_end|>"}]
    asked = request(messages, thinking=False)
    want = TOKENIZER.apply_chat_template(messages, thinking=False, tokenize=True)
    assert asked.token_ids.tolist() == want
    assert asked.sampling.stop_ids == (5, TOKENIZER.eos_id, END, TOKENIZER.special_id("[EOT]"))


def test_answer_follows_even_an_answer():
    assert TOKENIZER.decode(request([{"role": "assistant", "content": "a"}]).token_ids).endswith("<think>")


def test_images_and_videos_come_one_by_one():
    image = PIL.Image.new("RGB", (60, 30), "red")
    frames = [np.full((28, 28, 3), i, np.uint8) for i in range(6)]
    parts = [{"type": "video", "video": frames}, {"type": "image", "image": image}]
    asked = request([{"role": "user", "content": parts}])
    assert [item.grid for item in asked.media] == [(4, 2, 2), (2, 2, 2), (1, 4, 6)]
    assert [item.patches.shape for item in asked.media] == [(16, 588), (8, 588), (24, 588)]
    assert (asked.token_ids == TOKENIZER.media_pad_id).sum() == 1 + 1 + 6
    want, _ = kimi.process_image(image)
    assert asked.media[2].patches.dtype == np.uint8
    np.testing.assert_array_equal(normalise(asked.media[2].patches), want)


def test_what_cannot_be_asked():
    image = [{"role": "user", "content": [{"type": "image", "image": PIL.Image.new("RGB", (28, 28))}]}]
    with pytest.raises(ValueError, match="text-only"):
        request(image, vision=False)
    with pytest.raises(ValueError, match="do not belong together"):
        chat_request(Chat(image), TOKENIZER, preset("demo"), Sampling())
    with pytest.raises(BadRecord, match="refused"):
        request([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}])
    for message in ({"role": "user", "name": 5}, {"role": "user", "content": 5}, {"content": "x"}):
        with pytest.raises(ValueError, match=r"messages\[0\]"):
            request([message])


def test_reader_who_stops_frees_the_engine():
    engine = ScriptedEngine(TOKENIZER, lambda prompt: TOKENIZER.encode("x" * 100))
    asked = request([{"role": "user", "content": "hi"}])
    deltas = stream(engine, asked, ReplyStream(TOKENIZER, asked.sampling.stop_ids, None))
    assert next(deltas) == Delta(content="x")
    deltas.close()
    assert engine.cancelled == [0]
    whole = list(stream(engine, asked, ReplyStream(TOKENIZER, asked.sampling.stop_ids, None)))
    assert "".join(delta.content for delta in whole) == "x" * 100
    assert engine.cancelled == [0]


# --------------------------------------------------------------------------------------------------------- on a model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def test_generate_is_the_models_own_greedy_text(model):
    """Token by token the most probable one of `model.logits`, an image included."""
    image = PIL.Image.new("RGB", (40, 30), (200, 30, 30))
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}]
    reply = model.generate(messages, max_new_tokens=6, temperature=0, thinking=False)
    asked = chat_request(Chat(messages, thinking=False), model.tokenizer, model.config, Sampling())
    pixels, grid = kimi.process_image(image)
    ids = asked.token_ids.tolist()
    for _ in range(6):
        ids.append(int(model.logits([ids], pixels, grid)[0, -1].argmax()))
    sampled = [i for i in ids[len(asked.token_ids) :] if i not in asked.sampling.stop_ids]
    assert reply == parse_reply(sampled, model.tokenizer, thinking=False)


def test_generate_repeats_itself_with_a_seed(model):
    messages = [{"role": "user", "content": "hi"}]
    first, again, other = (model.generate(messages, max_new_tokens=12, seed=seed) for seed in (1, 1, 2))
    assert isinstance(first, Reply)
    assert first == again != other
    long = [{"role": "user", "content": "x" * 1050}]  # does not fit the first engine
    assert isinstance(model.generate(long, max_new_tokens=2, seed=1), Reply)


def test_model_without_a_tokenizer_says_so(model):
    bare = kimi.Model(model.config, model.params)
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        bare.generate([{"role": "user", "content": "hi"}])
