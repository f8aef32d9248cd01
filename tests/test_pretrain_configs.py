"""The three stages of pre-training as settings: they go together, follow from each other, learn the right tokens."""

import itertools
import math
import re
import runpy

import pytest
from jax.sharding import AbstractMesh

from kimi_jax import sharding
from kimi_jax.config import ConfigError, YarnConfig, freeze, override, preset
from kimi_jax.config_check import check_run
from kimi_jax.data.bins import check_bins
from kimi_jax.data.pipeline import BatchStream
from kimi_jax.data.sources import open_source
from kimi_jax.data.tokenizer import train_tokenizer
from tests.environment import REPO

LONG = runpy.run_path(str(REPO / "configs/pretrain/long.py"))
FILES = {"vit": LONG["VIT"], "joint": LONG["JOINT"], "long": LONG}  # as the last one runs the others
DEMO = (
    ("vit", "language"), ("vit", "tower"), ("vit", "projector"), ("joint", "demo"), ("long", "2x"), ("long", "4x"),
)  # fmt: skip
POD = (
    ("vit", "tower@v5p-1024"), ("vit", "projector@v5p-1024"), ("joint", "v5p-1024"), ("long", "8x@v5p-1024"),
    ("long", "64x@v5p-1024"),
)  # fmt: skip
CAPTION = re.compile(r"a \w+ \w+ (left of|right of|above|below) a \w+ \w+|a \w+ \w+ moves \w+|the number \d")
POD_TOKENS = (1e12, 5e9, 15e12, 500e9, 200e9)


def settings(file: str, name: str):
    return freeze(FILES[file]["get_config"](name))


@pytest.mark.parametrize("file, name", DEMO + POD)
def test_stage_settings_go_together(file, name):
    config = settings(file, name)
    check_run(config)
    check_bins(config.data, config.model)


@pytest.mark.parametrize("chain", [DEMO, POD], ids=["demo", "pod"])
def test_stages_start_where_the_one_before_ends(chain):
    configs = [settings(*stage) for stage in chain]
    if chain == POD:  # the tower's decoder is not the one of the later stages: the projector starts fresh
        assert configs[1].init_from.vision == configs[0].workdir and not configs[1].init_from.projector
        configs = configs[1:]
    else:
        assert configs[1].init_from.language == configs[0].workdir and configs[1].freeze == ("language",)
        configs = configs[1:]
        assert len({config.data.tokenizer for config in configs}) == 1
    assert configs[0 if chain == POD else 1].freeze == ("language", "vision")
    for before, after in itertools.pairwise(configs):
        assert after.init_from.path == before.workdir
    assert not any(config.freeze for config in configs[1 if chain == POD else 2 :])
    joint = configs[1] if chain == POD else configs[2]
    assert joint.data.vision_ratio == ((0.0, 0.1),) and joint.model.rope_scaling is None


def test_last_stage_of_the_pod_is_the_released_model():
    config = settings("long", "64x@v5p-1024")
    released = preset("kimi_k2_5")
    assert config.model.rope_scaling == released.rope_scaling == YarnConfig(64.0, 4096)
    assert config.model.max_position_embeddings == released.max_position_embeddings == config.data.sequence_length


@pytest.mark.parametrize("stage, tokens", zip(POD, POD_TOKENS, strict=True))
def test_stage_of_a_pod_takes_the_tokens_of_the_report(stage, tokens):
    config = settings(*stage)
    batch = config.data.num_packs * config.data.rows_per_pack * config.data.sequence_length
    assert config.steps * batch == pytest.approx(tokens, rel=0.002)


@pytest.mark.parametrize("topology", ["v5p-512", "v5p-1024", "v5p-4096"])
@pytest.mark.parametrize("factor", [8, 64])
def test_long_rows_are_shared_by_devices_that_divide_evenly(topology, factor):
    config = settings("long", f"{factor}x@{topology}")
    devices = FILES["vit"]["PODS"]["TOPOLOGIES"][topology][0]
    sizes = sharding.mesh_sizes(config.mesh, devices)
    assert math.prod(sizes.values()) == devices and config.model.moe.n_routed_experts % sizes["expert"] == 0
    sharding.check_packs(config.data.num_packs, AbstractMesh(tuple(sizes.values()), tuple(sizes)))
    assert config.data.sequence_length // sizes["context"] == FILES["long"]["TOKENS_A_DEVICE"]


@pytest.mark.parametrize(
    "file, name", [("vit", "head"), ("vit", "language@v5p-128"), ("vit", "tower@v5p-100"), ("joint", "v5p-100"),
                   ("long", "3x"), ("long", "8x"), ("long", "8x@v5p-1")],
)  # fmt: skip
def test_stage_names_that_do_not_work_are_refused(file, name):
    with pytest.raises(ConfigError):
        settings(file, name)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A vocabulary of captions."""
    sources = [open_source(source) for source in FILES["vit"]["CAPTIONS"].values()]
    texts = [part.text for s in sources for i in range(200) for part in s.record(i).parts]
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    return train_tokenizer([*texts, "image video 0123456789:."], 512, path), str(path)


@pytest.mark.parametrize("phase", ["tower", "projector"])
def test_vit_stage_learns_captions_and_nothing_else(tokenizer, phase):
    """Of every document in the packs the targets with weight are the caption and the end, whole and in order."""
    words, path = tokenizer
    changes = {"data.tokenizer": path, "data.num_workers": 0, "data.sequence_length": 512, "data.buffer_size": 8}
    config = override(settings("vit", phase), changes)
    learned, modalities = [], set()
    with BatchStream(config.data, config.model, config.steps) as stream:
        for _ in range(2):
            batch = next(stream)
            for row in range(len(batch.tokens)):
                for document in set(batch.segment_ids[row].tolist()) - {0}:
                    at = (batch.segment_ids[row] == document) & (batch.loss_weights[row] > 0)
                    ids = batch.targets[row][at].tolist()
                    assert ids[-1] == words.eos_id and set(batch.loss_weights[row][at]) == {1.0}
                    learned.append(words.decode(ids[:-1]))
                    modalities |= set(batch.modality[row][at].tolist())
    assert len(learned) > 20 and all(map(CAPTION.fullmatch, learned)) and modalities == {1, 2}
