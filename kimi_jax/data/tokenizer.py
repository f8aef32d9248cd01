"""Text to token ids and back: byte-level BPE with the special tokens of the released model.

Source: docs/released_model.md section 6.

Text that comes from data never turns into a special token, whatever it spells: only the pipeline itself inserts those.
The words are split by the released pattern, so a tokenizer trained here behaves like the released one at its seams.
Two backends share the interface `Tokenizer`: the JSON file of `tokenizers` here, the released `tiktoken.model` in
kimi_tokenizer.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from kimi_jax.untrusted import read_bytes

if TYPE_CHECKING:
    from kimi_jax.data.conversation import Message

MAX_TOKENIZER = 1 << 27  # bytes of a tokenizer file; the released one has 2.8 MB
# Ids 0, 1, ... of a tokenizer trained here, in this order: every named special token of the release.
SPECIAL_TOKENS = (
    "[BOS]", "[EOS]", "[PAD]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|media_begin|>", "<|media_content|>",
    "<|media_end|>", "<|media_pad|>", "<|im_system|>", "<|im_middle|>", "<think>", "</think>", "[UNK]", "[EOT]",
    "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|start_header_id|>", "<|end_header_id|>",
)  # fmt: skip


def split_pattern(upper: str, lower: str) -> str:
    """The released eight alternatives. upper, lower: a letter of that case that is not Han, as regular expressions."""
    lead, tail = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    return "|".join([
        r"[\p{Han}]+",
        f"{lead}{upper}*{lower}+{tail}",
        f"{lead}{upper}+{lower}*{tail}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ])  # fmt: skip


# `&&[^\p{Han}]` of the release is written as a look-ahead, which matches the same strings
SPLIT_PATTERN = split_pattern(
    r"(?:(?!\p{Han})[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}])", r"(?:(?!\p{Han})[\p{Ll}\p{Lm}\p{Lo}\p{M}])"
)

# Byte-level BPE writes each byte as one character: itself where it is printable, else one from U+0100 on, in order.
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}


class Tokenizer:
    """What the project asks of a tokenizer. Picklable.

    vocab_size: number of ids. bos_id, eos_id, pad_id and the four media ids are those that the pipeline inserts.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    media_begin_id: int
    media_content_id: int
    media_end_id: int
    media_pad_id: int

    def find_special(self, token: str) -> int | None:
        """Id of a special token by name; None if there is none."""
        raise NotImplementedError

    def special_id(self, token: str) -> int:
        """Id of a special token by name, think and tool tokens included. Raises ValueError if there is none."""
        index = self.find_special(token)
        if index is None:
            raise ValueError(f"{token} is not a special token of this tokenizer")
        return index

    def encode(self, text: str, allow_special_tokens: bool = False) -> list[int]:
        """Token ids of a text: text is text, whatever it spells.

        allow_special_tokens: what spells a special token becomes it, as the release does by default. Never for text
        that comes from data or from strangers.
        """
        raise NotImplementedError

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = False) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        raise NotImplementedError

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of ids: for a stream, whose tokens may end within a character."""
        raise NotImplementedError

    def token_bytes(self, ids: Sequence[int] | np.ndarray) -> int:
        """UTF-8 bytes that ids stand for: what bits per byte divides by. Special tokens count as none."""
        raise NotImplementedError

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        thinking: bool = True,
        preserve_thinking: bool = False,
        add_generation_prompt: bool | None = None,
        tokenize: bool = False,
    ) -> str | list[int]:
        """The prompt of a conversation, as text or (tokenize) as ids: see `conversation.apply_chat_template`."""
        from kimi_jax.data import conversation  # it imports this module

        return conversation.apply_chat_template(
            messages, tools, thinking, preserve_thinking, add_generation_prompt, self if tokenize else None
        )


class JsonTokenizer(Tokenizer):
    """A `tokenizers` JSON file: what `train_tokenizer` writes.

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
        names = sorted((token.content for token in added.values() if token.special), key=len, reverse=True)
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None
        self.bos_id = self._id("[BOS]")
        self.eos_id = self._id("[EOS]")
        self.pad_id = self._id("[PAD]")
        self.media_begin_id = self._id("<|media_begin|>")
        self.media_content_id = self._id("<|media_content|>")
        self.media_end_id = self._id("<|media_end|>")
        self.media_pad_id = self._id("<|media_pad|>")
        self.vocab_size = max(self._backend.get_vocab().values()) + 1

    def _id(self, token: str) -> int:
        index = self._backend.token_to_id(token)
        if index is None:
            raise ValueError(f"the tokenizer has no token {token}; train one with kimi_jax.data.tokenizer")
        return index

    def __getstate__(self) -> str:
        return self._serialized  # the backend's own pickle forgets `encode_special_tokens`

    def __setstate__(self, serialized: str) -> None:
        self._load(serialized)

    def find_special(self, token: str) -> int | None:
        """See Tokenizer."""
        index = self._backend.token_to_id(token)
        return index if index in self._special else None

    def encode(self, text: str, allow_special_tokens: bool = False) -> list[int]:
        """Token ids of a text. Half surrogate pairs, which have no UTF-8, become U+FFFD.

        allow_special_tokens: what spells a special token becomes it; by default none ever does.
        """
        if not allow_special_tokens or self._special_pattern is None:
            return self._encode_plain(text)
        ids: list[int] = []
        for i, piece in enumerate(self._special_pattern.split(text)):
            if i % 2:
                ids.append(self._id(piece))
            elif piece:
                ids += self._encode_plain(piece)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
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

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of ids: for a stream, whose tokens may end within a character. Unknown ids have none."""
        tokens = [(int(i) in self._special, self._backend.id_to_token(int(i)) or "") for i in ids]
        return b"".join(t.encode() if special else bytes(map(_BYTES.__getitem__, t)) for special, t in tokens)

    def token_bytes(self, ids: Sequence[int] | np.ndarray) -> int:
        """UTF-8 bytes that ids stand for: what bits per byte divides by. Special tokens count as none."""
        tokens = (self._backend.id_to_token(int(i)) for i in ids if int(i) not in self._special)
        return sum(len(t) for t in tokens if t)  # byte-level BPE writes each byte as one character


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a file, or of a folder that holds one.

    path: a `tokenizers` JSON file, the released `tiktoken.model`, or a folder with the latter (or a `tokenizer.json`).
    Raises FileNotFoundError, and ValueError for a file of another kind, without the special tokens, above 128 MiB, or
    that is no regular file.
    """
    path = Path(path)
    if path.is_dir():
        inside = [path / name for name in ("tiktoken.model", "tokenizer.json")]
        path = next((file for file in inside if file.exists()), inside[0])
    if not path.exists():
        raise FileNotFoundError(f"no tokenizer at {path}; it is a .json file of `tokenizers` or a tiktoken.model")
    if path.suffix != ".json":
        from kimi_jax.data.kimi_tokenizer import load_kimi_tokenizer  # it imports this module

        return load_kimi_tokenizer(path)
    try:
        return JsonTokenizer(read_bytes(path, MAX_TOKENIZER, ValueError).decode("utf-8"))
    except ValueError:
        raise
    except Exception as error:  # `tokenizers` raises bare Exception for a file it cannot parse
        raise ValueError(f"{path} is not a tokenizer file of `tokenizers`: {error}") from error


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: str | os.PathLike[str]) -> Tokenizer:
    """Trains byte-level BPE on `texts`, writes it to `path` and returns it.

    The special tokens have ids 0 .. 22, the bytes follow, then the merges. Deterministic for the same texts.
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
