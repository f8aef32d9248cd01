"""The SFT configs: settings that go together, layouts that divide evenly, and names that are checked."""

import runpy

import pytest
from jax.sharding import AbstractMesh

from kimi_jax import sharding
from kimi_jax.config import ConfigError, freeze
from kimi_jax.config_check import check_run
from tests.environment import REPO

K2_5 = runpy.run_path(str(REPO / "configs/sft/kimi_k2_5.py"))
TOPOLOGIES = K2_5["PODS"]["TOPOLOGIES"]


def layout(config, topology: str) -> dict[str, int]:
    """The mesh over the devices of a topology, checked against the batch."""
    sizes = sharding.mesh_sizes(config.mesh, TOPOLOGIES[topology][0])
    sharding.check_packs(config.data.num_packs, AbstractMesh(tuple(sizes.values()), tuple(sizes)))
    return sizes


@pytest.mark.parametrize("name", ["demo", "kimi_vl_a3b"])
def test_sft_settings_go_together(name):
    config = freeze(runpy.run_path(str(REPO / f"configs/sft/{name}.py"))["get_config"]())
    check_run(config)
    assert config.init_from.path and config.lora is None
    if name == "demo":
        demo = freeze(runpy.run_path(str(REPO / "configs/demo.py"))["get_config"]())
        assert config.model == demo.model and config.data.tokenizer == demo.data.tokenizer
    else:
        layout(config, "v5p-128")


@pytest.mark.parametrize("topology", ["v5p-512", "v5p-1024", "v5p-4096", "ironwood-512"])
def test_sft_of_all_weights_fits_where_pretraining_does(topology):
    config = freeze(K2_5["get_config"](f"full@{topology}"))
    check_run(config)
    assert config.model.moe.n_routed_experts % layout(config, topology)["expert"] == 0
    assert config.init_from.path and config.lora is None


@pytest.mark.parametrize("topology", ["v5p-128", "v5p-1024", "v6e-256"])
def test_sft_of_adapters_fits_small_pods(topology):
    config = freeze(K2_5["get_config"](f"lora@{topology}"))
    check_run(config)
    assert config.model.moe.n_routed_experts % layout(config, topology)["expert"] == 0
    assert config.lora.experts == "int4" and not config.init_from.path


@pytest.mark.parametrize("name", ["full@v5p-128", "lora@cpu-8", "half@v5p-128", "full@v5p-100"])
def test_sft_names_that_do_not_work_are_refused(name):
    with pytest.raises(ConfigError):
        K2_5["get_config"](name)
