"""Trajectories to batches: tokens trained on are those sampled, once each; images lie once; JSON is strict."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_jax.data.example import MediaItem
from kimi_jax.data.packing import PackShape, unpack
from kimi_jax.nn.vision_stage import place_features
from kimi_jax.rl import record
from kimi_jax.rl.types import GIVEN, Group, Segment, Trajectory, TrajectoryError, pack, samples, staleness
from tests.nn import tiny

PAD, MEDIA_PAD = 2, 9
SHAPE = PackShape(rows=2, sequence_length=64, bins=((32, 2),), pad_id=PAD, media_pad_id=MEDIA_PAD, patch_size=2)
GRID = (1, 4, 4)  # 16 patches, 4 features


def make_image(seed=0):
    return MediaItem(np.random.default_rng(seed).integers(0, 256, (16, 12), dtype=np.uint8), GRID)


PROMPT = [11, *[MEDIA_PAD] * 4, 12]


@st.composite
def trees(draw, with_image=False):
    """A random tree: a prompt, then replies and tool results after any earlier segment, some of them frozen.

    Token ids are unique in a trajectory, so a token that is trained on tells where it came from.
    """
    ids = iter(range(1000, 5000))
    prompt = PROMPT if with_image else [next(ids)]
    segments = [Segment.given(prompt, media=(0,) if with_image else ())]
    for i in range(draw(st.integers(1, 6))):
        parent = draw(st.integers(0, i))
        n = draw(st.integers(1, 3))
        kind = draw(st.sampled_from(["drawn", "drawn", "given", "frozen", "subagent"]))
        tokens = [next(ids) for _ in range(n)]
        if kind == "given":
            segments.append(Segment.given(tokens, parent))
        elif kind == "subagent":
            segments.append(Segment.given(tokens))
        else:
            logp = [-0.001 * t for t in tokens]
            segments.append(Segment.drawn(tokens, logp, [draw(st.integers(0, 3))] * n, parent, kind == "frozen"))
    return Trajectory(tuple(segments), draw(st.floats(-1, 1)), "stop")


@given(st.lists(trees(), min_size=1, max_size=3))
def test_every_sampled_token_is_a_target_once_with_its_own_logp_and_advantage(trajectories):
    """Over branches, tool results and subagents; given and frozen tokens are never targets with a weight."""
    group = Group("g", tuple(trajectories))
    advantages = [0.5 * (i + 1) for i in range(len(trajectories))]
    batch, left = pack(samples(group, advantages, MEDIA_PAD), SHAPE, 8)
    assert not left
    learnt = batch.loss_weights > 0
    got = sorted(
        zip(
            batch.targets[learnt],
            batch.columns["logp_sampler"][learnt],
            batch.columns["advantage"][learnt],
            strict=True,
        )
    )
    want = sorted(
        (token, logp, np.float32(advantage))
        for trajectory, advantage in zip(trajectories, advantages, strict=True)
        for s in trajectory.segments
        if not s.frozen
        for token, logp in zip(s.tokens[s.sampled], s.logp[s.sampled], strict=True)
    )
    assert got == want
    for name in ("logp_sampler", "advantage"):
        assert batch.columns[name].dtype == np.float32 and not batch.columns[name][~learnt].any()


@given(trees())
def test_contexts_are_what_the_model_had_before_it(trajectory):
    """The tokens of a row up to a trained target are those of the path to it, in order, none decoded in between."""
    group = Group("g", (trajectory,))
    batch, _ = pack(samples(group, [1.0], MEDIA_PAD), SHAPE, 8)
    where = {int(t): i for i, s in enumerate(trajectory.segments) for t in s.tokens}
    for document in unpack(batch):
        for at in np.flatnonzero(document.loss_weights):
            target = int(document.targets[at])
            path, i = [], where[target]
            while i is not None:
                path.insert(0, i)
                i = trajectory.segments[i].parent
            before = np.concatenate([trajectory.segments[i].tokens for i in path])
            before = before[: list(before).index(target)]
            assert document.tokens[: at + 1].tolist() == before.tolist()


def test_branches_train_their_common_beginning_once_and_length_counts_it_once():
    first = Segment.drawn([1001, 1002], [-1, -2], [0, 0], 0)
    branches = [Segment.drawn([t], [-3], [1], 1) for t in (2001, 3001)]
    trajectory = Trajectory((Segment.given([1000]), first, *branches), 1.0, "stop")
    out = samples(Group("g", (trajectory,)), [1.0], MEDIA_PAD)
    assert [s.encoded.tokens.tolist() for s in out] == [[1000, 1001, 1002, 2001], [1000, 1001, 1002, 3001]]
    assert [s.encoded.loss_weights.tolist() for s in out] == [[0, 1, 1, 1], [0, 0, 0, 1]]
    assert trajectory.num_sampled() == 4
    assert staleness([Group("g", (trajectory,))], 2).tolist() == [0, 2, 2]


# ------------------------------------------------------------------------------------------------------------- images


def vision_group(count=6, seed=0):
    rng = np.random.default_rng(seed)
    prompt = Segment.given(PROMPT, media=(0,))

    def drawn(n):
        return Segment.drawn(rng.integers(20, 40, n), -rng.random(n), [0] * n, 0)

    return Group(
        "p", tuple(Trajectory((prompt, drawn(int(rng.integers(2, 5)))), 1.0) for _ in range(count)), (make_image(),)
    )


def test_image_of_a_group_lies_once_in_a_pack_and_all_samples_see_it():
    """Six samples with one image of 16 patches: one item in the bins, and each document unpacks to that image."""
    group = vision_group()
    batch, left = pack(samples(group, [1.0] * 6, MEDIA_PAD), SHAPE, 2)
    assert not left
    assert sum(int((arrays.segment_ids > 0).sum()) for arrays in batch.vision) == 16
    documents = list(unpack(batch))
    assert len(documents) == 6
    for document in documents:
        assert len(document.media) == 1 and document.modality == 1
        np.testing.assert_array_equal(document.media[0].patches, group.media[0].patches)


def test_equal_images_of_different_groups_stay_apart():
    """Sharing goes by the object, never by comparing pixels: two groups with equal images take two places."""
    items = [s for seed in (0, 1) for s in samples(vision_group(2, seed), [1.0, -1.0], MEDIA_PAD)]
    batch, left = pack(items, SHAPE, 1)
    assert not left and int((batch.vision[0].segment_ids > 0).sum()) == 32


def test_features_of_a_shared_image_get_the_sum_of_its_samples_gradients():
    """Early fusion of the batch, and its gradient, against NumPy's repeated addition."""
    batch, _ = pack(samples(vision_group(), [1.0] * 6, MEDIA_PAD), SHAPE, 1)
    rng = np.random.default_rng(1)
    features, x = rng.normal(size=(1, 16, 3)).astype(np.float32), np.zeros((2, 64, 3), np.float32)
    upstream = rng.normal(size=x.shape).astype(np.float32)
    index = batch.feature_index
    out, pull = jax.vjp(lambda f: place_features(jnp.asarray(x), f, jnp.asarray(index)), jnp.asarray(features))
    np.testing.assert_array_equal(out[index >= 0], features[0, index[index >= 0]])
    want = np.zeros_like(features)
    np.add.at(want[0], index[index >= 0], upstream[index >= 0])
    np.testing.assert_allclose(pull(upstream)[0], want, rtol=1e-5, atol=1e-6)
    assert np.bincount(index[index >= 0]).tolist() == [6] * 4


