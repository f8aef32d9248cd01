"""Packing: nothing lost, nothing twice, nothing across a border, every index right, rows nearly full, none starves."""

import dataclasses
import itertools
import time

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kimi_jax.config import ConfigError
from kimi_jax.data.example import Encoded, MediaItem
from kimi_jax.data.packing import (
    BufferedExample,
    Pack,
    PackShape,
    best_subset,
    empty_batch,
    fill_pack,
    unpack,
)
from kimi_jax.data.patches import num_features
from kimi_jax.packed_batch import PackedBatch, concatenate
from tests.data.synthetic import settings

PAD, MEDIA_PAD = 2, 9
SHAPE = PackShape(rows=2, sequence_length=48, bins=((16, 2), (32, 1)), pad_id=PAD, media_pad_id=MEDIA_PAD, patch_size=2)


def example(rng: np.random.Generator, length: int, grids=(), key: str = "") -> Encoded:
    """`length` tokens of which the pads of `grids` are part; every patch and weight is recognisable."""
    pads = [num_features(g) for g in grids]
    length = max(length, sum(pads) + len(pads) + 1)
    tokens = rng.integers(16, 400, length).astype(np.int32)
    at = 0
    for count in pads:
        tokens[at + 1 : at + 1 + count] = MEDIA_PAD
        at += count + 1
    weights = np.where(tokens == MEDIA_PAD, 0, rng.random(length)).astype(np.float32)
    media = tuple(MediaItem(rng.integers(0, 256, (int(np.prod(g)), 12), dtype=np.uint8), g) for g in grids)
    return Encoded(tokens, weights, media, min(2, len(grids)), key)


GRIDS = st.sampled_from([(1, 2, 2), (1, 2, 4), (1, 4, 4), (2, 2, 2), (4, 2, 2), (3, 2, 4), (1, 4, 8)])
EXAMPLES = st.lists(st.tuples(st.integers(1, 48), st.lists(GRIDS, max_size=2)), min_size=1, max_size=30)


def fits_alone(e: Encoded) -> bool:
    return len(e.tokens) <= SHAPE.sequence_length and sum(len(m.patches) for m in e.media) <= 32


def pack_all(examples: list[Encoded], buffer_size: int = 8) -> list[dict]:
    """Packs until everything is packed; the stream ends in examples of one token, told by their key."""
    stream = iter(examples)
    buffer: list[BufferedExample] = []

    def draw() -> list[BufferedExample]:
        e = next(stream, None)
        return [BufferedExample(e or Encoded(np.ones(1, np.int32), np.ones(1, np.float32), (), 0, "end"), (0,))]

    packs = []
    packed = 0
    while packed < len(examples):
        pack, _ = fill_pack(SHAPE, buffer, draw, buffer_size)
        packs.append(pack.batch)
        packed += sum(len(d.tokens) > 1 or d.tokens[0] != 1 for d in unpack(packs[-1]))
    return packs


def check_batch(batch: PackedBatch) -> None:
    """What holds for any batch (the contract of the arrays)."""
    rows, num_packs = batch.rows_per_pack, batch.num_packs
    real = batch.segment_ids > 0
    assert (batch.tokens[~real] == PAD).all() and (batch.targets[~real] == PAD).all()
    assert (batch.loss_weights[~real] == 0).all() and (batch.feature_index[~real] == -1).all()
    same = (batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]) & real[:, 1:]
    assert (batch.targets[:, :-1][same] == batch.tokens[:, 1:][same]).all()
    ends = real.copy()
    ends[:, :-1] &= ~same
    assert (batch.targets[ends] == PAD).all() and (batch.loss_weights[ends] == 0).all()
    assert (batch.loss_weights[batch.targets == MEDIA_PAD] == 0).all()
    assert ((batch.feature_index >= 0) == (batch.tokens == MEDIA_PAD)).all()
    for g in range(num_packs):
        used, offset = [], 0
        for arrays in batch.vision:
            count, windows = len(arrays.patches) // num_packs, arrays.feature_slots.shape[1]
            for b in range(count):
                slots = arrays.feature_slots[g * count + b]
                inside = arrays.segment_ids[g * count + b].reshape(windows, 4)
                assert ((slots == windows) == (inside == 0).all(1)).all()
                assert (inside == inside[:, :1]).all()  # a window belongs to one item
                used += [offset + b * windows + s for s in np.unique(slots[slots < windows])]
            offset += count * windows
        index = batch.feature_index[g * rows : (g + 1) * rows]
        assert sorted(index[index >= 0].tolist()) == used, "feature_index is a bijection onto the used slots"


