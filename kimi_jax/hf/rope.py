"""The rotary settings of a released config.json in all their spellings.

Source: YaRN (arXiv:2309.00071); `rope_theta` and `rope_scaling` of the released files; `rope_parameters`, in which
transformers 5 holds both. What a section may say beyond YarnConfig has to be what `nn.rope` does anyway.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from kimi_jax.config import ConfigError, YarnConfig
from kimi_jax.hf.config_keys import COUNT, NOT_NEGATIVE, POSITIVE, Number, check_fixed, check_known, number, section
from kimi_jax.untrusted import describe

THETA, FACTOR = Number(1.0001, 1e30, False), Number(1, 1e6, False)
YARN_KEYS = frozenset(field.name for field in dataclasses.fields(YarnConfig))
OTHER_KEYS = frozenset(("type", "rope_type", "rope_theta", "attention_factor", "truncate", "partial_rotary_factor"))
NEUTRAL = {"truncate": True, "partial_rotary_factor": 1.0}


def read(text: dict[str, Any], where: str) -> tuple[float, YarnConfig | None]:
    """(rope_theta, YaRN or None) of the text section.

    Raises ConfigError for settings that `nn.rope` does not follow and for spellings that contradict each other.
    """
    found = {}
    for key in ("rope_scaling", "rope_parameters"):
        values = section(text, key, where)
        if values:
            found[key] = values
    thetas = {
        f"{key}.rope_theta": number(values, "rope_theta", THETA, f"{where}: {key}") for key, values in found.items()
    }
    thetas = {"rope_theta": number(text, "rope_theta", THETA, where)} | thetas
    _check_same(thetas, where, absent_counts=False)
    theta = next((value for value in thetas.values() if value is not None), None)
    if theta is None:
        raise ConfigError(f"{where} lacks: rope_theta")
    scalings = {key: _scaling(values, key, f"{where}: {key}") for key, values in found.items()}
    _check_same(scalings, where, absent_counts=True)
    return theta, next(iter(scalings.values()), None)


def _check_same(spellings: dict[str, Any], where: str, *, absent_counts: bool) -> None:
    values = [value for value in spellings.values() if absent_counts or value is not None]
    if any(value != values[0] for value in values):
        raise ConfigError(f"{where}: {' and '.join(spellings)} contradict each other; keep one of them")


def _scaling(values: dict[str, Any], name: str, where: str) -> YarnConfig | None:
    check_known(values, YARN_KEYS | OTHER_KEYS, where)
    check_fixed(values, NEUTRAL, where)
    kinds = [values[key] for key in ("rope_type", "type") if values.get(key) is not None]
    if any(kind != kinds[0] for kind in kinds):
        raise ConfigError(f"{where}: rope_type = {describe(kinds[0])} contradicts type = {describe(kinds[1])}")
    only_theta = not any(values.get(key) is not None for key in YARN_KEYS)
    kind = kinds[0] if kinds else "default" if only_theta else None
    if kind == "default":
        check_fixed(values, {"factor": 1.0, "attention_factor": 1.0}, where)
        return None
    if kind != "yarn":
        raise ConfigError(f"{where} of type {describe(kind)} is not supported; there are: yarn, default, null")
    return _yarn(values, name, where)


def _yarn(values: dict[str, Any], name: str, where: str) -> YarnConfig:
    lacking = [key for key in ("factor", "original_max_position_embeddings") if values.get(key) is None]
    if name == "rope_scaling":  # there the released code has a default for the second
        lacking = lacking[:1] if "factor" in lacking else []
    if lacking:
        raise ConfigError(f"{where} lacks: {', '.join(lacking)}")
    original = number(values, "original_max_position_embeddings", Number(1, COUNT.high, False), where, 4096.0)
    if original != int(original):
        raise ConfigError(f"{where}: original_max_position_embeddings = {original} is no whole number")
    yarn = YarnConfig(
        factor=number(values, "factor", FACTOR, where),
        original_max_position_embeddings=int(original),
        beta_fast=number(values, "beta_fast", POSITIVE, where, 32.0),
        beta_slow=number(values, "beta_slow", POSITIVE, where, 1.0),
        mscale=number(values, "mscale", NOT_NEGATIVE, where, 1.0),
        mscale_all_dim=number(values, "mscale_all_dim", NOT_NEGATIVE, where, 0.0),  # leaves the softmax scale alone
    )
    if yarn.beta_fast < yarn.beta_slow:
        raise ConfigError(f"{where}: beta_fast = {yarn.beta_fast} is below beta_slow = {yarn.beta_slow}")
    attention = number(values, "attention_factor", POSITIVE, where)
    ours = _magnitude(yarn.factor, yarn.mscale) / _magnitude(yarn.factor, yarn.mscale_all_dim)
    if attention is not None and not math.isclose(attention, ours, rel_tol=1e-6):
        raise ConfigError(f"{where}: attention_factor = {attention} is not the {ours:g} that mscale and factor give")
    return yarn


def _magnitude(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0
