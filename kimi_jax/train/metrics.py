"""What a run tells about itself: rows over a log interval, the files they go to, the progress line, and the yardsticks.

A row is the mean over the steps since the row before. It is the same, bit for bit, whether or not the run was killed in
between: the running sums travel with the checkpoint. Only the keys in `TIMED` depend on the machine.

Row (one JSON line of `WORKDIR/metrics.jsonl`):
  step; loss, loss_text, loss_image, loss_video (nats a target token; null if there was none); balance_loss
  tokens, features, patches (real ones in the interval); tokens_seen (since the start of the run)
  lr, update_rms_muon, update_rms_adamw (of the last step); grad_norm (mean, before clipping)
  max_logit [L], clipped_heads; expert_load [Lm][E] (tokens), load_imbalance [Lm] (largest over mean); dropped;
  skipped (steps without update)
  tokens_per_s, patches_per_s, flops_per_s (the model's own), mfu, step_s, wait_s (for data, of a step), time_s (since
  the start of the run)
and from the data stream: token_fill, vision_ratio, data (all that `BatchStream.report()` says)

`WORKDIR/eval.jsonl` has one line an evaluation: step, eval (task/metric -> score), rows (see kimi_jax.eval.runner).

L layers, Lm layers with experts, E experts, 3 modalities
"""

from __future__ import annotations

import json
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kimi_jax.config import ModelConfig
from kimi_jax.train import flops
from kimi_jax.train.step import MODALITIES

_SUMS = ("nll_sum", "weight_sum", "balance_loss", "grad_norm")  # over steps with an update
_TOTALS = (*flops.COUNTS, "expert_load", "dropped", "clipped_heads")  # over all steps
TIMED = ("tokens_per_s", "patches_per_s", "flops_per_s", "mfu", "step_s", "wait_s", "time_s")
_LAST = ("lr", "update_rms_muon", "update_rms_adamw")


