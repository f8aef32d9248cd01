"""A run of adapters on a released INT4 checkpoint: they alone learn and are saved; merged, the model goes back out.

Loss of one batch that comes again and again, so that it must fall. 1e-5 of the largest logit where the merged weights
and the adapters beside them sum in another order (float32).
"""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import kimi_jax as kimi
from kimi_jax import checksums, sharding
from kimi_jax.config import CheckpointConfig, ConfigError, EvalConfig, LoRAConfig, MeshConfig
from kimi_jax.data.tokenizer import train_tokenizer
from kimi_jax.eval import runner
from kimi_jax.eval.packed import Scorer
from kimi_jax.hf import stream
from kimi_jax.hf.convert import from_hf, to_hf
from kimi_jax.hf.stream import EXPERTS, get_leaf
from kimi_jax.nn.kimi import init_params
from kimi_jax.nn.param import unbox
from kimi_jax.train import adapters, checkpoint, loop
from tests.hf.tiny import flat
from tests.train.test_loop import Source
from tests.train.tiny import CONFIG, MODEL, make_batch, make_text_batch

MOE = dataclasses.replace(MODEL.moe, moe_intermediate_size=32)  # groups of 32 inputs share an INT4 scale
BASE = dataclasses.replace(MODEL, vocab_size=320, initializer_range=0.2, num_hidden_layers=2, vision=None, moe=MOE)
IDS = make_batch(3).tokens[:1, 16:28]


