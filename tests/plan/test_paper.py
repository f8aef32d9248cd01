"""The plan on paper: each term by hand for a model that can be counted in the head; what must change with a layout."""

import dataclasses

import pytest

from kimi_jax.config import MeshConfig, MoEConfig
from kimi_jax.nn.kimi import count_params
from kimi_jax.plan import paper
from kimi_jax.plan.chips import parse_topology
from kimi_jax.train import flops
from tests.train.tiny import CONFIG

POD = parse_topology("v5p:4x4x4")
ROWS = 2
MOE = MoEConfig(n_routed_experts=64, num_experts_per_tok=2, moe_intermediate_size=16)
BASE = dataclasses.replace(
    CONFIG,
    model=dataclasses.replace(CONFIG.model, hidden_size=64, vision=None, remat=True, moe=MOE),
    data=dataclasses.replace(CONFIG.data, vision_bins=()),
)
TOKENS = ROWS * BASE.data.sequence_length
EXPERTS = 2 * 64 * 3 * 64 * 16  # layers with experts, experts, matrices, width, inner width


def estimate(config=BASE, **mesh):
    return paper.estimate(dataclasses.replace(config, mesh=MeshConfig(**mesh)), POD, ROWS)


def test_compute_is_model_flops_and_a_third_for_recomputation():
    found = estimate()
    pairs = ROWS * 32 * 33 / 2
    counts = {"tokens": TOKENS, "token_pairs": pairs, "patches": 0, "patch_pairs": 0, "features": 0}
    assert found["tokens"] == TOKENS
    assert found["model_flops"] == flops.train_flops(BASE.model, counts)
    assert found["seconds"]["compute"] == pytest.approx(found["model_flops"] / 459e12 * 4 / 3)


def test_weights_travel_twice_in_bfloat16_and_their_gradients_once_in_float32():
    """fsdp alone: every weight is gathered over all 64 devices, and no token is sent."""
    found = estimate()
    total = count_params(BASE.model)["total"]
    assert found["parameters"] == total
    assert found["wire_bytes"]["gather"] == pytest.approx(2 * 2 * total * 63 / 64)
    assert found["wire_bytes"]["reduce"] == pytest.approx(4 * total * 63 / 64)
    assert found["wire_bytes"]["tokens"] == found["wire_bytes"]["tensor"] == found["wire_bytes"]["replicas"] == 0


def test_reduce_dtype_halves_the_bytes_of_sums_over_devices():
    config = dataclasses.replace(BASE, memory=dataclasses.replace(BASE.memory, reduce_dtype="bfloat16"))
    axes = {"replica": 2, "tensor": 2}
    wide, narrow = (estimate(each, **axes)["wire_bytes"] for each in (BASE, config))
    for kind in ("reduce", "tensor", "replicas"):
        assert narrow[kind] == wide[kind] / 2 > 0
    for kind in ("gather", "tokens", "muon"):
        assert narrow[kind] == wide[kind]


def test_expert_parallelism_trades_weights_for_tokens():
    """Experts over 16 devices: a sixteenth of them is gathered, over 4 devices; tokens are sent 6 times a layer."""
    found = estimate(expert=16)
    rest = count_params(BASE.model)["total"] - EXPERTS
    assert found["wire_bytes"]["gather"] == pytest.approx(2 * 2 * (rest * 63 / 64 + EXPERTS / 16 * 3 / 4))
    assert found["wire_bytes"]["tokens"] == pytest.approx(6 * 2 * TOKENS * 2 * 64 * 2 * 15 / 16)


def test_microbatches_gather_again_and_keep_less():
    config = dataclasses.replace(BASE, memory=dataclasses.replace(BASE.memory, microbatches=2))
    one, two = estimate(expert=16), estimate(config, expert=16)
    assert two["wire_bytes"]["gather"] == 2 * one["wire_bytes"]["gather"]
    assert two["wire_bytes"]["tokens"] == one["wire_bytes"]["tokens"]
    assert two["least_bytes"] < one["least_bytes"]


def test_state_is_weights_and_moments():
    """On one device: 8 bytes for each value of a matrix that Muon moves, 12 for the others, 4 for a router's bias."""
    one = parse_topology("v5p:1x1x1")
    found = paper.estimate(dataclasses.replace(BASE, mesh=MeshConfig()), one, ROWS)
    total = count_params(BASE.model)["total"]
    assert 8 * total < found["state_bytes"] < 12 * total
    assert not any(found["wire_bytes"].values()) and found["seconds"]["ici"] == 0


def test_step_takes_the_longest_part_to_the_sum_of_all():
    found = estimate(expert=16)
    seconds = found["seconds"]
    slow, fast = found["tokens_per_second_per_chip"]
    assert fast == pytest.approx(TOKENS / max(seconds.values()))
    assert slow == pytest.approx(TOKENS / (seconds["compute"] + seconds["ici"] + seconds["dcn"]))
    assert found["chip_hours_per_trillion_tokens"][0] == pytest.approx(1e12 / slow / 3600)
    assert f"{slow:,.0f} (nothing overlapped)" in paper.table(found)
