"""What a sampler hands to the trainer: segments of tokens, trees of them, groups of one prompt; and their batches.

Source: Kimi K2.5 report (arXiv 2602.02276), section 5.1 and appendix D: token in, token out, and the log-probability of
every sampled token is recorded. docs/rl.md section 3 explains the tree.

n tokens of a segment   L MoE layers   k experts of a token   N patches of an image   C = 3 * patch_size^2

A *context* is a path of segments from one that has no parent to one that nothing continues: what the model had before
it when it drew the last token. Branches share the beginning of their contexts, a subagent begins one of its own. Each
sampled token is trained on once, in the first context that holds it; tokens of frozen segments never.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np

from kimi_jax.data import packing
from kimi_jax.data.example import Encoded, MediaItem
from kimi_jax.data.patches import num_features
from kimi_jax.data.routing import FREE
from kimi_jax.packed_batch import PackedBatch, concatenate

MAX_TOKENS = 1 << 20  # of a segment; the longest context of the model is a quarter of it
MAX_SEGMENTS = 1 << 14  # of a trajectory
MAX_TRAJECTORIES = 1 << 12  # of a group
MAX_MEDIA = 1 << 12  # of a group
COLUMNS = ("logp_sampler", "advantage")  # what `kimi_jax.rl.objective.policy` asks of a batch
Numbers: TypeAlias = Sequence[int] | Sequence[float] | np.ndarray
GIVEN = -1  # version of a token that was not sampled


class TrajectoryError(ValueError):
    """A segment, trajectory or group that contradicts itself, or a record that is none."""


@dataclass(frozen=True, eq=False)
class Segment:
    """Consecutive tokens of one context: a prompt, a reply, a tool's result.

    tokens:   int32 [n], as drawn or as given; never decoded and encoded again.
    logp:     float32 [n], the sampler's log-probability of each sampled token, 0 for the others.
    sampled:  bool [n], the loss mask: which tokens the policy drew. Not the first of a context.
    versions: int32 [n], of the weights that drew each token; GIVEN for the others.
    parent:   index of the segment that this one continues, lower than its own; None begins a context.
    frozen:   drawn by weights that are not trained (a subagent): an observation, whatever `sampled` says.
    media:    indices into the media of the group, one for each run of media pads.
    experts:  int [n, L, k] that each token was routed to (`FREE`: it was drawn and never read), or None.
    """

    tokens: np.ndarray
    logp: np.ndarray
    sampled: np.ndarray
    versions: np.ndarray
    parent: int | None = None
    frozen: bool = False
    media: tuple[int, ...] = ()
    experts: np.ndarray | None = None

    def __post_init__(self) -> None:
        n = len(self.tokens)
        for name, dtype in (("tokens", np.int32), ("logp", np.float32), ("sampled", np.bool_), ("versions", np.int32)):
            array = getattr(self, name)
            if array.shape != (n,) or array.dtype != dtype:
                raise TrajectoryError(
                    f"{name} of a segment is {np.dtype(dtype)} [{n}], not {array.dtype} {array.shape}"
                )
        if n > MAX_TOKENS:
            raise TrajectoryError(f"a segment has {n} tokens, more than {MAX_TOKENS}")
        if n and self.tokens.min() < 0:
            raise TrajectoryError("a token id is negative")
        given = ~self.sampled
        # a float32 softmax may put 1e-7 above 0
        if not (np.isfinite(self.logp).all() and (self.logp <= 1e-3).all() and not self.logp[given].any()):
            raise TrajectoryError("log-probabilities are finite and at most 0, and 0 where nothing was sampled")
        if (self.versions[given] != GIVEN).any() or (self.versions[self.sampled] < 0).any():
            raise TrajectoryError(f"versions are {GIVEN} where nothing was sampled and at least 0 elsewhere")
        if self.experts is not None and (self.experts.ndim != 3 or len(self.experts) != n):
            raise TrajectoryError(f"experts of a segment have the shape [{n}, L, k], not {self.experts.shape}")

    @classmethod
    def given(cls, tokens: Numbers, parent: int | None = None, media: tuple[int, ...] = ()) -> Segment:
        """A prompt, a tool's result, or whatever else the policy reads and has not written."""
        n = len(tokens)
        zeros, none = np.zeros(n, np.float32), np.full(n, GIVEN, np.int32)
        return cls(np.array(tokens, np.int32), zeros, np.zeros(n, bool), none, parent, media=media)

    @classmethod
    def drawn(cls, tokens: Numbers, logp: Numbers, versions: Numbers, parent: int, frozen: bool = False) -> Segment:
        """What a sampler wrote after the segment `parent`."""
        arrays = np.array(tokens, np.int32), np.array(logp, np.float32), np.ones(len(tokens), bool)
        return cls(*arrays, np.array(versions, np.int32), parent, frozen)


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One sample of a prompt: a tree of segments in the order in which they were made.

    reward: None as long as it is unfinished. finish: why it ended ("stop", "length", ...), "" if it did not.
    """

    segments: tuple[Segment, ...]
    reward: float | None = None
    finish: str = ""

    def __post_init__(self) -> None:
        if not 0 < len(self.segments) <= MAX_SEGMENTS:
            raise TrajectoryError(f"a trajectory has 1 to {MAX_SEGMENTS} segments, not {len(self.segments)}")
        if self.reward is not None and not np.isfinite(self.reward):
            raise TrajectoryError(f"a reward is {self.reward}")
        for i, segment in enumerate(self.segments):
            if segment.parent is not None and not 0 <= segment.parent < i:
                raise TrajectoryError(f"segment {i} continues segment {segment.parent}, which is not before it")
            if segment.parent is None and (not len(segment.tokens) or segment.sampled[0]):
                raise TrajectoryError(f"segment {i} begins a context, so its first token is given")

    def contexts(self) -> list[list[int]]:
        """The indices of the segments of each context, in the order of their last segments."""
        continued = {segment.parent for segment in self.segments}
        paths = []
        for leaf in (i for i in range(len(self.segments)) if i not in continued):
            path: list[int] = []
            at: int | None = leaf
            while at is not None:
                path.append(at)
                at = self.segments[at].parent
            paths.append(path[::-1])
        return paths

    def num_sampled(self) -> int:
        """Tokens of this trajectory that are trained on: its length for Toggle and budgets."""
        return sum(int(s.sampled.sum()) for s in self.segments if not s.frozen)


@dataclass(frozen=True, eq=False)
class Group:
    """The samples of one prompt. key: which prompt. media: its images, which all samples share."""

    key: str
    trajectories: tuple[Trajectory, ...]
    media: tuple[MediaItem, ...] = ()

    def __post_init__(self) -> None:
        if len(self.trajectories) > MAX_TRAJECTORIES or len(self.media) > MAX_MEDIA:
            raise TrajectoryError(f"a group has at most {MAX_TRAJECTORIES} samples and {MAX_MEDIA} images")
        used = {i for trajectory in self.trajectories for segment in trajectory.segments for i in segment.media}
        if used and not (min(used) >= 0 and max(used) < len(self.media)):
            raise TrajectoryError(f"group {self.key}: a segment shows image {max(used)} of {len(self.media)}")


class TrainingSample(NamedTuple):
    """A context as the packer takes it. columns: COLUMNS, float32 [n] beside the tokens.

    experts: int [n, L, k] that the sampler routed each token to, `FREE` where it recorded none; None: no record.
    """

    encoded: Encoded
    columns: dict[str, np.ndarray]
    experts: np.ndarray | None = None


def samples(group: Group, advantages: Sequence[float], media_pad_id: int) -> list[TrainingSample]:
    """The contexts of a group that hold a token to train on.

    advantages: one for each trajectory. Raises TrajectoryError if media pads and images, or the shapes of recorded
    experts, do not agree.
    """
    out = []
    for number, (trajectory, advantage) in enumerate(zip(group.trajectories, advantages, strict=True)):
        seen: set[int] = set()
        for context in trajectory.contexts():
            parts = [trajectory.segments[i] for i in context]
            masks = [p.sampled & (not p.frozen and i not in seen) for i, p in zip(context, parts, strict=True)]
            seen.update(context)
            mask = np.concatenate(masks)
            if not mask.any():
                continue
            tokens = np.concatenate([p.tokens for p in parts])
            media = tuple(group.media[i] for p in parts for i in p.media)
            pads = int(np.count_nonzero(tokens == media_pad_id))
            if pads != sum(num_features(item.grid) for item in media):
                raise TrajectoryError(f"group {group.key}, sample {number}: {pads} media pads do not fit its images")
            modality = 2 if any(item.grid[0] > 1 for item in media) else int(bool(media))
            logp = np.where(mask, np.concatenate([p.logp for p in parts]), 0).astype(np.float32)
            encoded = Encoded(tokens, mask.astype(np.float32), media, modality, f"{group.key}#{number}")
            columns = {"logp_sampler": logp, "advantage": np.where(mask, np.float32(advantage), 0)}
            out.append(TrainingSample(encoded, columns, _experts(parts, encoded.key)))
    return out


def _experts(parts: Sequence[Segment], key: str) -> np.ndarray | None:
    """Those of a context, `FREE` for segments without a record; None if no segment has one."""
    shapes = {part.experts.shape[1:] for part in parts if part.experts is not None}
    if len(shapes) > 1:
        raise TrajectoryError(f"{key}: its segments record experts of different models, [L, k] = {sorted(shapes)}")
    if not shapes:
        return None
    (shape,) = shapes
    each = [np.full((len(p.tokens), *shape), FREE, np.int32) if p.experts is None else p.experts for p in parts]
    return np.concatenate(each)


def pack(
    items: Sequence[TrainingSample], shape: packing.PackShape, num_packs: int
) -> tuple[PackedBatch, list[TrainingSample]]:
    """A batch of `num_packs` packs with the columns of COLUMNS, and the samples that found no room, both in order.

    With `shape.routing` the batch also holds `routed_experts`, which the training step then forces.
    First fit, but a pack that holds a sample's images comes first, so that each image lies once in as few packs as
    its group takes. Raises ValueError for a sample that does not fit an empty pack, or experts that the model cannot
    have.
    """
    packs = [packing.Pack(shape, COLUMNS) for _ in range(num_packs)]
    left = []
    for item in items:
        media = item.encoded.media
        order = sorted(packs, key=lambda pack: -sum(pack.holds(m) for m in media))
        places = ((pack, row) for pack in order for row in range(shape.rows))
        if not any(pack.add(item.encoded, row, item.columns, item.experts) for pack, row in places):
            left.append(item)
    return concatenate([pack.batch for pack in packs]), left


def staleness(groups: Sequence[Group], version: int) -> np.ndarray:
    """int64 [oldest age + 1]: how many tokens that are trained on were drawn by weights of that many versions ago."""
    versions = [s.versions[s.sampled] for g in groups for t in g.trajectories for s in t.segments if not s.frozen]
    return np.bincount(version - np.concatenate([np.zeros(0, np.int32), *versions]))
