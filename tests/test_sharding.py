"""One table says how every array is sharded: no name without a rule, no rule without a name, nothing twice."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from kimi_jax import sharding
from kimi_jax.config import PRESETS, ConfigError, LoRAConfig, MeshConfig, preset
from kimi_jax.nn import lora
from kimi_jax.nn.param import AdamW, Muon, ParamInfo, metadata
from kimi_jax.train import state as state_lib
from tests.train.tiny import MODEL, make_batch


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(MeshConfig())


def test_mesh_takes_all_devices_or_exactly_what_is_asked_for(mesh):
    assert dict(mesh.shape) == {"replica": 1, "fsdp": 8, "expert": 1, "context": 1, "tensor": 1}
    assert mesh.axis_types == (AxisType.Auto,) * 5
    assert sharding.make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]).size == 1
    assert sharding.make_mesh(MeshConfig(expert=4)).shape["fsdp"] == 2
    with pytest.raises(ConfigError, match="does not make 8 devices"):
        sharding.make_mesh(MeshConfig(fsdp=3))
    with pytest.raises(ConfigError, match="only one axis may be -1, not fsdp and tensor"):
        sharding.make_mesh(MeshConfig(tensor=-1))


class Chip:
    """What `create_hybrid_device_mesh` asks of a TPU: two slices of eight chips in a cube."""

    platform, device_kind, process_index = "tpu", "TPU v5", 0

    def __init__(self, number):
        self.slice_index, inside = divmod(number, 8)
        self.id, self.coords, self.core_on_chip = number, (inside & 1, inside >> 1 & 1, inside >> 2), 0


def test_slices_hold_whole_replicas():
    """Everything but the replicas stays on the fast net of one slice."""
    chips = [Chip(i) for i in range(16)]
    mesh = sharding.make_mesh(MeshConfig(replica=2, fsdp=4, expert=2), chips)
    assert [{c.slice_index for c in part.flat} for part in mesh.devices] == [{0}, {1}]
    assert dict(mesh.shape)["fsdp"] == 4 and mesh.axis_types == (AxisType.Auto,) * 5
    four = sharding.make_mesh(MeshConfig(replica=4), chips)
    assert [{c.slice_index for c in part.flat} for part in four.devices] == [{0}, {0}, {1}, {1}]
    with pytest.raises(ConfigError, match="make it a multiple of 2"):
        sharding.make_mesh(MeshConfig(), chips)


def test_array_is_sharded_once_by_preference_and_only_where_it_divides(mesh):
    def spec_of(axes, shape):
        return sharding.spec(ParamInfo(axes, Muon()), shape, mesh)

    assert spec_of(("embed", "mlp"), (16, 32)) == P("fsdp", None)
    assert spec_of(("mlp", "embed"), (32, 16)) == P(None, "fsdp")
    assert spec_of(("embed", "mlp"), (12, 32)) == P(None, "fsdp")  # 12 does not divide by 8
    assert spec_of(("embed", "mlp"), (12, 12)) == P(None, None)
    assert spec_of(("layers", "norm"), (8, 16)) == P(None, None)


def test_axes_share_an_array_by_preference():
    """An expert weight lives on `expert`; the rest of it is sharded like any weight. No mesh axis shards an array
    twice."""
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))

    def spec_of(axes, shape):
        return sharding.spec(ParamInfo(axes, Muon()), shape, mesh)

    assert spec_of(("layers", "expert", "embed", "expert_mlp"), (3, 4, 8, 8)) == P(None, "expert", "fsdp", "tensor")
    assert spec_of(("expert", "expert_mlp", "embed"), (3, 8, 8)) == P(None, ("tensor", "expert"), "fsdp")
    assert spec_of(("embed", "heads", "head_dim"), (8, 4, 4)) == P("fsdp", ("tensor", "expert"), None)
    assert spec_of(("embed", "q_lora"), (8, 8)) == P("fsdp", "expert")
    assert spec_of(("q_lora", "heads", "head_dim"), (8, 2, 4)) == P(("expert", "fsdp"), "tensor", None)
    assert spec_of(("embed", "norm"), (7, 8)) == P(None, None)


def test_name_without_a_rule_is_an_error(mesh):
    with pytest.raises(sharding.ShardingError, match="no rule for the logical axis 'embd'"):
        sharding.spec(ParamInfo(("embd", "mlp"), AdamW()), (8, 8), mesh)


def test_rule_without_a_mesh_axis_is_an_error():
    with pytest.raises(sharding.ShardingError, match="'fsdp', but the mesh has only"):
        sharding.spec(ParamInfo(("embed",), AdamW()), (8,), AbstractMesh((8,), ("data",)))


def test_every_parameter_of_every_preset_has_rules_and_every_rule_a_parameter(mesh):
    trees = [state_lib.infos(preset(name)) for name in PRESETS]
    adapters = jax.eval_shape(lambda: lora.init(preset("demo"), LoRAConfig(), jax.random.key(0)))
    trees.append(metadata(adapters))
    for name in PRESETS:
        state_lib.abstract_params(preset(name), mesh)  # raises for a name without a rule
    assert sharding.unused_rules(*trees) == []


def test_released_model_is_sharded_evenly(mesh):
    """On 8 devices each holds an eighth of K2.5's weights, but for the norms and small tables."""
    abstract = state_lib.abstract_params(preset("kimi_k2_5"), mesh)
    total = sum(x.size for x in jax.tree.leaves(abstract))
    local = sum(np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64) for x in jax.tree.leaves(abstract))
    assert local < 1.001 * total / 8


def test_rows_and_the_bins_beside_them_are_on_the_same_device(mesh):
    batch = sharding.put_batch(make_batch(0), mesh)
    for x in jax.tree.leaves(batch):
        assert [s.index[0] for s in x.addressable_shards] == [slice(i, i + 1) for i in range(8)]
    np.testing.assert_array_equal(batch.tokens, make_batch(0).tokens)


def test_uneven_groups_are_refused(mesh):
    sharding.check_packs(16, mesh)
    with pytest.raises(sharding.ShardingError, match="multiple of 8"):
        sharding.check_packs(12, mesh)
    with pytest.raises(sharding.ShardingError, match="8 devices in 4 microbatches; make it a multiple of 32"):
        sharding.check_packs(16, mesh, microbatches=4)


def test_weights_do_not_depend_on_the_mesh():
    """To a unit in the last place: on jax 0.12 the compiled normal sampler rounds a few per cent of the elements
    otherwise where the shard has another length (1.9e-7 relative seen). Another draw would differ by its own size."""
    from kimi_jax.nn.kimi import init_params
    from kimi_jax.nn.param import unbox

    def make(num_devices):
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:num_devices])
        placements = jax.tree.map(lambda x: x.sharding, state_lib.abstract_params(MODEL, mesh))
        return jax.jit(lambda: unbox(init_params(MODEL, jax.random.key(3))), out_shardings=placements)()

    for a, b in zip(jax.tree.leaves(make(1)), jax.tree.leaves(make(8)), strict=True):
        np.testing.assert_allclose(a, b, rtol=5e-7, atol=0)