class Meter:
    """Running sums since the last row. Holds the metrics of one step back, so that the devices are never waited for."""

    def __init__(self, model: ModelConfig, log_interval: int, last_step: int, state: dict[str, Any] | None = None):
        self._model, self._interval, self._last_step = model, log_interval, last_step
        state = state or {"sums": {}, "tokens_seen": 0, "time_s": 0.0}
        self._sums = {k: np.asarray(v, np.float64) for k, v in state["sums"].items()}
        self._tokens_seen, self._time_s = state["tokens_seen"], state["time_s"]
        self._pending: tuple[int, Any, dict[str, Any]] | None = None
        self.fetched_step = self.skipped_in_row = 0  # as of the metrics fetched last
        self.skipped_now = False  # the push or flush just now brought a step without update
        self.restart_clock()

    def state(self) -> dict[str, Any]:
        """JSON of the sums; call `flush` first."""
        if self._pending is not None:
            raise RuntimeError("flush the meter before its state is saved")
        sums = {k: v.tolist() for k, v in self._sums.items()}
        return {"sums": sums, "tokens_seen": self._tokens_seen, "time_s": self._time_s}

    def restart_clock(self) -> None:
        """Leaves what happened so far (compiling, evaluation) out of the speed of the next row."""
        self._start, self._waited, self._timed = time.perf_counter(), 0.0, dict.fromkeys(flops.COUNTS, 0.0)
        self._timed_steps = 0

    def waited(self, seconds: float) -> None:
        """Adds time during which the loop waited for data."""
        self._waited += seconds

    def due(self, step: int) -> bool:
        """Whether a row ends with this step."""
        return step % self._interval == 0 or step == self._last_step

    def push(self, step: int, metrics: Any, beside: dict[str, Any]) -> dict[str, Any] | None:
        """Takes the device metrics of `step`, fetches those of the step before; returns its row if one is due.

        `beside` goes into the row of `step`; it must belong to that step, so that a row does not depend on when it is
        fetched.
        """
        row = self.flush()
        self._pending = (step, metrics, beside)
        return row

    def flush(self) -> dict[str, Any] | None:
        """Fetches what is pending (waits for it); returns its row if one is due."""
        self.skipped_now = False
        if self._pending is None:
            return None
        (step, metrics, beside), self._pending = self._pending, None
        self._add(jax.device_get(metrics))
        self.fetched_step = step
        return self._row(step) | beside if self.due(step) else None

    def _add(self, m: dict[str, Any]) -> None:
        finite = bool(m["finite"])
        self.skipped_in_row, self.skipped_now = int(m["skipped_in_row"]), not finite
        add = {k: m[k] for k in _TOTALS} | {"steps": 1, "skipped": not finite}
        if finite:
            add |= {k: m[k] for k in _SUMS}
        for k, v in add.items():
            self._sums[k] = self._sums.get(k, 0.0) + np.asarray(v, np.float64)
        for k in _LAST:
            if k in m:
                self._sums[k] = np.asarray(m[k], np.float64)
        self._sums["max_logits"] = np.maximum(self._sums.get("max_logits", -np.inf), np.float64(m["max_logits"]))
        self._tokens_seen += int(m["tokens"])
        self._timed_steps += 1
        for k in flops.COUNTS:
            self._timed[k] += float(m[k])

    def _row(self, step: int) -> dict[str, Any]:
        s, self._sums = self._sums, {}
        updates = s["steps"] - s["skipped"]
        nll, weight = s.get("nll_sum", np.zeros(3)), s.get("weight_sum", np.zeros(3))
        load = s["expert_load"]
        row: dict[str, Any] = {"step": step, "loss": _ratio(nll.sum(), weight.sum())}
        row |= {f"loss_{name}": _ratio(n, w) for name, n, w in zip(MODALITIES, nll, weight, strict=True)}
        row |= {k: _ratio(s.get(k, 0.0), updates) for k in ("balance_loss", "grad_norm")}
        row |= {k: float(s[k]) for k in _LAST if k in s}
        row |= {k: int(s[k]) for k in ("tokens", "features", "patches", "clipped_heads", "dropped", "skipped")}
        row |= {
            "tokens_seen": self._tokens_seen,
            "max_logit": _json(s["max_logits"]),
            "expert_load": _json(load),
            "load_imbalance": _json(load.max(-1) / np.maximum(load.mean(-1), 1e-9)) if load.size else [],
        }
        return row | self._speed()

    def _speed(self) -> dict[str, float]:
        seconds = max(time.perf_counter() - self._start, 1e-9)
        speed = {
            "tokens_per_s": self._timed["tokens"] / seconds,
            "patches_per_s": self._timed["patches"] / seconds,
            "step_s": seconds / max(self._timed_steps, 1),
            "wait_s": self._waited / max(self._timed_steps, 1),
            "flops_per_s": flops.train_flops(self._model, self._timed) / seconds,
        }
        self._time_s += seconds
        self.restart_clock()
        return speed | {"time_s": self._time_s}


def _ratio(a: Any, b: Any) -> float | None:
    return float(a / b) if b > 0 else None


def _json(x: Any) -> Any:
    """Python numbers rounded to what float32 can hold; what is not finite becomes null, which JSON can say."""
    x = np.asarray(x)
    if x.ndim:
        return [_json(item) for item in x]
    return float(f"{float(x):.8g}") if math.isfinite(x) else None


# --------------------------------------------------------------------------------------------------------------- files


