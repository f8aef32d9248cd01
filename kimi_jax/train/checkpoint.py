"""Saving and restoring a run with Orbax, asynchronously and atomically.

One Orbax step `WORKDIR/checkpoints/N` holds the run after N steps:
  params     the plain nested dict of weights: all that evaluation and conversion need; of `config.lora` its adapters
  optimizer  optimizer moments and counters, flat: path in the state -> array
  host       JSON: state of the source of batches, running values of the log
  host_arrays  the arrays in that state, if there are any: path in the JSON -> array
  config     JSON: the settings of the run
  checksums.json  of all these files (kimi_jax.checksums), written before the step is committed
Restoring goes into an abstract state with the shardings of *this* run, so another mesh is normal. A step that is proved
to be damaged is moved to `WORKDIR/damaged_checkpoints` once an earlier one has been restored: left in place, it would
make Orbax refuse to save its number again. If none can be restored, nothing is moved and the run does not start.
Trouble that may pass (no memory, no file descriptor, I/O errors) is raised. A step that cannot be written (a full disk)
is reported, removed and left out: training is worth more than one checkpoint.

With several hosts each of them calls every method here at the same point; `workdir` is then a place that all of them
see (`gs://...`, NFS).
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Collection
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh

from kimi_jax import checksums, hosts, sharding
from kimi_jax.config import CheckpointConfig, ConfigError, MeshConfig, TrainConfig, diff, freeze
from kimi_jax.hf.files import CheckpointError
from kimi_jax.nn.param import leaf_name
from kimi_jax.train import inputs
from kimi_jax.train.batches import described, join_arrays, split_arrays
from kimi_jax.train.state import TrainState, abstract_params

# signs of trouble that may pass, in the text of errors that tensorstore raises as ValueError
PASSING = ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "PERMISSION_DENIED", "DEADLINE_EXCEEDED", "OS error", "ABORTED")
ITEMS = ("params", "optimizer", "host", "host_arrays", "config")


class CheckpointMismatch(ConfigError):
    """A checkpoint belongs to a model or an optimizer of another shape; the message names what differs."""


class NoCheckpoint(ConfigError):
    """A workdir holds checkpoints and none of them can be used; starting at step 0 would overwrite its run."""


class CheckpointUnavailable(RuntimeError):
    """A checkpoint cannot be read just now, and nothing shows that it is damaged; the same command may succeed."""


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
        self._warn, self._verify = warn, options.verify
        self._asked: int | None = None  # the step of the last save
        self._open = lambda: _manager(workdir, options, before_commit=self._write_checksums if self._verify else None)
        self._manager = self._open()

    def _write_checksums(self) -> None:
        """Called by Orbax on every host, in its thread, when the files of a step are complete but not yet committed."""
        if hosts.is_first():
            _write_checksums(epath.Path(self._manager.directory), self._asked)

    def save(self, state: TrainState, host: dict[str, Any], config: TrainConfig) -> int:
        """Starts saving the state under its own step number, which it returns; a step that is there stays as it is.

        host: JSON, and NumPy arrays anywhere in it (`batches.HostState`), which are copied; TypeError for other values.
        """
        step = int(state.step)
        json, arrays = split_arrays(host)
        self.wait()
        self._asked = step
        if step not in self._manager.all_steps():
            items = ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                optimizer=ocp.args.StandardSave(_flat(state)),
                host=ocp.args.JsonSave(json),
                config=ocp.args.JsonSave(dataclasses.asdict(config)),
                **({"host_arrays": ocp.args.StandardSave(arrays)} if arrays else {}),
            )
            self._try(lambda: self._manager.save(step, args=items, force=True))
        return step

    def check_errors(self) -> None:
        """Warns if saving has failed in the background; does not wait."""
        self._try(self._manager.check_for_errors)

    def wait(self) -> bool:
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

    def restore(self, abstract: TrainState, config: TrainConfig, healthy: bool = False) -> Restored | None:
        """The newest checkpoint that can be read, or None without any.

        `abstract` carries shapes and shardings (`state.abstract`). Unreadable newer ones are moved away with a warning.
        healthy: pass over those written while updates were being left out.
        Raises CheckpointMismatch if the checkpoint's arrays have other names or shapes than those of `abstract`,
        NoCheckpoint if there are checkpoints but none is a whole one of a run, CheckpointUnavailable for trouble that
        may pass.
        """
        damaged: dict[int, str] = {}
        passed_over = False
        for step in sorted(self._manager.all_steps(), reverse=True):
            found, problem, trouble = None, None, None
            try:
                problem = self._damage(step)
                if problem is None:
                    host = self._host(step)
                    if healthy and host.host["meter"]["skipped_in_row"]:
                        passed_over = True
                        continue
                    found = self._restore_step(step, host, abstract, config)
            except (ConfigError, CheckpointUnavailable):  # a mismatch is not damage
                raise
            except Exception as error:  # whatever Orbax, tensorstore or the operating system raise
                problem, trouble = self._judge(step, error)
            # what one host cannot read, all of them leave
            reports = hosts.gather([problem, trouble])
            if troubles := [text for _, text in reports if text]:
                raise CheckpointUnavailable(self._unavailable(step, troubles[0]))
            if problems := [text for text, _ in reports if text]:
                damaged[step] = problems[0]
                continue
            for number, text in damaged.items():
                self._quarantine(number, text)
            return found
        if not passed_over:
            self._check_new(damaged)
        return None

    def _damage(self, step: int) -> str | None:
        """What the checksums of a step prove; None for nothing. Every host reads a share of the files."""
        folder = self._folder(step)
        items = {item for item in ITEMS if (folder / item).exists()} | set(_recorded_parts(folder))
        if "params" in items and not items & {"optimizer", "host"}:
            raise NoCheckpoint(
                f"{folder} holds weights without an optimizer state: {self._damaged.parent} was made by a conversion "
                "and is not the workdir of a run. Give the run a --config.workdir of its own; adapters can be trained "
                f"on these weights with --config.lora.base={self._damaged.parent}"
            )
        problem, trouble = None, None
        if self._verify:
            try:
                problem = next(iter(_own_problems(folder)), None)
            except (OSError, MemoryError) as error:
                trouble = f"{type(error).__name__}: {error}"
        found = hosts.gather([problem, trouble])
        if troubles := [text for _, text in found if text]:
            raise CheckpointUnavailable(self._unavailable(step, troubles[0]))
        return next((text for text, _ in found if text), None)

    def _judge(self, step: int, error: Exception) -> tuple[str | None, str | None]:
        """What an error while a step was read proves: (damage, None), or (None, trouble that may pass)."""
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        try:
            proved = checksums.problems(self._folder(step))
            has_sums = _recorded_parts(self._folder(step)) != ()
        except (OSError, MemoryError):
            return None, text
        if proved:
            return proved[0], None
        of_content = isinstance(error, (FileNotFoundError, KeyError, ValueError)) and not any(
            sign in text for sign in PASSING
        )
        return (text, None) if of_content and not has_sums else (None, text)

    def _unavailable(self, step: int, trouble: str) -> str:
        return (
            f"checkpoint {self._folder(step)} cannot be read just now ({trouble}). Nothing shows that it is damaged, "
            "and nothing was changed: start again when the cause is gone"
        )

    def _check_new(self, damaged: dict[int, str]) -> None:
        """Raises NoCheckpoint if this workdir has had checkpoints, of which none can be used."""
        if damaged:
            shown = "; ".join(f"step {step}: {problem}" for step, problem in damaged.items())
            raise NoCheckpoint(
                f"none of the {len(damaged)} checkpoints in {self._manager.directory} can be read ({shown}). Nothing "
                "was moved or overwritten. Bring a whole one back, or start a new run in another --config.workdir"
            )
        if self._damaged.exists() and any(self._damaged.iterdir()):
            raise NoCheckpoint(
                f"{self._damaged} holds damaged checkpoints and {self._manager.directory} holds none: starting at step "
                "0 would overwrite this run. Bring a whole one back, or use another --config.workdir"
            )

    def _folder(self, step: int) -> epath.Path:
        return epath.Path(self._manager.directory) / str(step)

    def _host(self, step: int) -> Any:
        return self._manager.restore(
            step, args=ocp.args.Composite(host=ocp.args.JsonRestore(), config=ocp.args.JsonRestore())
        )

    def _restore_step(self, step: int, json: Any, abstract: TrainState, config: TrainConfig) -> Restored:
        saved_config = freeze(json.config)
        for item in ("params", "optimizer"):
            if not (self._folder(step) / item / "_METADATA").exists():  # Orbax would report a tree without arrays
                raise FileNotFoundError(f"{self._folder(step) / item / '_METADATA'} is missing")
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
        return Restored(step, state, self._with_arrays(step, json.host), saved_config)

    def _with_arrays(self, step: int, host: dict[str, Any]) -> dict[str, Any]:
        like = described(host)
        if not like:
            return host
        found = self._manager.restore(step, args=ocp.args.Composite(host_arrays=ocp.args.StandardRestore(like)))
        return join_arrays(host, found.host_arrays)

    def _quarantine(self, step: int, problem: str) -> None:
        directory = self._folder(step)
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
        self.wait()
        self._manager.close()


def load(
    workdir: str,
    step: int | None = None,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    verify: bool = True,
    parts: Collection[str] | None = None,
) -> tuple[TrainConfig, Any]:
    """The settings and the weights of a run, for evaluation; the newest checkpoint unless `step` names another.

    The settings name the copy of the tokenizer in the workdir, so that the workdir may have been copied.
    Of a run with `config.lora` it is the adapters (`kimi.load` merges them into their base). The weights are sharded
    over the mesh, all devices by default, as in training; each device reads its own part. dtype: of all weights but the
    router bias and adapters; default: as they were trained. verify: compare the files with their checksums first.
    parts: names at the top of the tree (`vision`, `lm_head`), of which alone anything is read; default all.
    Raises FileNotFoundError if there is no such checkpoint, CheckpointError if it is damaged.
    """
    manager = _manager(workdir, CheckpointConfig(), read_only=True)
    try:
        steps = sorted(manager.all_steps())
        if not steps or (step is not None and step not in steps):
            raise FileNotFoundError(
                f"no checkpoint {'' if step is None else f'of step {step} '}in {manager.directory}; there are: {steps}"
            )
        step = steps[-1] if step is None else step
        if verify and (damage := _damage_on_load(epath.Path(manager.directory) / str(step))):
            raise CheckpointError("\n  ".join(["the checkpoint is damaged:", *damage]))
        config = freeze(manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore())).config)
        model = dataclasses.replace(config.model, param_dtype=dtype) if dtype else config.model
        abstract = abstract_params(model, mesh or sharding.make_mesh(MeshConfig()), config.lora)
        params = _restore_parts(epath.Path(manager.directory) / str(step) / "params", abstract, parts)
    finally:
        manager.close()
    tokenizer = inputs.kept_tokenizer(workdir, config.data.tokenizer)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=tokenizer)), params


def save_weights(workdir: str, params: Any, config: TrainConfig, keep: int = 2) -> int:
    """Weights alone as the next step of `workdir`, for whoever calls `load` or a server; returns its number, 1 or more.

    They are complete when it returns; older ones than the last `keep` are removed. A number is never used twice as long
    as the folder exists. One host only. Raises OSError and whatever else Orbax raises if they cannot be written.
    """
    step = 0
    manager = _manager(
        workdir, CheckpointConfig(keep=keep),
        before_commit=lambda: _write_checksums(epath.Path(workdir).absolute() / "checkpoints", step),
    )  # fmt: skip
    try:
        step = 1 + max(manager.all_steps(), default=0)
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params), config=ocp.args.JsonSave(dataclasses.asdict(config))
        )
        manager.save(step, args=items, force=True)
        manager.wait_until_finished()
    finally:
        manager.close()
    return step


def load_settings(workdir: str) -> TrainConfig:
    """The settings of the newest checkpoint of a workdir; reads no weights. Raises FileNotFoundError without one."""
    manager = _manager(workdir, CheckpointConfig(), read_only=True)
    try:
        step = manager.latest_step()
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {manager.directory}")
        return freeze(manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore())).config)
    finally:
        manager.close()


def _write_checksums(steps: epath.Path, step: int | None) -> None:
    """Of a step whose files are complete but not yet committed."""
    half = [p for p in steps.iterdir() if p.name.startswith(f"{step}.orbax-checkpoint-tmp")]
    checksums.write(half[0] if half else steps / str(step))  # in a bucket it has its name from the start


def _restore_parts(item: epath.Path, abstract: Any, parts: Collection[str] | None) -> Any:
    wanted = {name: tree for name, tree in abstract.items() if parts is None or name in parts}
    args = ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=parts is not None,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(item, args=args)


def _damage_on_load(folder: epath.Path) -> list[str]:
    """Lines for damaged files; every host reads a share of them."""
    return [line for lines in hosts.gather(_own_problems(folder, ("params", "config"))) for line in lines]


def _own_problems(folder: epath.Path, parts: tuple[str, ...] = ()) -> list[str]:
    return checksums.problems(folder, parts, jax.process_index(), jax.process_count())


def _recorded_parts(folder: epath.Path) -> tuple[str, ...]:
    """Items of a step that have checksums; empty without any."""
    try:
        sums = checksums.recorded(folder)
    except ValueError:  # the list is damaged: it was there
        return ITEMS
    return tuple({name.split("/")[0] for name in sums or ()})


def _manager(
    workdir: str,
    options: CheckpointConfig,
    read_only: bool = False,
    before_commit: Callable[[], None] | None = None,
) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        epath.Path(workdir).absolute() / "checkpoints",
        options=ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(options.keep),
            cleanup_tmp_directories=not read_only,  # what a killed run left half-written
            create=not read_only,
            read_only=read_only,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=before_commit),
        ),
        item_names=ITEMS,
        item_handlers={
            "params": ocp.StandardCheckpointHandler(),
            "optimizer": ocp.StandardCheckpointHandler(),
            "host": ocp.JsonCheckpointHandler(),
            "host_arrays": ocp.StandardCheckpointHandler(),
            "config": ocp.JsonCheckpointHandler(),
        },
    )


def _paths(tree: Any) -> dict[str, Any]:
    """Leaves by their path, `embed.embedding` or `opt_state.0.mu.embed.embedding`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {leaf_name(path): leaf for path, leaf in leaves}


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
