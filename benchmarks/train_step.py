"""A training step here, in transformers' DeepseekV3 on torch and in MaxText: tokens a second and their ratio, one run.

Run:    python -m benchmarks.train_step [--torch=PYTHON] [--maxtext=PYTHON] [--dtype=bfloat16] [--repeats=9]
        (an interpreter with torch and transformers; one with `maxtext[tpu]==0.2.5`; without them our side alone)
Goal:   1.5 times as fast at equal dtype; 60 % of the machine's dense-matmul rate, embedding look-ups not counted.

One random model of 29 M parameters (8 layers of width 256, 32 experts, 4 a token); 8 sequences of 512 tokens of text;
two threads. It is written once in the released layout, which transformers reads: before anything is timed both must
agree on the loss. MaxText draws weights of its own, as many and in the same shapes. All take turns, so that a busy
machine slows all, and a ratio is the median of the ratios of neighbours.
  muonclip    the step that `train` runs: gradients, clipping, MuonClip, QK-clip, router bias, metrics
  adamw       gradients, clipping and AdamW for every weight: what the other side does
  gradients   forward and backward alone
  torch ...   `benchmarks.train_step_torch`, one for each way that transformers has to run experts
  maxtext ... `benchmarks.train_step_maxtext`, likewise
The share is of `measure_matmul_rate` (square matmuls of 1024 in jax, same dtype), measured in every turn.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from absl import app, flags

from benchmarks.peer import Peer, seconds
from kimi_jax import sharding
from kimi_jax.config import DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig
from kimi_jax.hf import stream
from kimi_jax.nn.kimi import count_params
from kimi_jax.nn.param import AdamW, Muon
from kimi_jax.optim.muonclip import muonclip
from kimi_jax.packed_batch import PackedBatch, padding
from kimi_jax.train import flops
from kimi_jax.train import state as state_lib
from kimi_jax.train.metrics import measure_matmul_rate
from kimi_jax.train.step import gradients, make_train_step

FLAGS = flags.FLAGS
Timer = Callable[[], float]  # makes one step and says its seconds


def define_flags() -> None:
    """Of the command line."""
    flags.DEFINE_integer("repeats", 9, "Turns of each side.", lower_bound=1)
    flags.DEFINE_integer("threads", 2, "Of torch; jax takes as many as the process may use (taskset).", lower_bound=1)
    flags.DEFINE_integer("rows", 8, "Sequences.", lower_bound=1)
    flags.DEFINE_integer("tokens", 512, "Of a sequence.", lower_bound=2)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of activations and matmuls.")
    flags.DEFINE_string("torch", "", "Python of an environment with torch and transformers.")
    flags.DEFINE_string("maxtext", "", "Python of an environment with MaxText.")


def model_config(dtype: str) -> ModelConfig:
    """29 M parameters, 10 M of them active."""
    return ModelConfig(
        vocab_size=8192, hidden_size=256, intermediate_size=768, num_hidden_layers=8, num_attention_heads=4,
        q_lora_rank=128, kv_lora_rank=64, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
        rope_scaling=None, max_position_embeddings=2048, vision=None, dtype=dtype,
        moe=MoEConfig(n_routed_experts=32, num_experts_per_tok=4, moe_intermediate_size=128, routed_scaling_factor=2.0),
        media_placeholder_token_id=8191, bos_token_id=8189, eos_token_id=8190, pad_token_id=8188,
    )  # fmt: skip


def train_config(model: ModelConfig, rows: int, tokens: int) -> TrainConfig:
    """A run of that model on one group of rows; the learning rate is small, so that the loss stays where it is."""
    optimizer = OptimizerConfig(peak_lr=1e-5, final_lr=1e-6, warmup_steps=0, decay_fraction=0.0)
    data = DataConfig(sequence_length=tokens, num_packs=1, rows_per_pack=rows)
    return TrainConfig(model=model, data=data, optimizer=optimizer)


def text_batch(model: ModelConfig, rows: int, tokens: int, seed: int = 0) -> PackedBatch:
    """Random tokens, one document a row."""
    ids = np.random.default_rng(seed).integers(0, model.vocab_size - 16, (rows, tokens)).astype(np.int32)
    batch = padding(rows, tokens, rows, 0)
    batch.tokens[:], batch.targets[:], batch.loss_weights[:, :-1] = ids, np.roll(ids, -1, axis=1), 1
    batch.segment_ids[:], batch.positions[:] = 1, np.arange(tokens)
    return batch


def adamw_only(config: TrainConfig) -> optax.GradientTransformation:
    """Our optimizer with every matrix in AdamW's group."""
    infos = jax.tree.map(
        lambda info: dataclasses.replace(info, group=AdamW()) if isinstance(info.group, Muon) else info,
        state_lib.infos(config.model),
    )
    return muonclip(config.optimizer, config.steps, infos)


