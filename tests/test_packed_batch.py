"""The packed batch as a structure: every part of it knows its packs, and plain containers give the same arrays back."""

import jax

from kimi_jax.packed_batch import PackedBatch, concatenate, empty_bins, map_arrays, padding
from kimi_jax.train.step import microbatches


def batch(packs: int, rows_per_pack: int = 2, fill: int = 0) -> PackedBatch:
    bins = [empty_bins(3 * packs, 8, 12), empty_bins(packs, 16, 12)]
    return padding(
        packs * rows_per_pack, 4, rows_per_pack, fill, bins, columns=("advantage", "logp_sampler"), routing=(2, 3)
    )


def test_packed_batch_knows_its_packs_however_it_is_joined_and_divided():
    joined = concatenate([batch(2), batch(4)])
    assert (joined.num_packs, joined.tokens.shape) == (6, (12, 4))
    assert [bins.patches.shape[0] for bins in joined.vision] == [18, 6]
    seen = []

    def body(carry, part):
        seen.append((part.num_packs, part.tokens.shape, part.vision[0].coords.shape, part.columns["advantage"].shape))
        return carry, part.routed_experts.sum()

    jax.eval_shape(lambda b: jax.lax.scan(body, 0, microbatches(b, 3)), joined)
    assert seen == [(2, (4, 4), (6, 8, 3), (4, 4))]


def test_packed_batch_of_plain_containers_has_the_very_arrays():
    made = batch(1)
    tree = made.as_dict()
    assert type(tree["vision"]) is list and {type(bins) for bins in tree["vision"]} == {dict}
    again = PackedBatch.from_dict(tree)
    assert all(a is b for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(again), strict=True))
    assert jax.tree.structure(made) == jax.tree.structure(again)


def test_map_arrays_meets_every_array_once():
    """The host's walk, which knows nothing of jax, is that of the pytree."""
    made, other = batch(1), batch(1, fill=5)
    met = []
    map_arrays(lambda a, b: met.append((id(a), id(b))), made, other)
    leaves = zip(jax.tree.leaves(made), jax.tree.leaves(other), strict=True)
    assert sorted(met) == sorted((id(a), id(b)) for a, b in leaves)


def test_padding_holds_nothing():
    made = batch(1, fill=7)
    assert (made.tokens == 7).all() and not made.segment_ids.any() and not made.loss_weights.any()
    assert (made.feature_index == -1).all() and (made.routed_experts == -1).all()
    for bins in made.vision:
        windows = bins.patches.shape[1] // 4
        assert not bins.segment_ids.any() and (bins.feature_slots == windows).all() and bins.feature_slots.ndim == 2
