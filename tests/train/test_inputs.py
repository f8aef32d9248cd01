"""What a run is fed travels with it: the tokenizer in its workdir, and fingerprints that notice other content."""

import dataclasses
import json

import pytest
from PIL import Image

from kimi_jax.config import CheckpointConfig, ConfigError, DataConfig, SourceConfig, TrainConfig
from kimi_jax.data.tokenizer import load_tokenizer, train_tokenizer
from kimi_jax.train import inputs


@pytest.fixture
def config(tmp_path):
    for name in ("text", "vision"):
        lines = [{"text": f"number {n}"} for n in range(40)]
        if name == "vision":
            lines = [{"parts": [{"image": f"{n}.png"}, {"text": "red"}]} for n in range(3)]
            for n in range(3):
                Image.new("RGB", (28, 28), (200, 0, n)).save(tmp_path / f"{n}.png")
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train_tokenizer(["number one two three"], 290, tmp_path / "tokenizer.json")
    sources = {name: SourceConfig(kind="jsonl", path=str(tmp_path / f"{name}.jsonl")) for name in ("text", "vision")}
    data = DataConfig(sources=sources, tokenizer=str(tmp_path / "tokenizer.json"))
    return TrainConfig(workdir=str(tmp_path / "run"), data=data)


def resume(config, before, changed=None):
    inputs.check(config, before, changed or config, inputs.fingerprint(config.data))


def test_resume_with_the_same_inputs_is_accepted(config):
    before = json.loads(json.dumps(inputs.fingerprint(config.data)))  # as it comes back from a checkpoint
    resume(config, before)
    resume(config, None)  # a checkpoint of an older version
    resume(config, before, dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=3)))


def test_resume_with_another_tokenizer_of_the_same_size_is_refused(config, tmp_path):
    before = inputs.fingerprint(config.data)
    train_tokenizer(["quite another text"], 290, tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"the tokenizer .*tokenizer\.json.*check_data=False"):
        resume(config, before)
    resume(config, before, dataclasses.replace(config, checkpoint=CheckpointConfig(check_data=False)))


def test_resume_with_other_content_of_the_same_count_is_refused(config, tmp_path):
    before = inputs.fingerprint(config.data)
    text = (tmp_path / "text.jsonl").read_text()
    (tmp_path / "text.jsonl").write_text(text.replace("number", "letter"))
    with pytest.raises(ConfigError, match="source 'text'"):
        resume(config, before)
    (tmp_path / "text.jsonl").write_text(text)
    Image.new("RGB", (28, 28), "blue").save(tmp_path / "1.png")
    with pytest.raises(ConfigError, match="source 'vision'"):
        resume(config, before)


@pytest.mark.parametrize("change", [{"sequence_length": 128}, {"vision_bins": ((64, 1),)}], ids=str)
def test_resume_with_another_length_is_refused(config, change):
    with pytest.raises(ConfigError, match=rf"config\.data\.{next(iter(change))} is .* and was"):
        resume(config, None, dataclasses.replace(config, data=dataclasses.replace(config.data, **change)))


def test_workdir_keeps_its_tokenizer(config, tmp_path):
    inputs.keep_tokenizer(config)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    (tmp_path / "tokenizer.json").rename(tmp_path / "gone")
    kept = inputs.kept_tokenizer(tmp_path / "elsewhere", config.data.tokenizer)
    assert load_tokenizer(kept).encode("number one") == load_tokenizer(tmp_path / "elsewhere" / "tokenizer").encode(
        "number one"
    )
    assert inputs.kept_tokenizer(tmp_path, "given") == "given"  # of a workdir without one
