"""Tokenizer: text round trip, fixed low ids of the specials, and that data can never spell a special token."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_jax.data.tokenizer import SPECIAL_TOKENS, Tokenizer, load_tokenizer, train_tokenizer

TEXTS = ["The river Rhine's length is 1234567 m. <|media_pad|> [EOS]", "image video 00:00:01.500 中文 字符 don't"] * 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return train_tokenizer(TEXTS, 400, tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


def test_specials_have_the_first_ids_in_the_agreed_order(tokenizer):
    assert [tokenizer.special_id(t) for t in SPECIAL_TOKENS] == list(range(23))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    media = (tokenizer.media_begin_id, tokenizer.media_content_id, tokenizer.media_end_id, tokenizer.media_pad_id)
    assert media == (6, 7, 8, 9)
    assert tokenizer.vocab_size <= 400


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_comes_back_unchanged(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes(ids) == len(text.encode())


@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, " ", "a", "<|", "media_pad", "|>", "\n"]), max_size=12))
def test_text_never_becomes_a_special_token(tokenizer, pieces):
    text = "".join(pieces)
    ids = tokenizer.encode(text)
    assert not set(ids) & set(range(23))
    assert tokenizer.decode(ids) == text


def test_special_tokens_stay_text_after_pickling(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("x<|media_pad|>[EOS]") == tokenizer.encode("x<|media_pad|>[EOS]")
    assert not set(copy.encode("<|media_pad|>")) & set(range(23))


def test_half_a_surrogate_pair_becomes_a_replacement_character(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a\ufffdb"


def test_words_split_at_the_released_seams(tokenizer):
    # numbers in threes, and no merge across a word's end
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("1234567")]
    assert all(len(p) <= 3 for p in pieces)


def test_decode_can_leave_specials_out(tokenizer):
    ids = [*tokenizer.encode("The"), tokenizer.media_pad_id, tokenizer.eos_id]
    assert tokenizer.decode(ids) == "The<|media_pad|>[EOS]"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "The"


def test_training_twice_gives_the_same_file(tmp_path):
    for name in ("a", "b"):
        train_tokenizer(TEXTS, 330, tmp_path / f"{name}.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_errors_say_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*none\.json"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="is not a tokenizer file"):
        load_tokenizer(tmp_path / "broken.json")
    with pytest.raises(ValueError, match="below 279"):
        train_tokenizer(TEXTS, 100, tmp_path / "small.json")
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    (tmp_path / "plain.json").write_text(Backend(models.BPE()).to_str())
    with pytest.raises(ValueError, match=r"no token \[BOS\]"):
        load_tokenizer(tmp_path / "plain.json")