@given(EXAMPLES, st.integers(0, 2**31), st.integers(1, 12))
def test_unpacking_gives_every_example_back_once(specs, seed, buffer_size):
    rng = np.random.default_rng(seed)
    examples = [e for n, grids in specs if fits_alone(e := example(rng, max(n, 2), grids))]
    assume(examples)
    packs = pack_all(examples, buffer_size)
    for batch in packs:
        check_batch(batch)
    batch = concatenate(packs)
    check_batch(batch)
    documents = [d for d in unpack(batch) if len(d.tokens) > 1]
    left = list(examples)
    for d in documents:
        match = next(e for e in left if np.array_equal(e.tokens, d.tokens))
        left = [e for e in left if e is not match]
        assert np.array_equal(d.loss_weights[:-1], match.loss_weights[1:])
        assert d.positions.tolist() == list(range(len(d.tokens))) and d.modality == match.modality
        assert len(d.media) == len(match.media)
        for mine, theirs in zip(d.media, match.media, strict=True):
            assert mine.grid == theirs.grid and np.array_equal(mine.patches, theirs.patches)
        pack = d.row // SHAPE.rows
        assert all(b // SHAPE.bins[k][1] == pack for k, b in d.places), "items lie in the bins of their own pack"
    assert not left


@given(st.integers(0, 2**31))
def test_coordinates_and_slots_of_every_patch(seed):
    """Patch (t, y, x) of an item shows what the raster order has there; its window's slot is that of (y, x) alone."""
    rng = np.random.default_rng(seed)
    grid = (3, 2, 4)
    e = example(rng, 20, [(1, 2, 2), grid])
    pack = Pack(SHAPE)
    assert pack.add(e, 0)
    (document,) = unpack(pack.batch)
    k, b = document.places[1]
    arrays = pack.batch.vision[k]
    mine = np.flatnonzero((arrays.grids[b] == grid).all(-1) & (arrays.segment_ids[b] > 0))
    start = mine[0]
    for p in mine:
        t, y, x = arrays.coords[b, p]
        assert np.array_equal(arrays.patches[b, p], e.media[1].patches[(t * 2 + y) * 4 + x])
        assert arrays.feature_slots[b, p // 4] == start // 4 + (y // 2) * 2 + x // 2
    assert len(mine) == 24


def test_example_that_cannot_fit_is_an_error_not_a_loop():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="does not fit an empty pack"):
        Pack(SHAPE).add(example(rng, 49), 0)


def test_capacity_is_never_exceeded():
    rng = np.random.default_rng(0)
    pack = Pack(SHAPE)
    assert pack.add(example(rng, 10, [(1, 4, 8)]), 0)
    assert not pack.add(example(rng, 10, [(1, 4, 8)]), 0)  # the only bin of 32 is taken
    assert pack.add(example(rng, 38), 0) and pack.room(0) == 0
    assert not pack.add(example(rng, 1), 0)
    assert pack.used() == {"tokens": 48, "vision_tokens": 8, "documents": 2, "patches": [0, 32]}


@given(st.lists(st.integers(1, 40), max_size=12), st.integers(0, 120))
def test_best_subset_is_the_best(lengths, room):
    chosen = best_subset(lengths, room)
    sums = {0}
    for n in lengths:
        sums |= {s + n for s in sums}
    assert sum(lengths[i] for i in chosen) == max(s for s in sums if s <= room)
    assert chosen == sorted(set(chosen))


def realistic(rng: np.random.Generator) -> Encoded:
    """Text of 60-250 tokens; questions of 30-60 tokens on an image of 9-25 features; clips of 100 tokens."""
    kind = rng.random()
    if kind < 0.35:
        return example(rng, int(rng.integers(60, 251)))
    if kind < 0.85:
        h, w = 2 * rng.integers(3, 6, 2)
        return example(rng, int(rng.integers(30, 61)), [(1, int(h), int(w))])
    return example(rng, 100, [(4, 6, 6), (int(rng.integers(1, 5)), 6, 6)])


@pytest.mark.parametrize(
    "rows, length, bins",
    [(1, 512, ((64, 8), (160, 4))), (4, 512, ((64, 32), (160, 16))), (2, 1024, ((160, 24),))],
)
def test_rows_are_at_least_97_percent_full(rows, length, bins):
    shape = PackShape(rows, length, bins, PAD, MEDIA_PAD, patch_size=2)
    rng = np.random.default_rng(0)
    stream = itertools.cycle([realistic(rng) for _ in range(500)])
    buffer: list[BufferedExample] = []
    tokens, patches = 0, np.zeros(len(bins))
    for _ in range(40):
        used = fill_pack(shape, buffer, lambda: [BufferedExample(next(stream), ())], 64)[0].used()
        tokens += used["tokens"]
        patches += used["patches"]
        assert len(buffer) <= 64
    assert tokens / (40 * rows * length) >= 0.97
    assert (patches / (40 * np.array([p * v for p, v in bins])) > 0.05).all()


def test_nobody_waits_for_more_groups_than_the_pool_has_places():
    """Examples that take a whole row, among many that fit better."""
    rng = np.random.default_rng(0)
    count = itertools.count()

    def draw() -> list[BufferedExample]:
        i = next(count)
        return [BufferedExample(example(rng, 48 if i % 5 == 0 else int(rng.integers(2, 20))), (i, group_number))]

    buffer: list[BufferedExample] = []
    longest = 0
    for group_number in range(200):
        before = {w.reference for w in buffer}
        fill_pack(SHAPE, buffer, draw, 12)
        gone = before - {w.reference for w in buffer}
        longest = max([longest, *(group_number - drawn for _, drawn in gone)])
        assert all(group_number - w.reference[1] < 12 for w in buffer)
    assert longest >= 1


def test_bins_that_are_full_let_text_fill_the_rows():
    """A run of large images in front of text: images wait, text goes ahead, order of the images is kept."""
    rng = np.random.default_rng(0)
    images = [example(rng, 12, [(1, 4, 8)], key=f"image-{i}") for i in range(10)]
    stream = iter([*images, *(example(rng, 7, key="text") for _ in range(200))])
    buffer: list[BufferedExample] = []
    seen = []
    for _ in range(10):
        pack, _ = fill_pack(SHAPE, buffer, lambda: [BufferedExample(next(stream), ())], 16)
        documents = list(unpack(pack.batch))
        seen += [d.media[0] for d in documents if d.media]
        assert sum(bool(d.media) for d in documents) == 1
        assert pack.used()["tokens"] == 12 + 5 * 7 + 6 * 7  # both rows hold as many texts of seven as can be
    for item, e in zip(seen, images, strict=True):
        assert np.array_equal(item.patches, e.media[0].patches)


def test_speed():
    """Far above what a host has to deliver: 200 k tokens and 20 k patches a second of processor time."""
    shape = PackShape(4, 1024, ((64, 64), (160, 32)), PAD, MEDIA_PAD, patch_size=14)
    rng = np.random.default_rng(0)
    examples = [realistic(rng) for _ in range(300)]
    for i, e in enumerate(examples):  # patches of the real size
        media = tuple(MediaItem(np.zeros((len(m.patches), 588), np.uint8), m.grid) for m in e.media)
        examples[i] = dataclasses.replace(e, media=media)
    stream = itertools.cycle(examples)
    buffer: list[BufferedExample] = []
    start = time.process_time()
    used = [fill_pack(shape, buffer, lambda: [BufferedExample(next(stream), ())], 64)[0].used() for _ in range(20)]
    seconds = time.process_time() - start
    assert sum(u["tokens"] for u in used) / seconds > 200_000
    assert sum(sum(u["patches"]) for u in used) / seconds > 20_000


def test_shapes_follow_the_settings(tmp_path):
    data, model = settings(tmp_path)
    shape = PackShape.of(data, model)
    batch = empty_batch(shape, data.num_packs)
    check_batch(batch)
    assert batch.tokens.shape == (8, 256)
    assert [bins.patches.shape for bins in batch.vision] == [(16, 64, 588), (12, 160, 588)]
    assert shape.bin_offsets == (0, 64)
    text_only = PackShape.of(data, dataclasses.replace(model, vision=None))
    assert empty_batch(text_only).vision == ()


@pytest.mark.parametrize("bins", [((6, 1),), ((64, 0),), ((64, 1), (32, 1)), ((2, 1),)])
def test_bins_that_cannot_work(tmp_path, bins):
    data, model = settings(tmp_path, vision_bins=bins)
    with pytest.raises(ConfigError, match="vision_bins"):
        PackShape.of(data, model)
