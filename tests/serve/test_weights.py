"""POST /v1/weights: steps of one folder and nothing else, behind the key; what is wrong leaves the old weights."""

import json
import threading
import types
import urllib.error
import urllib.request

import jax
import numpy as np
import pytest

from kimi_jax.hf.convert import from_hf
from kimi_jax.infer.engine import Engine as InferenceEngine
from kimi_jax.model import load
from kimi_jax.serve.weights import WeightsFolder
from kimi_jax.train import checkpoint
from tests.environment import FIXTURES
from tests.serve.server import PATIENCE, ScriptedEngine, serving
from tests.serve.test_app import TOKENIZER, config

KEY = "secret"


def post(address, body, key=KEY):
    """(status, JSON) of a call."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}/v1/weights", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


class Engine(ScriptedEngine):
    """Remembers the weights that it was given."""

    mesh, config = None, types.SimpleNamespace(param_dtype="float32")
    shapes = {"w": ((3,), np.float32)}
    params = None

    def set_params(self, params, version, running):
        super().set_params(params, version, running)
        self.params = (float(params["w"][0]), running)


@pytest.fixture
def served(monkeypatch):
    """(address, engine, loads): a server whose run has the steps 4, 5 (another model) and 6 (adapters)."""
    loads = []

    def load(workdir, step, mesh, dtype):
        loads.append((workdir, step))
        if step not in (4, 5, 6):
            raise FileNotFoundError("no checkpoint in /secret/place")
        size = 9 if step == 5 else 3
        return types.SimpleNamespace(lora=step == 6 or None), {"w": np.full(size, step, np.float32)}

    monkeypatch.setattr(checkpoint, "load", load)
    engine = Engine(TOKENIZER, lambda prompt: [])
    with serving(engine, TOKENIZER, config(), api_key=KEY, weights=WeightsFolder("/runs/one", engine)) as address:
        yield address, engine, loads


def test_named_step_is_read_from_the_folder_of_the_server(served):
    address, engine, loads = served
    assert post(address, {"step": 4, "running": "keep"}) == (200, {"object": "weights", "step": 4, "version": 4})
    assert engine.params == (4.0, "keep") and engine.version == 4 and loads == [("/runs/one", 4)]
    with urllib.request.urlopen(f"{address}/health", timeout=PATIENCE) as answer:
        assert answer.headers["X-Weight-Version"] == "4"


@pytest.mark.parametrize(("body", "status", "message"), [
    ({"step": 7}, 404, "no checkpoint of step 7"),
    ({"step": 5}, 400, "another model"),
    ({"step": 6}, 400, "adapters"),
    ({}, 400, "number of a checkpoint"),
    ({"step": -1}, 400, "from 0 to"),
    ({"step": "../../etc"}, 400, "must be an integer"),
    ({"step": True}, 400, "must be an integer"),
    ({"step": 4, "path": "/etc"}, 400, "is not known here"),
    ({"step": 4, "running": "kill"}, 400, "drain, keep, recompute"),
    (b"{", 400, "not JSON"),
    (b"[" * 4000, 400, "not JSON"),
    (b" " * 5000, 413, "4096 bytes"),
])  # fmt: skip
def test_what_cannot_be_done_is_said_and_changes_nothing(served, body, status, message):
    address, engine, _ = served
    found = post(address, body)
    assert found[0] == status and message in found[1]["error"]["message"] and "/secret" not in str(found)
    assert engine.params is None and engine.version == 0


def test_key_is_needed(served):
    address, engine, loads = served
    assert post(address, {"step": 4}, key="")[0] == post(address, {"step": 4}, key="other")[0] == 401
    assert not loads and engine.params is None


def test_second_change_waits_its_turn(served, monkeypatch):
    address, _, _ = served
    read, began, go_on = checkpoint.load, threading.Event(), threading.Event()

    def slow(*arguments):
        began.set()
        assert go_on.wait(PATIENCE)
        return read(*arguments)

    monkeypatch.setattr(checkpoint, "load", slow)
    first = threading.Thread(target=post, args=(address, {"step": 4}))
    first.start()
    assert began.wait(PATIENCE)
    assert post(address, {"step": 4})[0] == 409
    go_on.set()
    first.join(PATIENCE)
    assert post(address, {"step": 4})[0] == 200


def test_weights_of_a_real_checkpoint_are_those_of_the_engine(tmp_path):
    """Read for an engine without a mesh, as arrays of the same devices, also when it has got others before; a step that
    there is not is not found."""
    from_hf(FIXTURES / "tiny_fp32", tmp_path / "ours")
    model = load(tmp_path / "ours")
    engine = InferenceEngine(model.config, model.params, slots=1, max_sequence_length=64)
    (step,) = (int(folder.name) for folder in (tmp_path / "ours" / "checkpoints").iterdir() if folder.name.isdigit())
    folder = WeightsFolder(str(tmp_path / "ours"), engine)
    engine.set_params(folder.read(step), step)
    for mine, theirs in zip(jax.tree.leaves(folder.read(step)), jax.tree.leaves(model.params), strict=True):
        assert mine.devices() == theirs.devices()
        np.testing.assert_array_equal(mine, theirs)
    with pytest.raises(FileNotFoundError):
        folder.read(step + 1)


def test_server_without_a_folder_has_no_such_route():
    engine = Engine(TOKENIZER, lambda prompt: [])
    with serving(engine, TOKENIZER, config(), api_key=KEY) as address:
        assert post(address, {"step": 4})[0] == 404
