"""The ready layouts: every model has one on every topology it fits, each divides evenly, each can be overridden."""

import math
import runpy

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from kimi_jax import sharding
from kimi_jax.config import ConfigError, freeze
from kimi_jax.nn.kimi import abstract_params
from kimi_jax.nn.param import metadata, unbox
from tests.environment import REPO

PODS = runpy.run_path(str(REPO / "configs/pods.py"))
FITS = {
    "kimi_k2_5": {"v5p-512", "v5p-1024", "v5p-2048", "v5p-4096", "ironwood-128", "ironwood-256", "ironwood-512"},
    "moonlight_16b_a3b": set(PODS["TOPOLOGIES"]) - {"cpu-8"},
    "demo": set(PODS["TOPOLOGIES"]),
}


@pytest.mark.parametrize("model", FITS)
def test_layout_wherever_it_fits(model):
    for topology, (devices, _) in PODS["TOPOLOGIES"].items():
        if topology not in FITS[model]:
            with pytest.raises(ConfigError, match="do not fit into three quarters of"):
                PODS["get_config"](f"{model}@{topology}")
            continue
        config = freeze(PODS["get_config"](f"{model}@{topology}"))
        sizes = sharding.mesh_sizes(config.mesh, devices)
        mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
        sharding.check_packs(config.data.num_packs, mesh)
        assert config.model.moe.n_routed_experts % sizes["expert"] == 0


@pytest.mark.parametrize("topology", ["v5p-512", "v5p-1024", "v5p-4096", "ironwood-512"])
def test_released_model_is_sharded_evenly(topology):
    """Every device holds its share of the weights and at most 5 % more: not all of the vision tower divides."""
    config = freeze(PODS["get_config"](f"kimi_k2_5@{topology}"))
    devices = PODS["TOPOLOGIES"][topology][0]
    sizes = sharding.mesh_sizes(config.mesh, devices)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    boxed = abstract_params(config.model)
    total = local = 0
    for info, x in zip(jax.tree.leaves(metadata(boxed)), jax.tree.leaves(unbox(boxed)), strict=True):
        axes = [axis for part in sharding.spec(info, x.shape, mesh) if part for axis in np.atleast_1d(part)]
        total += x.size
        local += x.size // math.prod(sizes[axis] for axis in axes)
    assert total / devices <= local < 1.05 * total / devices


def test_names_are_checked():
    with pytest.raises(ConfigError, match="no topology 'v5p-1000' .did you mean 'v5p-1"):
        PODS["get_config"]("kimi_k2_5@v5p-1000")
    with pytest.raises(ConfigError, match="did you mean 'kimi_k2_5'"):
        PODS["get_config"]("kimi_k25@v5p-1024")
