"""Pages: never two owners who did not share a prefix, never lost; keys: equal exactly when tokens and images are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_jax.data.example import MediaItem
from kimi_jax.infer.cache import NULL_PAGE, PagePool, media_digest, page_keys

SIZE = 4


def keys(tokens, owners=None, digests=()):
    tokens = np.array(tokens, np.int32)
    owners = np.full(len(tokens), -1, np.int32) if owners is None else np.array(owners, np.int32)
    return page_keys(tokens, owners, list(digests), SIZE)


@given(st.lists(st.integers(0, 2), max_size=14), st.lists(st.integers(0, 2), max_size=14))
def test_keys_are_equal_as_far_as_the_tokens_are(a, b):
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    one, other = keys(a), keys(b)
    assert len(one) == len(a) // SIZE
    assert one[: same // SIZE] == other[: same // SIZE]
    assert not set(one[same // SIZE :]) & set(other[same // SIZE :])


def test_another_image_is_another_page_from_its_first_pad_on():
    patches = np.zeros((4, 12), np.uint8)
    changed = patches.copy()
    changed[3, 11] = 1
    items = [
        MediaItem(patches, (1, 2, 2)), MediaItem(changed, (1, 2, 2)), MediaItem(patches.astype(np.float32), (1, 2, 2)),
        MediaItem(np.zeros((4, 12), np.uint8), (1, 2, 2)), MediaItem(np.concatenate([patches] * 4), (1, 4, 4)),
        MediaItem(np.concatenate([patches] * 4), (4, 2, 2)),
    ]  # fmt: skip
    digests = [media_digest(item) for item in items]
    assert digests[0] == digests[3]
    assert len(set(digests)) == 5
    tokens, owners = [5, 6, 7, 8, 5, 9, 9, 6, 1, 1, 1, 1], [-1] * 5 + [0, 1] + [-1] * 5
    one, other = keys(tokens, owners, digests[:2]), keys(tokens, owners, [digests[0], digests[4]])
    assert one[0] == other[0]
    assert one[1] != other[1] and one[2] != other[2]
    assert keys(tokens, owners, digests[:2]) != keys(tokens, owners, digests[1::-1])  # images in the other order


def test_known_prefix_is_shared_and_unused_pages_go_oldest_and_last_first():
    pool = PagePool(7)
    first, second = keys(range(12)), keys(range(100, 108))
    pages, known = pool.allocate(first, 4)
    assert known == 0 and NULL_PAGE not in pages
    for page, key in zip(pages, first, strict=False):
        pool.insert(page, key)
    again, known = pool.allocate(first, 3)  # while the first one still uses them
    assert known == 3 and again == pages[:3]
    pool.release(again)
    pool.release(pages)
    assert (pool.free, pool.cached) == (6, 3)
    other, known = pool.allocate(second, 2)
    for page, key in zip(other, second, strict=True):
        pool.insert(page, key)
    pool.release(other)
    assert pool.cached == 5
    # one page was never kept; the next room is made of the end of what has not been used for longest
    pool.release(pool.allocate(keys(range(50, 58)), 2)[0])
    assert pool.allocate(first, 3)[1] == 2


def test_too_few_pages_change_nothing():
    pool = PagePool(4)
    a = keys(range(8))
    pages, _ = pool.allocate(a, 2)
    for page, key in zip(pages, a, strict=True):
        pool.insert(page, key)
    pool.release(pages)
    assert pool.allocate(a, 4) is None  # the two known ones would be used, so only one is left
    assert (pool.free, pool.cached) == (3, 2)
    assert pool.allocate(a, 3)[1] == 2
    with pytest.raises(ValueError, match="at least 2"):
        PagePool(1)


def test_forgotten_pages_are_free_and_used_ones_come_back():
    pool = PagePool(5)
    a, b = keys(range(8)), keys(range(20, 24))
    pages, _ = pool.allocate(a, 2)
    other, _ = pool.allocate(b, 1)
    for page, key in zip(pages + other, a + b, strict=True):
        pool.insert(page, key)
    pool.release(pages)
    pool.clear()
    assert (pool.free, pool.cached) == (3, 0)
    pool.release(other)
    assert (pool.free, pool.cached) == (4, 0)
    assert pool.allocate(a, 4)[1] == 0


@given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 1), min_size=1, max_size=20)), max_size=30))
def test_pages_hold_what_their_users_believe(actions):
    """A model of memory: whoever computes a page writes its prefix there; whoever shares it must find that prefix."""
    pool, memory, running = PagePool(9), {}, []
    for start, tokens in actions:
        if start:
            mine = keys(tokens)
            reserved = pool.allocate(mine, -(-len(tokens) // SIZE))
            if reserved is not None:
                pages, known = reserved
                for number, page in enumerate(pages):
                    prefix = tuple(tokens[: (number + 1) * SIZE])
                    if number < known:
                        assert memory[page] == prefix
                    else:
                        assert all(page not in other for other, _ in running)
                        memory[page] = prefix
                for page, key in zip(pages, mine, strict=False):
                    pool.insert(page, key)
                running.append((pages, tokens))
        elif running:
            pool.release(running.pop(len(tokens) % len(running))[0])
        used = {page for pages, _ in running for page in pages}
        assert pool.free + len(used) == pool.capacity
        assert all(memory[page] == tuple(t[: (i + 1) * SIZE]) for pages, t in running for i, page in enumerate(pages))


def test_pages_that_decoding_made_are_shared_only_with_those_who_take_them():
    pool = PagePool(8)
    pages, _ = pool.allocate([], 2)
    pool.insert(pages[0], b"a")
    pool.insert(pages[1], b"b", decoded=True)
    pool.release(pages)
    mine, known = pool.allocate([b"a", b"b"], 2, decoded=False)
    assert known == 1 and mine[0] == pages[0] and mine[1] != pages[1]
    pool.insert(mine[1], b"b")  # read from a prompt: it takes the place of the decoded one
    assert pool.first_decoded(mine) == 2
    pool.release(mine)
    assert pool.allocate([b"a", b"b"], 2, decoded=False) == (mine, 2)
    pool.release(mine)
    assert pool.free == pool.capacity
