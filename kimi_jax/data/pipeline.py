"""The data stream of a run: logical shards in worker processes, batches, and the state of the batch last delivered.

G   logical shards (packs of the global batch); this host serves some of them
B   rows of a local batch: (shards of this host) * rows_per_pack

Each worker process (Grain `mp_prefetch`) owns some of the shards and makes one pack of each at a time. Every pack
travels with the state its shard had right after it, so `state()` belongs to the batch last delivered, however much was
prefetched. Shards know nothing of workers or hosts: any split of them gives the same packs (docs/architecture.md
section 3).

What Grain 0.2.18 does about a worker that goes wrong: an exception is raised again here with the worker's traceback; a
worker that dies by a signal or a non-zero exit is noticed within a second (RuntimeError); one that merely hangs is
waited for without end, and one whose trainer was killed lives on for ever. The last two are dealt with here: a worker
from which nothing came for `stall_seconds`, all of them at one record, is killed, which turns into that RuntimeError,
and workers leave with their parent.
"""

from __future__ import annotations

import json
import logging
import math
import mmap
import multiprocessing
import multiprocessing.process
import os
import signal
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from kimi_jax.config import ConfigError, DataConfig, ModelConfig
from kimi_jax.data import DataError
from kimi_jax.data.bins import check_bins
from kimi_jax.data.example import Source
from kimi_jax.data.packing import PackShape
from kimi_jax.data.shard import NAMED, Quarantine, Shard, check_bad, wholly_masked
from kimi_jax.data.tokenizer import Tokenizer, load_tokenizer
from kimi_jax.packed_batch import PackedBatch, concatenate, map_arrays

VERSION = 3  # of the state; 2 counted text for the vision ratio when it was drawn
POLLS = 4  # at what a worker reads, in the stall time; one that has moved on to another record is slow, and not stuck
START_UP = 9  # times the stall time that a worker may take besides until it reads its first record, or from one on
log = logging.getLogger(__name__)


class _Shards(grain.IterDataset):
    """Some logical shards as a Grain dataset. An element holds one pack of each of them, and their states as JSON."""

    def __init__(
        self,
        shards: Sequence[int],
        states: Mapping[str, dict],
        data: DataConfig,
        model: ModelConfig,
        total_steps: int,
        sources: Mapping[str, Source] | None,
        tokenizer: Tokenizer | None,
        whereabouts: str,
    ):
        super().__init__()
        self._shards, self._states, self._whereabouts = tuple(shards), states, whereabouts
        self._settings = (data, model, total_steps)
        self._sources, self._tokenizer = sources, tokenizer

    def __iter__(self) -> grain.DatasetIterator:
        return _ShardsIterator(self)

    def open(self) -> list[Shard]:
        """The shards at their states; opens the sources."""
        data = self._settings[0]
        tokenizer = self._tokenizer or load_tokenizer(data.tokenizer)
        sources = self._sources if self._sources is not None else _open_sources(data)
        quarantine = Quarantine(self._states.values(), _Note(self._whereabouts).write)
        states = [self._states.get(str(k)) for k in self._shards]
        shards = [
            Shard(k, *self._settings, sources, tokenizer, state, quarantine)
            for k, state in zip(self._shards, states, strict=True)
        ]
        if states[0] is None:
            shards[0].check_sizes()  # those of one shard speak for all
        return shards


class _ShardsIterator(grain.DatasetIterator):
    """Makes the elements of `_Shards`, opening the sources on first use, so in the worker."""

    def __init__(self, dataset: _Shards):
        super().__init__()
        self._dataset = dataset
        self._opened: list[Shard] | None = None

    def __next__(self) -> dict:
        if self._opened is None:
            self._opened = self._dataset.open()
        batch = concatenate([shard.next_pack() for shard in self._opened])
        states = {str(k): s.state() for k, s in zip(self._dataset._shards, self._opened, strict=True)}
        return {"batch": batch.as_dict(), "states": json.dumps(states)}

    def get_state(self) -> dict:
        """Nothing: the state that counts travels with each element."""
        return {}

    def set_state(self, state: dict) -> None:
        """Not used: a stream starts at the states it is given."""
        raise NotImplementedError("a BatchStream is restored by passing `state` to it")


def _open_sources(data: DataConfig) -> dict[str, Source]:
    from kimi_jax.data.sources import open_source  # readers may themselves import this package

    return {name: open_source(config) for name, config in data.sources.items()}


class _Note:
    """A line in a small file that both a worker and its parent have in memory: what the worker is reading."""

    SIZE = 256

    def __init__(self, path: str):
        with open(path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), self.SIZE)

    def write(self, text: str) -> None:
        self._memory[:] = text.encode()[: self.SIZE].ljust(self.SIZE)

    def read(self) -> str:
        return self._memory[:].decode(errors="replace").strip("\0 ")


