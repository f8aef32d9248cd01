"""Scores documents with a model: many a forward pass, in the static shapes of training. Texts come from the engine.

Every question with an answer to score is one document. Documents are packed by `kimi_jax.data.packing` into batches of
the run's own shape, so one compiled function serves all tasks: it returns for every position the log-likelihood of the
next token and whether it was the likeliest, and at the ends of documents the log-probabilities of a few candidate
tokens. Answers that differ in their last token only (" 3", " 7") share one. What has to be generated is given to
`kimi_jax.infer.engine`, over the same mesh.

B, S, D, V  as in the model;  N ends of documents a batch;  A candidates an end
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kimi_jax import sharding
from kimi_jax.config import MeshConfig, ModelConfig, TrainConfig
from kimi_jax.data.example import Encoded, EncodeLimits, Example, Text, encode, split
from kimi_jax.data.packing import Pack, PackShape
from kimi_jax.data.tokenizer import Tokenizer, load_tokenizer
from kimi_jax.eval import scorers
from kimi_jax.eval.tasks import Part, Question
from kimi_jax.infer.engine import Engine
from kimi_jax.infer.request import Request, RequestEngine, Sampling
from kimi_jax.nn import lora
from kimi_jax.nn.kimi import KimiK25
from kimi_jax.nn.layers import precision
from kimi_jax.packed_batch import PackedBatch, concatenate

MAX_CANDIDATES = 16
HEAD_CHUNK = 1024  # positions whose logits exist at once
SLOTS = 32  # texts that are generated together

Apply = Callable[[Any, PackedBatch, Any, Any], tuple[Any, Any, Any]]


@dataclass(frozen=True)
class ScoredDocument:
    """What the model says about one document.

    nll: sum of loss weight * -log p over its targets, nats. greedy: whether every target with weight was likeliest.
    candidates: log-probabilities of the tokens asked for after the last one.
    """

    nll: float
    greedy: bool
    candidates: np.ndarray


# ---------------------------------------------------------------------------------------------------------------- model


@functools.lru_cache(maxsize=4)
def make_apply(config: ModelConfig, num_packs: int, mesh_config: MeshConfig) -> Apply:
    """The compiled function (variables of KimiK25, batch, ends int32 [N], candidates int32 [N, A]) -> (nll f32 [B, S],
    likeliest int32 [B, S], log-probabilities f32 [N, A]), all on every device. `ends` index the flat [B*S] positions.
    """
    mesh = sharding.make_mesh(mesh_config)
    sharding.check_packs(num_packs, mesh)
    model = KimiK25(config, sharding.layout(mesh) if mesh.size > 1 else None)

    def apply(variables: Any, batch: PackedBatch, ends: jax.Array, candidates: jax.Array) -> tuple[jax.Array, ...]:
        x, _ = model.apply(variables, batch, method=model.hidden)
        kernel = variables["params"]["lm_head"]["kernel"]
        flat = x.reshape(-1, x.shape[-1])

        def log_probs(rows: jax.Array) -> jax.Array:
            weights = kernel.astype(rows.dtype)
            logits = jnp.matmul(rows, weights, precision=precision(rows.dtype), preferred_element_type=jnp.float32)
            return jax.nn.log_softmax(logits, axis=-1)

        def head(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            logp = log_probs(chunk[0])
            return -jnp.take_along_axis(logp, chunk[1][:, None], axis=-1)[:, 0], jnp.argmax(logp, axis=-1)

        size = next(n for n in range(min(HEAD_CHUNK, len(flat)), 0, -1) if len(flat) % n == 0)
        targets = batch.targets.reshape(-1, size)
        nll, likeliest = jax.lax.map(head, (flat.reshape(-1, size, flat.shape[-1]), targets))
        shape = batch.targets.shape
        at_ends = jnp.take_along_axis(log_probs(flat[ends]), candidates, axis=-1)
        return nll.reshape(shape), likeliest.reshape(shape).astype(jnp.int32), at_ends

    compiled = jax.jit(apply, out_shardings=sharding.replicated(mesh))

    def run(variables: Any, batch: PackedBatch, ends: Any, candidates: Any) -> tuple[Any, Any, Any]:
        return compiled(variables, _place(batch, sharding.batch_sharding(mesh)), ends, candidates)

    return run


def _place(batch: PackedBatch, placement: Any) -> PackedBatch:
    """Host arrays that every process holds whole, as global arrays sharded by packs."""
    return jax.tree.map(lambda a: jax.make_array_from_callback(a.shape, placement, lambda index: a[index]), batch)


# -------------------------------------------------------------------------------------------------------------- scoring


class Scorer:
    """A model, its tokenizer and the packing shapes of its run.

    `apply` and `engine` stand in for the compiled model and its engine (tests). frozen: with `config.lora` the weights;
    `params` are then its adapters.
    """

    def __init__(
        self, params: Any, config: TrainConfig, tokenizer: Tokenizer | None = None, apply: Apply | None = None,
        frozen: Any = None, engine: RequestEngine | None = None,
    ):  # fmt: skip
        self._config, self._params, self._frozen, self._given = config, params, frozen, engine
        self.tokenizer = tokenizer or load_tokenizer(config.data.tokenizer)
        self._variables = lora.variables(params, frozen, config.lora)
        self._apply = apply or make_apply(config.model, config.data.num_packs, config.mesh)
        self._shape = PackShape.of(config.data, config.model)
        self._num_packs = config.data.num_packs
        self._limits = EncodeLimits(sequence_length=self._shape.sequence_length, bins=self._shape.bins)
        self._ends = max(8, min(256, 2**22 // config.model.vocab_size))
        self.length = self._shape.sequence_length

    def encode(self, context: Sequence[Part], continuation: str = "") -> Encoded:
        """One document without an end. Only the tokens of `continuation` have loss weight (1).

        Text only that is longer than a row loses its beginning. Raises BadRecord as `kimi_jax.data.example.encode`.
        """
        parts = tuple(dataclasses.replace(p, loss_weight=0.0) if isinstance(p, Text) else p for p in context)
        parts = (*parts, Text(continuation, 1.0)) if continuation else parts
        whole = encode(Example(parts, "question"), self.tokenizer, self._limits, self._shape.patch_size)
        return self.from_tokens(whole.tokens[:-1], whole.loss_weights[:-1], whole)

    def from_tokens(self, tokens: np.ndarray, weights: np.ndarray, like: Encoded | None = None) -> Encoded:
        """A document of given tokens, with the media of `like`; text only loses what exceeds a row, from the front."""
        like = like or Encoded(tokens, weights, (), 0, "tokens")
        first = 0 if like.media else max(0, len(tokens) - self.length)
        return dataclasses.replace(
            like, tokens=np.asarray(tokens[first:], np.int32), loss_weights=np.asarray(weights[first:], np.float32)
        )

    def score(
        self, documents: Sequence[Encoded], candidates: Sequence[Sequence[int]] | None = None
    ) -> list[ScoredDocument]:
        """Scores documents in as few batches as first fit finds; `candidates`: tokens to compare at each one's end.

        Raises ValueError for a document that does not fit a pack, or for more than MAX_CANDIDATES candidates.
        """
        results: list[ScoredDocument | None] = [None] * len(documents)
        waiting = list(range(len(documents)))
        while waiting:
            packs = [Pack(self._shape) for _ in range(self._num_packs)]
            placed: list[tuple[int, int, int]] = []  # document, row of the batch, start
            left = []
            for i in waiting:
                place = _add(packs, documents[i]) if len(placed) < self._ends else None
                if place is None:
                    left.append(i)
                else:
                    placed.append((i, *place))
                if len(left) > 4 * self._num_packs:  # the packs are as good as full
                    left += waiting[waiting.index(i) + 1 :]
                    break
            waiting = left
            asked = [candidates[i] if candidates else () for i, _, _ in placed]
            for (i, *_), scored in zip(placed, self._run(packs, documents, placed, asked), strict=True):
                results[i] = scored
        return [r for r in results if r is not None]

    def _run(
        self, packs: list[Pack], documents: Sequence[Encoded], placed: list, asked: list[Sequence[int]]
    ) -> list[ScoredDocument]:
        batch = concatenate([pack.batch for pack in packs])
        ends = np.zeros(self._ends, np.int32)
        wanted = np.zeros((self._ends, MAX_CANDIDATES), np.int32)
        for k, (i, row, start) in enumerate(placed):
            ends[k] = row * self.length + start + len(documents[i].tokens) - 1
            wanted[k, : len(asked[k])] = asked[k]
        nll, likeliest, logp = (np.asarray(a) for a in self._apply(self._variables, batch, ends, wanted))
        scored = []
        for k, (i, row, start) in enumerate(placed):
            here = np.s_[row, start : start + len(documents[i].tokens) - 1]
            weights = batch.loss_weights[here]
            right = likeliest[here] == batch.targets[here]
            total = float(np.sum(weights * nll[here], dtype=np.float64))
            scored.append(ScoredDocument(total, bool(np.all(right | (weights == 0))), logp[k, : len(asked[k])]))
        return scored

    # ------------------------------------------------------------------------------------------------ kinds of request

    def choose(self, questions: Sequence[Question], by_length: bool) -> list[int]:
        """Index of the likeliest choice of each question."""
        documents, candidates, owners = [], [], []
        for k, question in enumerate(questions):
            for document, last_tokens in self._documents(question):
                documents.append(document)
                candidates.append(last_tokens)
                owners.append(k)
        values: list[list[float]] = [[] for _ in questions]
        for k, last_tokens, scored in zip(owners, candidates, self.score(documents, candidates), strict=True):
            values[k] += scored.candidates.tolist() if last_tokens else [-scored.nll]
        lengths = [[len(c.encode()) for c in q.choices] if by_length else None for q in questions]
        return [scorers.pick(v, n) for v, n in zip(values, lengths, strict=True)]

    def _documents(self, question: Question) -> list[tuple[Encoded, tuple[int, ...]]]:
        """One document with candidate last tokens if the choices differ in their last token only, else one a choice."""
        ids = [self.tokenizer.encode(choice, allow_special_tokens=False) for choice in question.choices]
        same_start = len({tuple(i[:-1]) for i in ids}) == 1
        if same_start and all(ids) and len(ids) <= MAX_CANDIDATES:
            context = self.encode(question.context)
            tokens = np.concatenate([context.tokens, np.array(ids[0][:-1], np.int32)])
            return [(self.from_tokens(tokens, np.zeros(len(tokens)), context), tuple(i[-1] for i in ids))]
        return [(self.encode(question.context, choice), ()) for choice in question.choices]

    def generate(self, contexts: Sequence[Encoded], max_new_tokens: int, stop: Sequence[str] = ("\n",)) -> list[str]:
        """Greedy continuations, up to (without) the first of the `stop` strings, the end token or `max_new_tokens`.

        Context and continuation together are not longer than a row: of a text the beginning is left out for that, up
        to half a row; what has media, or still has no room, ends there. Raises RuntimeError if the engine fails.
        """
        engine, made = self._engine, [list[int]() for _ in contexts]
        sampling = Sampling(0.0, max_new_tokens=max_new_tokens, stop_ids=(self.tokenizer.eos_id,))
        running = {engine.submit(self._request(context, sampling)): i for i, context in enumerate(contexts)}
        while running:
            for event in engine.step():
                i = running.get(event.request_id)
                if i is None:  # it was cancelled
                    continue
                if event.finish_reason == "error":
                    raise RuntimeError(f"question {i} of {len(contexts)}: {event.error}")
                made[i] += [] if event.token_id is None else [event.token_id]
                if event.finish_reason or any(s in self._text(made[i]) for s in stop):
                    del running[event.request_id]
                    engine.cancel(event.request_id)
        while not engine.idle:
            engine.step()
        return [_until(self._text(ids), stop) for ids in made]

    def _request(self, context: Encoded, sampling: Sampling) -> Request:
        most = max(self.length - sampling.max_new_tokens, self.length // 2)
        tokens = context.tokens if context.media else context.tokens[-most:]
        return Request(tokens, context.media, sampling)

    @functools.cached_property
    def _engine(self) -> RequestEngine:
        """Made when the first text is wanted; adapters are merged into their weights, as they are served."""
        if self._given is not None:
            return self._given
        config, mesh = self._config, sharding.make_mesh(self._config.mesh)
        params = self._params if config.lora is None else lora.merge(self._frozen, self._params, config.lora)
        return Engine(
            dataclasses.replace(config.model, remat=False), params, slots=SLOTS, tokens_per_call=8,
            max_sequence_length=self.length + 1, mesh=mesh if mesh.size > 1 else None,
        )  # fmt: skip

    def _text(self, ids: list[int]) -> str:
        ids = ids[: ids.index(self.tokenizer.eos_id)] if self.tokenizer.eos_id in ids else ids
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def bits(self, text: str) -> list[Encoded]:
        """Documents of a text to be scored whole, split into rows; the first token of each is given, not scored."""
        return split(self.encode_all(text), self.length)

    def encode_all(self, text: str) -> Encoded:
        """A text whose every token has weight 1."""
        whole = encode(Example((Text(text, 1.0),), "text"), self.tokenizer, self._limits, self._shape.patch_size)
        return dataclasses.replace(whole, tokens=whole.tokens[:-1], loss_weights=whole.loss_weights[:-1])


def _add(packs: list[Pack], document: Encoded) -> tuple[int, int] | None:
    """Packs into the first row and pack with room; (row of the batch, start), or None."""
    for g, pack in enumerate(packs):
        for row in range(pack.shape.rows):
            start = pack.shape.sequence_length - pack.room(row)
            if pack.add(document, row):
                return g * pack.shape.rows + row, start
    return None


def _until(text: str, stop: Sequence[str]) -> str:
    return text[: min((text.find(s) for s in stop if s in text), default=len(text))]
