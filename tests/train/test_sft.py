"""SFT is a chat source and a config: the run resumes bit for bit, and what a conversation gives is not learned."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from kimi_jax.config import ChatConfig, CheckpointConfig, ConfigError, InitFromConfig, MeshConfig, SourceConfig
from kimi_jax.data.tokenizer import train_tokenizer
from kimi_jax.train import checkpoint, loop
from tests.data.sources.media import png, write_jsonl
from tests.hf.tiny import flat
from tests.train.tiny import CONFIG, MODEL

COLOURS = ("red", "green", "blue", "white")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Conversations with and without images, some longer than a row, and a tokenizer."""
    folder = tmp_path_factory.mktemp("chat")
    (folder / "a.png").write_bytes(png(28, 28))
    rows = []
    for i in range(24):
        colour = COLOURS[i % 4]
        content = [{"type": "image", "image": "a.png"}] if i % 3 == 0 else []
        messages = [
            {"role": "user", "content": [*content, {"type": "text", "text": f"which colour is {i % 4}?"}]},
            {"role": "assistant", "content": colour},
        ]
        rows.append({"messages": messages * (1 + i % 4)})
    write_jsonl(folder / "rows.jsonl", rows)
    train_tokenizer(["which colour is 0 1 2 3? red green blue white"] * 9, 320, folder / "tokenizer.json")
    return folder


def settings(folder, workdir, **changes):
    """12 steps on 8 devices with a checkpoint at 6, without loops over layers (see tests/environment.py)."""
    source = SourceConfig(kind="chat", path=str(folder / "rows.jsonl"), vision=True, chat=ChatConfig(thinking=False))
    data = dataclasses.replace(
        CONFIG.data, sources={"chat": source}, tokenizer=str(folder / "tokenizer.json"), sequence_length=64,
        vision_bins=((16, 2),), buffer_size=8,
    )  # fmt: skip
    vision = dataclasses.replace(MODEL.vision, num_hidden_layers=1)
    model = dataclasses.replace(MODEL, vocab_size=320, num_hidden_layers=2, vision=vision)
    config = dataclasses.replace(
        CONFIG, workdir=str(workdir), steps=12, log_interval=4, mesh=MeshConfig(8), model=model
    )
    config = dataclasses.replace(config, data=data, checkpoint=CheckpointConfig(interval=6))
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def base(folder, tmp_path_factory):
    """A checkpoint to start from, of another seed."""
    workdir = tmp_path_factory.mktemp("base")
    assert loop.run(settings(folder, workdir, seed=5, steps=4)) == 0
    return workdir


@pytest.fixture(scope="module")
def trained(folder, base, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    assert loop.run(settings(folder, workdir, init_from=InitFromConfig(path=str(base)))) == 0
    return workdir


@pytest.mark.slow
def test_sft_learns(trained):
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert rows[-1]["data"]["shortened"]["chat"] > 0 and not rows[-1]["data"]["bad"]


@pytest.mark.slow
def test_sft_that_was_cut_off_goes_on_bit_for_bit(trained, base, folder, tmp_path):
    """Another process would do the same: all that it has is the workdir as it was after step 6."""
    (tmp_path / "checkpoints").mkdir()
    shutil.copytree(trained / "checkpoints/6", tmp_path / "checkpoints/6")
    shutil.copyfile(trained / "metrics.jsonl", tmp_path / "metrics.jsonl")
    assert loop.run(settings(folder, tmp_path, init_from=InitFromConfig(path=str(base)))) == 0
    one, other = (flat(jax.device_get(checkpoint.load(str(path))[1])) for path in (trained, tmp_path))
    for leaf, array in one.items():
        np.testing.assert_array_equal(array, other[leaf], err_msg=leaf)


def test_sft_does_not_go_on_with_another_loss_mask(trained, folder, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    shutil.copytree(trained / "checkpoints/6", tmp_path / "checkpoints/6")
    config = settings(folder, tmp_path, init_from=InitFromConfig(path="gone"))  # weights come from the checkpoint
    source = dataclasses.replace(config.data.sources["chat"], chat=ChatConfig(train_on="last", thinking=False))
    with pytest.raises(ConfigError, match="source 'chat'"):
        loop.run(dataclasses.replace(config, data=dataclasses.replace(config.data, sources={"chat": source})))
