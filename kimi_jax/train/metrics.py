"""What a run tells about itself: rows over a log interval, the progress line, and the yardsticks.

A row is over the steps since the row before; each metric says where it is made how it is reduced
(`kimi_jax.train.objective`). It is the same, bit for bit, whether or not the run was killed in between: the running
values travel with the checkpoint. Only the keys in `TIMED` depend on the machine.

Row (one JSON line of `WORKDIR/metrics.jsonl`, see kimi_jax.train.log; `ROW` has every key of pre-training, another
objective has its own metrics instead of `loss_text` and so on):
  step; loss, loss_text, loss_image, loss_video (nats a target token; null if there was none); balance_loss
  tokens, features, patches (real ones in the interval); tokens_seen (since the start of the run)
  lr, update_rms_muon, update_rms_adamw (of the last step); grad_norm (mean, before clipping)
  max_logit [L], clipped_heads; expert_load [Lm][E] (tokens), load_imbalance [Lm] (largest over mean); dropped;
  rounds (of the exchange between expert devices), imbalance (rows of the fullest expert device over their mean): of the
  worst step; skipped (steps without update), spikes (those of them with a finite loss), rollbacks (since the start)
  tokens_per_s, patches_per_s, flops_per_s (the model's own), mfu, step_s, wait_s (for data, of a step), time_s (since
  the start of the run); goodput (of this start), goodput_run, seconds (of the run): see kimi_jax.train.goodput
and from the source of batches: token_fill, vision_ratio, data (all that its `report()` says, and interval_token_fill,
  interval_ratio: of the last interval)

L layers, Lm layers with experts, E experts, 3 modalities
"""

from __future__ import annotations

import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kimi_jax.config import ModelConfig
from kimi_jax.train import flops
from kimi_jax.train.objective import MODALITIES, Last, Max, Mean, Metric, Sum

REDUCTIONS: dict[str, type[Mean | Sum | Max | Last]] = {kind.__name__: kind for kind in (Mean, Sum, Max, Last)}
WORK = ("token_pairs", "patch_pairs")  # counted for flops_per_s, and no columns of a row
ROW = (
    "step", "loss", "loss_text", "loss_image", "loss_video", "balance_loss", "tokens", "features", "patches",
    "tokens_seen", "lr", "update_rms_muon", "update_rms_adamw", "grad_norm", "max_logit", "clipped_heads",
    "expert_load", "load_imbalance", "dropped", "rounds", "imbalance", "skipped", "spikes", "rollbacks", "tokens_per_s",
    "patches_per_s", "flops_per_s", "mfu", "step_s", "wait_s", "time_s", "goodput", "goodput_run", "seconds",
    "token_fill", "vision_ratio", "data",
)  # fmt: skip
TIMED = ("tokens_per_s", "patches_per_s", "flops_per_s", "mfu", "step_s", "wait_s", "time_s", "goodput", "goodput_run",
         "seconds")  # fmt: skip


class Meter:
    """Running values since the last row. Holds one step's metrics back, so that the devices are never waited for."""

    def __init__(self, model: ModelConfig, log_interval: int, last_step: int, state: dict[str, Any] | None = None):
        self._model, self._interval, self._last_step = model, log_interval, last_step
        state = state or {"running": {}, "tokens_seen": 0, "time_s": 0.0, "skipped_in_row": 0, "rollbacks": 0}
        self._running: dict[str, Metric] = {
            name: _wide(REDUCTIONS[kind](*values)) for name, (kind, *values) in state["running"].items()
        }
        self._tokens_seen, self._time_s = state["tokens_seen"], state["time_s"]
        self._pending: tuple[int, Any, dict[str, Any]] | None = None
        self.fetched_step = 0
        self.skipped_in_row: int = state["skipped_in_row"]  # as of the metrics fetched last
        self.rollbacks: int = state["rollbacks"]
        self.skipped_now = ""  # if the push or flush just now brought a step without update: why
        self.restart_clock()

    def state(self) -> dict[str, Any]:
        """JSON of the running values; call `flush` first."""
        if self._pending is not None:
            raise RuntimeError("flush the meter before its state is saved")
        return {
            "running": {k: [type(m).__name__, *(v.tolist() for v in m)] for k, m in self._running.items()},
            "tokens_seen": self._tokens_seen,
            "time_s": self._time_s,
            "skipped_in_row": self.skipped_in_row,
            "rollbacks": self.rollbacks,
        }

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
        self.skipped_now = ""
        if self._pending is None:
            return None
        (step, metrics, beside), self._pending = self._pending, None
        self._add(jax.device_get(metrics))
        self.fetched_step = step
        return self._row(step) | beside if self.due(step) else None

    def _add(self, m: dict[str, Any]) -> None:
        finite, spike = bool(m["finite"]), bool(m["spike"])
        self.skipped_in_row = int(m["skipped_in_row"])
        if not finite:
            self.skipped_now = "loss or gradient is not finite"
        elif spike:
            self.skipped_now = f"the loss spikes to {float(m['loss_total']):.4g}"
        found = {name: _wide(metric) for name, metric in m.items() if isinstance(metric, Mean | Sum | Max | Last)}
        if not finite or spike:
            found |= {k: Mean(*map(np.zeros_like, each)) for k, each in found.items() if isinstance(each, Mean)}
        counted = {"steps": 1, "skipped": not finite or spike, "spikes": spike}
        for name, metric in (found | {k: _wide(Sum(v)) for k, v in counted.items()}).items():
            before: Any = self._running.get(name)
            self._running[name] = metric if before is None else before.add(metric)
        self._tokens_seen += int(m["tokens"].value)
        self._timed_steps += 1
        for k in flops.COUNTS:
            self._timed[k] += float(m[k].value)

    def _row(self, step: int) -> dict[str, Any]:
        running, self._running = self._running, {}
        load = np.asarray(running["expert_load"][0])
        values = {
            "step": step,
            **{name: _value(metric) for name, metric in running.items() if name not in (*WORK, "steps")},
            "tokens_seen": self._tokens_seen,
            "rollbacks": self.rollbacks,
            "load_imbalance": _json(load.max(-1) / np.maximum(load.mean(-1), 1e-9)) if load.size else [],
            **self._speed(),
        }
        return {k: values[k] for k in ROW if k in values} | values  # in the order of ROW

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