@pytest.mark.slow
def test_sharing_an_image_changes_neither_loss_nor_gradient():
    """The tiny model on three samples that share an image, against each with an image of its own: 2e-5."""
    model_shape = PackShape(2, 64, ((tiny.BIN, 4),), PAD, MEDIA_PAD, patch_size=4)
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 256, (16, 48), dtype=np.uint8)
    replies = [rng.integers(10, 30, 5) for _ in range(3)]

    def batch(shared):
        media = MediaItem(patches, GRID)
        groups = []
        for reply in replies:
            item = media if shared else MediaItem(patches, GRID)
            trajectory = Trajectory(
                (Segment.given(PROMPT, media=(0,)), Segment.drawn(reply, [-1.0] * 5, [0] * 5, 0)), 1.0
            )
            groups.append(Group("p", (trajectory,), (item,)))
        packed, left = pack([s for g in groups for s in samples(g, [1.0], MEDIA_PAD)], model_shape, 1)
        assert not left
        count = int((packed.vision[0].segment_ids > 0).sum())
        assert count == (16 if shared else 48)
        return packed

    evaluate = tiny.loss_and_grads()
    (loss, _), grads = evaluate(tiny.params(), batch(True), 0.0)
    (want, _), want_grads = evaluate(tiny.params(), batch(False), 0.0)
    np.testing.assert_allclose(loss, want, rtol=2e-5)
    tiny.assert_trees_close(grads, want_grads, 2e-5)
    assert any(float(np.abs(g).max()) > 0 for g in jax.tree.leaves(grads["vision"]))


def test_what_does_not_fit_is_left_in_order():
    group = vision_group(40)
    items = samples(group, [1.0] * 40, MEDIA_PAD)
    batch, left = pack(items, SHAPE, 1)
    numbers = [int(s.encoded.key.split("#")[1]) for s in left]
    assert numbers == sorted(numbers) and len(left) + len(list(unpack(batch))) == 40 and left


def test_pads_without_their_image_are_refused():
    with pytest.raises(TrajectoryError, match="media pads"):
        samples(
            Group("p", vision_group().trajectories[:1], (MediaItem(make_image().patches[:4], (1, 2, 2)),)),
            [1.0],
            MEDIA_PAD,
        )


# ----------------------------------------------------------------------------------------------------------------- JSON


def plain(group):
    return json.loads(record.dump(group))