class Same(Source):
    """The text of the first batch again and again."""

    def __next__(self):
        super().__next__()
        return make_text_batch(0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A released directory with INT4 experts."""
    path = tmp_path_factory.mktemp("base") / "released"
    stream.save(path, BASE, unbox(jax.jit(lambda: init_params(BASE, jax.random.key(0)))()), "kimi_k2", "float32", True)
    return path


def settings(workdir, base, **changes):
    """12 steps on 8 devices; the model of `CONFIG` has other sizes than the base, and gives way."""
    options = LoRAConfig(str(base), "int4", rank=4, alpha=8.0, targets=("attention", "mlp", "shared"))
    config = dataclasses.replace(CONFIG, workdir=str(workdir), steps=12, log_interval=4, mesh=MeshConfig(8))
    config = dataclasses.replace(config, checkpoint=CheckpointConfig(interval=6), lora=options)
    config = dataclasses.replace(
        config, optimizer=dataclasses.replace(CONFIG.optimizer, peak_lr=3e-2, weight_decay=0.0)
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """The workdir of a run that is evaluated at its end."""
    workdir = tmp_path_factory.mktemp("run")
    train_tokenizer(["0 1 2 3 4 5 6 7 8 9"], BASE.vocab_size, workdir / "tokenizer.json")
    data = dataclasses.replace(CONFIG.data, tokenizer=str(workdir / "tokenizer.json"))
    tasks = EvalConfig(tasks=("arithmetic",), final_limit=8)
    assert loop.run(settings(workdir, base, data=data, eval=tasks), batches=Same) == 0
    return workdir


@pytest.mark.slow
def test_only_the_adapters_learn_and_the_loss_falls(trained, base):
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    found, params = checkpoint.load(str(trained))
    assert found.model.moe == dataclasses.replace(MOE, int4_group_size=32)
    leaves = flat(jax.device_get(params))
    assert {leaf.rsplit(".", 1)[1] for leaf in leaves} == {"a", "b"}
    assert all(np.abs(array).max() > 0 for array in leaves.values())
    before, after = kimi.load(base, experts="int4"), kimi.load(trained)
    changed = flat(jax.device_get(after.params))
    for leaf, array in flat(jax.device_get(before.params)).items():
        assert (changed[leaf].tobytes() == array.tobytes()) == (f"{leaf}.a" not in leaves), leaf
    assert np.abs(after.logits(IDS) - before.logits(IDS)).max() > 0.1


@pytest.mark.slow
def test_what_is_evaluated_is_the_adapted_model(trained):
    """In the loop as by the command, adapters beside the weights; by likelihoods it is the model that is served."""
    config, params, frozen = adapters.load_run(str(trained))
    (row,) = runner.evaluate(params, config, ("arithmetic",), 8, frozen=frozen)
    assert [dataclasses.asdict(row)] == json.loads((trained / "results.json").read_text())
    served = dataclasses.replace(config, lora=None)

    def nll(params, config, frozen=None):
        scorer = Scorer(params, config, frozen=frozen)
        return scorer.score([scorer.encode((), "1 + 2 = 3, 4 + 5 = 9")])[0].nll

    adapted = nll(params, config, frozen)
    mesh = sharding.make_mesh(config.mesh)
    np.testing.assert_allclose(nll(kimi.load(trained, mesh=mesh).params, served), adapted, rtol=1e-5)
    assert abs(nll(frozen, served) - adapted) > 0.1


@pytest.mark.slow
def test_run_that_was_cut_off_ends_with_the_same_adapters(trained, base, tmp_path):
    """From the checkpoint of step 6, which does not hold the base: it is read again. Bit for bit."""
    for name in ("checkpoints/6", "metrics.jsonl"):
        copy = shutil.copytree if "/" in name else shutil.copyfile
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        copy(trained / name, tmp_path / name)
    assert loop.run(settings(tmp_path, base), batches=Same) == 0  # without an evaluation, which changes nothing
    one, other = (flat(jax.device_get(checkpoint.load(str(path))[1])) for path in (trained, tmp_path))
    assert {leaf: array.tobytes() for leaf, array in one.items()} == {k: v.tobytes() for k, v in other.items()}


@pytest.mark.slow
def test_export_is_the_base_with_the_adapters_merged(trained, base, tmp_path):
    """As it is served, with the experts' words untouched; the same from a base that was converted."""
    want = kimi.load(trained)
    to_hf(trained, tmp_path / "packed", int4_experts=True)
    got = kimi.load(tmp_path / "packed", experts="int4")
    for leaf in EXPERTS:
        for part in ("words", "scales"):
            ours, theirs = (np.asarray(get_leaf(model.params, leaf)[part]) for model in (got, want))
            assert ours.tobytes() == theirs.tobytes()
    logits = want.logits(IDS)
    assert np.abs(got.logits(IDS) - logits).max() <= 1e-5 * np.abs(logits).max()
    from_hf(base, tmp_path / "ours")
    _rebase(trained, tmp_path / "run", tmp_path / "ours")
    to_hf(tmp_path / "run", tmp_path / "again", int4_experts=True)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "packed" / name).read_bytes()
    to_hf(trained, tmp_path / "floats")
    assert np.abs(kimi.load(tmp_path / "floats").logits(IDS) - logits).max() <= 1e-5 * np.abs(logits).max()


def _rebase(run, to, base):
    """A copy of a run whose base lies elsewhere."""
    shutil.copytree(run / "checkpoints" / "12", to / "checkpoints" / "12")
    file = to / "checkpoints" / "12" / "config" / "metadata"
    config = json.loads(file.read_text())
    config["lora"]["base"] = str(base)
    file.write_text(json.dumps(config))
    (to / "checkpoints" / "12" / checksums.NAME).unlink()  # which say that the settings were edited


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": LoRAConfig()}, "config.lora.base is empty"),
        ({"lora": LoRAConfig("nowhere")}, "neither config.json"),
        ({"eval": EvalConfig(tasks=("nonsense",))}, "no task is called 'nonsense'"),
        (
            {"eval": EvalConfig(tasks=("arithmetic",)), "lora": LoRAConfig("base", "int4", targets=("experts",))},
            "arithmetic generate text, which adapters of INT4 experts cannot",
        ),
    ],
)
def test_what_cannot_be_run_is_said(changes, message, base, tmp_path):
    with pytest.raises(ConfigError, match=message):
        loop.run(settings(tmp_path, base, **changes))
