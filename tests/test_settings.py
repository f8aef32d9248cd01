"""Ranges of settings: every field declares one, and no value, however hostile, ends in anything but a ConfigError."""

import copy
import dataclasses
import math
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_jax import config as c
from kimi_jax.config_check import check_run

# checked where they are used
FREE_TEXTS = {
    "kind",
    "path",
    "split",
    "tokenizer",
    "workdir",
    "remat_policy",
    "base",
    "prompt",
    "truth",
    "verifier",
    "after",
}
FREE_TEXTS |= {"vision", "projector", "language"}  # of init_from
HOSTILE = [
    math.inf, -math.inf, math.nan, 0, -1, 1, 1e308, -1e308, 10**400, 2**31, 2**63, True, None, "", "float16", "nan", [],
    {},     [[]], [[1, 2, 3]], [["a", 1]], {"a": 1}, [[math.nan, 1]], [[0.5, 0.1], [0.0, 0.2]], b"x", object(),
]  # fmt: skip
SECTIONS = [cls for cls in vars(c).values() if dataclasses.is_dataclass(cls) and cls.__name__.endswith("Config")]
FULL = c.TrainConfig(data=c.DataConfig(sources={"s": c.SourceConfig()}), lora=c.LoRAConfig())
RUN = c.TrainConfig(data=c.DataConfig(sources={"s": c.SourceConfig()}, vision_ratio=((0.0, 0.0),)))


def leaves(values, path=()):
    """(path, value) of every value that is no section."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


PATHS = [path for path, _ in leaves(dataclasses.asdict(FULL))]


@pytest.mark.parametrize("cls", SECTIONS, ids=lambda cls: cls.__name__)
def test_every_number_of_the_settings_declares_its_range(cls):
    plain, full = typing.get_type_hints(cls), typing.get_type_hints(cls, include_extras=True)
    for name, hint in plain.items():
        if any(kind in repr(hint) for kind in ("int", "float")) and "Config" not in repr(hint):
            assert "Range" in repr(full[name]), f"{cls.__name__}.{name}"
        elif hint is str:
            assert "OneOf" in repr(full[name]) or name in FREE_TEXTS, f"{cls.__name__}.{name}"


@pytest.mark.parametrize("path", PATHS, ids=".".join)
def test_hostile_value_is_refused_in_one_line_or_passes_the_check(path):
    for value in HOSTILE:
        values = dataclasses.asdict(FULL)
        section = values
        for key in path[:-1]:
            section = section[key]
        section[path[-1]] = value
        try:
            c.check(c.freeze(values))
            said = "config"
        except c.ConfigError as error:
            said = str(error)
        assert said.startswith(("config", "unknown setting config")) and "\n" not in said


def changed(values, changes):
    """The settings with values put at paths; a path whose section is gone by then changes nothing."""
    values = copy.deepcopy(values)
    for path, value in changes:
        section = values
        for key in path[:-1]:
            section = section.get(key) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section[path[-1]] = value
    return values


def check_settings(changes):
    """Settings that pass every check before a run, or one line of at most 1,000 characters."""
    said = ""
    try:
        config = c.freeze(changed(dataclasses.asdict(RUN), changes))
        c.check(config)
        check_run(config)
    except c.ConfigError as error:
        said = str(error)
    assert "\n" not in said and len(said) < 1000, said


numbers = st.one_of(st.integers(), st.floats(), st.integers(-2, 9), st.floats(0, 1))
anything = st.recursive(
    st.one_of(st.sampled_from(HOSTILE), st.none(), st.booleans(), numbers, st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=8,
)
# whole sections too
PLACES = sorted({path[:length] for path in PATHS for length in range(1, len(path) + 1)} | {("unknown",)})
# values of the setting's own type, so that the rules between settings are reached
SAME_TYPE = {bool: st.booleans(), int: st.integers(-1, 4096), float: st.floats(0, 2), str: st.text(max_size=8)}
NEAR = [(path, SAME_TYPE[type(value)]) for path, value in leaves(dataclasses.asdict(RUN)) if type(value) in SAME_TYPE]
near = st.sampled_from(NEAR).flatmap(lambda place: st.tuples(st.just(place[0]), place[1]))
changes = st.lists(st.one_of(near, near, st.tuples(st.sampled_from(PLACES), anything)), min_size=1, max_size=4)


@settings(max_examples=300)
@given(changes)
def test_settings_fuzz(changes):
    check_settings(changes)


@pytest.mark.fuzz
@settings(max_examples=20_000)
@given(changes)
def test_settings_fuzz_long(changes):
    check_settings(changes)


@pytest.mark.parametrize("change, message", [
    ({"optimizer": {"peak_lr": math.inf}}, r"config\.optimizer\.peak_lr must be a finite number .*, not inf"),
    ({"memory": {"microbatches": 0}}, r"config\.memory\.microbatches must be a finite number at least 1"),
    ({"model": {"dtype": "float8"}}, r"config\.model\.dtype must be one of float32, bfloat16, float16, not 'float8'"),
    ({"model": {"qk_rope_head_dim": 7}}, r"config\.model: qk_rope_head_dim must be even"),
    ({"model": {"moe": {"num_experts_per_tok": 500}}}, r"config\.model\.moe: num_experts_per_tok = 500"),
    ({"data": {"vision_ratio": [[0.5, 0.1], [0.0, 0.2]]}}, r"config\.data: the parts of vision_ratio must begin"),
    ({"model": 3}, r"config\.model is a section of settings"),
    ({"two\nlines": 3}, r"^unknown setting config: 'two\\nlines'"),
])  # fmt: skip
def test_setting_out_of_range_names_key_value_and_what_is_allowed(change, message):
    with pytest.raises(c.ConfigError, match=message):
        c.freeze(change)


def test_settings_built_in_python_are_checked_before_training():
    from kimi_jax.train.loop import run

    with pytest.raises(c.ConfigError, match=r"config\.optimizer\.weight_decay"):
        run(dataclasses.replace(c.TrainConfig(), optimizer=c.OptimizerConfig(weight_decay=math.nan)))
