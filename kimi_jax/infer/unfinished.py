"""Answers that are not complete, as values: taken out of an engine, stored in a checkpoint, put back into any engine.

A token's draw depends on its seed and its position, so that an answer goes on with the tokens that it would have got:
all that is needed are the request, its seed, and what it has so far. Media travel with it.

N patches of an item   n tokens so far   L MoE layers   k experts of a token
"""

from __future__ import annotations

import base64
import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kimi_jax.config import ModelConfig
from kimi_jax.data.example import MediaItem
from kimi_jax.infer.request import Request, Sampling, TokenEvent

if TYPE_CHECKING:
    from kimi_jax.infer.sequence import Answer


@dataclass(frozen=True)
class Unfinished:
    """A request whose seed is given, and the tokens that it got so far: as in `request.Completion`.

    experts: int32 [n, L, k] of the first n tokens of prompt and answer, if they were asked for.
    """

    request: Request
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top: tuple[tuple[tuple[int, float], ...], ...] = ()
    versions: tuple[int, ...] = ()
    prompt_logprobs: tuple[float, ...] = ()
    experts: np.ndarray | None = field(default=None, compare=False)

    @classmethod
    def of(cls, answer: Answer) -> Unfinished:
        """What the engine has of a request."""
        sampling = dataclasses.replace(answer.sampling, seed=answer.seed)
        request = Request(np.array(answer.tokens[: answer.prompt], np.int32), answer.media, sampling, answer.grammar)
        sampled = [event for event in answer.events if event.token_id is not None]
        return cls(
            request,
            tuple(answer.tokens[answer.prompt :]),
            tuple(event.logprob for event in sampled if event.logprob is not None),
            tuple(event.top for event in sampled),
            tuple(event.version for event in sampled),
            tuple(answer.scores) if answer.scored else (),
            np.array(answer.experts, np.int32) if answer.experts else None,
        )

    def to_json(self) -> dict[str, Any]:
        """What `json.dumps` takes. Floats are written in full, arrays in base64. Raises ValueError for a grammar."""
        given = self.request
        if given.grammar is not None:
            raise ValueError("an unfinished answer with a grammar cannot be stored")
        return {
            "prompt": np.asarray(given.token_ids).tolist(),
            "media": [{"grid": list(item.grid), "patches": _pack(item.patches)} for item in given.media],
            "sampling": dataclasses.asdict(given.sampling),
            "token_ids": list(self.token_ids), "logprobs": list(self.logprobs), "versions": list(self.versions),
            "top": [[list(pair) for pair in row] for row in self.top],
            "prompt_logprobs": list(self.prompt_logprobs),
            "experts": None if self.experts is None else _pack(self.experts),
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Unfinished:
        """What `to_json` made. Raises ValueError for anything else."""
        try:
            media = tuple(MediaItem(_unpack(m["patches"]), tuple(map(int, m["grid"]))) for m in value["media"])  # type: ignore[arg-type]
            settings = {**value["sampling"], "stop_ids": tuple(map(int, value["sampling"]["stop_ids"]))}
            return cls(
                Request(np.array(value["prompt"], np.int32), media, Sampling(**settings)),
                tuple(map(int, value["token_ids"])),
                tuple(map(float, value["logprobs"])),
                tuple(tuple((int(i), float(p)) for i, p in row) for row in value["top"]),
                tuple(map(int, value["versions"])),
                tuple(map(float, value["prompt_logprobs"])),
                None if value["experts"] is None else _unpack(value["experts"]),
            )
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"not an unfinished answer: {type(error).__name__}: {error}") from error


def restore(answer: Answer, unfinished: Unfinished, config: ModelConfig) -> None:
    """Give a request that has just entered an engine what it had so far. Raises ValueError if that cannot be."""
    tokens, count = unfinished.token_ids, len(unfinished.token_ids)
    if not len(unfinished.logprobs) == len(unfinished.top) == len(unfinished.versions) == count:
        raise ValueError("an unfinished answer needs a log-probability, alternatives and a version for every token")
    if any(not 0 <= token < config.vocab_size for token in tokens):
        raise ValueError(f"an unfinished answer holds tokens outside the vocabulary 0..{config.vocab_size - 1}")
    if (count and answer.prompt + count >= answer.limit) or set(tokens) & set(answer.sampling.stop_ids):
        raise ValueError("the answer is finished: it holds a stop id or as many tokens as it can get")
    start = answer.sampling.score_from
    if unfinished.prompt_logprobs and (start is None or len(unfinished.prompt_logprobs) != answer.prompt - start):
        raise ValueError("prompt_logprobs of an unfinished answer do not fit its score_from")
    if unfinished.experts is not None and unfinished.experts.shape[1:] != _experts_shape(config):
        raise ValueError(f"experts of an unfinished answer must be [n, *{_experts_shape(config)}]")
    answer.tokens += tokens
    answer.scores = list(unfinished.prompt_logprobs)
    answer.experts = [] if unfinished.experts is None else list(unfinished.experts[: answer.prompt + count - 1])
    rows = zip(tokens, unfinished.logprobs, unfinished.top, unfinished.versions, strict=True)
    answer.events = [TokenEvent(answer.number, token, p, top, None, version=version) for token, p, top, version in rows]
    answer.unreported = unfinished.prompt_logprobs


def _experts_shape(config: ModelConfig) -> tuple[int, ...]:
    return () if config.moe is None else (config.num_moe_layers, config.moe.num_experts_per_tok)


def _pack(array: np.ndarray) -> dict[str, Any]:
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"dtype": array.dtype.str, "shape": list(array.shape), "data": data}


def _unpack(value: dict[str, Any]) -> np.ndarray:
    """Raises ValueError for data that are not an array of numbers."""
    dtype = np.dtype(value["dtype"])
    if dtype.kind not in "uif":
        raise ValueError(f"arrays of an unfinished answer hold numbers, not {dtype}")
    return np.frombuffer(base64.b64decode(value["data"], validate=True), dtype).reshape(value["shape"])
