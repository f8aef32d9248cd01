"""What is planned is what is trained: one lowered text, the same shapes and bytes; collectives per layer are golden."""

import dataclasses
import math

import jax
import pytest

from kimi_jax import sharding
from kimi_jax.config import ConfigError, MeshConfig
from kimi_jax.data.packing import PackShape
from kimi_jax.plan import chips, program, report
from kimi_jax.plan.plan import layouts
from kimi_jax.train import flops
from kimi_jax.train.step import make_train_step
from tests.train.tiny import CONFIG, make_batch, make_text_batch


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(MeshConfig())


@pytest.mark.slow
def test_plan_lowers_the_function_that_train_jits(mesh):
    """Text for text, from a real state and batch on the one side and from shapes on the other."""
    init, step = make_train_step(CONFIG, mesh)
    trained = step.lower(init(), sharding.put_batch(make_batch(0), mesh)).as_text()
    assert program.lower(CONFIG, mesh).as_text() == trained


def test_planned_batch_is_a_packed_batch(mesh):
    real = sharding.put_batch(make_batch(0), mesh)
    planned = program.abstract_batch(CONFIG, mesh)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), planned) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding), real
    )


def test_rows_a_device_take_their_share_of_the_images(mesh):
    data = dataclasses.replace(CONFIG.data, num_packs=4, rows_per_pack=8, vision_bins=((16, 4), (64, 1)))
    config = dataclasses.replace(CONFIG, data=data)
    small = program.scaled(config, mesh, 2).data
    assert (small.num_packs, small.rows_per_pack, small.vision_bins) == (8, 2, ((16, 1), (64, 1)))
    spread = program.scaled(config, mesh, None).data
    assert (spread.num_packs, spread.rows_per_pack) == (8, 4)
    halves = dataclasses.replace(config, memory=dataclasses.replace(config.memory, microbatches=2))
    assert (program.scaled(halves, mesh, 2).data.num_packs, program.scaled(halves, mesh, 2).data.rows_per_pack) == (
        16,
        1,
    )
    with pytest.raises(ConfigError, match="8 rows cannot be sharded into 16 packs"):
        program.scaled(halves, mesh, 1)


def test_counts_of_a_full_pack_are_those_of_its_shape():
    counts = report.full_counts(CONFIG, 8)
    shape = PackShape.of(CONFIG.data, CONFIG.model)
    assert counts["tokens"] == shape.rows * shape.sequence_length and counts["patches"] == 16
    real = flops.batch_counts(jax.tree.map(lambda x: x[:1], make_text_batch(0)))
    assert counts["tokens"] >= float(real["tokens"]) and counts["token_pairs"] >= float(real["token_pairs"])


def test_layouts_use_every_device_and_divide_what_they_shard():
    found = layouts(CONFIG, 64)
    assert len(set(found)) == len(found)
    for mesh in found:
        assert math.prod(size for size in dataclasses.asdict(mesh).values() if size > 0) == 64


def test_without_the_compiler_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "libtpu", None)
    with pytest.raises(program.PlanError, match=r"kimi_jax\[tpu\]"):
        program.devices_of(chips.parse_topology("v5p:2x2x1"))
