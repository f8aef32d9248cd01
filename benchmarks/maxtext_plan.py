"""Kimi K2.5 here and kimi-k2-1t in MaxText on the same pods, both compiled by one libtpu and read by one predictor.

Run:     python -m benchmarks.maxtext_plan --maxtext=PYTHON [--pods=v5p:8x8x8,v5p:4x8x8] [--sequences=4,2,1]
         ... --sides=ours        (ours again; what --dir holds of the other side goes into the table as it is)
         ... --sides=maxtext --layout='ici_expert_parallelism=64 ...'       (another one than LAYOUTS)
Needs:   this package with its extra [tpu] on Python 3.12, and PYTHON with `maxtext[tpu]==0.2.5` and the same libtpu.
For each pod and side the largest of --sequences (of 4,096 tokens, a chip) that the compiler takes. MaxText's side is
text only, has AdamW and drops the tokens that its buffer cannot hold; ours is multimodal, has MuonClip and drops none.
Nothing is measured but the compiler: the rest is predicted from the compiled programs, by `kimi_jax.plan` for both.
"""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks import plan as our_plan
from kimi_jax.config import TrainConfig, freeze
from kimi_jax.plan import hlo, program, report
from kimi_jax.plan.chips import Topology, parse_topology
from kimi_jax.plan.cost import price
from kimi_jax.plan.network import Network

