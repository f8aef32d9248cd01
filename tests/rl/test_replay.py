"""Routing replay from end to end: experts that the engine recorded reach the training step, beside the right tokens.

How far sampler and trainer differ is KL(sampler || trainer) of the drawn tokens, the metric `mismatch_kl`, as
docs/rl.md section 3 shows it: `python -m pytest tests/rl/test_replay.py -k mismatch -s` prints its table.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from kimi_jax.config import ConfigError, DataConfig, MoEConfig, TrainConfig
from kimi_jax.data import packing
from kimi_jax.data.routing import FREE, RoutingShape
from kimi_jax.infer.engine import Engine
from kimi_jax.infer.request import Request, Sampling
from kimi_jax.model import Model
from kimi_jax.rl.objective import PolicyConfig, policy
from kimi_jax.rl.types import Group, Segment, Trajectory, TrajectoryError, pack, samples
from kimi_jax.train.step import loss_fn
from tests.nn import tiny

NO_PAD = 64  # outside the vocabulary: what the engine draws is never an image
CONFIG = tiny.replace(
    vision=None, num_hidden_layers=4, media_placeholder_token_id=NO_PAD,
    moe=MoEConfig(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, routed_scaling_factor=1.5),
)  # fmt: skip
L, K, PROMPT = 3, 2, 6
DATA = DataConfig(sequence_length=64, num_packs=2, rows_per_pack=8, vision_bins=())
SHAPE = packing.PackShape.of(DATA, CONFIG, routed_experts=True)


# -------------------------------------------------------------------------------------------------------------- packing


def recorded(tokens, parent=None, seed=0, last=False):
    """A segment whose experts are its own; last: its last token was never read."""
    n = len(tokens)
    rng = np.random.default_rng(seed)
    experts = rng.permuted(np.tile(np.arange(8, dtype=np.int32), (n, L, 1)), axis=-1)[..., :K]
    if last:
        experts[-1] = FREE
    drawn = Segment.given(tokens) if parent is None else Segment.drawn(tokens, [-1.0] * n, [0] * n, parent)
    return dataclasses.replace(drawn, experts=experts)


def test_packed_experts_lie_beside_their_tokens():
    """A prompt, a reply, a tool's result that nothing recorded, a reply; two such contexts in a row of a pack."""
    trajectories = []
    for seed in (1, 2):
        segments = [recorded([10, 11, 12], seed=seed), recorded([13, 14], 0, seed + 10, last=True),
                    Segment.given([15, 16], 1), recorded([17, 18, 19], 2, seed + 20, last=True)]  # fmt: skip
        trajectories.append(Trajectory(tuple(segments), 1.0, "stop"))
    shape = dataclasses.replace(SHAPE, rows=1, sequence_length=24)
    batch, left = pack(samples(Group("g", tuple(trajectories)), [1.0, -1.0], NO_PAD), shape, 2)
    found = batch.routed_experts
    assert not left and found.dtype == np.int32 and found.shape == (2, L, 24, K)
    for at, trajectory in zip((0, 10), trajectories, strict=True):
        parts = trajectory.segments
        tool = np.full((2, L, K), FREE)
        want = np.concatenate([parts[0].experts, parts[1].experts, tool, parts[3].experts])
        np.testing.assert_array_equal(found[0, :, at : at + 10], want.swapaxes(0, 1))
        assert (want[4] == FREE).all() and (want[:3] >= 0).all()
    assert (found[0, :, 20:] == FREE).all() and (found[1] == FREE).all()
    empty = packing.empty_batch(shape, 2, ("logp_sampler", "advantage"))
    assert jax.tree.map(np.shape, batch) == jax.tree.map(np.shape, empty)


def test_packing_without_replay_has_no_column_and_takes_segments_with_experts():
    group = Group("g", (Trajectory((recorded([10, 11]), recorded([12], 0)), 1.0, "stop"),))
    batch, left = pack(samples(group, [1.0], NO_PAD), dataclasses.replace(SHAPE, routing=None), 1)
    assert not left and batch.routed_experts is None


def test_segments_without_experts_are_packed_free():
    group = Group("g", (Trajectory((Segment.given([10, 11]), Segment.drawn([12], [-1.0], [0], 0)), 1.0, "stop"),))
    batch, _ = pack(samples(group, [1.0], NO_PAD), SHAPE, 1)
    assert (batch.routed_experts == FREE).all()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda e: e[:, :2],
            r"must be ints \(2, 3, 2\), for 3 MoE layers and 2 experts of a token, not int32 \(2, 2, 2\)",
        ),
        (lambda e: e[..., :1], r"must be ints \(2, 3, 2\)"),
        (lambda e: e.astype(np.float32), "not float32"),
        (lambda e: np.where(e == e.max(), 8, e), "the model has 0..7"),
        (lambda e: np.full_like(e, -2), "the model has 0..7"),
        (lambda e: np.full_like(e, 5), "2 different experts"),
        (lambda e: np.stack([e[..., 0], np.full_like(e[..., 0], FREE)], -1), "in place of all"),
    ],
    ids=["layers", "experts a token", "dtype", "id too large", "negative id", "one twice", "half free"],
)
def test_experts_that_the_model_cannot_have_are_refused_before_anything_is_compiled(change, match):
    """By the packer, and in the same words by `Model.logits`."""
    first = recorded([10, 11])
    experts = change(first.experts)
    group = Group("g", (Trajectory((dataclasses.replace(first, experts=experts), _reply(experts)), 1.0, "stop"),))
    with pytest.raises(ValueError, match="example g#0"):
        pack(samples(group, [1.0], NO_PAD), SHAPE, 1)
    with pytest.raises(ValueError, match=match):
        RoutingShape.of(CONFIG).check(experts, (2, L, K), "a test")
    model = Model(CONFIG, {})  # its weights are not reached
    with pytest.raises(ValueError, match="routed experts of the batch"):
        model.logits(np.array([[10, 11]]), routed_experts=experts.swapaxes(0, 1)[None])


