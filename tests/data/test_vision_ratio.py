"""Vision ratio and fill of rows: every config and pod over 200 packs of realistic sizes, and bins that are refused."""

import contextlib
import dataclasses
import runpy
from pathlib import Path

import numpy as np
import pytest

from kimi_jax.config import ConfigError, DataConfig, SourceConfig, freeze, preset
from kimi_jax.data.bins import SAMPLE, check_sizes, share_held
from kimi_jax.data.example import Encoded, Example, Image, MediaItem, Text
from kimi_jax.data.image import fit_image
from kimi_jax.data.pipeline import BatchStream
from kimi_jax.data.shard import Shard
from tests.data import synthetic
from tests.data.synthetic import tokenizer

CONFIGS = Path(__file__).parents[2] / "configs"
PODS = runpy.run_path(str(CONFIGS / "pods.py"))
PACKS = 200
SIZES = (224, 784)  # pixels of a side of a still image, evenly; 64 to 784 patches
TEXTS = (50, 3000)  # tokens of a text, evenly in the logarithm


def text(rng: np.random.Generator, longest: int) -> Encoded:
    """A text of a random length; only its length matters here."""
    n = min(longest, int(np.exp(rng.uniform(*np.log(TEXTS)))))
    return Encoded(np.full(n, 5, np.int32), np.ones(n, np.float32), (), 0, "t")


def image(rng: np.random.Generator, data: DataConfig, scale: float = 1.0) -> Encoded:
    """An image of a random size with 40 tokens of caption; planned for the bins, its patches without memory."""
    width, height = (int(scale * rng.integers(*SIZES)) for _ in "wh")
    plan = fit_image(width, height, data.vision_bins[-1][0], 16384, 512, 14)
    patches = np.broadcast_to(np.zeros((1, 588), np.uint8), (plan.patches, 588))
    pads = [preset("demo").media_placeholder_token_id] * plan.tokens
    tokens = np.array([5] * 10 + pads + [5] * 40, np.int32)
    item = MediaItem(patches, (1, plan.h, plan.w))
    return Encoded(tokens, np.ones(len(tokens), np.float32), (item,), 1, "v")


def shard_of(data: DataConfig, folder: Path, scale: float = 1.0) -> Shard:
    """A shard whose sources give such examples, endlessly."""
    rng = np.random.default_rng(0)
    shard = Shard(0, data, preset("demo"), 10**9, {"t": range(500), "v": range(500)}, tokenizer(folder))
    shard._readers["t"].encode = lambda *_: [text(rng, data.sequence_length)]
    shard._readers["v"].encode = lambda *_: [image(rng, data, scale)]
    return shard


def settings(name: str) -> dict[str, DataConfig]:
    """The data settings of a config file and of all its pods, alike ones once; two sources, one shard."""
    sources = {"t": SourceConfig(), "v": SourceConfig(vision=True)}
    configs = {name: freeze(runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]())}
    for topology in PODS["TOPOLOGIES"]:
        with contextlib.suppress(ConfigError):  # a model that is too large for the pod
            configs[f"{name}@{topology}"] = freeze(PODS["get_config"](f"{name}@{topology}"))
    out: dict[str, DataConfig] = {}
    for key, config in configs.items():
        data = dataclasses.replace(config.data, sources=sources, num_packs=1, num_workers=0)
        if config.model.vision and data not in out.values():
            out[key] = data
    return out


ALL = {key: data for name in ("kimi_k2_5", "kimi_vl_a3b", "small") for key, data in settings(name).items()}


@pytest.mark.parametrize("name", ALL)
def test_vision_ratio_and_fill_of_a_config_over_200_packs(name, tmp_path):
    """Issued shapes, real mixture and packer. The ratio is that of the tokens delivered, all 200 packs together."""
    data = ALL[name]
    shard = shard_of(data, tmp_path)
    tokens = vision = 0
    for _ in range(PACKS):
        pack = shard.next_pack()
        tokens += int((pack.segment_ids > 0).sum())
        vision += int((pack.feature_index >= 0).sum())
    rows = PACKS * data.rows_per_pack * data.sequence_length
    ratio = data.vision_ratio[0][1]
    print(f"{name}: fill {tokens / rows:.4f}, vision share {vision / tokens:.4f} of {ratio}")
    assert tokens / rows >= 0.97
    assert vision / tokens == pytest.approx(ratio, rel=0.02)


