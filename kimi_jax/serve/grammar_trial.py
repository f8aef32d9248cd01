"""llguidance behind a few functions, and as a process (`python -m` this module) in which strangers' grammars are tried.

It reads a vocabulary, then grammars, a line of JSON each, and answers each grammar with a line: null, or what is wrong.
Who started it ends it when an answer does not come in time; memory is limited here. It imports nothing of the model.
"""

from __future__ import annotations

import base64
import json
import resource
import sys
from collections.abc import Callable
from typing import Any

import llguidance

MAX_MEMORY = 2 << 30  # bytes of address space
WALK = 8  # tokens of an answer that are tried


class Vocabulary:
    """What llguidance asks of a tokenizer. The first three are what JSON can hold.

    tokens: the bytes of each id, base64. special: ids that no text may hold. end: the id that ends an answer.
    encode: the ids of a text, where only one text may follow; a token for each byte unless given.
    """

    def __init__(
        self, tokens: list[str], special: list[int], end: int, encode: Callable[[str], list[int]] | None = None
    ):
        self.tokens = [base64.b64decode(token) for token in tokens]
        self.special_token_ids, self.eos_token_id, self.bos_token_id = special, end, None
        hidden = set(special)
        plain = {token: i for i, token in enumerate(self.tokens) if i not in hidden}
        self._encode = encode or (lambda text: [plain[bytes([byte])] for byte in text.encode()])

    def __call__(self, text: str) -> list[int]:
        """See the class. TypeError for bytes tells llguidance to ask with a text."""
        if not isinstance(text, str):
            raise TypeError("a text is wanted")
        return self._encode(text)


def make_tokenizer(
    vocabulary: dict[str, Any], encode: Callable[[str], list[int]] | None = None
) -> llguidance.LLTokenizer:
    """vocabulary: the first arguments of `Vocabulary`."""
    wrapper = llguidance.TokenizerWrapper(Vocabulary(**vocabulary, encode=encode))
    return llguidance.LLTokenizer(wrapper, n_vocab=len(vocabulary["tokens"]), eos_token=vocabulary["end"])


def make_matcher(tokenizer: llguidance.LLTokenizer, text: str) -> llguidance.LLMatcher:
    """At the beginning of an answer; errors are its own (`problem_of`). Does not hold the interpreter's lock."""
    limits = llguidance.LLParserLimits(  # about half of its own; a state of the lexer takes 2 kB
        step_lexer_fuel=100_000, step_max_items=20_000, max_lexer_states=50_000,
        initial_lexer_fuel=500_000, max_grammar_size=200_000, verbose_errors=False,
    )  # fmt: skip
    return llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_lark(text), log_level=0, limits=limits)


def problem_of(matcher: llguidance.LLMatcher) -> str | None:
    """The first line of what went wrong with a matcher, None if nothing did."""
    return matcher.get_error().partition("\n")[0][:300] or "error" if matcher.is_error() else None


def main() -> None:
    """Answers until its input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    tokenizer = make_tokenizer(json.loads(sys.stdin.readline()))
    print("ready", flush=True)
    for line in sys.stdin:
        matcher = make_matcher(tokenizer, json.loads(line))
        print(json.dumps(walk(tokenizer, matcher)), flush=True)


def walk(tokenizer: llguidance.LLTokenizer, matcher: llguidance.LLMatcher) -> str | None:
    """What goes wrong within the first tokens of some answer, None if nothing does: most grammars that no answer can
    follow fail there. Of what is allowed a marker is taken, or else the last token."""
    for _ in range(WALK):
        if matcher.is_stopped():
            break
        mask = matcher.compute_bitmask()
        if matcher.is_error():
            break
        ids = [8 * i + bit for i, byte in enumerate(mask) if byte for bit in range(8) if byte >> bit & 1]
        if not ids:
            return "nothing may follow"
        token = next(filter(tokenizer.is_special_token, ids), ids[-1])
        if token == tokenizer.eos_token:
            break
        matcher.consume_token(token)
    return problem_of(matcher)


if __name__ == "__main__":
    main()
