"""The price of a program against closed forms: loops, branches, kernels, collectives that hide in fusions."""

import numpy as np
import pytest

from kimi_jax.plan import cost, hlo, report
from kimi_jax.plan.chips import CHIPS
from tests.plan.test_network import LINK, pod

V5P = CHIPS["v5p"]
# a layer loop of 61 with a gather, a fused reduce-scatter, a matmul and a kernel; a round loop of unknown length; a
# conditional; the shapes are chosen so that every number below can be done in the head
PROGRAM = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%scattered (in: bf16[64,1024]) -> bf16[1,1024] {
  %in = bf16[64,1024] parameter(0)
  %sum = bf16[64,1024] all-reduce(%in), replica_groups=[1,64]<=[64], to_apply=%add
  %zero = s32[] constant(0)
  ROOT %part = bf16[1,1024] dynamic-slice(%sum, %zero, %zero), dynamic_slice_sizes={1,1024}
}

%product (p: bf16[64,1024]) -> bf16[64,1024] {
  %p = bf16[64,1024] parameter(0)
  ROOT %c = bf16[64,1024] convolution(%p, %p), dim_labels=bf_io->bf
}

%layer (c: (s32[], bf16[1,1024])) -> (s32[], bf16[1,1024]) {
  %c = (s32[], bf16[1,1024]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %w = bf16[1,1024] get-tuple-element(%c), index=1
  %g = (bf16[1,1024], bf16[64,1024]) all-gather-start(%w),
    replica_groups=mesh['a'=64] {'a'}, dimensions={0}, metadata={op_name="jit(step)/jvp(K)/while/mlp/dot"}
  %gd = bf16[64,1024] all-gather-done(%g)
  %m = bf16[64,1024] fusion(%gd), kind=kOutput, calls=%product,
    backend_config={"window_config":{"estimated_cycles":"1750000"}}
  %weights = bf16[4,1024,512] custom-call(), custom_call_target="AllocateBuffer"
  %gmm.1 = bf16[64,512] custom-call(%m, %weights), custom_call_target="tpu_custom_call"
  %r = bf16[1,1024] fusion(%m), kind=kCustom, calls=%scattered
  %copied = bf16[1,1024] copy(%r)
  ROOT %n = (s32[], bf16[1,1024]) tuple(%i, %copied)
}

%below (c2: (s32[], bf16[1,1024])) -> pred[] {
  %c2 = (s32[], bf16[1,1024]) parameter(0)
  %i2 = s32[] get-tuple-element(%c2), index=0
  %layers = s32[] constant(61)
  ROOT %lt = pred[] compare(%i2, %layers), direction=LT
}

%round (c3: (s32[], s32[])) -> (s32[], s32[]) {
  %c3 = (s32[], s32[]) parameter(0)
  %k = s32[] get-tuple-element(%c3), index=0
  %rows = bf16[128,1024] custom-call(), custom_call_target="AllocateBuffer"
  %offsets = s32[4] custom-call(), custom_call_target="AllocateBuffer"
  %sent = bf16[128,1024] ragged-all-to-all(%rows, %rows, %offsets, %offsets, %offsets, %offsets),
    replica_groups={{0,1,2,3}}
  ROOT %e = (s32[], s32[]) tuple(%k, %k)
}

%more (c4: (s32[], s32[])) -> pred[] {
  %c4 = (s32[], s32[]) parameter(0)
  %k4 = s32[] get-tuple-element(%c4), index=0
  %n4 = s32[] get-tuple-element(%c4), index=1
  ROOT %lt4 = pred[] compare(%k4, %n4), direction=LT
}

%cheap (q: f32[8]) -> f32[8] {
  ROOT %q = f32[8] parameter(0)
}

%dear (q2: f32[8]) -> f32[8] {
  %q2 = f32[8] parameter(0)
  ROOT %exact = f32[8] fusion(%q2), kind=kLoop, calls=%cheap, backend_config={"estimated_cycles":"17500"}
}

ENTRY %main (x: bf16[1,1024], rounds: s32[], flag: pred[]) -> f32[8] {
  %x = bf16[1,1024] parameter(0)
  %rounds = s32[] parameter(1)
  %flag = pred[] parameter(2)
  %zero = s32[] constant(0)
  %t = (s32[], bf16[1,1024]) tuple(%zero, %x)
  %stack = (s32[], bf16[1,1024]) while(%t), condition=%below, body=%layer
  %t2 = (s32[], s32[]) tuple(%zero, %rounds)
  %exchange = (s32[], s32[]) while(%t2), condition=%more, body=%round, metadata={op_name="jit(step)/jvp(K)/moe/while"}
  %f = f32[8] custom-call(), custom_call_target="AllocateBuffer"
  ROOT %clip = f32[8] conditional(%flag, %f, %f), branch_computations={%cheap, %dear}
}
"""


@pytest.fixture(scope="module")
def network():
    return pod("v5p:4x4x4", fsdp=64)


def total(items, **wanted):
    return [x for x in items if all(getattr(x, k) == v for k, v in wanted.items())]


def test_every_instruction_counts_as_often_as_it_runs(network):
    found = cost.price(hlo.parse(PROGRAM), V5P, network)
    fusion = total(found.work, name="m")[0]
    assert fusion.times == 61 and fusion.seconds == pytest.approx(61 * 1e-3)  # 1.75 M cycles at 1.75 GHz
    copied = total(found.work, what="mover")
    assert [w.name for w in copied] == ["copied"]
    assert copied[0].seconds == pytest.approx(61 * 2 * 2048 / 2765e9)


def test_kernels_cost_their_flops_or_their_bytes(network):
    """64 rows of 1,024 times 4 experts' weights [1,024, 512]: so few rows that reading them takes longer."""
    kernel = total(cost.price(hlo.parse(PROGRAM), V5P, network).work, what="kernel")[0]
    moved = 2 * (64 * 512 + 64 * 1024 + 4 * 1024 * 512)
    assert kernel.seconds == pytest.approx(61 * moved / 2765e9)
    many = PROGRAM.replace("bf16[64,1024] fusion(%gd)", "bf16[65536,1024] fusion(%gd)")
    kernel = total(cost.price(hlo.parse(many), V5P, network).work, what="kernel")[0]
    assert kernel.seconds == pytest.approx(61 * 2 * 65536 * 1024 * 512 / 459e12)


def test_kernels_of_which_nothing_is_known_are_named(network):
    found = cost.price(hlo.parse(PROGRAM.replace("%gmm.1", "%mystery.1")), V5P, network)
    assert found.unpriced == ["mystery.1"]
    stated = PROGRAM.replace("%gmm.1", "%mystery.1").replace(
        'custom_call_target="tpu_custom_call"',
        'custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{"flops":"459000000000"}}',
    )
    found = cost.price(hlo.parse(stated), V5P, network)
    assert not found.unpriced and total(found.work, what="kernel")[0].seconds == pytest.approx(61 * 1e-3)


def test_collectives_are_found_in_loops_and_in_fusions(network):
    """An all-reduce of which each device keeps a slice is a reduce-scatter: half the bytes."""
    found = cost.price(hlo.parse(PROGRAM), V5P, network)
    gather, scatter = total(found.collectives, kind="all-gather")[0], total(found.collectives, kind="reduce-scatter")[0]
    assert not total(found.collectives, kind="all-reduce")
    assert (gather.axis, gather.members, gather.times) == ("fsdp", 64, 61)
    assert gather.wire == 61 * 63 * 2048 and scatter.wire == 61 * 63 * 2048
    assert gather.seconds == pytest.approx(61 * 63 * 2048 / (6 * LINK))
    assert report.collectives_per_loop(found)["61"] == {"all-gather fsdp": 1, "reduce-scatter fsdp": 1}


def test_loops_of_unknown_length_run_as_many_rounds_as_asked(network):
    one, two = (cost.price(hlo.parse(PROGRAM), V5P, network, rounds) for rounds in (1, 2))
    assert one.dynamic_loops == ["forward moe"]
    sent = [total(c.collectives, kind="ragged-all-to-all")[0].wire for c in (one, two)]
    assert sent == [128 * 2048 * 3 / 4, 2 * 128 * 2048 * 3 / 4]
    assert two.compute == one.compute


def test_conditionals_count_at_their_dearest_branch(network):
    found = cost.price(hlo.parse(PROGRAM), V5P, network)
    assert total(found.work, name="exact")[0].seconds == pytest.approx(1e-5)
    assert found.conditionals[0]["dearest"] == pytest.approx(1e-5) and found.conditionals[0]["cheapest"] == 0


def test_places_are_named_by_pass_and_module():
    assert cost.label("jit(step)/jvp(KimiK25.token_nll)/while/body/closed_call/moe_layers/mlp/dot_general") == (
        "forward moe_layers/mlp/dot_general")  # fmt: skip
    assert cost.label("jit(step)/transpose(jvp(K))/while/body/rematted_computation/moe/mul") == "recompute moe/mul"
    assert cost.label("jit(step)/transpose(jvp(K))/while/body/moe/mul") == "backward moe/mul"
    assert cost.label("jit(step)/muon/dot_general") == "update muon/dot_general"


@pytest.mark.parametrize(
    ("name", "shapes", "flops"),
    [
        ("gmm.3", [(4,), (512, 64), (8, 64, 32)], 2 * 512 * 64 * 32),
        ("gmm.4", [(512, 64), (8, 32, 64)], 2 * 512 * 64 * 32),  # the weights transposed
        ("tgmm.1", [(64, 512), (512, 32)], 2 * 512 * 64 * 32),
        ("splash_mha_fwd", [(16, 1024, 192), (16, 1024, 192), (16, 1024, 128)], 16 * 1024 * 1024 * (192 + 128)),
        ("splash_mha_dkv", [(16, 1024, 192), (16, 1024, 192), (16, 1024, 128)], 16 * 1024 * 1024 * (384 + 256)),
        ("topk", [(512, 64)], None),
    ],
)
def test_flops_of_kernels_from_their_shapes(name, shapes, flops):
    assert cost.matmul_flops(name, shapes) == flops


def test_prediction_is_between_full_overlap_and_none(network):
    from tests.train.tiny import CONFIG

    found = cost.price(hlo.parse(PROGRAM), V5P, network)
    timed = report.timing(CONFIG, network.topology, found)
    low, high = timed["step_seconds"]
    assert low == max(found.compute, found.communication) and high == found.compute + found.communication
    slow, fast = timed["tokens_per_second_per_chip"]
    tokens = 8 * 32 / 64  # eight rows of 32 on 64 chips of one device each
    assert slow == pytest.approx(tokens / high) and fast == pytest.approx(tokens / low)
    assert timed["mfu"][1] == pytest.approx(timed["model_flops"] / 459e12 / low)
    np.testing.assert_allclose(sum(row["wire_bytes"] for row in timed["traffic"]), found.wire)


def test_table_says_what_is_predicted_and_what_fits(network):
    """Every figure of the plan that people decide by, for a plan that fits and for one that does not."""
    from tests.train.tiny import CONFIG

    plan = {
        "config": "tiny", "topology": "v5p:4x4x4", "chips": 64, "mesh": {"fsdp": 64, "tensor": 1}, "rows": 0.5,
        "sequence_length": 32, "microbatches": 1, "usual_rounds": 2, "jax": "0", "libtpu": "0", "params": 10**9,
        "params_bytes": 2**30, "state_bytes": 3 * 2**30,
        "memory": {"arguments": 3 * 2**30, "temporaries": 2**30, "peak": 4 * 2**30, "available": 95 * 2**30,
                   "fits": True, "spare": 91 * 2**30, "compile_seconds": 12.0},
        "rounds": {"2": report.timing(CONFIG, network.topology, cost.price(hlo.parse(PROGRAM), V5P, network, 2))},
    }  # fmt: skip
    text = report.table(plan)
    for part in ("64 chips, mesh fsdp 64", "4.0 of 95.0 GiB", "fits, 91.0 GiB to spare", "1,000,000,000 in all",
                 "PREDICTED", "2 round(s) of   forward moe", "ragged-all-to-all", "cheapest"):  # fmt: skip
        assert part in text
    small = {"peak": 4 * 2**30, "available": 3 * 2**30, "fits": False, "spare": -(2**30), "compile_seconds": 1.0}
    refused = report.table({k: v for k, v in plan.items() if k != "rounds"} | {"memory": small})
    assert "DOES NOT FIT: 1.0 GiB too much" in refused and "PREDICTED" not in refused
