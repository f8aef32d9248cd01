"""Routing replay in the training step: experts forced to what the routers choose anyway change no bit.

The choice is computed layer by layer by another program (`tests.nn.routing`). That a program gives the same bits with
the forced choice and with a free one is compared within one compiled program, whose column is -1 in one of the runs; a
program without the column may round otherwise: losses to 1e-6, gradients to 1e-5 of the largest of their array.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from kimi_jax import sharding
from kimi_jax.config import MemoryConfig, MeshConfig
from kimi_jax.nn.kimi import init_params
from kimi_jax.nn.param import unbox
from kimi_jax.train import state as state_lib
from kimi_jax.train.step import gradients, make_layout
from tests.nn.routing import router_choices
from tests.nn.tiny import QUICK, assert_trees_close
from tests.train.tiny import CONFIG, MODEL, make_text_batch

ROWS = 16
TEXT = dataclasses.replace(MODEL, vision=None, initializer_range=0.1)
# scan, microbatches, dtype, mesh: of all 8 devices, rows over fsdp and expert, experts over expert
CASES = {
    "scan": (True, 1, "float32", None),
    "unrolled, bfloat16, 2 microbatches": (False, 2, "bfloat16", None),
    "scan, expert parallel, 2 microbatches": (True, 2, "float32", MeshConfig(fsdp=2, expert=4)),
    "unrolled, expert and context parallel, bfloat16": (False, 1, "bfloat16", MeshConfig(fsdp=2, expert=2, context=2)),
}


def batch():
    return make_text_batch(0, ROWS)


@functools.cache
def params():
    return jax.jit(lambda: unbox(init_params(TEXT, jax.random.key(0))), compiler_options=QUICK)()


@functools.cache
def chosen(dtype):
    """bfloat16 rounds a router's input by 2^-9, its logits of 1 by as much: tokens nearer to a tie are left free."""
    margin = {"float32": 1e-5, "bfloat16": 1e-2}[dtype]
    found = router_choices(dataclasses.replace(TEXT, dtype=dtype), params(), batch(), margin)
    assert found.shape == (ROWS, 2, 32, 2) and (found >= 0).mean() > 0.8
    assert (found[:, 0] != found[:, 1]).mean() > 0.3  # layers differ, so a mistaken order of them would be seen
    return found


@functools.cache
def program(case):
    """(batch -> ((loss, what is beside it), gradients) of the training step's own function)."""
    scan, parts, dtype, mesh_config = CASES[case]
    model = dataclasses.replace(TEXT, scan_layers=scan, dtype=dtype)
    data = dataclasses.replace(CONFIG.data, num_packs=ROWS)
    config = dataclasses.replace(CONFIG, model=model, data=data, memory=MemoryConfig(microbatches=parts))
    config = dataclasses.replace(config, optimizer=dataclasses.replace(CONFIG.optimizer, balance_loss_weight=0.1))
    mesh = sharding.make_mesh(mesh_config or MeshConfig(), jax.devices()[: None if mesh_config else 1])
    layout = make_layout(config, mesh)
    placements = jax.tree.map(lambda x: x.sharding, state_lib.abstract_params(model, mesh))
    put = jax.device_put(params(), placements)
    run = jax.jit(lambda p, b: gradients(p, b, config, layout), compiler_options=QUICK)
    return lambda b: jax.device_get(run(put, sharding.put_batch(b, mesh)))


def with_experts(experts):
    return dataclasses.replace(batch(), routed_experts=np.ascontiguousarray(experts))


@pytest.mark.parametrize("case", CASES)
def test_replay_of_the_routers_own_choice_changes_no_bit(case):
    """Loss, balance loss, gradients, load of every expert; and another choice changes them (the control)."""
    experts = chosen(CASES[case][2])
    free = program(case)(with_experts(np.full_like(experts, -1)))
    forced = program(case)(with_experts(experts))
    for a, b in zip(jax.tree.leaves(free), jax.tree.leaves(forced), strict=True):
        np.testing.assert_array_equal(a, b)
    other = program(case)(with_experts(np.where(experts < 0, -1, (experts + 1) % 4)))
    (loss, _), _ = free
    (other_loss, out), grads = other
    assert abs(other_loss - loss) > 1e-4 and out["aux"].dropped == 0
    assert np.abs(grads["moe_layers"]["mlp"]["router"]["kernel"]).max() > 0


def test_replay_is_the_same_without_the_column_and_over_a_mesh_in_microbatches():
    """Of forced experts that are the routers' own without the column, of any others over eight devices."""
    own = chosen("float32")
    other = np.where(own < 0, -1, (own + 1) % 4)
    mesh = program("scan, expert parallel, 2 microbatches")
    pairs = ((batch(), program("scan")(with_experts(own))), (with_experts(other), mesh(with_experts(other))))
    for given, ((want, want_out), want_grads) in pairs:
        (loss, out), grads = program("scan")(given)
        np.testing.assert_allclose(loss, want, rtol=1e-6)
        np.testing.assert_array_equal(out["aux"].expert_load, want_out["aux"].expert_load)
        assert_trees_close(grads, want_grads, 1e-5)


def test_replay_counts_the_load_of_the_forced_experts():
    """All tokens of both layers to experts 1 and 3: the load that moves the router's bias is theirs, padding apart."""
    experts = np.broadcast_to(np.array([3, 1], np.int32), (ROWS, 2, 32, 2))
    (_, out), _ = program("scan")(with_experts(experts))
    tokens = (batch().segment_ids > 0).sum()
    np.testing.assert_array_equal(out["aux"].expert_load, [[0, tokens, 0, tokens]] * 2)
    assert out["aux"].dropped == 0


@pytest.mark.parametrize(
    "experts",
    [
        np.zeros((2, ROWS, 32, 2), np.int32),
        np.zeros((ROWS, 2, 32, 3), np.int32),
        np.zeros((ROWS, 2, 32, 2), np.float32),
    ],
    ids=["layers first", "too many", "float32"],
)
def test_replay_refuses_an_array_of_another_shape_when_the_step_is_traced(experts):
    config = dataclasses.replace(CONFIG, model=TEXT, data=dataclasses.replace(CONFIG.data, num_packs=ROWS))
    array = jax.ShapeDtypeStruct(experts.shape, experts.dtype)
    with pytest.raises(ValueError, match=r"routed_experts of a batch must be int32 \(16, 2, 32, 2\)"):
        jax.eval_shape(
            lambda p, b: gradients(p, b, config), params(), dataclasses.replace(batch(), routed_experts=array)
        )
