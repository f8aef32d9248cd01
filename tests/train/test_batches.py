"""Sources of batches: their host state comes back from a checkpoint as it was, and what they cannot have is refused.

That a run with arrays in its source's state continues bit for bit after SIGKILL is in test_faults.py.
"""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kimi_jax.train.batches import described, join_arrays, split_arrays
from tests.train.test_loop import Source, config, train
from tests.train.tiny import make_batch

DTYPES = st.sampled_from(["bool", "uint8", "int32", "int64", "float16", "float32", "float64"])
ARRAYS = DTYPES.flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0)))
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | ARRAYS
STATES = st.dictionaries(
    st.text(), st.recursive(LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x, max_size=3))
)


def same(a, b):
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list) else a == b


@given(STATES)
def test_host_state_of_any_shape_comes_back_from_json_and_arrays(state):
    text, arrays = split_arrays(state)
    text = json.loads(json.dumps(text))
    like = described(text)
    assert {k: (v.dtype, v.shape) for k, v in like.items()} == {k: (v.dtype, v.shape) for k, v in arrays.items()}
    assert same(state, join_arrays(text, arrays))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": [np.array(["text"])]}, r"host state a\.0: an array of <U4"),
        ({"a": {"b": np.array([None])}}, r"host state a\.b: an array of object"),
        ({"a": {"b": {1, 2}}}, r"host state a\.b: set is neither JSON nor an array"),
        ({"a": {"__array__": 1}}, r"host state a: keys are strings other than '__array__'"),
    ],
)
def test_host_state_that_cannot_be_saved_is_named(state, message):
    with pytest.raises(TypeError, match=message):
        split_arrays(state)


class Toy(Source):
    """Draws the number of its next batch with a generator whose state is arrays; remembers what it was told."""

    opened: list = []

    def __init__(self, config, packs, state):
        super().__init__(config, packs, state)
        self.drawn = state["drawn"] if state else np.zeros(0, np.int64)
        self.found, self.updates, self.closed = state, [], False
        self.packs = list(packs)
        self.opened.append(self)

    def __next__(self):
        super().__next__()
        number = int(np.random.default_rng(self.drawn).integers(1000)) if len(self.drawn) else 0
        self.drawn = np.append(self.drawn, number)
        return make_batch(number)

    def state(self):
        return super().state() | {"drawn": self.drawn}

    def update(self, params, step):
        super().update(params, step)
        self.updates.append((step, np.array(params["embed"]["embedding"][0])))

    def close(self):
        self.closed = True


class Dies(Toy):
    """Ends the process' run in the middle of step 7, as a crash would: nothing is saved."""

    def __next__(self):
        if self.step == 6:
            raise KeyboardInterrupt("killed")
        return super().__next__()


@pytest.mark.slow
def test_source_with_arrays_continues_bit_for_bit_and_sees_the_weights_of_every_step(tmp_path):
    Toy.opened.clear()
    assert train(config(tmp_path / "whole"), Toy) == 0
    with pytest.raises(KeyboardInterrupt, match="killed"):
        train(config(tmp_path / "killed"), Dies)
    assert train(config(tmp_path / "killed"), Toy) == 0
    whole, dead, resumed = Toy.opened
    assert whole.closed and dead.closed and resumed.closed and whole.packs == list(range(8))
    assert whole.found is None and resumed.found["step"] == 4  # of the checkpoint before
    assert resumed.found["drawn"].dtype == np.int64 and len(set(whole.drawn)) == 8
    np.testing.assert_array_equal(resumed.drawn, whole.drawn)
    assert [step for step, _ in whole.updates] == list(range(8))
    assert [step for step, _ in resumed.updates] == list(range(4, 8))
    for (_, want), (_, got) in zip(whole.updates[4:], resumed.updates, strict=True):
        np.testing.assert_array_equal(got, want)
    assert not np.array_equal(whole.updates[1][1], whole.updates[7][1])
