"""Options of the TPU compiler: by chip, overridable, and such that the compiler knows them."""

import dataclasses

import jax
import pytest

from kimi_jax import sharding
from kimi_jax.config import MeshConfig
from kimi_jax.train.xla_flags import PRESETS, SLICES, VMEM, options


@dataclasses.dataclass(frozen=True)
class Device:
    device_kind: str
    slice_index: int = 0
    platform: str = "tpu"


def test_options_are_those_of_the_chip_and_of_several_slices():
    v5p, v6e = Device("TPU v5"), Device("TPU v6 lite")
    assert options([v5p, v5p], env={}) == {}
    assert options([v6e, v6e], env={}) == PRESETS["TPU v6 lite"] != {}
    assert options([v5p, Device("TPU v5", 1)], env={}) == SLICES
    assert options(jax.devices(), env={}) == {}  # these are CPUs


def test_what_the_user_sets_is_stronger():
    v6e = [Device("TPU v6 lite"), Device("TPU v6 lite", 1)]
    assert options(v6e, env={"LIBTPU_INIT_ARGS": f"--xla_a=1 --{VMEM}=1024"}) == SLICES
    assert options(v6e, preset=False, env={}) == {}


@pytest.mark.tpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_compiler_knows_the_options(topology):
    pytest.importorskip("libtpu", reason="needs the extra [tpu]: make test-tpu")
    from kimi_jax.plan import chips, program

    devices = program.devices_of(chips.parse_topology(topology))
    mesh = sharding.make_mesh(MeshConfig(), devices)
    x = jax.ShapeDtypeStruct((8, 128), "float32", sharding=sharding.replicated(mesh))
    assert jax.jit(lambda x: x @ x.T).lower(x).compile(compiler_options=options(devices, env={}) | SLICES)