@given(st.lists(trees(with_image=True), min_size=1, max_size=2))
@settings(max_examples=25)
def test_json_comes_back_bit_for_bit(trajectories):
    group = Group("name\u2028", tuple(trajectories), (make_image(),))
    again = record.load(record.dump(group))
    assert plain(again) == plain(group)
    for a, b in zip(again.trajectories[0].segments, group.trajectories[0].segments, strict=True):
        for name in ("tokens", "logp", "sampled", "versions"):
            x, y = getattr(a, name), getattr(b, name)
            assert x.dtype == y.dtype and x.tobytes() == y.tobytes()
    np.testing.assert_array_equal(again.media[0].patches, group.media[0].patches)


def test_json_keeps_experts():
    experts = np.arange(12, dtype=np.int32).reshape(3, 2, 2) - 1
    segment = Segment.given([5, 6, 7])
    segment = Segment(segment.tokens, segment.logp, segment.sampled, segment.versions, experts=experts)
    again = record.load(record.dump(Group("g", (Trajectory((segment,)),)))).trajectories[0].segments[0]
    np.testing.assert_array_equal(again.experts, experts)
    assert again.experts.dtype == np.int32


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.just(10**400), st.just(1e300), st.text(max_size=4), st.just([]),
    st.just({}), st.just([1e300]), st.just([True]), st.just([2**31]), st.just("AAAA"),
)  # fmt: skip


@given(st.data())
@settings(max_examples=150)
def test_json_of_strangers_is_a_group_or_a_typed_error(data):
    """Any value at any place, fields left out or added: TrajectoryError, or a group that satisfies the checks."""
    value = plain(vision_group(2))
    node = value
    for _ in range(data.draw(st.integers(0, 5))):
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if not isinstance(node[key], (dict, list)) or not node[key]:
            break
        node = node[key]
    key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
    if isinstance(node, dict) and data.draw(st.booleans()):
        node[data.draw(st.sampled_from(["other", key]))] = node.pop(key)
    else:
        node[key] = data.draw(ODD)
    try:
        group = record.load(json.dumps(value).encode())
    except TrajectoryError:
        return
    assert plain(group) == json.loads(json.dumps(value))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"\xff", "not JSON"),
        (b"[]", "JSON object"),
        (b'{"key": "g", "key": "h"}', "twice"),
        (b"[" * 100_000, "nested"),
        (b'{"key": "g", "media": [], "trajectories": [NaN]}', "NaN"),
        (b'{"key": "g", "media": [], "trajectories": ' + b"[" * 40 + b"]" * 40 + b"}", "nested"),
    ],
)
def test_broken_json_is_refused(data, match):
    with pytest.raises(TrajectoryError, match=match):
        record.load(data)


def test_size_is_checked_before_parsing(monkeypatch):
    data = record.dump(vision_group(2))
    monkeypatch.setattr(record, "MAX_BYTES", len(data) - 1)
    monkeypatch.setattr(record, "parse_object", None)  # calling it would fail otherwise
    with pytest.raises(TrajectoryError, match="more than"):
        record.load(data)
    with pytest.raises(TrajectoryError, match="more than"):
        record.dump(vision_group(2))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"logp": np.array([0.0, np.nan], np.float32)}, "log-probabilities"),
        ({"logp": np.array([0.0, 0.5], np.float32)}, "log-probabilities"),
        ({"logp": np.array([-0.5, -0.5], np.float32)}, "log-probabilities"),
        ({"versions": np.array([GIVEN, GIVEN], np.int32)}, "versions"),
        ({"tokens": np.array([-1, 3], np.int32)}, "negative"),
        ({"tokens": np.array([1, 3], np.int64)}, "int32"),
        ({"experts": np.zeros((3, 1, 1), np.int32)}, "experts"),
    ],
)
def test_segments_that_contradict_themselves_are_refused(changes, match):
    fields = {
        "tokens": np.array([1, 3], np.int32), "logp": np.array([0, -0.5], np.float32),
        "sampled": np.array([False, True]), "versions": np.array([GIVEN, 0], np.int32),
    }  # fmt: skip
    Segment(**fields)
    with pytest.raises(TrajectoryError, match=match):
        Segment(**{**fields, **changes})


def test_trees_that_are_none_are_refused():
    given, drawn = Segment.given([1]), Segment.drawn([2], [-1], [0], 1)
    with pytest.raises(TrajectoryError, match="not before it"):
        Trajectory((given, drawn))
    with pytest.raises(TrajectoryError, match="1 to"):
        Trajectory(())
    with pytest.raises(TrajectoryError, match="first token is given"):
        Trajectory((Segment(drawn.tokens, drawn.logp, drawn.sampled, drawn.versions),))
    with pytest.raises(TrajectoryError, match="reward"):
        Trajectory((given,), float("nan"))
    with pytest.raises(TrajectoryError, match="image 0 of 0"):
        Group("g", (Trajectory((Segment.given(PROMPT, media=(0,)),)),))
