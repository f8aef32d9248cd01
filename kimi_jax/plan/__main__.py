"""Plan a run: `python -m kimi_jax.plan --config=configs/kimi_k2_5.py --topology=v5p:8x8x8 --sequences_per_chip=4`.

Compiles the training step for that pod (no TPU is needed, but the extra [tpu]) and prints memory, predicted time and
traffic. --paper prints what the layout costs in closed form, at once and without the compiler. --search ranks layouts,
rows and microbatches on paper and compiles the best of them. --slots plans one decoding step instead. A compilation at
full size takes minutes of one core.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from kimi_jax import cli
from kimi_jax.config import ConfigError, TrainConfig

_TOPOLOGY = flags.DEFINE_string("topology", None, "The pod: v5p:8x8x8, v6e:16x16, 2xv5p:8x8x8 (two slices).")
_ROWS = flags.DEFINE_list("sequences_per_chip", [], "Rows a device; several, with commas, for --search. "
                          "Default: the global batch of the settings.")  # fmt: skip
_ROUNDS = flags.DEFINE_list("rounds", ["1", "2"], "Times that a loop of unknown length (expert rounds) runs.")
_PAPER = flags.DEFINE_bool("paper", False, "Only the closed forms; compiles nothing.")
_SEARCH = flags.DEFINE_bool("search", False, "Rank layouts, microbatches and every --sequences_per_chip.")
_COMPILE = flags.DEFINE_integer("compile", 3, "With --search: so many of the best on paper are compiled.")
_SLOTS = flags.DEFINE_integer("slots", 0, "Plan decoding: so many requests at once on the pod.")
_LENGTH = flags.DEFINE_integer("length", 4096, "With --slots: most tokens of a request.")
_JSON = flags.DEFINE_string("json", "", "Also write the plan to this file.")
_HLO = flags.DEFINE_string("hlo", "", "Keep the text of the compiled program in this file.")


def main(_: list[str]) -> int:
    """Prints the plan. Exit status 1 if it does not fit, 2 for settings that do not work."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the TPU exists only for the compiler
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from kimi_jax.plan import program  # after the environment is set: jax reads it when imported
    from kimi_jax.sharding import ShardingError

    try:
        results = _plans(cli.settings())
    except (ConfigError, ShardingError, program.PlanError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(results, indent=1))
    first = results[0]
    return 0 if first.get("memory", {"fits": True})["fits"] else 1


def _plans(config: TrainConfig) -> list[dict[str, Any]]:
    """Makes and prints what was asked for; the best, or only, plan first."""
    from kimi_jax.plan import paper, plan, report
    from kimi_jax.plan.chips import parse_topology

    topology = parse_topology(_TOPOLOGY.value or "")
    rows = [int(n) for n in _ROWS.value]
    if _SLOTS.value:
        made, text = plan.decode(config.model, config.mesh, topology, _SLOTS.value, _LENGTH.value)
        made["config"] = config_flags.get_config_filename(flags.FLAGS["config"])
        print(report.decode_table(made))
        _keep(text)
        return [made]
    if _SEARCH.value:
        plans, estimates = plan.search(config, topology, rows or [1, 2, 4], _COMPILE.value)
        for estimate in estimates[:10]:
            print(paper.table(estimate))
    else:
        estimate = paper.estimate(config, topology, rows[0] if rows else None)
        print(f"{topology.name}, {paper.table(estimate)}", flush=True)
        if _PAPER.value:
            return [{"paper": estimate}]
        made, text = plan.make(config, topology, rows[0] if rows else None, [int(n) for n in _ROUNDS.value])
        plans, estimates = [{**made, "paper": estimate}], []
        _keep(text)
    for made in plans:
        made["config"] = config_flags.get_config_filename(flags.FLAGS["config"])
        print(report.table(made))
    return plans or [{"paper": estimate} for estimate in estimates]


def _keep(text: str) -> None:
    if _HLO.value and text:
        Path(_HLO.value).write_text(text)


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse)
