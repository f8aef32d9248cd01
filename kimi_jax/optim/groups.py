"""Optimizer groups for somebody else's parameters: what `muonclip` needs to know about a tree it did not declare.

Our own modules declare their groups where they create a parameter (`nn.param.declare`). A tree from elsewhere gets them
here, from rules by name that the caller writes down, and from the number of axes only where nothing can go wrong.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping

import jax
from jaxtyping import PyTree

from kimi_jax.config import nearest
from kimi_jax.nn.param import AdamW, Group, Muon, ParamInfo, leaf_name


def param_groups(params: PyTree, rules: Mapping[str, Group] | None = None) -> PyTree[ParamInfo]:
    """The `infos` of `muonclip` for any tree of arrays (or their shapes).

    rules: pattern -> `Muon(batch, rows)`, `AdamW()` or `Frozen()`, tried in order on the path of a leaf, its keys
    joined by dots; `*` stands for anything, dots too. Kimi K2 keeps embedding and output head in AdamW, so name them.
    Of what no rule names, arrays with two axes are matrices [inputs, outputs] for Muon, those with fewer go to AdamW.
    Raises ValueError for a rule that matches nothing, TypeError for a leaf of more axes without a rule: which of them
    are inputs cannot be seen.
    """
    rules = dict(rules or {})
    names = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in rules:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"the rule {pattern!r} matches no parameter{nearest(pattern, names)}")

    def info(path: tuple, leaf: jax.Array) -> ParamInfo:
        name = leaf_name(path)
        group = next((each for pattern, each in rules.items() if fnmatch.fnmatchcase(name, pattern)), None)
        if group is None and leaf.ndim > 2:
            raise TypeError(
                f"{name} has {leaf.ndim} axes {tuple(leaf.shape)}; say which are inputs with a rule, for example "
                f"{{{name!r}: Muon(batch=0, rows=1)}}"
            )
        return ParamInfo(("",) * leaf.ndim, group or (Muon() if leaf.ndim == 2 else AdamW()))

    return jax.tree_util.tree_map_with_path(info, params)
