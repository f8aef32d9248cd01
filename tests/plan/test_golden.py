"""Collectives of a layer and of the optimizer in the compiled training step: a lost sharding rule is a failing test.

The real step (loss, gradients, MuonClip, QK-clip, router bias) of a text model in miniature, compiled for 4 virtual
devices and counted by `plan.cost`. What runs three times is in one of the three layers, forward, recomputed or
backward; what runs once is around them and in the optimizer. When a change of the model or the optimizer is meant to
change the counts, write the new ones here.
"""

import dataclasses

import jax
import pytest

from kimi_jax import config as c
from kimi_jax import sharding
from kimi_jax.plan import cost, hlo, program, report
from kimi_jax.plan.chips import CHIPS
from tests.nn.tiny import QUICK
from tests.plan.test_network import pod
from tests.train.tiny import CONFIG

LAYERS = 3


def counts() -> dict[str, dict[str, int]]:
    moe = dataclasses.replace(CONFIG.model.moe, first_k_dense_replace=0)
    model = dataclasses.replace(CONFIG.model, vision=None, num_hidden_layers=LAYERS, moe=moe, remat=True)
    optimizer = dataclasses.replace(CONFIG.optimizer, newton_schulz_steps=1)
    data = dataclasses.replace(CONFIG.data, vision_bins=())
    config = dataclasses.replace(CONFIG, model=model, optimizer=optimizer, data=data)
    mesh = sharding.make_mesh(c.MeshConfig(fsdp=2, expert=2), jax.devices()[:4])
    text = program.lower(config, mesh).compile(compiler_options=QUICK).as_text()
    priced = cost.price(hlo.parse(text), CHIPS["v5p"], pod("v5p:2x2x1", **mesh.shape))
    return report.collectives_per_loop(priced)


# the same on jax 0.10.2 and 0.12. Matrices are sharded along both sides: each is gathered, its gradient scattered, in
# two steps; what is summed over both axes is a norm's gradient or a statistic. Gathers over `expert` are also what
# stands in for ragged_all_to_all on a CPU
GOLDEN = {
    "1": {
        "all-gather expert": 2,
        "all-gather fsdp": 2,
        "all-reduce expert": 4,
        "all-reduce fsdp": 4,
        "all-reduce fsdp+expert": 3,
        "all-to-all expert": 10,
        "all-to-all fsdp": 18,
        "reduce-scatter expert": 2,
        "reduce-scatter fsdp": 1,
    },
    "3": {
        "all-gather expert": 29,
        "all-gather fsdp": 24,
        "all-gather fsdp+expert": 4,
        "all-reduce expert": 1,
        "all-reduce fsdp": 1,
        "all-reduce fsdp+expert": 6,
        "reduce-scatter expert": 8,
        "reduce-scatter fsdp": 11,
    },
}


@pytest.mark.slow
def test_collectives_are_as_many_as_ever():
    assert counts() == GOLDEN


@pytest.mark.slow
def test_lost_rule_changes_the_counts(monkeypatch):
    monkeypatch.setitem(sharding.RULES, "embed", ())
    assert counts()[str(LAYERS)] != GOLDEN[str(LAYERS)]