@pytest.mark.parametrize("name", ALL)
def test_bins_of_a_config_hold_its_ratio_with_stills_of_these_sizes(name):
    rng = np.random.default_rng(1)
    check_sizes(ALL[name], {"v": [image(rng, ALL[name]) for _ in range(SAMPLE)]})


def test_bins_that_two_images_cannot_share_are_refused_although_their_patches_suffice():
    """Images of 2,600 patches: one to a bin of 4,096, so that two bins hold 1,300 of the 1,638 tokens asked for."""
    data = DataConfig(
        sources={"t": SourceConfig(), "v": SourceConfig(vision=True)}, sequence_length=16384, rows_per_pack=1,
        vision_bins=((4096, 2),), vision_ratio=((0.0, 0.1),),
    )  # fmt: skip
    tokens = np.full(660, 5, np.int32)
    item = MediaItem(np.broadcast_to(np.zeros((1, 588), np.uint8), (2600, 588)), (1, 52, 50))
    example = Encoded(tokens, np.ones(660, np.float32), (item,), 1, "v")
    assert share_held(data, {"v": [example]}, 0.0) == pytest.approx(1300 / 16384)
    with pytest.raises(ConfigError, match=r"hold a vision share of 0\.079.*asks for 0\.1 .*bins to \(\(4096, 3\),\)"):
        check_sizes(data, {"v": [example]})
    check_sizes(dataclasses.replace(data, vision_bins=((4096, 3),)), {"v": [example]})


def test_bins_are_judged_by_the_weights_of_the_time():
    """A source of large images that begins at half of the run is judged for that half."""
    data = DataConfig(
        sources={
            "t": SourceConfig(), "small": SourceConfig(vision=True, weight_schedule=((0.5, 0.0),)),
            "large": SourceConfig(vision=True, weight=0.001, weight_schedule=((0.5, 1.0),)),
        },
        sequence_length=1024, rows_per_pack=1, vision_bins=((512, 1),), vision_ratio=((0.0, 0.1),),
    )  # fmt: skip

    def of(patches: int) -> Encoded:
        item = MediaItem(np.broadcast_to(np.zeros((1, 588), np.uint8), (patches, 588)), (1, 2, patches // 2))
        return Encoded(np.full(patches // 4 + 9, 5, np.int32), np.ones(patches // 4 + 9, np.float32), (item,), 1, "v")

    sample = {"small": [of(64)], "large": [of(300)]}
    with pytest.raises(ConfigError, match="at 50% of training"):
        check_sizes(data, sample)


class Stills:
    """100 images of 8 x 6 patches each, which cannot share a bin of 64."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> Example:
        return Example((Image(np.zeros((84, 112, 3), np.uint8)), Text(" a shape")), f"still-{index}")


@pytest.mark.parametrize("workers", [0, 1])
def test_run_whose_images_leave_the_bins_short_is_refused_before_its_first_pack(workers, tmp_path):
    """Eight bins of 64 patches hold 512, and 4 x 0.2 x 512 x 1.1 = 451 are needed; one image each leaves 384."""
    tokenizer(tmp_path)
    sources = {"wiki": SourceConfig(), "stills": SourceConfig(vision=True)}
    data, model = synthetic.settings(
        tmp_path / "tokenizer.json", sources=sources, vision_bins=((64, 8),), num_workers=workers
    )
    opened = {"wiki": synthetic.Synthetic("text"), "stills": Stills()}
    with BatchStream(data, model, 100, sources=opened) as stream:
        with pytest.raises(ConfigError, match=r"hold a vision share of 0\.18.*vision_bins to \(\(64, 9\),\)"):
            next(stream)
    data = dataclasses.replace(data, vision_bins=((64, 9),))
    with BatchStream(data, model, 100, sources=opened) as stream:
        next(stream)
