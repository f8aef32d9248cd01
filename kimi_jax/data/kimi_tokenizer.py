"""The released tokenizer: tiktoken over the official `tiktoken.model`. The file is not ours.

Source: docs/released_model.md section 6.

n   ids of the base vocabulary, 163,584 in the released file; 256 special ids follow
C   characters of a text

Ids are those of the released class on every text, its cuts of long texts included. The file is read here, not by
tiktoken's loader, which wants a cache folder and, for some paths, a further package.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import tiktoken

from kimi_jax.data.tokenizer import MAX_TOKENIZER, Tokenizer, split_pattern
from kimi_jax.untrusted import MAX_CONFIG, describe, read_bytes, read_json

RELEASED_SHA256 = "b6c497a7469b33ced9c38afb1ad6e47f03f5e5dc05f15930799210ec050c5103"
NUM_SPECIAL = 256
# Offset from n to (name, whether `skip_special_tokens` leaves it out); the others are <|reserved_token_{id}|>.
SPECIALS = {
    0: ("[BOS]", True), 1: ("[EOS]", True), 2: ("<|im_end|>", True), 3: ("<|im_user|>", True),
    4: ("<|im_assistant|>", True), 6: ("<|start_header_id|>", True), 7: ("<|end_header_id|>", True),
    9: ("[EOT]", True), 10: ("<|im_system|>", True), 11: ("<|tool_calls_section_begin|>", False),
    12: ("<|tool_calls_section_end|>", False), 13: ("<|tool_call_begin|>", False),
    14: ("<|tool_call_argument_begin|>", False), 15: ("<|tool_call_end|>", False), 17: ("<|im_middle|>", True),
    18: ("<|media_begin|>", True), 19: ("<|media_content|>", True), 20: ("<|media_end|>", True),
    21: ("<|media_pad|>", True), 22: ("<think>", False), 23: ("</think>", False), 254: ("[UNK]", True),
    255: ("[PAD]", True),
}  # fmt: skip

# As `tokenizer.SPLIT_PATTERN`, with set intersections in place of look-aheads: the same strings, twice as fast here.
SPLIT_PATTERN = split_pattern(r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]")

WINDOW = 400_000  # characters that are encoded at a time
LONGEST_RUN = 25_000  # spaces, or other characters, in a row
_RUN = re.compile(r"\s+|\S+")
_SPACE, _OTHER = re.compile(r"\s"), re.compile(r"\S")


class KimiTokenizer(Tokenizer):
    """The released vocabulary behind the interface of every tokenizer here. Picklable: it carries the file.

    data:  the bytes of `tiktoken.model`: lines of a base64 token and its rank, ranks 0 .. n-1.
    names: other names of special ids (`added_tokens_decoder` of tokenizer_config.json), id -> (name, skipped).
    Raises ValueError for a file of another kind.
    """

    def __init__(self, data: bytes, names: Mapping[int, tuple[str, bool]] | None = None):
        self._load(data, dict(names or {}))

    def _load(self, data: bytes, names: dict[int, tuple[str, bool]]) -> None:
        self._data, self._names = data, names
        ranks = _read_ranks(data)
        n = len(ranks)
        special = {n + i: SPECIALS.get(i, (f"<|reserved_token_{n + i}|>", False)) for i in range(NUM_SPECIAL)}
        outside = sorted(set(names) - set(special))
        if outside:
            raise ValueError(f"special tokens have the ids {n} to {n + NUM_SPECIAL - 1}, but {outside[0]} is named too")
        special |= names
        self._ids = {name: i for i, (name, _) in special.items()}
        if len(self._ids) != NUM_SPECIAL:
            raise ValueError("two special tokens have one name")
        self._skipped = frozenset(i for i, (_, skipped) in special.items() if skipped)
        self._first = {name[:1] for name in self._ids}
        self._encoding = tiktoken.Encoding(
            "kimi", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=self._ids
        )
        self._encode_ordinary = self._encoding.encode_ordinary
        self._encode_special = functools.partial(
            self._encoding.encode, allowed_special=frozenset(self._ids), disallowed_special=()
        )
        self.base_size = n
        self.vocab_size = n + NUM_SPECIAL
        # by place, not by name: Kimi-VL calls the same id <|media_start|>
        self.bos_id, self.eos_id, self.pad_id = n, n + 1, n + 255
        self.media_begin_id, self.media_content_id, self.media_end_id, self.media_pad_id = range(n + 18, n + 22)

    def __getstate__(self) -> tuple[bytes, dict[int, tuple[str, bool]]]:
        return self._data, self._names

    def __setstate__(self, state: tuple[bytes, dict[int, tuple[str, bool]]]) -> None:
        self._load(*state)

    def find_special(self, token: str) -> int | None:
        """See Tokenizer."""
        return self._ids.get(token)

    def encode(self, text: str, allow_special_tokens: bool = False) -> list[int]:
        """Token ids of a text, no [BOS] or [EOS] added. Half surrogate pairs, which have no UTF-8, become U+FFFD.

        Text is text, whatever it spells. allow_special_tokens: what spells a special token becomes it, which is the
        released class's default; never for text that comes from data or from strangers.
        """
        encode = self._encode_ordinary
        if allow_special_tokens and any(first in text for first in self._first):
            encode = self._encode_special  # handing tiktoken the 256 names takes as long as encoding a page
        if len(text) <= LONGEST_RUN:
            return encode(text)
        ids: list[int] = []
        for piece in pieces(text):
            ids += encode(piece)
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = False) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD. Raises ValueError for an id out of range.

        skip_special_tokens leaves out what the release marks so: not the think, tool and reserved tokens.
        """
        return self.decode_bytes(ids, skip_special_tokens).decode("utf-8", "replace")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = False) -> bytes:
        """The bytes of ids: for a stream, whose tokens may end within a character."""
        plain = [int(i) for i in ids]
        if plain and not 0 <= min(plain) <= max(plain) < self.vocab_size:
            raise ValueError(f"ids from {min(plain)} to {max(plain)}; this vocabulary has 0 to {self.vocab_size - 1}")
        if skip_special_tokens:
            plain = [i for i in plain if i not in self._skipped]
        return self._encoding.decode_bytes(plain)

    def token_bytes(self, ids: Sequence[int] | np.ndarray) -> int:
        """UTF-8 bytes that ids stand for: what bits per byte divides by. Special tokens count as none."""
        return len(self.decode_bytes([i for i in ids if i < self.base_size]))


