"""Muon with AdamW for what is not a matrix: the gradient part of MuonClip, as one optax transformation.

Source: Kimi K2, arXiv:2507.20534, Algorithm 1 (docs/paper_notes.md section 2.4). QK-clip, the other part, changes
weights after the update: `qk_clip.apply`. Which parameter is treated how is declared where it is created
(`kimi_jax.nn.param`), never guessed from its name.

    Muon        M = mu M + G;  O = NewtonSchulz(G + mu M or M) * update_rms * sqrt(max(R, C))
    AdamW       O = Adam(G), betas and epsilon of the config, no Nesterov
    both        W = W - lr (O + weight_decay W)     norms, biases and embeddings decay as well
    RouterBias  no update and no state here: `router_bias.apply`
    Frozen      no update, no decay, no state, no part in the gradient norm

Shape letters: N matrices in a stack, R rows (input), C columns (output).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from kimi_jax.config import OptimizerConfig
from kimi_jax.nn.layout import Layout
from kimi_jax.nn.param import AdamW, Frozen, Muon, ParamInfo, RouterBias, frozen, join, leaf_name, learned
from kimi_jax.optim import newton_schulz, schedules

LABELS = {Muon: "muon", AdamW: "adamw", RouterBias: "router_bias"}


Leaf = tuple[Muon, tuple[str, ...]]  # of one parameter: its group and its logical axes


class MuonState(NamedTuple):
    """Momentum of the Muon leaves, like the parameters in shape and dtype."""

    momentum: PyTree


class MuonClip(optax.GradientTransformation):
    """What `muonclip` gives: init and update, and the learning rate as a function of the updates already made."""

    learning_rate: optax.Schedule

    def __new__(cls, init: Callable[..., Any], update: Callable[..., Any], learning_rate: optax.Schedule) -> MuonClip:
        """The pair that optax knows, with its schedule."""
        made = super().__new__(cls, init, update)
        made.learning_rate = learning_rate
        return made


def muonclip(
    config: OptimizerConfig,
    total_steps: int,
    infos: PyTree,
    ns_dtype: DTypeLike | None = None,
    layout: Layout | None = None,
) -> MuonClip:
    """The optimizer of a run, global-norm clipping and WSD learning rate included.

    `infos` is `nn.param.metadata(boxed)`; parameters and gradients must be the same tree of arrays. `ns_dtype` is the
    dtype of Newton-Schulz (default: `newton_schulz.default_dtype()`). `layout` says how the parameters lie over a mesh;
    whole matrices are then distributed to its devices (`newton_schulz.orthogonalize_sharded`). The state is a pytree of
    arrays: momentum for Muon leaves, two moments for AdamW leaves, counters. `update` needs `params` (weight decay).
    The gradient of a Frozen leaf may be None, and so is its update then; else it is zero.
    Raises TypeError for a leaf without a known group, ValueError when `infos` and the parameters do not match, and
    ConfigError for a schedule that does not fit into `total_steps`. Source: docs/paper_notes.md section 2.4.
    """
    _check_groups(infos)
    learning = learned(infos, infos)
    labels = jax.tree.map(lambda info: LABELS[type(info.group)], learning)
    matrices = [(info.group, info.axes) for info in jax.tree.leaves(learning) if isinstance(info.group, Muon)]
    if config.matrices == "adamw":  # the rates are shared: Muon's updates have the RMS of AdamW's (`update_rms`)
        labels, matrices = jax.tree.map(lambda label: "adamw" if label == "muon" else label, labels), []
    learning_rate = schedules.wsd(config, total_steps)
    transform = optax.chain(
        optax.clip_by_global_norm(config.grad_clip_norm) if config.grad_clip_norm > 0 else optax.identity(),
        optax.partition(
            {
                "muon": scale_by_muon(config, matrices, ns_dtype, layout),
                "adamw": optax.scale_by_adam(
                    config.adam_b1, config.adam_b2, config.adam_eps, mu_dtype=_narrow(config.momentum_dtype)
                ),
                "router_bias": optax.set_to_zero(),
            },
            labels,
        ),
        optax.add_decayed_weights(config.weight_decay, mask=jax.tree.map(lambda label: label != "router_bias", labels)),
        optax.scale_by_learning_rate(learning_rate),
    )

    def init(params: PyTree) -> optax.OptState:
        _check_match(infos, params)
        return transform.init(learned(params, infos))

    def update(updates: PyTree, state: optax.OptState, params: PyTree | None = None) -> tuple[PyTree, optax.OptState]:
        if params is None:
            raise ValueError("muonclip decays weights: call update(grads, state, params)")
        _check_match(infos, updates)
        out, state = transform.update(learned(updates, infos), state, learned(params, infos))
        return join(out, jax.tree.map(jnp.zeros_like, frozen(updates, infos))), state

    return MuonClip(init, update, learning_rate)


def _narrow(dtype: str) -> jnp.dtype | None:
    """None, optax's word for the parameters' own dtype, unless the moments are to be narrower."""
    return None if dtype == "float32" else jnp.dtype(dtype)


def scale_by_muon(
    config: OptimizerConfig, leaves: list[Leaf], ns_dtype: DTypeLike | None = None, layout: Layout | None = None
) -> optax.GradientTransformation:
    """Momentum, Newton-Schulz and RMS matching, without learning rate and decay.

    `leaves` holds group and logical axes of each leaf of the tree, in tree order. Source: docs/paper_notes.md section
    2.4.
    """
    kept = _narrow(config.momentum_dtype)

    def init(params: PyTree) -> MuonState:
        return MuonState(jax.tree.map(lambda p: jnp.zeros_like(p, dtype=kept), params))

    def update(updates: PyTree, state: MuonState, params: PyTree | None = None) -> tuple[PyTree, MuonState]:
        mu = config.muon_momentum
        momentum = jax.tree.map(lambda m, g: mu * m.astype(g.dtype) + g, state.momentum, updates)
        ahead = jax.tree.map(lambda m, g: mu * m + g, momentum, updates) if config.muon_nesterov else momentum
        arrays, treedef = jax.tree.flatten(ahead)
        shapes = [as_matrices(array, group).shape[1:] for array, (group, _) in zip(arrays, leaves, strict=True)]
        directions = _directions(config, arrays, leaves, ns_dtype, layout)
        scaled = [
            (config.update_rms * math.sqrt(max(shape)) * direction).reshape(array.shape)
            for array, shape, direction in zip(arrays, shapes, directions, strict=True)
        ]
        return jax.tree.unflatten(treedef, scaled), MuonState(
            jax.tree.map(lambda m: m.astype(kept or m.dtype), momentum)
        )

    return optax.GradientTransformation(init, update)


def _directions(
    config: OptimizerConfig, arrays: list[Array], leaves: list[Leaf], dtype: DTypeLike | None, layout: Layout | None
) -> list[Array]:
    """Every matrix orthogonalised; over a mesh, parameters whose matrices are of one kind together."""
    steps = config.newton_schulz_steps
    if layout is None:
        matrices = [as_matrices(array, group) for array, (group, _) in zip(arrays, leaves, strict=True)]
        return [newton_schulz.orthogonalize(x, steps, dtype) for x in matrices]
    distributions = [
        newton_schulz.Distribution(group.batch, group.rows, layout.mesh, layout.spec(axes, array.shape))
        for array, (group, axes) in zip(arrays, leaves, strict=True)
    ]
    kinds: dict[tuple, list[int]] = {}
    for i, (array, distribution) in enumerate(zip(arrays, distributions, strict=True)):
        kinds.setdefault((array.dtype, *distribution.kind(array.shape)), []).append(i)
    out: list[Array] = list(arrays)
    for members in kinds.values():
        together = [arrays[i] for i in members], [distributions[i] for i in members]
        for i, direction in zip(members, newton_schulz.orthogonalize_sharded(*together, steps, dtype), strict=True):
            out[i] = direction
    return out


def as_matrices(leaf: Float[Array, "..."], group: Muon) -> Float[Array, "N R C"]:
    """The leaf as a stack of the matrices that its group declares (N = 1 without batch axes)."""
    batch, rows = leaf.shape[: group.batch], leaf.shape[group.batch : group.batch + group.rows]
    columns = leaf.shape[group.batch + group.rows :]
    return leaf.reshape(math.prod(batch), math.prod(rows), math.prod(columns))


# -------------------------------------------------------------------------------------------------------------- metrics


def group_rms(tree: PyTree[Float[Array, "..."]], infos: PyTree[ParamInfo]) -> dict[str, Float[Array, ""]]:
    """Root mean square over all elements of the Muon leaves and of the AdamW leaves, float32; absent groups left out.

    Of the updates of a step divided by its learning rate, Muon's is about `update_rms` (Moonlight's target, 0.2).
    """
    squares: dict[str, list] = {"muon": [], "adamw": []}
    sizes = {"muon": 0, "adamw": 0}
    for leaf, info in zip(*(jax.tree.leaves(learned(each, infos)) for each in (tree, infos)), strict=True):
        label = LABELS[type(info.group)]
        if label in squares:
            squares[label].append(jnp.sum(jnp.square(leaf.astype(jnp.float32))))
            sizes[label] += leaf.size
    # a float: a released model has more values than an int32 counts
    return {label: jnp.sqrt(sum(squares[label]) / float(sizes[label])) for label in squares if sizes[label]}


def step_metrics(grads: PyTree, updates: PyTree, infos: PyTree[ParamInfo]) -> dict[str, Float[Array, ""]]:
    """What a training step logs: `grad_norm` (global, before clipping) and `update_rms_muon`, `update_rms_adamw`; of
    what is not Frozen."""
    rms = {f"update_rms_{label}": value for label, value in group_rms(updates, infos).items()}
    # a norm in bfloat16 would have three digits
    wide = jax.tree.map(lambda g: g.astype(jnp.float32), learned(grads, infos))
    return {"grad_norm": optax.global_norm(wide), **rms}


# --------------------------------------------------------------------------------------------------------------- checks


def _check_groups(infos: PyTree) -> None:
    for path, info in jax.tree_util.tree_leaves_with_path(infos):
        if not isinstance(info, ParamInfo) or type(info.group) not in (*LABELS, Frozen):
            what = info.group if isinstance(info, ParamInfo) else info
            raise TypeError(
                f"parameter {leaf_name(path)} has no optimizer group that muonclip knows ({what!r}); declare it with "
                f"kimi_jax.nn.param.declare(..., group=Muon(...) | AdamW() | RouterBias() | Frozen())"
            )


def _check_match(infos: PyTree[ParamInfo], tree: PyTree) -> None:
    known = {leaf_name(path): info for path, info in jax.tree_util.tree_leaves_with_path(infos)}
    declared = {name: info for name, info in known.items() if not isinstance(info.group, Frozen)}
    arrays = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    undeclared, missing = sorted(arrays.keys() - known.keys()), sorted(declared.keys() - arrays.keys())
    if undeclared or missing:
        raise ValueError(
            f"the parameters do not match the infos muonclip was built with: {len(undeclared)} without info "
            f"{undeclared[:3]}, {len(missing)} infos without parameter {missing[:3]}; pass metadata() of the same model"
        )
    for name, info in declared.items():
        group, ndim = info.group, arrays[name].ndim
        if isinstance(group, Muon) and not (group.batch >= 0 and group.rows >= 1 and group.batch + group.rows < ndim):
            raise ValueError(
                f"parameter {name} of shape {arrays[name].shape} cannot be split as {group}: batch, row and column "
                f"axes must all come from its {ndim} axes"
            )
