"""The predictor against closed forms, on small programs that the TPU compiler makes. Needs the extra [tpu]."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from kimi_jax import sharding
from kimi_jax.config import MeshConfig
from kimi_jax.plan import chips, cost, hlo, program
from kimi_jax.plan.network import Network

pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'kimi_jax[tpu]'")

TOPOLOGY = chips.parse_topology("v5p:2x2x1")
N, LAYERS = 2048, 6


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(MeshConfig(fsdp=4), program.devices_of(TOPOLOGY))


def priced(fn, mesh, *args):
    """The cost of `fn` on shapes [(shape, dtype, spec)], cut as the specs say."""
    shapes = [jax.ShapeDtypeStruct(s, d, sharding=NamedSharding(mesh, PartitionSpec(*p))) for s, d, p in args]
    text = jax.jit(fn).lower(*shapes).compile().as_text()
    return cost.price(hlo.parse(text), TOPOLOGY.chip, Network.of(TOPOLOGY, mesh))


def test_matmuls_take_a_little_longer_than_their_flops(mesh):
    """A stack of layers of 4 N^3 multiplications: the compiler's estimate is between 70 and 100 % of the peak rate,
    and the loop is counted as often as it runs."""

    def layers(x, w):
        return lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    found = priced(layers, mesh, ((4 * N, N), jnp.bfloat16, ()), ((LAYERS, N, N), jnp.bfloat16, ()))
    at_peak = LAYERS * 2 * 4 * N**3 / TOPOLOGY.chip.flops
    assert at_peak <= found.compute <= at_peak / 0.7
    assert not found.collectives and not found.dynamic_loops


def test_reading_and_writing_take_their_bytes(mesh):
    """Twice a gigabyte: at most 45 % more than at the memory's full rate."""
    found = priced(lambda x: x * 2 + 1, mesh, ((16384, 16384), jnp.float32, ()))
    at_peak = 2 * 4 * 16384**2 / TOPOLOGY.chip.hbm_rate
    assert at_peak <= found.compute <= at_peak * 1.45


def test_gathered_weights_put_their_bytes_on_the_wire(mesh):
    """Weights cut four ways, used whole in each of the layers: three quarters of each travel to every device."""

    def layers(x, w):
        whole = NamedSharding(mesh, PartitionSpec())

        def layer(x, w):
            return x @ lax.with_sharding_constraint(w, whole), None

        return lax.scan(layer, x, w)[0]

    found = priced(layers, mesh, ((4 * N, N), jnp.bfloat16, ("fsdp",)), ((LAYERS, N, N), jnp.bfloat16, (None, "fsdp")))
    assert {(c.kind, c.axis) for c in found.collectives} == {("all-gather", "fsdp")}
    assert found.wire == LAYERS * N * N * 2 * 3 / 4


def test_summed_gradients_put_theirs_there_once(mesh):
    """Rows cut four ways, one weight's gradient wanted in quarters: a reduce-scatter of float32, or an all-reduce."""
    found = priced(
        lambda x, y: lax.with_sharding_constraint(
            jnp.matmul(x.T, y, preferred_element_type=jnp.float32), NamedSharding(mesh, PartitionSpec("fsdp"))
        ),
        mesh,
        ((4 * N, N), jnp.bfloat16, ("fsdp",)),
        ((4 * N, N), jnp.bfloat16, ("fsdp",)),
    )
    assert {c.axis for c in found.collectives} == {"fsdp"}
    assert found.wire == pytest.approx(N * N * 4 * 3 / 4)


def test_a_program_that_is_too_large_says_by_how_much(mesh):
    """200 GB of temporaries on a chip of 95.74 GiB."""
    whole = NamedSharding(mesh, PartitionSpec())
    shape = jax.ShapeDtypeStruct((160_000, 160_000), jnp.float32, sharding=whole)
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        jax.jit(lambda x: jnp.sin(x) @ x, out_shardings=whole).lower(shape).compile()
    failed = program.memory_error(error.value, 1.0)
    assert failed is not None and failed.available == pytest.approx(95.74 * 2**30, rel=1e-3)
    assert failed.needed > 160_000**2 * 4