def _wide(metric: Any) -> Any:
    """The same metric in float64, which sums of many steps need."""
    return type(metric)(*(np.asarray(value, np.float64) for value in metric))


def _value(metric: Metric) -> Any:
    """What stands in a row: null for a mean of nothing, and an integer where the value is one."""
    if isinstance(metric, Mean):
        return float(metric.total / metric.weight) if metric.weight > 0 else None
    if isinstance(metric, Last) or metric.value.ndim or not float(metric.value).is_integer():
        return _json(metric.value)
    return int(metric.value)


def _json(x: Any) -> Any:
    """Python numbers rounded to what float32 can hold; what is not finite becomes null, which JSON can say."""
    x = np.asarray(x)
    if x.ndim:
        return [_json(item) for item in x]
    return float(f"{float(x):.8g}") if math.isfinite(x) else None


# ------------------------------------------------------------------------------------------------------- for the reader


def progress_line(row: dict[str, Any]) -> str:
    """The row as one line: loss by modality, speed, and the things that must not go wrong."""
    by_modality = [f"{m} {row[f'loss_{m}']:.3f}" for m in MODALITIES if row.get(f"loss_{m}") is not None]
    parts = [f"loss {row['loss']:.3f}" if row["loss"] is not None else "loss -"]
    parts += [f"({', '.join(by_modality)})"] if by_modality else []
    parts += [f"{row['tokens_per_s']:,.0f} tok/s", f"{row['patches_per_s']:,.0f} patch/s"]
    parts += [f"MFU {row['mfu']:.1%}"] if "mfu" in row else []
    parts += [f"imbalance {max(row['load_imbalance']):.2f}"] if row["load_imbalance"] else []
    parts += [f"rounds {row['rounds']}"] if row["rounds"] > 1 else []
    parts += [f"dropped {row['dropped']}"]
    logits = [x for x in row["max_logit"] if x is not None]
    parts += [f"max logit {max(logits):.1f}"] if logits else []
    parts += [f"goodput {row['goodput_run']:.0%}"] if "goodput_run" in row else []
    parts += [f"SKIPPED {row['skipped']}"] if row["skipped"] else []
    parts += [f"ROLLED BACK {row['rollbacks']} times"] if row["rollbacks"] else []
    return "  ".join(parts)


def parameter_table(infos: Any, shapes: Any) -> str:
    """How many parameters each part has, and how many of them each optimizer group moves."""
    some_frozen = any(type(info.group).__name__ == "Frozen" for info in jax.tree.leaves(infos))
    groups = ("Muon", "AdamW", "RouterBias", *(("Frozen",) if some_frozen else ()))
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
    placement = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    a = jax.jit(lambda: jnp.ones((mesh.size, n, n), dtype), out_shardings=placement)()
    multiply = jax.jit(lambda a, b: jnp.einsum("dij,djk->dik", a, b) / n, out_shardings=placement)
    x = multiply(a, a).block_until_ready()
    start, best = time.perf_counter(), math.inf
    while time.perf_counter() - start < seconds:
        before = time.perf_counter()
        x = multiply(x, a).block_until_ready()
        best = min(best, time.perf_counter() - before)
    return 2.0 * n**3 * mesh.size / best
