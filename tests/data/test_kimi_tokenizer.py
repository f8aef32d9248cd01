"""The released tokenizer: the golden ids, the cuts of long texts, any Unicode and back, and damaged files."""

import base64
import json
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import tiktoken
from hypothesis import example, given
from hypothesis import strategies as st

import kimi_jax as kimi
from kimi_jax.data.example import Example, Text, encode
from kimi_jax.data.kimi_tokenizer import SPECIALS, KimiTokenizer, pieces
from kimi_jax.data.tokenizer import SPLIT_PATTERN as LOOK_AHEAD_PATTERN
from tests.environment import FIXTURES, shared

FOLDER = "kimi_tokenizer"


@pytest.fixture(scope="module")
def tokenizer() -> KimiTokenizer:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the released file is the released file
        return kimi.load_tokenizer(shared(FOLDER))


@pytest.fixture(scope="module")
def small() -> KimiTokenizer:
    """A vocabulary of the same form without the released file: the single bytes and a few merges."""
    tokens = [bytes([b]) for b in range(256)] + [b"th", b"the", b" the", "é".encode(), b"im", b"image"]
    return KimiTokenizer(lines(tokens))


def lines(tokens: list[bytes]) -> bytes:
    return b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens))


# --------------------------------------------------------------------------------------------------- the released file


def test_golden_ids(tokenizer):
    goldens = json.loads((FIXTURES / "tokenizer_golden.json").read_text())
    assert len(goldens) >= 9
    for text, ids in goldens.items():
        assert tokenizer.encode(text, allow_special_tokens=True) == ids, text
        assert tokenizer.decode(ids) == text