def pieces(text: str) -> Iterator[str]:
    """The released cuts of a long text: every 400,000 characters and, counted anew in each such window, after 25,000
    spaces, or other characters, in a row."""
    for begin in range(0, len(text), WINDOW):
        window = text[begin : begin + WINDOW]
        if not _has_long_run(window):
            yield window
            continue
        start = 0
        for run in _RUN.finditer(window):
            for cut in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN):
                yield window[start:cut]
                start = cut
        yield window[start:]


def _has_long_run(text: str) -> bool:
    """Whether some run may be too long: one that is covers half its length from a multiple of that half on.

    So a few characters in 12,500 are looked at, not all of them.
    """
    half = LONGEST_RUN // 2
    for at in range(0, len(text) - half, half):
        other = _OTHER if text[at].isspace() else _SPACE
        if other.search(text, at, at + half) is None:
            return True
    return False


def _read_ranks(data: bytes) -> dict[bytes, int]:
    try:
        lines = (line.split() for line in data.splitlines() if line)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error) as error:
        raise ValueError(f"not a tiktoken.model, whose lines are a base64 token and a rank: {error}") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
        raise ValueError("not a whole tiktoken.model: ranks must be 0, 1, 2, ... and every single byte have one")
    return ranks


def load_kimi_tokenizer(path: Path) -> KimiTokenizer:
    """The tokenizer of a `tiktoken.model`, with the names of the `tokenizer_config.json` beside it, if there is one.

    Warns if the file is not the one that K2 to K3 were released with (Moonlight and Kimi-VL have their own).
    Raises ValueError for a file of another kind.
    """
    data = read_bytes(path, MAX_TOKENIZER, ValueError)
    digest = hashlib.sha256(data).hexdigest()
    if digest != RELEASED_SHA256:
        warnings.warn(
            f"{path} is not the released K2.5 vocabulary: sha256 {digest[:16]}... instead of {RELEASED_SHA256[:16]}...",
            stacklevel=3,
        )
    config = path.with_name("tokenizer_config.json")
    try:
        return KimiTokenizer(data, _read_names(config) if config.exists() else None)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_names(path: Path) -> dict[int, tuple[str, bool]]:
    try:
        added = read_json(path, MAX_CONFIG, ValueError).get("added_tokens_decoder", {})
    except ValueError as error:
        raise ValueError(f"{path.name} has no readable added_tokens_decoder: {error}") from error
    names = {}
    for index, token in added.items() if isinstance(added, dict) else [("added_tokens_decoder", added)]:
        good = isinstance(token, dict) and isinstance(token.get("content"), str)
        if not (good and isinstance(token.get("special"), bool) and index.isascii() and index.isdecimal()):
            raise ValueError(
                f"{path.name} has no readable added_tokens_decoder: {describe(index)}: {describe(token)} is not an id "
                "with content and special"
            )
        names[int(index[:20])] = (token["content"], token["special"])
    return names
