"""The paged latent cache and its prefix cache: arrays on the device; on the host, who owns which page with what in it.

Source: docs/architecture.md section 9 (pages from the start: prefix reuse and RL's length tails need them).
A token takes kv_lora_rank + qk_rope_head_dim numbers a layer (576 in K2.5; 640 with the zeros behind them), whatever
the number of heads. Full pages are known by the hash of all tokens up to their end, so that a prompt finds the pages of
every prefix it shares; media pads are hashed with the content of their item, since the pads themselves are all alike.
Pages nobody uses stay until their room is needed; the longest unused goes first, and of one sequence its end before its
beginning.

P pages   s tokens a page   Z = kv_lora_rank + qk_rope_head_dim or more, see `page_width`   n tokens
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kimi_jax.config import ModelConfig
from kimi_jax.data.example import MediaItem
from kimi_jax.kernels.attention import paged_latent
from kimi_jax.kernels.attention.mla_flash import LANES

# The layers' pages. An array each: XLA copies a common one whenever a layer writes after another has read.
Cache: TypeAlias = tuple[Float[Array, "P s Z"], ...]
NULL_PAGE = 0  # the page that padding and idle slots write to; never handed out


def empty_cache(config: ModelConfig, num_pages: int, page_size: int) -> Cache:
    """Zeros, in the activations' dtype."""
    shape = num_pages, page_size, page_width(config)
    return tuple(jnp.zeros(shape, config.dtype) for _ in range(config.num_hidden_layers))


def page_width(config: ModelConfig) -> int:
    """Numbers that a token takes in a page, of which the first kv_lora_rank + qk_rope_head_dim are its latent.

    Whole vectors where a kernel reads the pages: of another width XLA would turn the pages round to save the room, and
    back for the kernel, all of them at every call.
    """
    width = config.kv_lora_rank + config.qk_rope_head_dim
    kernel = paged_latent.supports(config.kv_lora_rank, config.dtype)
    return width + -width % LANES if kernel else width


def media_digest(item: MediaItem) -> bytes:
    """What tells one image from another: grid, dtype and every patch."""
    patches = np.ascontiguousarray(item.patches)
    head = repr((tuple(map(int, item.grid)), patches.dtype.str)).encode()
    return hashlib.blake2b(patches.tobytes(), key=hashlib.blake2b(head, digest_size=32).digest()).digest()


def page_keys(token_ids: np.ndarray, owners: np.ndarray, digests: Sequence[bytes], page_size: int) -> list[bytes]:
    """A key for every full page, which stands for all tokens up to the page's end.

    token_ids, owners: ints [n]; owners: index into `digests` of the media item whose feature stands there, or -1.
    """
    keys, parent = [], b""
    for end in range(page_size, len(token_ids) + 1, page_size):
        part = slice(end - page_size, end)
        hasher = hashlib.blake2b(parent, digest_size=16)
        hasher.update(np.ascontiguousarray(token_ids[part], np.int32).tobytes())
        for item in sorted(set(owners[part].tolist()) - {-1}):
            hasher.update(digests[item])
        parent = hasher.digest()
        keys.append(parent)
    return keys


class PagePool:
    """Counts the users of every page but page 0, and remembers what the full ones hold.

    A page is free, used by one or more sequences, or unused but kept under its key.
    """

    def __init__(self, num_pages: int):
        if num_pages < 2:
            raise ValueError(f"num_pages must be at least 2 (page 0 is never handed out), not {num_pages}")
        self.capacity = num_pages - 1
        self._free = list(range(num_pages - 1, NULL_PAGE, -1))
        self._users = [0] * num_pages
        self._key: dict[int, bytes] = {}
        self._page: dict[bytes, int] = {}
        self._decoded: set[int] = set()  # kept pages that are not, or not only, the work of reading prompts
        self._unused: OrderedDict[int, None] = OrderedDict()  # kept pages without users, the longest unused first

    @property
    def free(self) -> int:
        """Pages that can be handed out, kept ones included."""
        return len(self._free) + len(self._unused)

    @property
    def cached(self) -> int:
        """Pages without users that are kept under their key."""
        return len(self._unused)

    def find(
        self, keys: Sequence[bytes], decoded: bool = True, usable: Callable[[int, int], bool] | None = None
    ) -> list[int]:
        """The pages that hold the longest known prefix of `keys`.

        decoded: whether pages that decoding has made may be among them. usable: of the index of a key and the page
        that holds it, whether the page will do.
        """
        known: list[int] = []
        for i, key in enumerate(keys):
            page = self._page.get(key)
            if page is None or (page in self._decoded and not decoded) or (usable and not usable(i, page)):
                break
            known.append(page)
        return known

    def allocate(self, keys: Sequence[bytes], count: int, decoded: bool = True) -> tuple[list[int], int] | None:
        """`count` pages for a sequence whose first pages have these keys, and how many of them already hold its tokens.

        The pages that `find` finds are shared, the others are new. None, and nothing changes, if there are not enough.
        """
        known = self.find(keys[:count], decoded)
        pages = self.share(known, count)
        return None if pages is None else (pages, len(known))

    def share(self, known: Sequence[int], count: int) -> list[int] | None:
        """`known` pages, which are used or kept, for one more user, and new ones behind them up to `count`.

        None, and nothing changes, if there are not enough.
        """
        waking = sum(self._users[page] == 0 for page in known)
        if count - len(known) > self.free - waking:
            return None
        for page in known:
            self._users[page] += 1
            self._unused.pop(page, None)
        return [*known, *(self._take() for _ in range(count - len(known)))]

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._unused.popitem(last=False)
            self._drop_key(page)
        self._users[page] = 1
        return page

    def insert(self, page: int, key: bytes, decoded: bool = False) -> None:
        """This page is full and holds what `key` stands for. decoded: that decoding had a part in it.

        If another page already holds the same, that one stays known, unless only the other was decoded.
        """
        other = self._page.get(key)
        if page in self._key or (other is not None and (decoded or other not in self._decoded)):
            return
        if other is not None:
            self._drop_key(other)
            if other in self._unused:
                del self._unused[other]
                self._free.append(other)
        self._key[page], self._page[key] = key, page
        if decoded:
            self._decoded.add(page)

    def first_decoded(self, pages: Sequence[int]) -> int:
        """Index of the first of these pages that decoding had a part in; their number if there is none."""
        return next((i for i, page in enumerate(pages) if page in self._decoded), len(pages))

    def _drop_key(self, page: int) -> None:
        del self._page[self._key.pop(page)]
        self._decoded.discard(page)

    def release(self, pages: Sequence[int]) -> None:
        """The sequence with these pages, in order, is done with them."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] == 0:
                if page in self._key:
                    self._unused[page] = None
                else:
                    self._free.append(page)

    def clear(self) -> None:
        """No page is known any more (the weights changed). Those in use stay with their users."""
        self._free += self._unused
        self._unused.clear()
        self._key.clear()
        self._page.clear()
        self._decoded.clear()