class Ours:
    """Our three steps; each keeps its own weights where it left them."""

    def __init__(self, config: TrainConfig, batch: PackedBatch):
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
        self.batch = sharding.put_batch(batch, mesh)
        init, self._train_step = make_train_step(config, mesh)
        self._state, state = init(), init()
        tx = adamw_only(config)
        self._params, self._moments = state.params, jax.jit(tx.init)(state.params)
        self._gradients = jax.jit(lambda params, batch: gradients(params, batch, config))

        def step(params: Any, moments: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
            (loss, _), grads = gradients(params, batch, config)
            updates, moments = tx.update(grads, moments, params)
            return optax.apply_updates(params, updates), moments, loss

        self._adamw_step = jax.jit(step, donate_argnums=(0, 1))

    @property
    def params(self) -> Any:
        """Of `adamw` and `gradients`."""
        return self._params

    def losses(self) -> tuple[float, float]:
        """Next-token loss alone, and the fullest expert's load over the mean."""
        (_, out), _ = self._gradients(self._params, self.batch)
        load = out["aux"].expert_load
        loss = out["metrics"]["loss"]
        return float(loss.total / loss.weight), float((load.max(-1) / load.mean(-1)).max())

    def muonclip(self) -> None:
        """The step of `train`."""
        self._state, metrics = jax.block_until_ready(self._train_step(self._state, self.batch))

    def adamw(self) -> None:
        """Gradients and AdamW."""
        out = self._adamw_step(self._params, self._moments, self.batch)
        self._params, self._moments, _ = jax.block_until_ready(out)

    def gradients(self) -> None:
        """Gradients alone."""
        jax.block_until_ready(self._gradients(self._params, self.batch))


def torch_timers(folder: str, loss: float) -> dict[str, Timer]:
    """transformers' steps by name. Each is asked for its loss first, which must be ours."""
    settings = {"folder": folder, "dtype": FLAGS.dtype, "threads": FLAGS.threads}
    peer = Peer(FLAGS.torch, "benchmarks.train_step_torch", settings)
    tolerance = 1e-4 if FLAGS.dtype == "float32" else 2e-2
    for name, first in peer.ready["losses"].items():
        assert abs(first - loss) < tolerance * loss, f"not the same model: loss {first} with {name}, {loss} here"
    return {name: functools.partial(peer.seconds, name) for name in peer.ready["losses"]}


def maxtext_timers(folder: str, model: ModelConfig) -> dict[str, Timer]:
    """MaxText's steps by name: as many weights, and losses of models that know nothing."""
    settings = {"folder": folder, "dtype": FLAGS.dtype, "model": dataclasses.asdict(model)}
    peer = Peer(FLAGS.maxtext, "benchmarks.train_step_maxtext", settings)
    total, guess = count_params(model)["total"], math.log(model.vocab_size)
    for params, (name, first) in zip(peer.ready["params"], peer.ready["losses"].items(), strict=True):
        assert params == total, f"not the same shape: {params:,} parameters in {name}, {total:,} here"
        assert abs(first - guess) < 0.1 * guess, f"loss {first} of {name}, a guess has {guess:.2f}"
    return {name: functools.partial(peer.seconds, name) for name in peer.ready["losses"]}


def main(argv: list[str]) -> None:
    """Prints one table."""
    del argv
    model = model_config(FLAGS.dtype)
    config = train_config(model, FLAGS.rows, FLAGS.tokens)
    batch = text_batch(model, FLAGS.rows, FLAGS.tokens)
    counts = count_params(model)
    print(
        f"{counts['total'] / 1e6:.1f} M parameters, {counts['text_active'] / 1e6:.1f} M active; jax {jax.__version__}"
    )
    work = flops.train_flops(model, flops.batch_counts(batch))
    ours = Ours(config, batch)
    loss, imbalance = ours.losses()
    print(f"loss {loss:.5f}; fullest expert over mean {imbalance:.2f}; {work / 1e9:.0f} GFLOP a step")
    own = {"adamw": ours.adamw, "muonclip": ours.muonclip, "gradients": ours.gradients}
    timers: dict[str, Timer] = {name: functools.partial(seconds, step) for name, step in own.items()}
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/ids.npy", batch.tokens)
        if FLAGS.torch:
            stream.save(folder, model, ours.params, "deepseek_v3", dtype="float32")
            timers |= torch_timers(folder, loss)
        if FLAGS.maxtext:
            timers |= maxtext_timers(folder, model)
    for timer in timers.values():
        timer()
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    turns = []
    for _ in range(FLAGS.repeats):
        rate = measure_matmul_rate(mesh, FLAGS.dtype, seconds=0.3)
        turns.append((rate, [timer() for timer in timers.values()]))
    print(f"dense matmuls: {statistics.median(rate for rate, _ in turns) / 1e9:.0f} GFLOP/s")
    print(f"{FLAGS.dtype:26} {'s':>6} {'tokens/s':>9} {'adamw is':>9} {'of dense':>9}")
    for i, name in enumerate(timers):
        time_s = statistics.median(times[i] for _, times in turns)
        ratio = statistics.median(times[i] / times[0] for _, times in turns)
        share = statistics.median(work / times[i] / rate for rate, times in turns)
        rate_s = batch.tokens.size / time_s
        print(f"{name:26} {time_s:6.2f} {rate_s:9,.0f} {ratio:8.2f}x {share:9.1%}", flush=True)


if __name__ == "__main__":
    define_flags()
    app.run(main)
