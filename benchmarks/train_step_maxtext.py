"""The side of MaxText in `benchmarks.train_step`: its own train step with AdamW for a deepseek model of that shape.

Needs `maxtext[tpu]==0.2.5` (Python 3.12). Settings: folder (where ids.npy is: int32 [rows, tokens]), dtype, model (the
fields of our ModelConfig). MaxText starts from random weights of its own: what is checked is how many there are, and
that its first loss is that of a model that knows nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import maxtext
import numpy as np
from flax import nnx
from flax.linen import logical_axis_rules
from maxtext.configs import pyconfig
from maxtext.trainers.pre_train import train
from maxtext.utils import sharding, train_utils

from benchmarks.peer import Step, serve

# ways that MaxText has to run experts on a CPU. "capacity" drops what an expert cannot hold, the other two drop nothing
WAYS = {
    "dense": ("sparse_matmul=False", "capacity_factor=-1"),
    "ragged_dot": ("sparse_matmul=True", "megablox=False"),
    "capacity 1.25 (drops)": ("sparse_matmul=False", "capacity_factor=1.25"),
}
FIXED = (
    "model_name=default", "decoder_block=deepseek", "attention_type=mla", "rope_type=default", "enable_dropout=False",
    "mlp_activations=['silu','linear']", "logits_via_embedding=False", "routed_score_func=sigmoid", "routed_bias=True",
    "hardware=cpu", "attention=dot_product", "remat_policy=none", "scan_layers=False", "weight_dtype=float32",
    "opt_type=adamw", "learning_rate=1e-5", "dataset_type=synthetic", "enable_checkpointing=False",
    "skip_jax_distributed_system=True", "run_name=train_step", "steps=100000", "log_config=False", "jax_cache_dir=",
)  # fmt: skip


def arguments(model: dict[str, Any], rows: int, tokens: int, dtype: str) -> list[str]:
    """MaxText's settings of our model."""
    moe = model["moe"]
    given = {
        "base_emb_dim": model["hidden_size"], "base_mlp_dim": model["intermediate_size"],
        "base_num_decoder_layers": model["num_hidden_layers"], "base_num_query_heads": model["num_attention_heads"],
        "base_num_kv_heads": model["num_attention_heads"], "vocab_size": model["vocab_size"],
        "q_lora_rank": model["q_lora_rank"], "kv_lora_rank": model["kv_lora_rank"], "v_head_dim": model["v_head_dim"],
        "qk_nope_head_dim": model["qk_nope_head_dim"], "qk_rope_head_dim": model["qk_rope_head_dim"],
        "num_experts": moe["n_routed_experts"], "num_experts_per_tok": moe["num_experts_per_tok"],
        "base_moe_mlp_dim": moe["moe_intermediate_size"], "shared_experts": moe["n_shared_experts"],
        "first_num_dense_layers": moe["first_k_dense_replace"],
        "routed_scaling_factor": moe["routed_scaling_factor"],
        "per_device_batch_size": rows, "max_target_length": tokens, "dtype": dtype,
    }  # fmt: skip
    return [*FIXED, *(f"{name}={value}" for name, value in given.items())]


class Training:
    """One model of MaxText with its weights and moments; set up as its `train.train_loop` does."""

    def __init__(self, given: list[str], ids: np.ndarray):
        base = Path(maxtext.__file__).parent / "configs" / "base.yml"
        self._config = pyconfig.initialize(["", str(base), *given])
        made = train_utils.setup_train_loop(self._config, None)
        shardings, self._mesh = made[2], made[4]
        graph, self._state = nnx.split(made[-1])
        weights, shardings = sharding.maybe_update_params_sharding_with_opt(self._config, shardings)
        self._step, _ = train_utils.jit_train_and_eval_step(
            self._config, graph, self._mesh, self._state, shardings, train.train_step, params_shardings=weights
        )
        self.params = sum(x.size for x in jax.tree.leaves(nnx.state(made[3], nnx.Param)))
        places = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
        batch = {"inputs": ids, "inputs_position": places, "inputs_segmentation": np.ones_like(ids)}
        shown = np.ones_like(ids)
        shown[:, -1] = 0
        batch |= {"targets": np.roll(ids, -1, axis=1), "targets_position": places, "targets_segmentation": shown}
        self._batch = jax.device_put(batch)

    def step(self) -> float:
        """One step; its loss."""
        with jax.set_mesh(self._mesh), logical_axis_rules(self._config.logical_axis_rules):
            self._state, metrics = jax.block_until_ready(self._step(self._state, self._batch))
        return float(metrics["scalar"]["learning/loss"])


def main() -> None:
    """Says each step's first loss and how many weights it has."""
    settings = json.loads(sys.argv[1])
    ids = np.load(f"{settings['folder']}/ids.npy")
    given = arguments(settings["model"], *ids.shape, settings["dtype"])
    runs = {f"maxtext {name}": Training([*given, *way], ids) for name, way in WAYS.items()}
    steps: dict[str, Step] = {name: run.step for name, run in runs.items()}
    ready = {"losses": {name: step() for name, step in steps.items()}, "params": [run.params for run in runs.values()]}
    serve(ready, steps)


if __name__ == "__main__":
    main()
