"""Settings: unknown ones are refused with the nearest name; nothing is lost between ConfigDict, dataclass and JSON."""

import contextlib
import dataclasses
import json
import runpy
import subprocess
import sys
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_jax import cli
from kimi_jax import config as c
from kimi_jax import config_tree as c_tree
from kimi_jax.config_check import check_run
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
        base, steps=7, model=dataclasses.replace(base.model, vision=None), data=c.DataConfig(num_packs=2)
    )
    lines = c.diff(other, base)
    assert [line.split(" = ")[0] for line in lines] == [
        "config.steps", "config.model.vision", "config.data.num_packs"
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


def test_overrides_are_taken_out_of_the_command_line_with_values_of_their_type():
    argv = [
        "prog", "--config=x.py", "--config.model.vision=None", "--config.steps", "7", "-config.optimizer.peak_lr=1e-3",
        "--config.model.remat", "--noconfig.model.scan_layers", "--config.data.vision_bins=((64,4),)",
        "--config.eval.tasks=wiki,digits", "--config.data.sources.mine.kind=jsonl", "--other=None", "--",
        "--config.x=1",
    ]  # fmt: skip
    kept, overrides = cli.split_overrides(argv)
    assert kept == ["prog", "--config=x.py", "--other=None", "--", "--config.x=1"]
    assert overrides == [
        ("model.vision", None), ("steps", 7), ("optimizer.peak_lr", 1e-3), ("model.remat", True),
        ("model.scan_layers", False), ("data.vision_bins", ((64, 4),)), ("eval.tasks", ("wiki", "digits")),
        ("data.sources.mine.kind", "jsonl"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "override, message",
    [
        ("--config.steps=abc", r"config\.steps takes int, not 'abc'"),
        ("--config.steps", r"config\.steps needs a value"),
        ("--config.model.remat=maybe", r"config\.model\.remat takes true or false, not 'maybe'"),
        ("--noconfig.steps", "only a setting that is true or false"),
        ("--config.lora=8", r"config\.lora is a section of settings: set config\.lora\.NAME"),
        ("--config.data.vision_bins=((64,", r"config\.data\.vision_bins takes a tuple such as"),
        ("--config.data.sources..kind=jsonl", r"an entry of config\.data\.sources needs a name"),
        ("--config.optimizer.peak_lr=" + "9" * 5000 + "x", r"config\.optimizer\.peak_lr takes float, not '9+\.\.\.'"),
    ],
)
def test_override_that_cannot_be_read_is_refused_in_one_line(override, message):
    with pytest.raises(c.ConfigError, match=message) as error:
        cli.split_overrides(["prog", "--config=x.py", override])
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def command(*arguments):
    """(settings, message) of a command line in a process of its own, as every command parses them."""
    program = "from absl import app; from kimi_jax import cli; import json, dataclasses\n"
    program += "app.run(lambda _: print(json.dumps(dataclasses.asdict(cli.settings()))), flags_parser=cli.parse)"
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == (0 if done.stdout else 2), done.stderr
    return c.freeze(json.loads(done.stdout)) if done.stdout else None, done.stderr


def test_command_line_sets_new_sources_sections_and_tuples():
    config, _ = command(
        "--config=configs/demo.py", "--config.data.sources.mine.kind=jsonl", "--config.data.sources.mine.path=m.jsonl",
        "--config.data.sources.digits=None", "--config.lora.rank=8", "--config.data.vision_bins=((64,4),)",
        "--config.model.rope_scaling=None",
    )  # fmt: skip
    before = c.freeze(get_config(REPO / "configs" / "demo.py"))
    assert config.data.sources["mine"] == c.SourceConfig(kind="jsonl", path="m.jsonl")
    assert set(config.data.sources) == set(before.data.sources) - {"digits"} | {"mine"}
    assert config.lora == c.LoRAConfig(rank=8) and config.data.vision_bins == ((64, 4),)
    assert config.model == dataclasses.replace(before.model, rope_scaling=None)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config=configs/demo.py", "--config.data.sources.wiky.weight=2"], "did you mean 'wiki'"),
        (["--config=configs/demo.py", "--config.memory.microbatches=7"], "does not divide config.data.num_packs"),
        (["--config=configs/nothing.py"], "configs/nothing.py"),
        (["--config=configs/pods.py:demo@v5p-3"], "demo@v5p-3: no topology 'v5p-3'"),
        ([], "which settings"),
    ],
)
def test_command_with_settings_that_do_not_work_ends_with_one_line_and_status_2(arguments, message):
    config, said = command(*arguments)
    assert config is None and message in said and said.startswith("error: ") and said.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------- override

WIKI = c.TrainConfig(data=c.DataConfig(sources={"wiki": c.SourceConfig(path="wiki")}))


