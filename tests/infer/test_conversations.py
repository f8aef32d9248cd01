"""Pages for more conversations than there are slots: those that wait for their client are found again."""

from __future__ import annotations

import numpy as np
import pytest

from kimi_jax.infer.engine import Engine
from kimi_jax.infer.request import Request, Sampling
from tests.infer.test_engine import LENGTH, model, text

SLOTS, CONVERSATIONS, TURNS, PAGE = 8, 32, 4, 4
GREEDY = Sampling(temperature=0.0, max_new_tokens=5)


def talk(engine):
    """32 conversations of 4 turns at once: tokens that were cached, and those that could have been.

    A turn's prompt is the one before, its answer and 6 new tokens. At best all full pages of what was computed are
    found: the last token of an answer is drawn and not read.
    """
    prompts = {i: text(i, 9).tolist() for i in range(CONVERSATIONS)}
    turns, known = dict.fromkeys(prompts, 0), dict.fromkeys(prompts, 0)
    places = {engine.submit(Request(np.array(prompt, np.int32), (), GREEDY)): i for i, prompt in prompts.items()}
    cached = ideal = 0
    while not engine.idle:
        for event in engine.step():
            i = places[event.request_id]
            prompts[i].append(event.token_id)
            if event.finish_reason:
                cached, ideal, turns[i] = cached + event.cached_tokens, ideal + known[i], turns[i] + 1
                known[i] = (len(prompts[i]) - 1) // PAGE * PAGE
                if turns[i] < TURNS:
                    prompts[i] += text(100 * turns[i] + i, 6).tolist()
                    places[engine.submit(Request(np.array(prompts[i], np.int32), (), GREEDY))] = i
    assert set(turns.values()) == {TURNS}
    return cached, ideal


@pytest.mark.parametrize(("conversations", "least", "most"), [(4 * SLOTS, 1.0, 1.0), (None, 0.0, 0.5)])
def test_prefixes_of_32_conversations_are_found_over_8_slots(conversations, least, most):
    """With pages for four conversations a slot, the server's default, every page; with pages for the slots, few."""
    engine = Engine(
        model().config,
        model().params,
        slots=SLOTS,
        conversations=conversations,
        page_size=PAGE,
        max_sequence_length=LENGTH,
        chunks=(16,),
    )
    cached, ideal = talk(engine)
    assert ideal > 32 * 3 * 20
    assert least <= cached / ideal <= most


def test_fewer_conversations_than_slots_still_have_a_page_for_every_slot():
    sizes = {"slots": 3, "page_size": PAGE, "max_sequence_length": LENGTH, "chunks": (16,)}
    pages = [
        Engine(model().config, model().params, conversations=n, **sizes).stats()["free_pages"] for n in (None, 1, 6)
    ]
    assert pages == [48, 48, 96]
