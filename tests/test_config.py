"""Settings: unknown ones are refused with the nearest name; nothing is lost between ConfigDict, dataclass and JSON."""

import dataclasses
import json
import runpy

import pytest

from kimi_jax import cli
from kimi_jax import config as c
from tests.environment import REPO

CONFIGS = sorted((REPO / "configs").glob("*.py"))


def get_config(path):
    return runpy.run_path(str(path))["get_config"]()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_freeze_and_round_trip(path):
    frozen = c.freeze(get_config(path))
    assert c.freeze(c.thaw(frozen)) == frozen
    # what config.json and a checkpoint hold: tuples have become lists, they come back as tuples
    assert c.freeze(json.loads(json.dumps(dataclasses.asdict(frozen)))) == frozen


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_name_their_command(path):
    assert f"--config=configs/{path.name}" in path.read_text()


@pytest.mark.parametrize(
    "key, nearest",
    [
        (("optimizer", "peak_rl"), "peak_lr"),
        (("model", "vision", "hiden_size"), "hidden_size"),
        (("data", "sources", "wiki", "wieght"), "weight"),
        (("stesp",), "steps"),
    ],
)
def test_unknown_setting_names_the_nearest(key, nearest):
    values = dataclasses.asdict(c.TrainConfig(data=c.DataConfig(sources={"wiki": c.SourceConfig()})))
    section = values
    for name in key[:-1]:
        section = section[name]
    section[key[-1]] = 1
    with pytest.raises(c.ConfigError, match=rf"config\.{'.'.join(key)} \(did you mean '{nearest}'\?\)"):
        c.freeze(values)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": 1.5}, r"config\.steps takes int"),
        ({"steps": True}, r"config\.steps takes int"),
        ({"steps": None}, r"config\.steps must not be None"),
        ({"model": {"scan_layers": 1}}, r"config\.model\.scan_layers takes bool"),
        ({"data": {"vision_bins": 3}}, r"config\.data\.vision_bins takes a tuple"),
        ({"data": {"vision_bins": [[64, 1, 2]]}}, r"config\.data\.vision_bins\[0\] takes 2 values, not 3"),
        ({"data": {"vision_bins": [[64, "a"]]}}, r"config\.data\.vision_bins\[0\]\[1\] takes int"),
    ],
)
def test_wrong_type_says_where(change, message):
    with pytest.raises(c.ConfigError, match=message):
        c.freeze(change)


def test_values_convert_where_nothing_is_lost():
    frozen = c.freeze({"optimizer": {"peak_lr": 1}, "data": {"vision_bins": [[64, 4]], "vision_ratio": [[0, 1]]}})
    assert frozen.optimizer.peak_lr == 1.0 and isinstance(frozen.optimizer.peak_lr, float)
    assert frozen.data.vision_bins == ((64, 4),) and frozen.data.vision_ratio == ((0.0, 1.0),)


def test_sections_and_values_that_are_off_stay_off():
    model = dataclasses.replace(c.preset("demo"), vision=None, moe=None, q_lora_rank=None, rope_scaling=None)
    values = c.thaw(c.TrainConfig(model=model))
    assert c.freeze(values).model == model
    values.model.q_lora_rank = 64  # a value that was None can be set
    assert c.freeze(values).model.q_lora_rank == 64


def test_diff_names_exactly_what_differs():
    base = c.TrainConfig()
    other = dataclasses.replace(
        base, steps=7, model=dataclasses.replace(base.model, vision=None), data=c.DataConfig(num_groups=2)
    )
    lines = c.diff(other, base)
    assert [line.split(" = ")[0] for line in lines] == [
        "config.steps", "config.model.vision", "config.data.num_groups"
    ]  # fmt: skip
    assert lines[0] == "config.steps = 7 (default 1000)"
    assert c.diff(base, base) == []


def test_unknown_preset_names_the_nearest():
    with pytest.raises(c.ConfigError, match="kimi_k2_5"):
        c.preset("kimi_k25")


def test_presets_are_released_shapes():
    k2 = c.preset("kimi_k2_5")
    assert (k2.qk_head_dim, k2.num_dense_layers, k2.num_moe_layers) == (192, 1, 60)
    assert c.preset("moonlight_16b_a3b").vision is None
    assert dataclasses.replace(k2, moe=None).num_moe_layers == 0


# --------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    "override, message",
    [
        ("--config.model.vison.hidden_size=3", r"config\.model\.vison \(did you mean 'vision'\?\)"),
        ("--config.data.sources.wiki.wheight=3", r"config\.data\.sources\.wiki\.wheight \(did you mean 'weight'\?\)"),
        ("--config.steps.more=3", r"config\.steps is a value"),
    ],
)
def test_override_of_unknown_setting(override, message):
    with pytest.raises(c.ConfigError, match=message):
        cli.split_overrides(["prog", "--config=x.py", override])


def test_what_is_set_to_none_is_taken_out_of_the_command_line():
    argv = ["prog", "--config=x.py", "--config.model.vision=None", "--config.model.q_lora_rank=None", "--other=None"]
    kept, off = cli.split_overrides(argv)
    assert off == ["model.vision", "model.q_lora_rank"]
    assert kept == ["prog", "--config=x.py", "--other=None"]
