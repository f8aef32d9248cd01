"""The journal of a run: one SQLite file (WAL) with its events, every call's outcome, and texts too long to send back.

A call of the model or of a tool is keyed by who asked, what was asked, and the how-manieth such call it is, so that
equal calls of several agents, or of one, never share an answer. With that, three modes are one mechanism:

    new      nothing is known; every outcome is durable at the end of the event loop's turn in which it came
    resume   what is known is not asked again; what is not known is asked, and paid for
    replay   what is known is not asked again; what is not known is `ReplayMiss`, which ends the run at once

Outcomes that are no answer are outcomes, too: a 429, an error, a timeout, a refusal by the budget. Only what a user
aborted has none, and so goes on when the run is resumed. Files of others are read defensively: read-only, with limits.
"""

import fcntl
import hashlib
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

from kimi_jax.agents.events import Event, from_json, to_json

Mode = Literal["new", "resume", "replay"]
MAX_ROW = 1 << 26  # bytes of one row
MAX_EVENTS = 1_000_000  # of one attempt that a reader takes
_CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=False, check_circular=False, separators=(",", ":"))
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS events (attempt INTEGER, id INTEGER, line TEXT NOT NULL, PRIMARY KEY (attempt, id));
CREATE TABLE IF NOT EXISTS calls (key BLOB PRIMARY KEY, outcome TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS outputs (id INTEGER PRIMARY KEY, agent TEXT NOT NULL, text TEXT NOT NULL);
"""


class JournalError(ValueError):
    """The file is no journal, belongs to another run, or is in use."""


class ReplayMiss(Exception):
    """A replay asked for what the recorded run did not ask; the message says who and what."""


Outcome = dict[str, Any]  # JSON-able; `time` is when it was there, `duration` how long it took, in seconds


class Journal:
    """An open journal. path: a file, or ":memory:" for a run that nobody will want back."""

    def __init__(self, path: str | os.PathLike[str] = ":memory:", mode: Mode = "new"):
        self.path, self.mode = os.fspath(path), mode
        self._lock = _lock(self.path, mode)
        self._seen: Counter[bytes] = Counter()
        self._known: dict[bytes, str] = {}
        self._events: list[tuple[int, int, str]] = []  # what `flush` writes
        self._outcomes: list[tuple[bytes, str]] = []
        self.attempt = 0
        try:
            self._db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            self._db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_ROW)
            self._db.execute("PRAGMA trusted_schema = OFF")
            if mode == "new":
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = NORMAL")
                self._db.executescript(_SCHEMA)
            else:
                self._known = dict(self._db.execute("SELECT key, outcome FROM calls"))
                self.attempt = (self._db.execute("SELECT max(attempt) FROM events").fetchone()[0] or 0) + 1
        except sqlite3.Error as error:
            raise JournalError(f"{self.path} is no journal of a swarm: {error}") from error
        outcomes = (json.loads(text) for text in self._known.values())
        self.elapsed: float = max(
            (outcome["time"] for outcome in outcomes), default=0.0
        )  # of earlier attempts, seconds

    # ------------------------------------------------------------------------------------------------------------ meta

    def describe(self, identity: dict[str, Any], notes: dict[str, Any]) -> None:
        """Says what run this is. Raises JournalError if an opened journal is of another one; notes may differ."""
        if self.mode != "new":
            known = read_meta(self._db)
            for name, value in identity.items():
                if known.get(name) != value:
                    found = f"its {name} is {known.get(name)!r:.200}, not {value!r:.200}"
                    raise JournalError(f"{self.path} is of another run: {found}")
        if self.mode != "replay":
            rows = [(name, json.dumps(value)) for name, value in {**identity, **notes}.items()]
            self._db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", rows)

    # ---------------------------------------------------------------------------------------------------------- events

    def write(self, event: Event) -> None:
        """Appends an event, which `flush` makes durable; a replay writes nothing."""
        if self.mode != "replay":
            self._events.append((self.attempt, event.id, to_json(event)))

    def flush(self) -> None:
        """Makes everything durable, against the end of this process, and visible to readers."""
        if not self._events and not self._outcomes:
            return
        self._db.execute("BEGIN")
        try:
            self._db.executemany("INSERT INTO events VALUES (?, ?, ?)", self._events)
            self._db.executemany("INSERT OR REPLACE INTO calls VALUES (?, ?)", self._outcomes)
        finally:
            self._events, self._outcomes = [], []
            self._db.execute("COMMIT")

    # ----------------------------------------------------------------------------------------------------------- calls

    def next_key(self, agent: str, request: Any) -> bytes:
        """The key of the next call of this agent that asks exactly this (JSON-able)."""
        digest = hashlib.sha256(canonical_json([agent, request])).digest()
        self._seen[digest] += 1
        return digest[:16] + self._seen[digest].to_bytes(4, "big")

    def peek(self, key: bytes) -> bool:
        """Whether an earlier attempt has an outcome of this call."""
        return key in self._known

    def known(self, key: bytes, agent: str, what: str) -> Outcome | None:
        """The outcome of an earlier attempt, or None if it has to be asked. Raises ReplayMiss in a replay."""
        text = self._known.get(key)
        if text is None and self.mode == "replay":
            raise ReplayMiss(
                f"{agent} asks {what}, which the recorded run did not (occurrence {int.from_bytes(key[16:], 'big')}): "
                "the prompts, the tools, the settings or the code have changed. Record a new run, or use resume"
            )
        return None if text is None else json.loads(text)

    def remember(self, key: bytes, outcome: Outcome) -> None:
        """Writes an outcome, which `flush` makes durable."""
        if self.mode != "replay":
            self._outcomes.append((key, _CANONICAL.encode(outcome)))

    # --------------------------------------------------------------------------------------------------------- outputs

    def keep(self, agent: str, text: str) -> int:
        """Keeps a long text and returns its number."""
        return self._db.execute("INSERT INTO outputs (agent, text) VALUES (?, ?)", (agent, text)).lastrowid or 0

    def output(self, number: int) -> tuple[str, str] | None:
        """(agent, text) of a kept text, or None."""
        return self._db.execute("SELECT agent, text FROM outputs WHERE id = ?", (number,)).fetchone()

    def close(self) -> None:
        """Closes the file and lets others have it."""
        self.flush()
        self._db.close()
        if self._lock:
            self._lock.close()


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal for equal values."""
    return _CANONICAL.encode(value).encode("utf-8", "surrogatepass")


def _lock(path: str, mode: Mode) -> IO[bytes] | None:
    """An exclusive lock beside the file, so that two programs do not pay for the same run."""
    if path == ":memory:":
        return None
    if mode == "new" and Path(path).exists():
        raise JournalError(f"{path} exists; resume it, replay it, or give the new run another file")
    if mode != "new" and not Path(path).is_file():
        raise JournalError(f"there is no journal {path}")
    lock = Path(path + ".lock").open("wb")  # noqa: SIM115 (closed with the journal)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise JournalError(f"{path} is in use by another process") from error
    return lock


def read_meta(db: sqlite3.Connection) -> dict[str, Any]:
    """What the journal says of its run."""
    return {name: json.loads(value) for name, value in db.execute("SELECT name, value FROM meta LIMIT 100")}


def read_run(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[Event]]:
    """(meta, events of the last attempt) of a journal, which may be of a stranger or still in use.

    Raises JournalError for anything else.
    """
    try:
        db = sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro", uri=True)
        try:
            db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_ROW)
            db.execute("PRAGMA trusted_schema = OFF")
            return read_meta(db), list(_events(db))
        finally:
            db.close()
    except (sqlite3.Error, ValueError, RecursionError) as error:
        raise JournalError(f"{os.fspath(path)} is no journal of a swarm: {error}") from error


def _events(db: sqlite3.Connection) -> Iterator[Event]:
    query = "SELECT line FROM events WHERE attempt = (SELECT max(attempt) FROM events) ORDER BY id LIMIT ?"
    for (line,) in db.execute(query, (MAX_EVENTS,)):
        yield from_json(line)