def _leave_with_parent(worker_index: int, worker_count: int) -> None:
    """Runs at the start of a worker: ends it when its parent is gone, which Grain would not notice.

    Ctrl-C in a terminal reaches the workers too; whether and when to end is for the trainer to say.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent,), daemon=True, name="leave-with-parent").start()


def _follow(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)


class BatchStream:
    """Endless iterator over packed batches of this host's shards (`kimi_jax.packed_batch`).

    shards: logical shards of this host, default all; rows come in ascending order of them.
    state:  of `state()`, or `merge_states` of those of all hosts; continues with exactly the next batch.
    sources, tokenizer: instead of opening those the settings name; must be picklable when there are workers.
    stall_seconds: a worker that delivers nothing for so long is given up.
    gather: gives every host what all of them passed (`hosts.gather`); state and report are then of all hosts.

    `data.num_workers` processes share the shards; 0 makes batches here, in a thread `data.prefetch` packs ahead
    (`prefetch=0`: no thread). Raises ConfigError and DataError, at once for settings, from `next` for data.
    """

    def __init__(
        self,
        data: DataConfig,
        model: ModelConfig,
        total_steps: int,
        *,
        shards: Sequence[int] | None = None,
        state: dict | None = None,
        sources: Mapping[str, Source] | None = None,
        tokenizer: Tokenizer | None = None,
        stall_seconds: float = 600.0,
        gather: Callable[[Any], list[Any]] = lambda value: [value],
    ):
        self._data, self._shape = data, PackShape.of(data, model)
        check_bins(data, model)
        self._shards = _check_shards(data, shards)
        _check_tokenizer(tokenizer or load_tokenizer(data.tokenizer), model)
        self._states = _check_state(state, data, self._shards)
        self._stall_seconds, self._gather = stall_seconds, gather
        self._closed = False
        self._warned: set[str] = set()  # wholly masked sources
        self._workers: list[multiprocessing.process.BaseProcess] = []
        workers = min(data.num_workers, len(self._shards))
        self._has_workers = workers > 0
        parts = [list(map(int, p)) for p in np.array_split(self._shards, max(1, workers))]
        self._parts, self._at, self._stuck = parts, 0, ""
        self._patience = 0  # looks that are left; 0: nobody waits for a worker
        self._polling = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="kimi_data_")
        notes = [os.path.join(self._folder.name, str(n)) for n in range(len(parts))]
        for note in notes:
            with open(note, "wb") as file:
                file.truncate(_Note.SIZE)
        self._notes = [_Note(note) for note in notes]
        settings = (data, model, total_steps, sources, tokenizer)
        self._iterators = [
            self._start(_Shards(part, self._states, *settings, note), len(part))
            for part, note in zip(parts, notes, strict=True)
        ]
        self._before = set(multiprocessing.active_children())
        # at the latest when the interpreter ends, and before Grain's own modules are taken down
        self._finalizer = weakref.finalize(self, _close_all, self._iterators)
        for iterator in self._iterators:
            iterator.start_prefetch()  # all at once, so that the first batch costs one start-up and not several

    def _start(self, dataset: grain.IterDataset, shards: int) -> grain.DatasetIterator:
        elements = math.ceil(self._data.prefetch / shards)
        if self._has_workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain reads its own flags; outside absl's app.run nobody parses any
            options = grain.MultiprocessingOptions(num_workers=1, per_worker_buffer_size=max(1, elements))
            dataset = dataset.mp_prefetch(options, worker_init_fn=_leave_with_parent)
        elif elements:
            dataset = grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=elements)
        return iter(dataset)

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> PackedBatch:
        """The next batch: arrays of this host's rows.

        Raises DataError (also for a worker that hangs, naming what it was reading), RuntimeError for one that died.
        """
        if self._closed:
            raise ValueError("this BatchStream is closed")
        with self._polling:
            self._patience, self._same, self._seen = (START_UP + 1) * POLLS, 0, ""
            self._watch()
        try:
            elements = [self._element(n) for n in range(len(self._iterators))]
        except Exception as error:
            raise (DataError(self._stuck) if self._stuck else error) from error
        finally:
            with self._polling:
                self._timer.cancel()
                self._patience = 0
        self._workers = self._own_workers()
        for element in elements:
            self._states.update(json.loads(element["states"]))
        self._check_bad()
        self._warn_of_masked()
        batch = concatenate([PackedBatch.from_dict(element["batch"]) for element in elements])
        # Grain's arrays live in shared memory that is unlinked under whoever keeps a view
        return map_arrays(_plain, batch) if self._has_workers else batch

    def _element(self, number: int) -> dict:
        self._at = number
        return next(self._iterators[number])

    def _watch(self) -> None:
        self._timer = threading.Timer(self._stall_seconds / POLLS, self._poll_workers)
        self._timer.daemon = True
        self._timer.start()

    def _poll_workers(self) -> None:
        with self._polling:
            if not self._patience or threading.current_thread() is not self._timer:
                return  # the batch came while this look began
            reading = self._notes[self._at].read()
            self._same = self._same + 1 if reading and reading == self._seen else 0
            self._patience -= 1
            self._seen = reading
            if self._same < POLLS and self._patience:
                self._watch()
            else:
                self._give_up(reading)

    def _give_up(self, reading: str) -> None:
        worker = f"data worker {self._at} of {len(self._parts)}" if self._has_workers else "the data thread"
        self._stuck = (
            f"{worker} (shards {self._parts[self._at]}) has delivered nothing for {self._stall_seconds:.0f} s; it "
            f"hangs at: {reading or 'opening its sources'}"
        )
        log.error(self._stuck)
        for process in self._own_workers():
            process.kill()

    def _own_workers(self) -> list[multiprocessing.process.BaseProcess]:
        """The processes of this stream: Grain's that appeared between its start and its first batch."""
        if self._workers:
            return self._workers
        new = [p for p in multiprocessing.active_children() if p not in self._before]
        return [p for p in new if p.name.startswith("grain-process-prefetch")] if self._has_workers else []

    def _check_bad(self) -> None:
        for name in self._data.sources:
            draws, size, bad, named = self._of_source(name, self._states.values())
            check_bad(name, draws, size, bad, named, self._data.max_bad_fraction)

    def _warn_of_masked(self) -> None:
        for name in set(self._masked(list(self._states.values()))) - self._warned:
            self._warned.add(name)
            log.warning(
                "source %r: no example has a loss anywhere (all weights are 0), so nothing is learned from it; look at "
                "{loss=...} in its template or at `loss` in its records",
                name,
            )

    def _masked(self, states: Sequence[dict]) -> list[str]:
        masked = []
        for name in self._data.sources:
            draws, size, bad, _ = self._of_source(name, states)
            learned = sum(state["sources"][name].get("learned", 1) for state in states)
            if states and wholly_masked(draws, size, sum(bad.values()), learned):
                masked.append(name)
        return masked

    def _of_source(self, name: str, states: Iterable[dict]) -> tuple[int, int, dict[str, int], list[str]]:
        draws, size = 0, 0
        bad: dict[str, int] = {}
        named: list[str] = []
        for state in states:
            source = state["sources"][name]
            draws, size, named = draws + source["drawn"], source["size"], named + source["named"]
            for reason, count in source["bad"].items():
                bad[reason] = bad.get(reason, 0) + count
        return draws, size, bad, list(dict.fromkeys(named))[:NAMED]

    def state(self) -> dict:
        """The state that belongs to the batch last delivered, JSON-able; of the shards of all hosts with `gather`."""
        own = {
            "version": VERSION,
            "num_packs": self._data.num_packs,
            "seed": self._data.seed,
            "shards": json.loads(json.dumps(self._states)),
        }
        return _of_all_hosts(self._gather(own))

    def update(self, params: Any, step: int) -> None:
        """Data does not depend on the weights."""

    def report(self) -> dict:
        """What the shards have delivered since the beginning of the run (restored states included); of all hosts with
        `gather`.

        {"batches", "tokens", "vision_tokens", "documents": int, "ratio", "token_fill": float, "patch_fill": [K] floats,
         "bad": {source: {reason: count}}, "bad_examples": {source: [text]}, "epochs": {source: float},
         "quarantined": {source: {index: [reason, key, detail]}}, "masked": [sources without any loss],
         "shortened": {source: conversations that lost turns}}
        """
        states = list(self.state()["shards"].values())
        used = [state["used"] for state in states]
        tokens = sum(u["tokens"] for u in used)
        vision = sum(u["vision_tokens"] for u in used)
        packs = sum(state["step"] for state in states)
        patches = [sum(u["patches"][k] for u in used) for k in range(len(self._shape.bins))]
        sources = {name: self._of_source(name, states) for name in self._data.sources}
        share = len(states or self._shards) / self._data.num_packs
        return {
            "batches": max((state["step"] for state in states), default=0),
            "tokens": tokens,
            "vision_tokens": vision,
            "documents": sum(u["documents"] for u in used),
            "ratio": vision / max(1, tokens),
            "token_fill": tokens / max(1, packs * self._shape.rows * self._shape.sequence_length),
            "patch_fill": [n / max(1, packs * p * v) for n, (p, v) in zip(patches, self._shape.bins, strict=True)],
            "bad": {name: bad for name, (_, _, bad, _) in sources.items() if bad},
            "bad_examples": {name: named for name, (_, _, _, named) in sources.items() if named},
            "quarantined": {name: met for name in self._data.sources if (met := _quarantined(name, states))},
            "masked": self._masked(states),
            "shortened": {name: n for name in self._data.sources if (n := _shortened(name, states))},
            "epochs": {name: draws / max(1, size) / share for name, (draws, size, _, _) in sources.items()},
        }

    def close(self) -> None:
        """Ends workers and threads. The state and the report stay readable."""
        self._closed = True
        self._finalizer()

    def __enter__(self) -> BatchStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def merge_states(states: Sequence[dict]) -> dict:
    """One state out of those of all hosts; any host may be restored from it.

    Raises DataError if they belong to different streams or batches, or if two hold the same shard.
    """
    if not states:
        raise DataError("no data states to merge")
    merged = {**states[0], "shards": {}}
    for state in states:
        same = all(state[key] == merged[key] for key in ("version", "num_packs", "seed"))
        twice = set(state["shards"]) & set(merged["shards"])
        if not same or twice:
            raise DataError(f"data states of different streams, or shards {sorted(twice)} twice; merge one run's hosts")
        merged["shards"].update(state["shards"])
    steps = {shard["step"] for shard in merged["shards"].values()}
    if len(steps) > 1:
        raise DataError(f"data states of different batches ({sorted(steps)}); save all hosts after the same batch")
    return merged


