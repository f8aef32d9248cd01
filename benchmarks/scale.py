"""From one chip to 4,096, on paper: `python -m benchmarks.scale`. The numbers of docs/scale.md.

For each size the layout, the rows a chip and the microbatches that are fastest in closed form (`kimi_jax.plan.paper`)
among those that need at most 80 % of the memory: what the compiler adds has to fit as well. Compiles nothing.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from absl import app, flags

from kimi_jax.config import TrainConfig, freeze
from kimi_jax.plan import plan
from kimi_jax.plan.chips import parse_topology

SIZES = (
    ("small", "v5p:1x1x1"),
    ("kimi_vl_a3b", "v5p:2x2x1"),
    ("kimi_vl_a3b", "v5p:4x4x4"),
    ("kimi_k2_5", "v5p:4x8x8"),
    ("kimi_k2_5", "v5p:8x8x8"),
    ("kimi_k2_5", "v5p:8x8x16"),
    ("kimi_k2_5", "v5p:8x16x16"),
    ("kimi_k2_5", "v5p:16x16x16"),
)
ROOM = 0.8
_ROWS = flags.DEFINE_list("rows", ["1", "4"], "Sequences a chip to try.")


def load(name: str) -> TrainConfig:
    """The settings of `configs/NAME.py`."""
    path = Path(__file__).resolve().parents[1] / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return freeze(module.get_config())


def row(name: str, pod: str, best: dict[str, Any]) -> str:
    """One line of the table."""
    seconds, sent = best["seconds"], best["wire_bytes"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in best["mesh"].items() if size > 1) or "one device"
    return "| " + " | ".join([
        name, pod, mesh, f"{best['rows']:g} / {best['microbatches']}",
        f"{best['least_bytes'] / 2**30:.0f}", f"{best['model_flops'] / 1e12:,.0f}",
        f"{(sent['gather'] + sent['reduce']) / 1e9:,.0f}", f"{sent['tokens'] / 1e9:,.0f}",
        " / ".join(f"{seconds[key]:.2f}" for key in ("compute", "hbm", "ici")), best["regime"],
        " to ".join(f"{rate:,.0f}" for rate in best["tokens_per_second_per_chip"]),
        " to ".join(f"{mfu:.0%}" for mfu in best["mfu"]),
        " to ".join(f"{hours:,.0f}" for hours in best["chip_hours_per_trillion_tokens"]),
    ]) + " |"  # fmt: skip


def main(_: list[str]) -> None:
    """Prints the table."""
    titles = ["model", "pod", "mesh", "rows / microbatches", "least GiB", "model TFLOP", "GB weights and gradients",
              "GB tokens", "s compute / HBM / ICI", "regime", "tokens/s/chip", "MFU",
              "chip-hours a trillion tokens"]  # fmt: skip
    print("| " + " | ".join(titles) + " |")
    print("|" + " --- |" * len(titles))
    for name, pod in SIZES:
        topology = parse_topology(pod)
        _, estimates = plan.search(load(name), topology, [int(n) for n in _ROWS.value], compiled=0)
        fitting = [e for e in estimates if e["least_bytes"] <= ROOM * topology.chip.hbm]
        print(row(name, pod, fitting[0]) if fitting else f"| {name} | {pod} | nothing fits |" + " |" * 10, flush=True)


if __name__ == "__main__":
    app.run(main)
