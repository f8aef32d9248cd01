"""A model of this project under EleutherAI's lm-eval (extra `[lm_eval]`): text requests of any of its tasks.

    from kimi_jax.eval.lm_eval_adapter import KimiLM
    lm_eval.simple_evaluate(model=KimiLM.from_workdir("runs/demo"), tasks=["my_task"], task_manager=...)

Requests are packed and scored by the same functions as our own tasks (`kimi_jax.eval.packed`). Only this file imports
lm_eval, and lm_eval imports torch: nothing else in the project imports this file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import LM

from kimi_jax.config import TrainConfig
from kimi_jax.data.example import Encoded
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.eval.packed import Apply, Scorer
from kimi_jax.infer.request import RequestEngine

MAX_NEW_TOKENS = 64  # where the task names no limit


class KimiLM(LM):
    """`lm_eval.api.model.LM` over a Scorer. Generation is greedy, by its engine: sampling options raise ValueError."""

    def __init__(
        self, params: Any, config: TrainConfig, tokenizer: Tokenizer | None = None, apply: Apply | None = None,
        frozen: Any = None, engine: RequestEngine | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._scorer = Scorer(params, config, tokenizer, apply, frozen, engine)

    @classmethod
    def from_workdir(cls, workdir: str, step: int | None = None) -> KimiLM:
        """The newest checkpoint of a run. Raises FileNotFoundError if there is none."""
        from kimi_jax.train import adapters

        config, params, frozen = adapters.load_run(workdir, step)
        return cls(params, config, frozen=frozen)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether greedy decoding gives it) of each (context, continuation)."""
        documents = []
        for request in requests:
            context, continuation = request.args
            documents.append(self._document(*self._pair(context, continuation)))
        scored = self._scorer.score(documents)
        return [(-s.nll, s.greedy) for s in scored]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text; the first token follows the end-of-document token.

        A text that is longer than a row is split into rows; each begins with the last token of the one before.
        """
        documents: list[Encoded] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            tokens = [self._scorer.tokenizer.eos_id, *self._scorer.tokenizer.encode(request.args[0], False)]
            for start in range(0, len(tokens) - 1, self._scorer.length - 1):
                piece = tokens[start : start + self._scorer.length]
                documents.append(self._document(piece[:1], piece[1:]))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, scored in zip(owners, self._scorer.score(documents), strict=True):
            totals[i] -= scored.nll
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuation of each (context, options), up to the first of `until` or `max_gen_toks` tokens."""
        answers = [""] * len(requests)
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(_options(request.args[1]), []).append(i)
        for (limit, until), members in groups.items():
            contexts = [self._document(*self._pair(requests[i].args[0], "")) for i in members]
            for i, text in zip(members, self._scorer.generate(contexts, limit, until), strict=True):
                answers[i] = text
        return answers

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both. The spaces that end a context belong to the continuation, as words carry theirs in front."""
        stripped = context.rstrip(" ") if continuation else context
        before = self._scorer.tokenizer.encode(stripped, False)
        after = self._scorer.tokenizer.encode(context[len(stripped) :] + continuation, False)
        return before or [self._scorer.tokenizer.eos_id], after

    def _document(self, context: Sequence[int], continuation: Sequence[int]) -> Encoded:
        tokens = np.array([*context, *continuation], np.int32)
        weights = np.repeat([0.0, 1.0], [len(context), len(continuation)]).astype(np.float32)
        return self._scorer.from_tokens(tokens, weights)


def _options(options: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """(most new tokens, stop strings). Raises ValueError for sampling, which this adapter does not do."""
    if options.get("do_sample") or not math.isclose(float(options.get("temperature") or 0.0), 0.0):
        raise ValueError(f"KimiLM generates greedily; the task asks for sampling: {options}")
    until = options.get("until") or ["\n"]
    stops: Iterable[str] = [until] if isinstance(until, str) else until
    return int(options.get("max_gen_toks") or MAX_NEW_TOKENS), tuple(stops)