def _of_all_hosts(states: list[dict]) -> dict:
    """One state out of those of all hosts; a shard that several hosts make counts once."""
    seen: set[str] = set()
    for state in states:
        state["shards"] = {k: v for k, v in state["shards"].items() if k not in seen}
        seen |= set(state["shards"])
    return merge_states([state for state in states if state["shards"]] or states[:1])


def _quarantined(name: str, states: Sequence[dict]) -> dict[str, list[str]]:
    met: dict[str, list[str]] = {}
    for state in states:
        met |= state["sources"][name]["quarantined"]
    return dict(sorted(met.items(), key=lambda item: int(item[0])))


def _shortened(name: str, states: Sequence[dict]) -> int:
    return sum(state["sources"][name].get("shortened", 0) for state in states)


def _close_all(iterators: list) -> None:
    while iterators:  # emptied, so that no iterator lives to see Grain's modules taken down at exit
        iterators.pop().close()


def _plain(array: np.ndarray) -> np.ndarray:
    return array if type(array) is np.ndarray else np.array(array, subok=False)


def _check_shards(data: DataConfig, shards: Sequence[int] | None) -> list[int]:
    chosen = sorted(range(data.num_packs) if shards is None else (int(k) for k in shards))
    if not chosen or len(set(chosen)) != len(chosen) or chosen[0] < 0 or chosen[-1] >= data.num_packs:
        raise ConfigError(f"shards {chosen} of a stream with data.num_packs = {data.num_packs}")
    if data.buffer_size < 1 or data.num_workers < 0 or data.prefetch < 0:
        raise ConfigError("data.buffer_size must be at least 1; data.num_workers and data.prefetch not negative")
    return chosen


