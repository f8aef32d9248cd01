"""Many tokens a call are the tokens of one at a time: same draws, same log-probabilities, same ends.

Log-probabilities may differ by 1e-5: the loop is another compiled program, whose sums may be taken in another order.
"""

from __future__ import annotations

import numpy as np
import pytest

from kimi_jax.infer.engine import Engine
from kimi_jax.infer.request import Request, Sampling
from tests.infer.engines import SIZES, eight_a_call, one_by_one
from tests.infer.test_engine import drain, ids, make_image, model, text, with_image


def requests(temperature, stop_ids):
    """More than slots, of different lengths, one with an image; answers from one token to more than two calls."""
    found = []
    for n, new in ((1, 19), (5, 1), (9, 8), (17, 3), (2, 12)):
        sampling = Sampling(temperature, 0.9 if n % 2 else 1.0, n, new, stop_ids, top_logprobs=n % 3)
        found.append(Request(text(n, n), sampling=sampling))
    sampling = Sampling(temperature, 1.0, 7, 9, stop_ids)
    return [*found, with_image(3, 5, make_image(1), 2, sampling)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("stop_ids", [(), tuple(range(10, 16)), tuple(range(60, 20, -1))])
def test_loop_gives_the_tokens_of_single_steps(temperature, stop_ids):
    """Greedy and sampled; without stop ids, with those that the device knows, and with more than it knows."""
    asked = requests(temperature, stop_ids)
    for got, want in zip(eight_a_call().run(asked), one_by_one().run(asked), strict=True):
        assert (got.token_ids, got.finish_reason) == (want.token_ids, want.finish_reason)
        np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)
        assert [[token for token, _ in top] for top in got.top] == [[token for token, _ in top] for top in want.top]
    if stop_ids:
        assert any(c.finish_reason == "stop" for c in one_by_one().run(asked))


def test_loop_stays_on_the_device_until_all_have_ended():
    """Nobody waits: two answers of 5 and 8 tokens are one call; no more tokens than asked for when streaming."""
    engine = eight_a_call()
    for n, new in ((3, 6), (4, 9)):  # the first token comes with the prompt
        engine.submit(Request(text(n, n), sampling=Sampling(0.0, max_new_tokens=new)))
    events = engine.step()
    assert len(events) == 2 and not engine.idle
    assert len(engine.step(tokens=1)) == 2
    assert len(engine.step(tokens=2)) == 4
    assert len(engine.step()) == 2 + 5
    assert engine.idle


def test_loop_is_left_for_who_waits():
    """Three slots, four requests: the call ends with the first answer, and the fourth prompt is read next."""
    engine = eight_a_call()
    numbers = [
        engine.submit(Request(text(n, n), sampling=Sampling(0.0, max_new_tokens=new)))
        for n, new in ((2, 8), (3, 4), (4, 9), (1, 3))
    ]
    engine.step()
    assert len(engine.step()) == 3 * 3
    assert [event.request_id for event in engine.step()] == [numbers[3]]
    found = drain(engine)
    assert len(ids(found[numbers[2]])) == 9 - 4


def test_loop_compiles_once_for_any_number_of_tokens():
    engine = eight_a_call()
    engine.run(requests(0.0, ()))
    before = engine.stats()["compilations"]
    engine.run(requests(1.0, (11,)))
    for tokens in (1, 3, 8):
        engine.submit(Request(text(1, 2), sampling=Sampling(0.0, max_new_tokens=9)))
        while not engine.idle:
            engine.step(tokens)
    assert engine.stats()["compilations"] == before


@pytest.mark.parametrize("settings", [{"tokens_per_call": 0}])
def test_loop_of_no_tokens_is_refused(settings):
    with pytest.raises(ValueError, match="at least 1"):
        Engine(model().config, model().params, **SIZES | settings)
