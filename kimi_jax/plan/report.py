"""The plan as numbers (a plain dict, for JSON) and as a table for people.

Everything about time is a prediction from the compiled program, never a measurement, and is printed as such. The step
takes at least the longer of compute and communication (if they overlap perfectly) and at most their sum; tokens/s and
MFU are given for both ends.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from kimi_jax.config import TrainConfig
from kimi_jax.data.packing import PackShape
from kimi_jax.plan.chips import Topology
from kimi_jax.plan.cost import Cost
from kimi_jax.plan.program import Compiled, DoesNotFit
from kimi_jax.train import flops

GIB = 2**30


def full_counts(config: TrainConfig, devices: int) -> dict[str, float]:
    """A device's share of a full batch (see `train.flops.batch_counts`): a row is one document, a bin one image, and
    every feature of the bins is placed."""
    data, bins = config.data, PackShape.of(config.data, config.model).bins
    packs = data.num_packs / devices
    rows, patches = packs * data.rows_per_pack, packs * sum(size * count for size, count in bins)
    return {
        "tokens": rows * data.sequence_length,
        "token_pairs": rows * data.sequence_length * (data.sequence_length + 1) / 2,
        "patches": patches,
        "patch_pairs": packs * sum(size * size * count for size, count in bins),
        "features": patches / 4,
    }


def memory(compiled: Compiled, topology: Topology) -> dict[str, Any]:
    """Bytes a device, and whether they fit."""
    hbm = topology.chip.hbm
    return {
        "arguments": compiled.arguments,
        "outputs_not_in_place": compiled.outputs,
        "temporaries": compiled.temporaries,
        "peak": compiled.peak,
        "available": hbm,
        "fits": compiled.peak <= hbm,
        "spare": hbm - compiled.peak,
        "compile_seconds": round(compiled.seconds, 1),
        "compile_cpu_seconds": round(compiled.cpu_seconds, 1),
        "trace_seconds": round(compiled.trace_seconds, 1),
    }


def memory_failed(error: DoesNotFit) -> dict[str, Any]:
    """The same for a program that the compiler refused: it only says how much it would have needed."""
    return {
        "peak": error.needed,
        "available": error.available,
        "fits": False,
        "spare": error.available - error.needed,
        "compile_seconds": round(error.seconds, 1),
    }


def timing(config: TrainConfig, topology: Topology, cost: Cost) -> dict[str, Any]:
    """Predicted seconds, rates and shares of one step, a device. Traffic is by mesh axis and kind."""
    counts = full_counts(config, topology.devices)
    needed = flops.train_flops(config.model, counts)
    low, high = max(cost.compute, cost.communication), cost.compute + cost.communication
    chip = topology.chip
    spared = sum(c["dearest"] - c["cheapest"] for c in cost.conditionals)
    return {
        "tokens": counts["tokens"],
        "patches": counts["patches"],
        "model_flops": needed,
        "model_flops_seconds": needed / chip.flops,
        "compute_seconds": cost.compute,
        "compute_us_per_token": 1e6 * cost.compute / counts["tokens"],
        "cheapest_us_per_token": 1e6 * (cost.compute - spared) / counts["tokens"],
        "communication_seconds": cost.communication,
        "wire_bytes": cost.wire,
        "step_seconds": [low, high],
        "tokens_per_second_per_chip": [chip.devices_per_chip * counts["tokens"] / t if t else 0.0 for t in (high, low)],
        "mfu": [needed / chip.flops / t if t else 0.0 for t in (high, low)],
        "traffic": _traffic(cost),
        "dynamic_loops": sorted(set(cost.dynamic_loops)),
        "conditionals": cost.conditionals,
        "unpriced_kernels": sorted(set(cost.unpriced)),
        "top": top(cost),
    }


def decoding(cost: Cost, slots: int) -> dict[str, Any]:
    """Predicted seconds of a decoding step, in which every slot gets a token, and tokens a second of the whole pod."""
    low, high = max(cost.compute, cost.communication), cost.compute + cost.communication
    return {
        "compute_seconds": cost.compute,
        "communication_seconds": cost.communication,
        "wire_bytes": cost.wire,
        "step_seconds": [low, high],
        "tokens_per_second": [slots / t if t else 0.0 for t in (high, low)],
        "traffic": _traffic(cost),
        "dynamic_loops": sorted(set(cost.dynamic_loops)),
        "unpriced_kernels": sorted(set(cost.unpriced)),
        "top": top(cost),
    }


def _traffic(cost: Cost) -> list[dict[str, Any]]:
    rows: dict[tuple, dict[str, Any]] = {}
    for c in cost.collectives:
        key = (c.axis, c.kind, c.crosses)
        row = rows.setdefault(key, {"axis": c.axis, "kind": c.kind, "network": "DCN" if c.crosses else "ICI",
                                    "members": c.members, "times": 0.0, "wire_bytes": 0.0, "seconds": 0.0})  # fmt: skip
        row["times"] += c.times
        row["wire_bytes"] += c.wire
        row["seconds"] += c.seconds
    return sorted(rows.values(), key=lambda row: -row["seconds"])


def top(cost: Cost, count: int = 10) -> list[dict[str, Any]]:
    """The places in the program that take the most seconds, compute and collectives in one list."""
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    for w in cost.work:
        seconds[(w.what, w.where)] += w.seconds
    for c in cost.collectives:
        seconds[(f"{c.kind} {c.axis}", c.where)] += c.seconds
    ranked = sorted(seconds.items(), key=lambda item: -item[1])[:count]
    return [{"what": what, "where": where, "seconds": s} for (what, where), s in ranked]


def collectives_per_loop(cost: Cost) -> dict[str, dict[str, int]]:
    """How many collectives of each kind and axis run so many times in a step: `{"60": {"all-gather fsdp": 14}}`.

    What runs as often as there are layers is in the layers. The golden counts of the tests.
    """
    out: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for c in cost.collectives:
        out[f"{c.times:g}"][f"{c.kind} {c.axis}"] += 1
    return {times: dict(sorted(kinds.items())) for times, kinds in sorted(out.items())}


# ---------------------------------------------------------------------------------------------------------------- table


def table(plan: dict[str, Any]) -> str:
    """The whole plan as text."""
    lines = [f"{plan['config']} on {plan['topology']}: {plan['chips']} chips, mesh {_mesh(plan['mesh'])}"]
    lines.append(f"  {plan['rows']:g} rows of {plan['sequence_length']} tokens a device in {plan['microbatches']} "
                 f"microbatches, jax {plan['jax']}, libtpu {plan['libtpu']}")  # fmt: skip
    lines.append(_memory_line(plan["memory"]))
    lines.append(f"  params    {plan['params']:,} in all, {plan['params_bytes'] / GIB:.1f} GiB a device; "
                 f"with optimizer {plan['state_bytes'] / GIB:.1f} GiB")  # fmt: skip
    lines.append(_compile_line(plan["memory"]))
    for rounds, timed in plan.get("rounds", {}).items():
        lines += _timing_lines(timed, rounds, plan)
    return "\n".join(lines)


def _memory_line(m: dict[str, Any]) -> str:
    verdict = (
        f"fits, {m['spare'] / GIB:.1f} GiB to spare"
        if m["fits"]
        else f"DOES NOT FIT: {-m['spare'] / GIB:.1f} GiB too much"
    )
    parts = (
        f" (held before it {m['arguments'] / GIB:.1f}, temporaries {m['temporaries'] / GIB:.1f})"
        if "arguments" in m
        else ""
    )
    return f"  memory    {m['peak'] / GIB:.1f} of {m['available'] / GIB:.1f} GiB a device{parts}: {verdict}"


def _compile_line(m: dict[str, Any]) -> str:
    cores = f" ({m['compile_cpu_seconds']:.0f} s of its cores)" if "compile_cpu_seconds" in m else ""
    return f"  compile   {m['compile_seconds']:.0f} s on this machine{cores}"


def decode_table(plan: dict[str, Any]) -> str:
    """The plan of a decoding step as text."""
    lines = [f"{plan['config']} on {plan['topology']}: decoding, mesh {_mesh(plan['mesh'])}"]
    lines.append(
        f"  {plan['slots']} slots of up to {plan['length']} tokens, jax {plan['jax']}, libtpu {plan['libtpu']}"
    )
    lines.append(f"  weights   {plan['dtype']}, {plan['weights_bytes'] / GIB:.1f} GiB a device")
    floor = plan["floor_seconds"]
    lines += [_memory_line(plan["memory"]), _compile_line(plan["memory"])]
    lines.append(f"  floor     {1e3 * floor:.2f} ms a step: the weights that are touched and all latents, read once")
    if "step" in plan:
        t = plan["step"]
        low, high = t["step_seconds"]
        slow, fast = t["tokens_per_second"]
        lines += [
            "  PREDICTED from the compiled program, nothing measured; all slots full",
            f"    step           {1e3 * low:.2f} ms (all overlapped) to {1e3 * high:.2f} ms (nothing overlapped): "
            f"{low / floor:.1f} to {high / floor:.1f} times the floor",
            f"    tokens/s       {slow:,.0f} to {fast:,.0f} on the whole pod",
            *_traffic_and_top(t),
        ]
    return "\n".join(lines)


def _mesh(mesh: dict[str, int]) -> str:
    return " x ".join(f"{name} {size}" for name, size in mesh.items() if size > 1) or "of one device"


def _timing_lines(t: dict[str, Any], rounds: str, plan: dict[str, Any]) -> list[str]:
    low, high = t["step_seconds"]
    slow, fast = t["tokens_per_second_per_chip"]
    title = f"PREDICTED from the compiled program, nothing measured; {rounds} round(s) of loops without a fixed length"
    if int(rounds) == plan["usual_rounds"]:
        title += ": the usual load"
    lines = [
        f"  {title}",
        f"    model FLOPs    {t['model_flops'] / 1e12:,.1f} TFLOP a device, {t['model_flops_seconds']:.2f} s at peak",
        f"    compute        {t['compute_seconds']:.2f} s by the compiler's estimate, "
        f"{t['compute_us_per_token']:,.0f} us a token",
        f"    communication  {t['communication_seconds']:.2f} s, {t['wire_bytes'] / 1e9:,.1f} GB sent by a device",
        f"    step           {low:.2f} s (all overlapped) to {high:.2f} s (nothing overlapped)",
        f"    tokens/s/chip  {slow:,.0f} to {fast:,.0f};  MFU {t['mfu'][0]:.1%} to {t['mfu'][1]:.1%}",
        *_traffic_and_top(t),
    ]  # fmt: skip
    if t["dynamic_loops"]:
        lines.append(f"    {rounds} round(s) of   {'; '.join(t['dynamic_loops'])}")
    if t["conditionals"]:
        cheapest = t["cheapest_us_per_token"]
        lines.append(f"    conditionals   counted at their dearest branch; {cheapest:,.0f} us a token at the cheapest")
    if t["unpriced_kernels"]:
        lines.append(f"    NOT COUNTED    kernels without a known cost: {', '.join(t['unpriced_kernels'])}")
    return lines


def _traffic_and_top(t: dict[str, Any]) -> list[str]:
    lines = []
    for row in t["traffic"]:
        lines.append(f"      {row['network']} {row['axis']:<16} {row['kind']:<18} {row['times']:>8,.0f} x  "
                     f"{row['wire_bytes'] / 1e9:>9,.2f} GB  {row['seconds']:>8.3f} s")  # fmt: skip
    lines.append("    top contributors")
    lines += [f"      {row['seconds']:>8.3f} s  {row['what']:<24} {row['where']}" for row in t["top"]]
    return lines