class Log:
    """`metrics.jsonl` and `eval.jsonl` (for people and scripts) and TensorBoard events, continued at `start_step`.

    Rows beyond `start_step` belong to a part of the run that was lost and will be done again: they are cut off.
    """

    def __init__(self, workdir: str, start_step: int):
        self._dir = epath.Path(workdir)
        self._dir.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "eval.jsonl"):
            _truncate(self._dir / name, start_step)
        from tensorboardX import SummaryWriter  # a slow import, wanted by training only

        self._board = SummaryWriter(str(self._dir / "tensorboard"), purge_step=start_step + 1)

    def train(self, row: dict[str, Any]) -> None:
        """Appends one row of a Meter."""
        self._append("metrics.jsonl", row)
        for name, value in _scalars(row):
            self._board.add_scalar(f"train/{name}", value, row["step"])
        self._board.flush()

    def evaluation(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Appends what the tasks of one evaluation scored."""
        scores = {f"{row['task']}/{row['metric']}": row["score"] for row in rows}
        self._append("eval.jsonl", {"step": step, "eval": scores, "rows": rows})
        for row in rows:
            for name in ("score", "control"):
                self._board.add_scalar(f"eval/{row['task']}/{row['metric']}/{name}", row[name], step)
        self._board.flush()

    def evaluated(self) -> set[int]:
        """Steps whose evaluation is in the log."""
        return {row["step"] for row in read_rows(self._dir / "eval.jsonl")}

    def _append(self, name: str, row: dict[str, Any]) -> None:
        with (self._dir / name).open("a") as file:
            file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        """Ends the TensorBoard thread."""
        self._board.close()


def read_rows(path: Any) -> list[dict[str, Any]]:
    """The rows of a JSONL file; a last line that a killed run left unfinished is not one. Empty if there is no file."""
    path = epath.Path(path)
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _truncate(path: epath.Path, last_step: int) -> None:
    if path.exists():
        kept = [row for row in read_rows(path) if row["step"] <= last_step]
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))


def write_atomic(path: Any, text: str) -> None:
    """Writes a file so that a reader sees the old text or the new one, never half of it."""
    path = epath.Path(path)
    temporary = path.parent / f"{path.name}.tmp"
    temporary.write_text(text)
    temporary.replace(path)


def _scalars(row: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    out: list[tuple[str, float]] = []
    for key, value in row.items():
        if isinstance(value, dict):
            out += _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, list) and value and not isinstance(value[0], list):
            out += _scalars({f"layer_{i}": v for i, v in enumerate(value)}, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and key != "step":
            out.append((f"{prefix}{key}", value))
    return out


# ------------------------------------------------------------------------------------------------------- for the reader


def progress_line(row: dict[str, Any]) -> str:
    """The row as one line: loss by modality, speed, and the things that must not go wrong."""
    by_modality = [f"{m} {row[f'loss_{m}']:.3f}" for m in MODALITIES if row[f"loss_{m}"] is not None]
    parts = [f"loss {row['loss']:.3f}" if row["loss"] is not None else "loss -"]
    parts += [f"({', '.join(by_modality)})"] if by_modality else []
    parts += [f"{row['tokens_per_s']:,.0f} tok/s", f"{row['patches_per_s']:,.0f} patch/s"]
    parts += [f"MFU {row['mfu']:.1%}"] if "mfu" in row else []
    parts += [f"imbalance {max(row['load_imbalance']):.2f}"] if row["load_imbalance"] else []
    parts += [f"dropped {row['dropped']}"]
    logits = [x for x in row["max_logit"] if x is not None]
    parts += [f"max logit {max(logits):.1f}"] if logits else []
    parts += [f"SKIPPED {row['skipped']}"] if row["skipped"] else []
    return "  ".join(parts)


def parameter_table(infos: Any, shapes: Any) -> str:
    """How many parameters each part has, and how many of them each optimizer group moves."""
    groups = ("Muon", "AdamW", "RouterBias")
    counts = {part: dict.fromkeys(groups, 0) for part in shapes}
    for part in shapes:
        for info, x in zip(jax.tree.leaves(infos[part]), jax.tree.leaves(shapes[part]), strict=True):
            counts[part][type(info.group).__name__] += math.prod(x.shape)
    total = {g: sum(c[g] for c in counts.values()) for g in groups}
    lines = [f"  {'parameters':<16}{'all':>22}" + "".join(f"{g:>22}" for g in groups)]
    for part, by_group in [*counts.items(), ("total", total)]:
        cells = [sum(by_group.values()), *(by_group[g] for g in groups)]
        lines.append(f"  {part:<16}" + "".join(f"{n:>22,}" for n in cells))
    return "\n".join(lines)


def measure_matmul_rate(mesh: Mesh, dtype: str, seconds: float = 0.5) -> float:
    """FLOP/s of plain square matmuls on all devices at once, the denominator of MFU. Takes about `seconds`."""
    n = 1024 if mesh.devices.flat[0].platform == "cpu" else 8192
    cut = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    a = jax.jit(lambda: jnp.ones((mesh.size, n, n), dtype), out_shardings=cut)()
    multiply = jax.jit(lambda a, b: jnp.einsum("dij,djk->dik", a, b) / n, out_shardings=cut)
    x = multiply(a, a).block_until_ready()
    start, best = time.perf_counter(), math.inf
    while time.perf_counter() - start < seconds:
        before = time.perf_counter()
        x = multiply(x, a).block_until_ready()
        best = min(best, time.perf_counter() - before)
    return 2.0 * n**3 * mesh.size / best