def test_ids_of_the_specials_are_those_of_the_released_config(tokenizer):
    named = json.loads(shared(f"{FOLDER}/tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {int(i): (t["content"], t["special"]) for i, t in named.items()} == {
        tokenizer.base_size + i: name for i, name in SPECIALS.items()
    }
    assert (tokenizer.base_size, tokenizer.vocab_size) == (163584, 163840)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (163584, 163585, 163839)
    media = (tokenizer.media_begin_id, tokenizer.media_content_id, tokenizer.media_end_id, tokenizer.media_pad_id)
    assert media == (163602, 163603, 163604, 163605)
    assert tokenizer.special_id("<think>") == 163606 and tokenizer.special_id("<|reserved_token_163600|>") == 163600
    with pytest.raises(ValueError, match="not a special token"):
        tokenizer.special_id("the")


def test_every_id_decodes_and_is_encoded_again(tokenizer):
    """Specials come back as themselves; the text of base tokens, of which a sample is taken, is kept."""
    for i in range(tokenizer.base_size, tokenizer.vocab_size):
        assert tokenizer.encode(tokenizer.decode([i]), allow_special_tokens=True) == [i]
    whole = [i for i in range(0, tokenizer.base_size, 97) if "\ufffd" not in tokenizer.decode([i])]
    assert len(whole) > 1000
    for i in whole:  # other ids may spell the same text, never another one
        assert tokenizer.decode(tokenizer.encode(tokenizer.decode([i]))) == tokenizer.decode([i])


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=80))
@example("İıſK'S don'T ﬁ ǅ ᾳ 한국어ㅋㅋ 漢字かな交じり\u3000\u200b\r\n\n \t x")
def test_any_text_comes_back_unchanged(tokenizer, text):
    ids = tokenizer.encode(text, allow_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert max(ids, default=0) < tokenizer.base_size
    assert tokenizer.token_bytes(ids) == len(text.encode())


@given(st.text(max_size=60))
def test_text_with_half_surrogates_never_fails(tokenizer, text):
    clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert tokenizer.decode(tokenizer.encode(text)) == clean


@given(st.lists(st.integers(0, 163839), max_size=40), st.booleans())
def test_any_ids_decode_to_text(tokenizer, ids, skip):
    text = tokenizer.decode(np.array(ids, np.int64), skip_special_tokens=skip)
    assert text == tokenizer.decode_bytes(ids, skip).decode("utf-8", "replace")


@pytest.fixture(scope="module")
def look_ahead(tokenizer) -> tiktoken.Encoding:
    ranks = {tokenizer.decode_bytes([i]): i for i in range(tokenizer.base_size)}
    return tiktoken.Encoding("look-ahead", pat_str=LOOK_AHEAD_PATTERN, mergeable_ranks=ranks, special_tokens={})


@given(st.text(alphabet=st.sampled_from("aÀǅʰé漢かな한ا१1٣ '\tsS\r\n.,!🙂\u0301\u200d"), max_size=40))
def test_two_ways_to_write_the_pattern_split_alike(tokenizer, look_ahead, text):
    """Set intersections here, look-aheads in the tokenizers that are trained: the same words."""
    assert tokenizer.encode(text, allow_special_tokens=False) == look_ahead.encode_ordinary(text)


def test_skipping_specials_keeps_thinking_and_tool_marks(tokenizer):
    text = "<|im_user|>a<think>b</think><|tool_call_begin|>c<|im_end|>[EOS]"
    assert (
        tokenizer.decode(tokenizer.encode(text, allow_special_tokens=True), True)
        == "a<think>b</think><|tool_call_begin|>c"
    )


def test_data_pipeline_takes_it_and_never_makes_a_special_token_of_data(tokenizer):
    encoded = encode(Example((Text("a <|im_end|>[EOS]<|media_pad|> b"),), "k"), tokenizer)
    assert encoded.tokens[-1] == tokenizer.eos_id and (encoded.tokens[:-1] < tokenizer.base_size).all()
    assert tokenizer.decode(encoded.tokens[:-1]) == "a <|im_end|>[EOS]<|media_pad|> b"


# ----------------------------------------------------------------------------------------------------------- long texts


def released_cuts(text: str) -> Iterator[str]:
    """The rule of docs/released_model.md section 6, one character at a time."""
    for begin in range(0, len(text), 400_000):
        window = text[begin : begin + 400_000]
        start, run = 0, 0
        for i, character in enumerate(window):
            same = i > 0 and character.isspace() == window[i - 1].isspace()
            run = run + 1 if same else 1
            if run > 25_000:
                yield window[start:i]
                start, run = i, 1
        yield window[start:]


@given(st.lists(st.tuples(st.sampled_from("a \n漢"), st.sampled_from([1, 7, 12_499, 24_999, 25_000, 25_001, 60_000])),
                min_size=1, max_size=12))  # fmt: skip
def test_long_texts_are_cut_where_the_release_cuts_them(runs):
    text = "".join(character * count for character, count in runs)
    assert list(pieces(text)) == list(released_cuts(text))


def test_windows_of_400_000_characters(small):
    text = ("the " * 101)[:401] * 1000 + "x"
    assert [len(p) for p in pieces(text)] == [400_000, 1001]
    assert small.decode(small.encode(text)) == text
    assert list(pieces("")) == [] and small.encode("") == []


def test_million_characters_without_a_space(small):
    text = "ab" * 500_000
    ids = small.encode(text)
    assert small.decode(ids) == text


# --------------------------------------------------------------------------------------------------------- other files


def test_vocabulary_of_another_size_keeps_the_places_of_the_specials(small):
    assert small.vocab_size == 262 + 256 and small.media_pad_id == 262 + 21 and small.pad_id == 262 + 255
    assert small.decode(small.encode("the thé<|im_end|>")) == "the thé<|im_end|>"
    assert small.encode("<|im_end|>", True) == [264] and len(small.encode("<|im_end|>", False)) > 5


def test_pickling_carries_the_vocabulary(small):
    copy = pickle.loads(pickle.dumps(small))
    assert copy.encode("the image [EOS]") == small.encode("the image [EOS]")


def test_ids_out_of_range_are_named(small):
    for ids in ([518], [-1]):
        with pytest.raises(ValueError, match="this vocabulary has 0 to 517"):
            small.decode(ids)


def test_file_or_folder_and_names_beside_it(tmp_path):
    data = lines([bytes([b]) for b in range(256)])
    (tmp_path / "tiktoken.model").write_bytes(data)
    for path in (tmp_path, tmp_path / "tiktoken.model", str(tmp_path)):
        with pytest.warns(UserWarning, match="is not the released K2.5 vocabulary"):
            assert kimi.load_tokenizer(path).vocab_size == 512
    # Kimi-VL calls its id 18 differently; the place counts
    named = {"274": {"content": "<|media_start|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": named}))
    with pytest.warns(UserWarning, match="released"):
        tokenizer = kimi.load_tokenizer(tmp_path)
    assert tokenizer.special_id("<|media_start|>") == tokenizer.media_begin_id == 274


@pytest.mark.parametrize(
    "data",
    [b"", b"not a vocabulary", lines([b"a", b"b"]), lines([bytes([b]) for b in range(256)])[:-20], b"YQ== 0\nYQ== x\n",
     lines([bytes([b]) for b in range(256)]) + b"YWI= 300\n", b"\xff\xfe\x00" * 50],
)  # fmt: skip
def test_damaged_files_are_refused_with_their_path(tmp_path, data):
    path = tmp_path / "tiktoken.model"
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="released"), pytest.raises(ValueError, match=re.escape(str(path))):
        kimi.load_tokenizer(path)


def test_damaged_names_and_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        kimi.load_tokenizer(tmp_path)
    (tmp_path / "tiktoken.model").write_bytes(lines([bytes([b]) for b in range(256)]))
    bad_names = {
        "{": "added_tokens_decoder",
        '{"added_tokens_decoder": {"9": 1}}': "added_tokens_decoder",
        '{"added_tokens_decoder": {"9": {"content": "x", "special": true}}}': "ids 256 to 511",
    }
    for text, match in bad_names.items():
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.warns(UserWarning, match="released"), pytest.raises(ValueError, match=match):
            kimi.load_tokenizer(tmp_path)


def test_released_folder_copied_elsewhere_loads_alike(tokenizer, tmp_path):
    shutil.copy(shared(f"{FOLDER}/tiktoken.model"), tmp_path)
    assert kimi.load_tokenizer(tmp_path).encode("<think>Hello", True) == tokenizer.encode("<think>Hello", True)
