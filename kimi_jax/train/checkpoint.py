"""Saving and restoring a run with Orbax, asynchronously and atomically.

One Orbax step `WORKDIR/checkpoints/N` holds the run after N steps:
  params     the plain nested dict of weights: all that evaluation and conversion need
  optimizer  optimizer moments and counters, flat: path in the state -> array
  host       JSON: state of the data stream, running sums of the log
  config     JSON: the settings of the run
Restoring goes into an abstract state with the shardings of *this* run, so another mesh is normal. A step that cannot be
read is moved to `WORKDIR/damaged_checkpoints` and the one before it is used: left in place, it would make Orbax refuse
to save its number again (shared/docs/design.md section 9).
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from kimi_jax import sharding
from kimi_jax.config import CheckpointConfig, ConfigError, MeshConfig, TrainConfig, diff, freeze
from kimi_jax.train.state import TrainState, abstract_params

ITEMS = ("params", "optimizer", "host", "config")


class CheckpointMismatch(ConfigError):
    """A checkpoint belongs to a model or an optimizer of another shape; the message names what differs."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint gives back."""

    step: int
    state: TrainState
    host: dict[str, Any]
    config: TrainConfig


class Checkpoints:
    """The checkpoints of one run. `save` returns as soon as the arrays are copied off the devices."""

    def __init__(self, workdir: str, options: CheckpointConfig):
        self._damaged = epath.Path(workdir).absolute() / "damaged_checkpoints"
        self._open = lambda: _manager(workdir, options)
        self._manager = self._open()

    def save(self, state: TrainState, host: dict[str, Any], config: TrainConfig) -> int:
        """Starts saving the state under its own step number, which it returns; a step that is there stays as it is."""
        step = int(state.step)
        if step not in self._manager.all_steps():
            items = ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                optimizer=ocp.args.StandardSave(_flat(state)),
                host=ocp.args.JsonSave(host),
                config=ocp.args.JsonSave(dataclasses.asdict(config)),
            )
            self._manager.save(step, args=items, force=True)
        return step

    def restore(self, abstract: TrainState, config: TrainConfig) -> Restored | None:
        """The newest checkpoint that can be read, or None without any.

        `abstract` carries shapes and shardings (`state.abstract`). Unreadable newer ones are moved away with a warning.
        Raises CheckpointMismatch if the checkpoint's arrays have other names or shapes than those of `abstract`.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return self._restore_step(step, abstract, config)
            except CheckpointMismatch:
                raise
            except Exception as error:  # whatever a truncated or missing file makes Orbax or tensorstore raise
                self._quarantine(step, error)
        return None

    def _restore_step(self, step: int, abstract: TrainState, config: TrainConfig) -> Restored:
        json = self._manager.restore(
            step, args=ocp.args.Composite(host=ocp.args.JsonRestore(), config=ocp.args.JsonRestore())
        )
        saved_config = freeze(json.config)
        found = self._manager.item_metadata(step)
        flat = _flat(abstract)
        problems = _differences(found.params, abstract.params) + _differences(found.optimizer, flat)
        if problems:
            raise CheckpointMismatch(_mismatch_message(step, problems, saved_config, config))
        arrays = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract.params), optimizer=ocp.args.StandardRestore(flat)
            ),
        )
        state = _unflat(abstract, arrays.params, arrays.optimizer)
        return Restored(step, state, json.host, saved_config)

    def _quarantine(self, step: int, error: Exception) -> None:
        directory = epath.Path(self._manager.directory) / str(step)
        target = self._damaged / str(step)
        warnings.warn(
            f"checkpoint {directory} cannot be read ({type(error).__name__}: {str(error)[:300]}); "
            f"moving it to {target} and falling back to the one before",
            stacklevel=3,
        )
        self._manager.close()
        if target.exists():
            target.rmtree()
        self._damaged.mkdir(parents=True, exist_ok=True)
        directory.rename(target)
        self._manager = self._open()

    def wait(self) -> None:
        """Returns when everything saved so far is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then lets go of the threads."""
        self._manager.close()


def load(workdir: str, step: int | None = None) -> tuple[TrainConfig, Any]:
    """The settings and the weights of a run, for evaluation; the newest checkpoint unless `step` names another.

    The weights are cut over all devices as in training. Raises FileNotFoundError if there is no such checkpoint.
    """
    manager = _manager(workdir, CheckpointConfig(), read_only=True)
    try:
        steps = sorted(manager.all_steps())
        if not steps or (step is not None and step not in steps):
            raise FileNotFoundError(
                f"no checkpoint {'' if step is None else f'of step {step} '}in {manager.directory}; there are: {steps}"
            )
        step = steps[-1] if step is None else step
        config = freeze(manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore())).config)
        abstract = abstract_params(config.model, sharding.make_mesh(MeshConfig()))
        params = manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(abstract))).params
    finally:
        manager.close()
    return config, params


def _manager(workdir: str, options: CheckpointConfig, read_only: bool = False) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        epath.Path(workdir).absolute() / "checkpoints",
        options=ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(options.keep),
            cleanup_tmp_directories=not read_only,  # what a killed run left half-written
            create=not read_only,
            read_only=read_only,
        ),
        item_names=ITEMS,
        item_handlers={
            "params": ocp.StandardCheckpointHandler(),
            "optimizer": ocp.StandardCheckpointHandler(),
            "host": ocp.JsonCheckpointHandler(),
            "config": ocp.JsonCheckpointHandler(),
        },
    )


def _paths(tree: Any) -> dict[str, Any]:
    """Leaves by their path, `embed.embedding` or `opt_state.0.mu.embed.embedding`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _flat(state: TrainState) -> dict[str, Any]:
    return _paths(dataclasses.replace(state, params=None))


def _unflat(like: TrainState, params: Any, flat: dict[str, Any]) -> TrainState:
    rest = dataclasses.replace(like, params=None)
    leaves = [flat[path] for path in _paths(rest)]
    return dataclasses.replace(jax.tree.unflatten(jax.tree.structure(rest), leaves), params=params)


def _differences(saved: Any, wanted: Any) -> list[str]:
    """Lines for every array that one side lacks or that has another shape."""
    found = {path: tuple(leaf.shape) for path, leaf in _paths(saved).items()}
    ours = {path: tuple(leaf.shape) for path, leaf in _paths(wanted).items()}
    lines = [f"{path}: not in the checkpoint" for path in ours if path not in found]
    lines += [f"{path}: only in the checkpoint" for path in found if path not in ours]
    lines += [
        f"{path}: {found[path]} in the checkpoint, {shape} here"
        for path, shape in ours.items()
        if path in found and found[path] != shape
    ]
    return lines


def _mismatch_message(step: int, problems: list[str], saved: TrainConfig, config: TrainConfig) -> str:
    shown = problems[:5] + ([f"... and {len(problems) - 5} more"] if len(problems) > 5 else [])
    settings = diff(config.model, saved.model, "config.model")
    settings += diff(config.optimizer, saved.optimizer, "config.optimizer")
    return "\n  ".join(
        [f"the checkpoint of step {step} does not fit these settings:", *shown]
        + ["settings that differ (as default: those of the checkpoint):", *(settings or ["none"])]
        + ["use another --config.workdir, or put the settings back"]
    )