def test_override_changes_single_settings_and_leaves_the_original():
    before = dataclasses.asdict(WIKI)
    changed = c.override(WIKI, {
        "optimizer.peak_lr": 1, "lora.rank": 8, "model.vision": None, "data.vision_bins": [[64, 4]],
        "data.sources.wiki.weight": 2.0, "data.sources.mine.kind": "jsonl",
        "model.moe": c.MoEConfig(n_shared_experts=2), "model.moe.n_routed_experts": 16,
    })  # fmt: skip
    assert dataclasses.asdict(WIKI) == before
    assert changed.optimizer.peak_lr == 1.0 and changed.lora == c.LoRAConfig(rank=8) and changed.model.vision is None
    assert changed.data.vision_bins == ((64, 4),)
    assert changed.data.sources == {"wiki": c.SourceConfig(path="wiki", weight=2.0), "mine": c.SourceConfig("jsonl")}
    assert changed.model.moe == c.MoEConfig(n_shared_experts=2, n_routed_experts=16)
    assert c.override(changed, {"lora": None, "data.sources.mine": None}).lora is None
    assert c.override(WIKI, {}) == WIKI


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"optimizer.peak_rl": 1}, r"config\.optimizer\.peak_rl \(did you mean 'peak_lr'\?\)"),
        (
            {"data.sources.wikki.weight": 2},
            r"config\.data\.sources has no 'wikki' \(did you mean 'wiki'\?\); to add",
        ),
        ({"data.sources.wikki": None}, r"no 'wikki' \(did you mean 'wiki'\?\)"),
        ({"data.sources.wikki": {"weight": 2.0}}, r"no 'wikki' \(did you mean 'wiki'\?\)"),
        ({"data.sources.mine.kind": 3}, r"config\.data\.sources\.mine\.kind takes str"),
        ({"steps.more": 3}, r"config\.steps is a value and has no setting 'more'"),
        ({"steps.more.yet": 3}, r"config\.steps is a value and has no setting 'more'"),
        ({"steps": None}, r"config\.steps must not be None"),
        ({"model": 3, "model.vocab_size": 4}, r"config\.model is a section of settings, not 3"),
        ({"": 3}, r"unknown setting config: ''"),
    ],
)
def test_override_of_what_does_not_exist_or_fit_is_refused(changes, message):
    with pytest.raises(c.ConfigError, match=message):
        c.override(WIKI, changes)


# ------------------------------------------------------------------------------------------------- rules of a whole run


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 100}, r"warmup_steps=500 and a decay of 35 steps"),
        ({"optimizer.final_lr": 1.0}, r"final_lr between 0 and it"),
        ({"memory.microbatches": 3}, r"config\.memory\.microbatches = 3 does not divide config\.data\.num_packs = 8"),
        ({"data.vision_bins": ((66, 1),)}, r"data\.vision_bins\[0\].*multiple of 4"),
        ({"data.vision_bins": ((64, 1), (64, 2))}, r"data\.vision_bins must ascend"),
        ({"data.sources.wiki.kind": "jsnl"}, r"config\.data\.sources\.wiki\.kind: .*did you mean 'jsonl'"),
        ({"data.sources.wiki.weight": 0.0}, r"config\.data\.sources\.wiki\.weight"),
        ({"data.sources.wiki.weight_schedule": ((0.5, 0.0),)}, r"weight 0 at 50%"),
        ({"data.vision_ratio": ((0.0, 0.1),)}, r"config\.data\.vision_ratio asks for media"),
    ],
)
def test_rules_of_a_whole_run_are_checked_before_it_starts(changes, message):
    valid = c.override(WIKI, {"data.vision_ratio": ((0.0, 0.0),)})
    check_run(valid)
    with pytest.raises(c.ConfigError, match=message):
        check_run(c.override(valid, changes))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_keep_the_rules_of_a_run(path):
    check_run(c.freeze(get_config(path)))


# ---------------------------------------------------------------------------------------------------------------- fuzz


def paths_of(cls, prefix=""):
    """Paths of every setting of the dataclass and the sections in it, generated from the declared types."""
    for name in typing.get_type_hints(cls):
        path = f"{prefix}{name}"
        kind = c_tree.type_at(name, cls)
        yield path
        if dataclasses.is_dataclass(kind):
            yield from paths_of(kind, f"{path}.")
        elif typing.get_origin(kind) is dict:
            yield from paths_of(typing.get_args(kind)[1], f"{path}.wiki.")


PATHS = sorted(paths_of(c.TrainConfig))
HOSTILE = [
    "", "None", "nan", "inf", "-inf", "0", "-1", "1e308", "1e999", "9" * 5000, "true", "x", "wiki,", "()", "((),)",
    "((64,4),)", "((64,'a'),)", "(" * 500, "[" * 500 + "]" * 500, "{}", "{'a': 1}", "__import__('os')", "\x00",
    "\ud800", "a" * 10_000, "0x10", "1_0", "(1,2", "b'x'", "...", "1if 1else 2",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_hostile_text_for_any_setting_is_refused_in_one_line_or_gives_settings(path):
    for text in HOSTILE:
        try:
            _, overrides = cli.split_overrides(["prog", f"--config.{path}={text}"])
            frozen = c.override(WIKI, dict(overrides))
            said = ""
            check_run(frozen)
        except c.ConfigError as error:
            said = str(error)
        assert "\n" not in said and len(said) < 1000, (path, text[:40])


@given(st.text(max_size=40), st.text(max_size=20))
def test_any_text_as_a_path_is_a_config_error_or_a_setting(path, text):
    with contextlib.suppress(c.ConfigError):
        _, overrides = cli.split_overrides(["prog", f"--config.{path}={text}"])
        c.override(WIKI, dict(overrides))