MAXTEXT = (
    "model_name=kimi-k2-1t", "max_target_length=4096", "compile_topology_num_slices=1", "dataset_type=synthetic",
    "enable_checkpointing=false", "jax_cache_dir=", "attention=flash", "sparse_matmul=True", "opt_type=adamw",
    "weight_dtype=float32", "allow_split_physical_axes=True",
)  # fmt: skip
# the best of three tried for 512 chips (benchmarks/README.md); for 256 the one of docs/architecture.md section 6, cut
# to half
LAYOUTS = {
    "v5p:8x8x8": "ici_expert_parallelism=32 ici_fsdp_parallelism=16 ragged_buffer_factor=1.25 remat_policy=full",
    "v5p:4x8x8": "ici_expert_parallelism=16 ici_fsdp_parallelism=16 ragged_buffer_factor=1.5 remat_policy=full",
}

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Of the command line."""
    flags.DEFINE_string("maxtext", None, "Python of an environment with MaxText.")
    flags.DEFINE_string("dir", "runs/maxtext_plan", "Where the plans go, and where the table finds them.")
    flags.DEFINE_list("pods", list(LAYOUTS), "Which pods.")
    flags.DEFINE_list("sides", ["ours", "maxtext"], "What to compile; nothing: only print the table.")
    flags.DEFINE_list("sequences", ["4", "2", "1"], "Sequences a chip, tried in this order until they fit.")
    flags.DEFINE_string("layout", "", "MaxText's, instead of LAYOUTS.")


def ours(pod: str, sequences: int, folder: Path) -> dict[str, Any]:
    """The plan of our training step. Raises RuntimeError if there is none."""
    out = folder / "plan.json"
    subprocess.run([*our_plan.command(pod, out), f"--sequences_per_chip={sequences}"], check=False)
    if not out.exists():
        raise RuntimeError(f"no plan of {pod}, see above")
    return json.loads(out.read_text())[0]


def maxtext(pod: str, sequences: int, folder: Path) -> dict[str, Any]:
    """The same of MaxText's. Raises RuntimeError if it fails for another reason than memory."""
    layout = FLAGS.layout or LAYOUTS[pod]
    arguments = (
        *MAXTEXT, *layout.split(), f"compile_topology={our_plan.PODS[pod]}", f"per_device_batch_size={sequences}",
    )  # fmt: skip
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "XLA_FLAGS": f"--xla_dump_to={folder} --xla_dump_hlo_as_text",
    }  # fmt: skip
    command = [FLAGS.maxtext, str(Path(__file__).with_name("maxtext_compile.py")), str(folder), *arguments]
    print("$ " + " ".join(command), flush=True)
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    if not (folder / "seconds.json").exists():
        raise RuntimeError(f"MaxText did not come to compile anything:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return {"layout": layout, **read(folder, parse_topology(pod), sequences)}


def read(folder: Path, topology: Topology, sequences: int) -> dict[str, Any]:
    """A plan from what `maxtext_compile.py` left in `folder`. Raises RuntimeError if the compiler failed."""
    seconds = json.loads((folder / "seconds.json").read_text()).get("/jax/core/compile/backend_compile_duration", 0.0)
    plan = {"topology": topology.name, "chips": topology.chips, "rows": sequences, "mesh": {}}
    refused = folder / "refused.txt"
    if refused.exists():
        error = program.memory_error(RuntimeError(refused.read_text()), seconds)
        if error is None:
            raise RuntimeError(f"MaxText's step was not compiled: {refused.read_text()[:2000]}")
        return {**plan, "memory": report.memory_failed(error)}
    step = json.loads((folder / "step.json").read_text())
    text = (folder / "step.hlo").read_text()
    analysis = step["arguments"] + step["outputs"] + step["temporaries"]
    peak = program.needed(program.reported(folder), analysis)
    compiled = program.Compiled(
        text, step["arguments"], step["outputs"], peak, seconds, cpu_seconds=0.0, trace_seconds=0.0
    )
    places = np.array(step["places"])
    network = Network(topology, step["mesh"], places, slices=np.zeros(len(places), int))
    cost = price(hlo.parse(text), topology.chip, network)
    return {
        **plan, "mesh": step["mesh"], "jax": step["jax"], "libtpu": step["libtpu"],
        "memory": report.memory(compiled, topology), "usual_rounds": 1,
        "rounds": {"1": report.timing(text_only(topology, sequences), topology, cost)},
    }  # fmt: skip


def text_only(topology: Topology, sequences: int) -> TrainConfig:
    """Our settings with that batch and without images, for the FLOPs of what MaxText trains."""
    pods = runpy.run_path(str(Path(__file__).parents[1] / "configs" / "pods.py"))
    config = freeze(pods["get_config"](f"kimi_k2_5@{our_plan.PODS[topology.name]}"))
    data = dataclasses.replace(
        config.data, num_packs=topology.devices, rows_per_pack=sequences, sequence_length=4096, vision_bins=()
    )
    return dataclasses.replace(config, data=data)


def largest(pod: str, side: str) -> list[dict[str, Any]]:
    """Plans with ever fewer sequences, the last one fits (or none does)."""
    plans = []
    for sequences in map(int, FLAGS.sequences):
        with tempfile.TemporaryDirectory() as folder:
            plans.append({"ours": ours, "maxtext": maxtext}[side](pod, sequences, Path(folder)))
        if plans[-1]["memory"]["fits"]:
            break
    return plans


def header() -> str:
    """The first line of the table."""
    return f"| side {our_plan.HEADER} step us/token | libtpu |"


def row(side: str, plan: dict[str, Any]) -> str:
    """One line of the table."""
    step = ""
    if "rounds" in plan:
        timed = plan["rounds"][str(plan["usual_rounds"])]
        low, high = (1e6 * seconds / timed["tokens"] for seconds in timed["step_seconds"])
        step = f"{low:,.0f} to {high:,.0f}"
    return f"| {side} {our_plan.row(plan)} {step} | {plan.get('libtpu', '')} |"


def main(_: list[str]) -> None:
    """Compiles what is asked for, then prints all that --dir holds."""
    folder = Path(FLAGS.dir)
    folder.mkdir(parents=True, exist_ok=True)
    for pod in FLAGS.pods:
        for side in FLAGS.sides:
            plans = largest(pod, side)
            (folder / f"{pod.replace(':', '_')}_{side}.json").write_text(json.dumps(plans, indent=1))
    print(f"\n{header()}\n|" + " --- |" * 14)
    layouts = []
    for path in sorted(folder.glob("*.json")):
        plans = json.loads(path.read_text())
        print("\n".join(row(path.stem.split("_")[-1], plan) for plan in plans))
        layouts += [f"MaxText on {plan['topology']}: {plan['layout']}" for plan in plans[-1:] if "layout" in plan]
    print("\n" + "\n".join(layouts))


if __name__ == "__main__":
    define_flags()
    app.run(main)
