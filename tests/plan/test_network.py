"""Groups in every way that XLA writes them, bytes on the wire, and time on a torus: against closed forms."""

import math

import numpy as np
import pytest

from kimi_jax.config import ConfigError
from kimi_jax.plan import network as net
from kimi_jax.plan.chips import parse_topology
from kimi_jax.plan.hlo import HloError

LINK = 100e9  # v5p, one way


def pod(name, **axes):
    """The network of a pod whose devices are numbered along the torus, last side fastest."""
    topology = parse_topology(name)
    places = np.stack(np.unravel_index(np.arange(math.prod(topology.shape)), topology.shape), axis=-1)
    slices = np.repeat(np.arange(topology.slices), len(places))
    return net.Network(topology, axes, np.tile(places, (topology.slices, 1)), slices)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ("replica_groups={{0,2},{1,3}}, dimensions={0}", [[0, 2], [1, 3]]),
        ("replica_groups={}, to_apply=%add", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4], dimensions={0}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x", [[0, 2], [1, 3]]),
        ("channel_id=1, source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_groups_in_every_notation(attributes, expected):
    np.testing.assert_array_equal(net.groups(attributes, 4), expected)


def test_groups_in_an_unknown_notation_are_an_error():
    with pytest.raises(HloError, match="unknown way"):
        net.groups("replica_groups=surprise", 4)


def test_bytes_on_the_wire_are_ring_volumes():
    assert net.wire_bytes("all-gather", 100, 8) == 700
    assert net.wire_bytes("reduce-scatter", 800, 8) == 700
    assert net.wire_bytes("all-reduce", 800, 8) == 1400  # a reduce-scatter, then an all-gather of an eighth
    assert net.wire_bytes("all-to-all", 800, 8) == 700
    assert net.wire_bytes("all-reduce", 800, 1) == 0
    assert net.wire_bytes("collective-permute", 800, 2) == 800


def test_axes_and_time_on_a_torus():
    """4 x 4 x 4: sides are rings. A group along one side has two links, one over the whole torus six."""
    network = pod("v5p:4x4x4", expert=4, fsdp=16)
    everybody, one_side = np.arange(64), np.arange(4)
    assert network.axis(everybody) == "expert+fsdp"
    assert network.axis(np.arange(16)) == "fsdp" and network.axis(np.arange(0, 64, 16)) == "expert"
    assert network.seconds("all-gather", 1000, one_side) == pytest.approx(3 * 1000 / (2 * LINK))
    assert network.seconds("all-gather", 1000, everybody) == pytest.approx(63 * 1000 / (6 * LINK))
    assert network.seconds("all-to-all", 1000, everybody) == pytest.approx(1000 * 4 / (8 * LINK))
    assert network.seconds("all-gather", 1000, np.array([5])) == 0


def test_side_that_is_no_ring_has_half_the_wires():
    network = pod("v5p:2x2x1", fsdp=4)
    assert network.seconds("all-gather", 1000, np.arange(2)) == pytest.approx(1000 / LINK)
    assert network.seconds("all-to-all", 1000, np.arange(4)) == pytest.approx(1000 * 2 / (4 * LINK))


def test_between_slices_bytes_take_the_data_centre_network():
    """Two slices of 64, an all-reduce over all: each byte of a chip's part of the sum crosses once each way."""
    network = pod("2xv5p:4x4x4", replica=2, fsdp=64)
    everybody, pair = np.arange(128), np.array([0, 64])
    assert network.crosses(pair) and not network.crosses(np.arange(64))
    assert network.axis(pair) == "replica"
    assert network.seconds("all-reduce", 640, pair) == pytest.approx(640 / 6.25e9)
    inside = 2 * 640 * 63 / 64 / (6 * LINK)
    assert network.seconds("all-reduce", 640, everybody) == pytest.approx(10 / 6.25e9 + inside)


def test_names_of_pods():
    two = parse_topology("2xv5p:8x8x8")
    assert (two.slices, two.chips, two.devices, two.name) == (2, 1024, 1024, "2xv5p:8x8x8")
    assert parse_topology("tpu7x:4x4x4").devices == 128  # two devices a chip
    for wrong, message in (("v5p", "write CHIP:AxBxC"), ("v5q:2x2x1", "did you mean 'v5p'"), ("v6e:4x4x4", "2 sides")):
        with pytest.raises(ConfigError, match=message):
            parse_topology(wrong)
