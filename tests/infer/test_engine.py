"""The engine gives what a full forward pass gives, token by token, whatever else it does at the time.

Greedy tokens must be equal to those of `Model.logits` repeated over the growing sequence (float32; the two ways differ
by 1e-6 of the largest logit, ties of random weights are not that close), log-probabilities to 1e-4.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from jax import monitoring

from kimi_jax import sharding
from kimi_jax.config import MeshConfig
from kimi_jax.data.example import MediaItem
from kimi_jax.data.patches import num_features
from kimi_jax.infer import engine as engine_module
from kimi_jax.infer.engine import Engine
from kimi_jax.infer.request import Request, Sampling
from kimi_jax.model import Model
from tests.nn import tiny

PAD = tiny.CONFIG.media_placeholder_token_id
LENGTH = 64
GREEDY = Sampling(temperature=0.0, max_new_tokens=6)


@pytest.fixture(scope="module")
def model():
    params = tiny.params()
    head = params["lm_head"]["kernel"]
    params["lm_head"]["kernel"] = head.at[:, PAD].set(0)  # a greedy pad would be a prompt that `logits` refuses
    return Model(tiny.CONFIG, params)


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(engine_module, "CHUNKS", (4, 16))


def engine(model, **settings):
    return Engine(model, **{"slots": 3, "page_size": 4, "max_sequence_length": LENGTH, **settings})


def text(seed, n):
    return np.random.default_rng(seed).integers(10, tiny.CONFIG.vocab_size, n).astype(np.int32)


def picture(seed, grid=(1, 4, 6)):
    count = np.prod(grid)
    return MediaItem(np.random.default_rng(seed).integers(0, 256, (count, 48)).astype(np.uint8), grid)


def with_picture(seed, before, item, after, sampling=GREEDY):
    pads = np.full(num_features(item.grid), PAD, np.int32)
    return Request(np.concatenate([text(seed, before), pads, text(seed + 1, after)]), (item,), sampling)


def reference(model, request):
    """Greedy tokens and their log-probabilities by full forward passes, padded behind to one length."""
    tokens, logprobs = list(request.token_ids), []
    pixels = grids = None
    if request.media:
        raw = np.concatenate([item.patches for item in request.media]).astype(np.float32)
        pixels, grids = (raw / 127.5 - 1).reshape(-1, 3, 4, 4), [item.grid for item in request.media]
    for _ in range(request.sampling.max_new_tokens):
        padded = [tokens + [10] * (LENGTH - len(tokens))]
        row = model.logits(padded, pixels, grids)[0, len(tokens) - 1].astype(np.float64)
        tokens.append(int(row.argmax()))
        logprobs.append(row.max() - np.log(np.exp(row - row.max()).sum()) - row.max())
    return tuple(tokens[len(request.token_ids) :]), logprobs


def check(model, request, completion):
    tokens, logprobs = reference(model, request)
    assert completion.token_ids == tokens
    np.testing.assert_allclose(completion.logprobs, logprobs, atol=1e-4)
    assert completion.finish_reason == "length"


def test_greedy_is_repeated_full_forward_for_text_and_pictures(model):
    """Prompts of one token up to several chunks and pages; more of them than slots; pictures cut by chunks."""
    requests = [Request(text(n, n), sampling=GREEDY) for n in (1, 4, 5, 23, 40)]
    requests += [with_picture(3, 5, picture(1), 2), with_picture(4, 14, picture(2, (3, 6, 4)), 9)]
    for request, completion in zip(requests, engine(model).run(requests), strict=True):
        check(model, request, completion)