def _reply(like):
    reply = Segment.drawn([12], [-1.0], [0], 0)
    return dataclasses.replace(reply, experts=like[:1])


def test_experts_of_different_models_in_a_context_are_refused():
    first, reply = recorded([10, 11]), recorded([12], 0)
    trajectory = Trajectory((first, dataclasses.replace(reply, experts=reply.experts[:, :1])), 1.0, "stop")
    with pytest.raises(TrajectoryError, match="experts of different models"):
        samples(Group("g", (trajectory,)), [1.0], NO_PAD)


def test_dense_models_have_nothing_to_replay():
    dense = tiny.replace(vision=None, moe=None)
    with pytest.raises(ConfigError, match="this model has none"):
        packing.PackShape.of(DATA, dense, routed_experts=True)
    with pytest.raises(ValueError, match="has no experts"):
        Model(dense, {}).logits(np.array([[10, 11]]), routed_experts=np.zeros((1, 2, 2, 2), int))


# ------------------------------------------------------------------------------------------------- sampler and trainer


@functools.cache
def weights(noise=0.0):
    """The trainer's; noise: standard deviation of what is added to every router's matrix, whose own is 0.1."""
    params = tiny.params(CONFIG)
    router = params["moe_layers"]["mlp"]["router"]
    drift = noise * jax.random.normal(jax.random.key(1), router["kernel"].shape)
    router["kernel"] = router["kernel"] + drift
    return params


@functools.cache
def engine(dtype):
    config = dataclasses.replace(CONFIG, dtype=dtype)
    return Engine(config, weights(), slots=8, page_size=4, max_sequence_length=64, chunks=(8,))


def rollouts(engine):
    """16 answers of up to 40 tokens, as a batch with the sampler's log-probabilities and routed experts."""
    rng = np.random.default_rng(0)
    asked = [
        Request(
            rng.integers(10, 64, PROMPT).astype(np.int32), sampling=Sampling(1.0, 1.0, seed, 40, routed_experts=True)
        )
        for seed in range(16)
    ]
    trajectories = []
    for request, found in zip(asked, engine.run(asked), strict=True):
        experts = np.concatenate([found.experts, np.full((1, L, K), FREE, np.int32)])  # the last token is never read
        given = dataclasses.replace(Segment.given(request.token_ids), experts=experts[:PROMPT])
        drawn = Segment.drawn(found.token_ids, np.minimum(found.logprobs, 0), found.versions, 0)
        trajectories.append(Trajectory((given, dataclasses.replace(drawn, experts=experts[PROMPT:])), 1.0, "length"))
    batch, left = pack(samples(Group("g", tuple(trajectories)), [1.0] * 16, NO_PAD), SHAPE, 2)
    assert not left and batch.loss_weights.sum() > 500
    return batch


@functools.cache
def trainer():
    config, objective = TrainConfig(model=CONFIG, data=DATA), policy(PolicyConfig())
    return jax.jit(lambda p, b: loss_fn(p, b, config, objective=objective)[1]["metrics"], compiler_options=tiny.QUICK)


def mismatch(batch, replay):
    """KL(sampler || trainer) in nats a token; the trainer has the weights without noise, in float32."""
    if not replay:
        batch = dataclasses.replace(batch, routed_experts=np.full_like(batch.routed_experts, FREE))
    total, weight = trainer()(weights(), batch)["mismatch_kl"]
    return float(total / weight)


def show(sampler, off, on):
    print(f"| {sampler} | {off:.1e} | {on:.1e} |")


def test_mismatch_of_equal_programs_is_rounding_with_and_without_replay():
    """Engine and trainer are two programs for the same weights in float32. An error of 0.5 in the recorded
    log-probabilities is not hidden: exp(0.5) - 1 - 0.5."""
    engine("float32").set_params(weights(), version=0)
    batch = rollouts(engine("float32"))
    off, on = (mismatch(batch, replay) for replay in (False, True))
    show("float32, the trainer's weights", off, on)
    assert 0 <= off < 1e-6 and 0 <= on < 1e-6
    lower = batch.columns["logp_sampler"] - 0.5 * batch.loss_weights
    biased = mismatch(dataclasses.replace(batch, columns={**batch.columns, "logp_sampler": lower}), True)
    np.testing.assert_allclose(biased, np.exp(0.5) - 1.5, rtol=1e-3)


@pytest.mark.parametrize("noise", [0.01, 0.05])
def test_mismatch_of_perturbed_routers_falls_with_replay(noise):
    """What is left with replay comes from the gates, which are the trainer's own."""
    engine("float32").set_params(weights(noise), version=1)
    batch = rollouts(engine("float32"))
    off, on = (mismatch(batch, replay) for replay in (False, True))
    show(f"float32, router matrices off by {noise / 0.1:.0%}", off, on)
    assert off > 1e-3 and on < off / 10


def test_mismatch_of_a_bfloat16_sampler_falls_with_replay():
    batch = rollouts(engine("bfloat16"))
    off, on = (mismatch(batch, replay) for replay in (False, True))
    show("bfloat16, the trainer's weights", off, on)
    assert 1e-4 < off < 1e-2 and on < 1e-3 and on < off / 5
