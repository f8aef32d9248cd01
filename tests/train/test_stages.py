"""The stages of pre-training in one chain, a few steps each: what is frozen stays, what learns moves, each begins with
the weights of the one before."""

import dataclasses
import runpy

import jax
import numpy as np
import pytest

from kimi_jax.config import YarnConfig, freeze, override
from kimi_jax.data.vocabulary import tokenizer_for
from kimi_jax.nn.kimi import KimiK25, init_params
from kimi_jax.nn.param import unbox
from kimi_jax.train import checkpoint, loop
from kimi_jax.train.batches import open_stream
from tests.environment import REPO
from tests.hf.tiny import flat
from tests.nn.tiny import QUICK
from tests.train.tiny import MODEL, make_batch

STAGES = (
    ("vit", "language"),
    ("vit", "tower"),
    ("vit", "projector"),
    ("joint", "demo"),
    ("long", "2x"),
    ("long", "4x"),
)
TINY = {
    "steps": 3, "model.vocab_size": 2048, "model.hidden_size": 32, "model.intermediate_size": 48,
    "model.num_hidden_layers": 2, "model.num_attention_heads": 2, "model.q_lora_rank": 16, "model.kv_lora_rank": 16,
    "model.qk_nope_head_dim": 8, "model.qk_rope_head_dim": 8, "model.v_head_dim": 8, "model.moe.n_routed_experts": 4,
    "model.moe.moe_intermediate_size": 16, "data.num_packs": 8, "data.rows_per_pack": 1, "data.buffer_size": 8,
    "data.num_workers": 0, "optimizer.warmup_steps": 1, "eval.tasks": (),
}  # fmt: skip
TINY_VISION = {
    "model.vision.hidden_size": 16, "model.vision.intermediate_size": 32, "model.vision.num_hidden_layers": 1,
    "model.vision.num_attention_heads": 2, "data.vision_bins": ((144, 8),),
}  # fmt: skip


class Recorded:
    """The data stream of a run, which keeps the weights from before the first batch."""

    def __init__(self, stream):
        self._stream, self.first = stream, None

    def __next__(self):
        return next(self._stream)

    def update(self, params, step):
        if step == 0:
            self.first = {name: np.array(leaf) for name, leaf in flat(jax.device_get(params)).items()}
        self._stream.update(params, step)

    def __getattr__(self, name):  # state, report, close
        return getattr(self._stream, name)


def run_stage(file, name, folder, ends):
    """Runs a stage in `folder` and holds it to what is frozen and where it begins; its settings. ends: the weights of
    the stages before, by workdir, to which those of this one are added."""
    config = freeze(runpy.run_path(str(REPO / f"configs/pretrain/{file}.py"))["get_config"](name))
    config = override(config, TINY | (TINY_VISION if config.model.vision else {}))
    places = {f.name: getattr(config.init_from, f.name) for f in dataclasses.fields(config.init_from)}
    before = {part: str(folder / place) for part, place in places.items() if place}
    config = override(config, {
        "workdir": str(folder / config.workdir), "data.tokenizer": str(folder / "tokenizer.json"),
        **{f"init_from.{part}": place for part, place in before.items()},
    })  # fmt: skip
    opened = []

    def record(*given):
        opened.append(Recorded(open_stream(*given)))
        return opened[0]

    assert loop.run(config, batches=record) == 0
    first, end = opened[0].first, at_end(config.workdir)
    for part, place in before.items():
        for leaf, array in ends[place].items():
            if part == "path" or not leaf.startswith(("vision", "projector")):
                assert first[leaf].tobytes() == array.tobytes(), (name, leaf)
    for leaf, array in end.items():
        part = next((tower for tower in ("vision", "projector") if leaf.startswith(tower)), "language")
        same = array.tobytes() == first[leaf].tobytes()
        # a bias of the router stays where it is while the experts' loads are even
        assert same if part in config.freeze else not same or leaf.endswith("router.bias"), (name, leaf)
    ends[config.workdir] = end
    return config


@pytest.mark.slow  # six runs, each compiled: two minutes of CPU
def test_three_stages_in_a_chain(tmp_path):
    """At tiny size, with the settings and the data of configs/pretrain; each run's end is read from its checkpoint."""
    joint = freeze(runpy.run_path(str(REPO / "configs/pretrain/joint.py"))["get_config"]())
    tokenizer_for(joint, str(tmp_path / "tokenizer.json"), 2048, max_bytes=2_000_000)
    ends: dict[str, dict[str, np.ndarray]] = {}
    for file, name in STAGES:
        config = run_stage(file, name, tmp_path, ends)
    assert config.model.rope_scaling == YarnConfig(4.0, 256) and config.data.sequence_length == 1024


def at_end(workdir):
    """The weights of a run's last checkpoint."""
    return flat(jax.device_get(checkpoint.load(workdir)[1]))


def test_yarn_changes_logits_of_all_but_the_first_token_of_a_document():
    """A first token sees itself only, whatever its position and the softmax scale; a factor of 1 changes no bit."""
    batch = make_batch(0)
    params = {"params": unbox(jax.jit(lambda key: init_params(MODEL, key))(jax.random.key(0)))}

    def logits(scaling):
        model = KimiK25(dataclasses.replace(MODEL, rope_scaling=scaling))
        run = jax.jit(lambda p, b: model.apply(p, b, method=model.hidden)[0], compiler_options=QUICK)
        return np.asarray(run(params, batch))

    plain, one, four = (logits(scaling) for scaling in (None, YarnConfig(1.0, 16), YarnConfig(4.0, 16)))
    np.testing.assert_array_equal(plain, one)
    first = (batch.positions == 0) & (batch.segment_ids > 0)
    later = (batch.positions > 0) & (batch.segment_ids > 0)
    np.testing.assert_array_equal(plain[first], four[first])
    moved = np.abs(plain - four).max(-1)
    assert (moved[later] > 1e-6).mean() > 0.95