def _check_tokenizer(tokenizer: Tokenizer, model: ModelConfig) -> None:
    pairs = {
        "eos_token_id": (model.eos_token_id, tokenizer.eos_id),
        "pad_token_id": (model.pad_token_id, tokenizer.pad_id),
        "media_placeholder_token_id": (model.media_placeholder_token_id, tokenizer.media_pad_id),
    }
    for name, (wanted, found) in pairs.items():
        if wanted != found:
            raise ConfigError(f"model.{name} is {wanted}, but the tokenizer has {found} there; set it to {found}")
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(f"the tokenizer has {tokenizer.vocab_size} tokens, model.vocab_size is {model.vocab_size}")


def _check_state(state: dict | None, data: DataConfig, shards: list[int]) -> dict[str, dict]:
    if state is None or not state["shards"]:
        return {}
    for key, wanted in (("version", VERSION), ("num_packs", data.num_packs), ("seed", data.seed)):
        if state[key] != wanted:
            raise DataError(f"the data state has {key} {state[key]}, this run {wanted}; it cannot continue that stream")
    missing = [k for k in shards if str(k) not in state["shards"]]
    if missing:
        raise DataError(f"the data state lacks the shards {missing}; merge the states of all hosts (merge_states)")
    return {str(k): state["shards"][str(k)] for k in shards}
