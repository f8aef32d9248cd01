"""Text to token ids and back: byte-level BPE with the special tokens of the released model (reference.md section 6).

Text that comes from data never turns into a special token, whatever it spells: only the pipeline itself inserts those.
The words are split by the released pattern, so a tokenizer trained here behaves like the released one at its seams.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

# Ids 0, 1, ... of a tokenizer trained here, in this order.
SPECIAL_TOKENS = (
    "[BOS]", "[EOS]", "[PAD]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|media_begin|>", "<|media_content|>",
    "<|media_end|>", "<|media_pad|>", "<|im_system|>", "<|im_middle|>", "<think>", "</think>", "[UNK]", "[EOT]",
)  # fmt: skip

# The released eight alternatives; `&&[^\p{Han}]` is written as a look-ahead, which matches the same strings.
_UPPER = r"(?:(?!\p{Han})[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}])"
_LOWER = r"(?:(?!\p{Han})[\p{Ll}\p{Lm}\p{Lo}\p{M}])"
_LEAD, _TAIL = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLIT_PATTERN = "|".join([
    r"[\p{Han}]+",
    f"{_LEAD}{_UPPER}*{_LOWER}+{_TAIL}",
    f"{_LEAD}{_UPPER}+{_LOWER}*{_TAIL}",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
])  # fmt: skip


class Tokenizer:
    """A `tokenizers` JSON file behind the few things the project asks of it. Picklable.

    Raises ValueError if the file lacks one of the special tokens that the pipeline inserts.
    """

    def __init__(self, serialized: str):
        self._load(serialized)

    def _load(self, serialized: str) -> None:
        self._serialized = serialized
        self._backend = tokenizers.Tokenizer.from_str(serialized)
        self._backend.encode_special_tokens = True  # "<|media_pad|>" in a text is thirteen characters, not a token
        added = self._backend.get_added_tokens_decoder()
        self._special = frozenset(i for i, token in added.items() if token.special)
        self.bos_id = self._id("[BOS]")
        self.eos_id = self._id("[EOS]")
        self.pad_id = self._id("[PAD]")
        self.media_begin_id = self._id("<|media_begin|>")
        self.media_content_id = self._id("<|media_content|>")
        self.media_end_id = self._id("<|media_end|>")
        self.media_pad_id = self._id("<|media_pad|>")
        self.vocab_size: int = max(self._backend.get_vocab().values()) + 1

    def _id(self, token: str) -> int:
        index = self._backend.token_to_id(token)
        if index is None:
            raise ValueError(f"the tokenizer has no token {token}; train one with kimi_jax.data.tokenizer")
        return index

    def __getstate__(self) -> str:
        return self._serialized  # the backend's own pickle forgets `encode_special_tokens`

    def __setstate__(self, serialized: str) -> None:
        self._load(serialized)

    def special_id(self, token: str) -> int:
        """Id of a special token by name. Raises ValueError if there is none."""
        index = self._id(token)
        if index not in self._special:
            raise ValueError(f"{token} is not a special token of this tokenizer")
        return index

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; never a special one. Half surrogate pairs, which have no UTF-8, become U+FFFD."""
        try:
            ids = self._backend.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):
            clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            ids = self._backend.encode(clean, add_special_tokens=False).ids
        if not self._special.isdisjoint(ids):
            raise ValueError("the tokenizer file turns plain text into special tokens; its vocabulary merges into one")
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = False) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def token_bytes(self, ids: Sequence[int] | np.ndarray) -> int:
        """UTF-8 bytes that ids stand for: what bits per byte divides by. Special tokens count as none."""
        tokens = (self._backend.id_to_token(int(i)) for i in ids if int(i) not in self._special)
        return sum(len(t) for t in tokens if t)  # byte-level BPE writes each byte as one character


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a `tokenizers` JSON file.

    Raises FileNotFoundError, and ValueError for a file of another kind or without the special tokens.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer at {path}; data.tokenizer names a .json file of `tokenizers`")
    try:
        text = path.read_text(encoding="utf-8")
        return Tokenizer(text)
    except ValueError:
        raise
    except Exception as error:  # `tokenizers` raises bare Exception for a file it cannot parse
        raise ValueError(f"{path} is not a tokenizer file of `tokenizers`: {error}") from error


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: str | os.PathLike[str]) -> Tokenizer:
    """Trains byte-level BPE on `texts`, writes it to `path` and returns it.

    The special tokens have ids 0 .. 15, the bytes follow, then the merges. Deterministic for the same texts.
    Raises ValueError if `vocab_size` does not hold the special tokens and the 256 bytes.
    """
    least = len(SPECIAL_TOKENS) + 256
    if vocab_size < least:
        raise ValueError(f"vocab_size {vocab_size} is below {least}, the special tokens and the 256 bytes")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(backend.to_str(), encoding="utf-8")
    os.replace(partial, path)
    return load_tokenizer(path)
