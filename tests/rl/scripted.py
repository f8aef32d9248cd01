"""Episodes whose turns are written down: a sampler at the engine's seam that says them, and a real engine forced to."""

import dataclasses
import json
from collections import deque

import numpy as np

from kimi_jax.data.conversation import ARGUMENTS, CALL, CALL_END, CALLS, CALLS_END, END, MIDDLE
from kimi_jax.data.tokenizer import train_tokenizer
from kimi_jax.data.tool_declaration import declare_tools
from kimi_jax.infer.engine import Engine
from kimi_jax.infer.request import TokenEvent
from kimi_jax.rl.worker import RolloutWorker
from kimi_jax.sandbox.tool import IPYTHON
from tests.rl.tiny_run import TEXT

HEADER_END = 3  # <|im_middle|><think></think>: replies come at once
VOCABULARY = 512
MODEL = dataclasses.replace(TEXT, vocab_size=VOCABULARY, max_position_embeddings=1024)


def write_tokenizer(folder):
    """A tokenizer to which the declaration of the tool is short."""
    texts = [declare_tools([IPYTHON])] * 20 + ["## Return of functions.ipython:0\n", '{"code": "print('] * 20
    train_tokenizer(texts, VOCABULARY, folder / "tokenizer.json")
    return folder / "tokenizer.json"


def call(code, number=0, name="ipython"):
    """A call as the model writes it: marks and texts."""
    arguments = code if isinstance(code, bytes) else json.dumps({"code": code}).encode()
    return [CALL, f"functions.{name}:{number}", ARGUMENTS, arguments.decode(), CALL_END]


def turn(tokenizer, text="", calls=(), end=END):
    """The tokens of a reply."""
    pieces = [text, *([CALLS, *(piece for each in calls for piece in each), CALLS_END] if calls else []), end]
    ids = []
    for piece in pieces:
        ids += [tokenizer.special_id(piece)] if type(piece) is not str else tokenizer.encode(piece)
    return ids


def place_of(token_ids, tokenizer):
    """(number of the turn, tokens of it so far) at the end of a conversation."""
    middle, assistant = tokenizer.special_id(MIDDLE), tokenizer.special_id("<|im_assistant|>")
    ids = np.asarray(token_ids)
    begin = int(np.flatnonzero(ids == middle)[-1]) + HEADER_END
    return int((ids == assistant).sum()) - 1, len(ids) - begin


class Script:
    """A sampler that says what is written, whatever the weights: `turns` of each answer by its seed's parity."""

    def __init__(self, tokenizer, turns):
        self._tokenizer, self._turns = tokenizer, turns
        self._running, self._number, self.version = deque(), 0, 0
        self.steps = 0

    @property
    def idle(self):
        return not self._running

    def set_params(self, params, version):
        self.version = version

    def submit(self, request):
        number, done = place_of(request.token_ids, self._tokenizer)
        turns = self._turns[request.sampling.seed % len(self._turns)]
        left = list(turns[min(number, len(turns) - 1)][done:])
        self._number += 1
        self._running.append([self._number, left, request.sampling.max_new_tokens, request.sampling.stop_ids])
        return self._number

    def submit_group(self, request, seeds):
        sampling = request.sampling
        return [
            self.submit(dataclasses.replace(request, sampling=dataclasses.replace(sampling, seed=seed)))
            for seed in seeds
        ]

    def cancel(self, request_id):
        self._running = deque(each for each in self._running if each[0] != request_id)

    def step(self):
        """One token of every answer."""
        self.steps += 1
        events = []
        for each in tuple(self._running):
            number, left, most, stops = each
            token = left.pop(0)
            each[2] = most - 1
            finish = "stop" if token in stops else "length" if most == 1 else None
            events.append(TokenEvent(number, token, -0.5, (), finish, version=self.version))
            if finish:
                self._running.remove(each)
        return events


class ScriptedWorker(RolloutWorker):
    """Says `turns`: one list of turns for each kind of seed."""

    turns = ()

    def _open(self, params):
        return Script(self.tokenizer, self.turns)


class Forced:
    """A grammar that allows one text: what is left of the first turn. Log-probabilities are the model's own."""

    def __init__(self, tokens):
        self._tokens = tokens

    def start(self):
        return Forced(list(self._tokens))

    def allowed(self):
        mask = np.zeros(-(-VOCABULARY // 32), np.uint32)
        mask[self._tokens[0] // 32] |= np.uint32(1) << np.uint32(self._tokens[0] % 32)
        return mask

    def accept(self, token):
        assert token == self._tokens.pop(0)


class ForcedEngine(Engine):
    """A real engine whose first turns are forced; later ones it draws freely."""

    tokenizer, first = None, ()

    def _enter(self, request, *caller):
        number, done = place_of(request.token_ids, self.tokenizer)
        if number == 0:
            request = dataclasses.replace(request, grammar=Forced(self.first[done:]))
        return super()._enter(request, *caller)


class ForcedWorker(RolloutWorker):
    """Draws with a `ForcedEngine`."""

    first = ()

    def _open(self, params):
        engine = ForcedEngine(
            dataclasses.replace(self._config.model, remat=False), params, slots=self._rollout.slots,
            page_size=self._rollout.page_size, max_sequence_length=self._config.data.sequence_length,
        )  # fmt: skip
        engine.tokenizer, engine.first = self.tokenizer, self.first
        return engine
