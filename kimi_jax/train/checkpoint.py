"""Saving and restoring a run with Orbax, asynchronously and atomically.

One Orbax step `WORKDIR/checkpoints/N` holds the run after N steps:
  params     the plain nested dict of weights: all that evaluation and conversion need; of `config.lora` its adapters
  optimizer  optimizer moments and counters, flat: path in the state -> array
  host       JSON: state of the data stream, running sums of the log
  config     JSON: the settings of the run
Restoring goes into an abstract state with the shardings of *this* run, so another mesh is normal. A step that cannot be
read is moved to `WORKDIR/damaged_checkpoints` and the one before it is used: left in place, it would make Orbax refuse
to save its number again (docs/architecture.md section 9). A step that cannot be written (a full disk) is told, cleaned
up and left out: training is worth more than one checkpoint.

With several hosts each of them calls every method here at the same point; `workdir` is then a place that all of them
see (`gs://...`, NFS).
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh

from kimi_jax import sharding
from kimi_jax.config import CheckpointConfig, ConfigError, MeshConfig, TrainConfig, diff, freeze
from kimi_jax.train import hosts
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
    """The checkpoints of one run. `save` returns as soon as the arrays are copied off the devices.

    warn: told what could not be saved or read.
    """

    def __init__(self, workdir: str, options: CheckpointConfig, warn: Callable[[str], Any] = warnings.warn):
        self._damaged = epath.Path(workdir).absolute() / "damaged_checkpoints"
        self._warn = warn
        self._open = lambda: _manager(workdir, options)
        self._manager = self._open()
        self._asked: int | None = None  # the step of the last save

    def save(self, state: TrainState, host: dict[str, Any], config: TrainConfig) -> int:
        """Starts saving the state under its own step number, which it returns; a step that is there stays as it is."""
        step = int(state.step)
        self.settle()
        self._asked = step
        if step not in self._manager.all_steps():
            items = ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                optimizer=ocp.args.StandardSave(_flat(state)),
                host=ocp.args.JsonSave(host),
                config=ocp.args.JsonSave(dataclasses.asdict(config)),
            )
            self._try(lambda: self._manager.save(step, args=items, force=True))
        return step

    def look(self) -> None:
        """Warns if saving has failed in the background; does not wait."""
        self._try(self._manager.check_for_errors)

    def settle(self) -> bool:
        """Waits for the last save; whether what it was to save is on disk. Warns if not."""
        self._try(self._manager.wait_until_finished)
        return self._asked is None or self._asked in self._manager.all_steps()

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # a full disk comes as OSError, ValueError or something of tensorstore
            where = self._manager.directory
            self._warn(
                f"WARNING: the checkpoint of step {self._asked} was NOT saved in {where} ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:300]}). Training goes on and tries again with the next one; until "
                "then a crash falls back to the last whole one"
            )
            with contextlib.suppress(Exception):  # says the same once more
                self._manager.close()
            self._manager = self._open()  # which removes what was half written

    def restore(self, abstract: TrainState, config: TrainConfig, sound: bool = False) -> Restored | None:
        """The newest checkpoint that can be read, or None without any.

        `abstract` carries shapes and shardings (`state.abstract`). Unreadable newer ones are moved away with a warning.
        sound: pass over those written while updates were being left out.
        Raises CheckpointMismatch if the checkpoint's arrays have other names or shapes than those of `abstract`.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            found, problem = None, None
            try:
                host = self._host(step)
                if sound and host.host["meter"]["skipped_in_row"]:
                    continue
                found = self._restore_step(step, host, abstract, config)
            except CheckpointMismatch:
                raise
            except Exception as error:  # whatever a truncated or missing file makes Orbax or tensorstore raise
                problem = f"{type(error).__name__}: {str(error)[:300]}"
            problems = [p for p in hosts.gather(problem) if p]  # what one host cannot read, all of them leave
            if not problems:
                return found
            self._quarantine(step, problems[0])
        return None

    def _host(self, step: int) -> Any:
        return self._manager.restore(
            step, args=ocp.args.Composite(host=ocp.args.JsonRestore(), config=ocp.args.JsonRestore())
        )

    def _restore_step(self, step: int, json: Any, abstract: TrainState, config: TrainConfig) -> Restored:
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

    def _quarantine(self, step: int, problem: str) -> None:
        directory = epath.Path(self._manager.directory) / str(step)
        target = self._damaged / str(step)
        self._warn(
            f"WARNING: checkpoint {directory} cannot be read ({problem}); moving it to {target} and falling back to "
            "the one before"
        )
        self._manager.close()
        if hosts.is_first():
            if target.exists():
                target.rmtree()
            self._damaged.mkdir(parents=True, exist_ok=True)
            directory.rename(target)
        hosts.wait_for_all(f"quarantine of {step}")
        self._manager = self._open()

    def close(self) -> None:
        """Waits, then lets go of the threads."""
        self.settle()
        self._manager.close()


def load(
    workdir: str, step: int | None = None, mesh: Mesh | None = None, dtype: str | None = None
) -> tuple[TrainConfig, Any]:
    """The settings and the weights of a run, for evaluation; the newest checkpoint unless `step` names another.

    Of a run with `config.lora` it is the adapters (`kimi.load` merges them into their base). The weights are cut over
    the mesh, all devices by default, as in training; each device reads its own part. dtype: of all weights but the
    router bias and adapters; default: as they were trained. Raises FileNotFoundError if there is no such checkpoint.
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
        model = dataclasses.replace(config.model, param_dtype=dtype) if dtype else config.model
        abstract = abstract_params(model, mesh or sharding.make_mesh(MeshConfig()), config.lora)
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
    return _paths(dataclasses.replace(state, params=None, frozen=None))


def _unflat(like: TrainState, params: Any, flat: dict[str, Any]) -> TrainState:
    rest = dataclasses.replace(like, params=None, frozen=None)
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
