"""Starting from weights that exist: the whole model or its parts, from released directories and workdirs.

`config.init_from` names them. Everything is compared by name and shape, from settings and file headers alone, before a
weight is read or anything on the devices given up; then each part is read straight onto the mesh, in the dtype in which
this run stores its weights, and nothing else of a checkpoint is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from kimi_jax.config import ConfigError, InitFromConfig, ModelConfig, TrainConfig, diff
from kimi_jax.hf import stream
from kimi_jax.hf.files import CheckpointError
from kimi_jax.nn.kimi import abstract_params
from kimi_jax.nn.param import leaf_name, unbox
from kimi_jax.train import checkpoint
from kimi_jax.train.weights import load_weights

TOWERS = ("vision", "projector")
COMPUTED = ("dtype", "param_dtype", "scan_layers", "remat", "remat_policy")  # of a model: not facts about its weights
SHOWN = 12  # lines of what does not fit


def start(config: TrainConfig, params: Any, mesh: Mesh, console: Callable[..., None]) -> Any:
    """The parameters of step 0: `params` (fresh ones, sharded) with what `config.init_from` names in its place.

    The fresh arrays that are replaced are deleted before others are read. console: told what came from where, and which
    settings of the model differ. Raises ConfigError for a path that is no checkpoint or a damaged one, and for parts
    that do not fit, naming every leaf that is missing, left over or of another shape.
    """
    chosen = _paths(config.init_from, params)
    found = {path: _model(path) for path in dict.fromkeys(chosen.values())}
    _check(chosen, found, params)
    for path, model in found.items():
        names = [name for name, source in chosen.items() if source == path]
        console(f"weights of {', '.join(names)} from {path}")
        facts = {name: getattr(config.model, name) for name in COMPUTED}
        lines = diff(dataclasses.replace(model, **facts), config.model, "config.model")
        console(*(f"  {line.replace('(default ', '(here ')} there" for line in lines))
        shardings = {name: jax.tree.map(lambda x: x.sharding, params[name]) for name in names}
        jax.tree.map(lambda x: x.delete(), {name: params[name] for name in names})
        read = _read(path, config.model.param_dtype, mesh, names, config.checkpoint.verify)
        params = {**params, **{name: jax.device_put(read[name], shardings[name]) for name in names}}
    return params


def _paths(options: InitFromConfig, params: Any) -> dict[str, str]:
    """Top-level name of the parameter tree -> where it comes from; fresh ones are left out."""
    named = {name: getattr(options, name if name in TOWERS else "language") or options.path for name in params}
    for tower in TOWERS:
        if getattr(options, tower) and tower not in params:
            raise ConfigError(f"config.init_from.{tower}: the model of this run has none (config.model.vision is None)")
    return {name: path for name, path in named.items() if path}


def _model(path: str) -> ModelConfig:
    """The model of a checkpoint, from its settings alone."""
    folder = epath.Path(path)
    try:
        if (folder / "checkpoints").is_dir():
            return checkpoint.load_settings(path).model
        released = stream.Released(folder)
        released.close()
    except (FileNotFoundError, CheckpointError, ConfigError) as error:
        raise ConfigError(f"config.init_from: {error}") from error
    return released.config


def _check(chosen: dict[str, str], found: dict[str, ModelConfig], params: Any) -> None:
    """Raises ConfigError that names every leaf that does not fit."""
    lines = []
    for path, model in found.items():
        theirs: Any = unbox(abstract_params(model))
        names = [name for name, source in chosen.items() if source == path]
        have, want = (_shapes({name: tree.get(name, {}) for name in names}) for tree in (theirs, params))
        lines += [f"missing in {path}: {leaf} {want[leaf]}" for leaf in want if leaf not in have]
        lines += [f"only in {path}: {leaf} {have[leaf]}" for leaf in have if leaf not in want]
        lines += [
            f"{leaf}: {have[leaf]} in {path}, {want[leaf]} here"
            for leaf in want
            if leaf in have and have[leaf] != want[leaf]
        ]
        # a whole model also has to have nothing that this one lacks
        if len(names) == len(params) and set(theirs) - set(params):
            lines += [f"only in {path}: {name}" for name in sorted(set(theirs) - set(params))]
    if lines:
        more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        raise ConfigError(
            "\n  ".join(
                ["config.init_from: these weights are not those of config.model:", *lines[:SHOWN], *more]
                + ["take single parts with config.init_from.{language,vision,projector}, or change config.model"]
            )
        )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {leaf_name(path): tuple(leaf.shape) for path, leaf in leaves}


def _read(path: str, dtype: str, mesh: Mesh, names: list[str], verify: bool) -> Any:
    """These parts of a checkpoint, sharded over the mesh."""
    try:
        if not (epath.Path(path) / "checkpoints").is_dir():
            return stream.load(path, dtype, mesh=mesh, parts=names)[1]
        if checkpoint.load_settings(path).lora is None:
            return checkpoint.load(path, mesh=mesh, dtype=dtype, verify=verify, parts=names)[1]
        return load_weights(path, dtype, mesh=mesh, verify=verify).params  # merges adapters into their base
    except (FileNotFoundError, CheckpointError, ConfigError) as error:
        raise ConfigError(f"config.init_from: {error}") from error
