"""Every setting of a run, as frozen dataclasses, and the named model presets.

`configs/*.py:get_config()` returns a mutable `ConfigDict` (so that `--config.a.b=1` works); `freeze` turns it into the
dataclasses below and refuses unknown keys. Defaults of the model are those of the released Kimi K2.5
(shared/docs/reference.md section 1.1); field names are the released ones.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kimi_jax.config_tree import ConfigError as ConfigError
from kimi_jax.config_tree import diff as diff
from kimi_jax.config_tree import nearest as nearest
from kimi_jax.config_tree import set_paths
from kimi_jax.config_tree import thaw as thaw

# ---------------------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class YarnConfig:
    """Rotary scaling by YaRN; released field names."""

    factor: float = 64.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


@dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts: sigmoid router with a selection bias, dropless routed experts, shared experts."""

    n_routed_experts: int = 384
    num_experts_per_tok: int = 8
    n_shared_experts: int = 1
    moe_intermediate_size: int = 2048
    first_k_dense_replace: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.827
    int4_group_size: int | None = None  # routed experts held as INT4, one scale for so many inputs; frozen


@dataclass(frozen=True)
class VisionConfig:
    """MoonViT-3D and the projector (reference.md section 2)."""

    patch_size: int = 14
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    init_pos_emb_height: int = 64
    init_pos_emb_width: int = 64
    init_pos_emb_time: int = 4
    merge_kernel_size: tuple[int, int] = (2, 2)
    rope_theta: float = 10000.0
    layer_norm_eps: float = 1e-5
    projector_ln_eps: float = 1e-5


@dataclass(frozen=True)
class ModelConfig:
    """The whole model. `vision=None` is a text-only model; `moe=None` makes every layer dense."""

    vocab_size: int = 163840
    hidden_size: int = 7168
    intermediate_size: int = 18432
    num_hidden_layers: int = 61
    num_attention_heads: int = 64
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rms_norm_eps: float = 1e-5
    lora_norm_eps: float = 1e-6
    rope_theta: float = 50000.0
    rope_scaling: YarnConfig | None = field(default_factory=YarnConfig)
    max_position_embeddings: int = 262144
    initializer_range: float = 0.02
    moe: MoEConfig | None = field(default_factory=MoEConfig)
    vision: VisionConfig | None = field(default_factory=VisionConfig)
    media_placeholder_token_id: int = 163605
    bos_token_id: int = 163584
    eos_token_id: int = 163585
    pad_token_id: int = 163839
    dtype: str = "bfloat16"  # activations
    param_dtype: str = "float32"  # stored weights
    scan_layers: bool = True  # False unrolls the same stacked weights
    remat: bool = False  # recompute each layer in the backward pass; the vision tower as a whole always is
    remat_policy: str = "layer_inputs"  # what of a decoder layer is kept all the same: nn.decoder.REMAT_POLICIES

    @property
    def qk_head_dim(self) -> int:
        """Width of one query/key head: the part without rotary plus the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_dense_layers(self) -> int:
        """Leading layers with a dense MLP; all of them without experts."""
        return self.moe.first_k_dense_replace if self.moe else self.num_hidden_layers

    @property
    def num_moe_layers(self) -> int:
        """Layers with routed experts."""
        return self.num_hidden_layers - self.num_dense_layers


# ----------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class SourceConfig:
    """One source of examples. `kind` names a reader of `kimi_jax.data.sources`; `path` is what that reader opens."""

    kind: str = "demo"
    path: str = ""
    split: str = "train"
    weight: float = 1.0  # share of the drawn examples within its modality (text-only or with media)
    weight_schedule: tuple[tuple[float, float], ...] = ()  # (from this share of training, weight instead)
    min_per_group: int = 0  # every group holds so many of its examples or more, as far as they fit
    vision: bool = False  # True: its examples carry images or video


@dataclass(frozen=True)
class DataConfig:
    """Shapes, mixture, workers. A group is the unit of packing: `rows_per_group` rows and the bins beside it."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    tokenizer: str = ""  # path of a tokenizer file (`.json` of `tokenizers`, or a released `tiktoken.model`)
    sequence_length: int = 4096  # S, tokens a row
    rows_per_group: int = 1  # R
    num_groups: int = 8  # G: logical shards of the stream; global batch G * R rows. A multiple of the device count
    vision_bins: tuple[tuple[int, int], ...] = ((4096, 1),)  # (P patches, bins a group), ascending P
    vision_ratio: tuple[tuple[float, float], ...] = ((0.0, 0.1),)  # (from this share of training, vision token share)
    lookahead: int = 64  # examples that may wait for a group with room
    num_workers: int = 1  # worker processes a host; 0 reads in the training process
    prefetch: int = 4  # groups each worker keeps ready
    max_bad_fraction: float = 0.01  # a run with a larger share of unusable records stops
    seed: int = 0


# ------------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class OptimizerConfig:
    """MuonClip (paper section 2.4) and the WSD schedule (2.5)."""

    peak_lr: float = 2e-4
    final_lr: float = 2e-5
    warmup_steps: int = 500
    decay_fraction: float = 0.35  # last part of training, cosine from peak to final
    weight_decay: float = 0.1
    muon_momentum: float = 0.95
    muon_nesterov: bool = True
    newton_schulz_steps: int = 5
    update_rms: float = 0.2  # Moonlight's RMS matching: update times 0.2 * sqrt(max(rows, columns))
    adam_b1: float = 0.9
    adam_b2: float = 0.95
    adam_eps: float = 1e-8
    momentum_dtype: str = "float32"  # of Muon's momentum and Adam's first moment; "bfloat16" halves them
    grad_clip_norm: float = 1.0  # 0 switches clipping off
    qk_clip_tau: float = 100.0  # 0 switches QK-clip off
    router_bias_rate: float = 1e-3
    balance_loss_weight: float = 1e-4


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and how much to keep. `interval=0` saves at the end and on Ctrl-C only."""

    interval: int = 500
    keep: int = 3


@dataclass(frozen=True)
class RecoveryConfig:
    """What a run does about a loss that is not finite or leaps up. The update of such a batch is always left out.

    After `max_skipped_in_row` of them the weights and moments of the newest checkpoint from before are taken instead,
    while data and step count go on; after `max_rollbacks` such returns the run stops.
    """

    spike_sigmas: float = 0.0  # a loss so many standard deviations above its running mean has leapt up; 0: never judged
    spike_after: int = 100  # updates before the running mean is trusted
    max_skipped_in_row: int = 10
    max_rollbacks: int = 0


@dataclass(frozen=True)
class EvalConfig:
    """Periodic evaluation inside training. `tasks` are names of `kimi_jax.eval.tasks`."""

    tasks: tuple[str, ...] = ()
    interval: int = 0
    limit: int = 128  # questions a task, each time
    final_limit: int = 1000  # questions a task, at the end


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh (`kimi_jax.sharding`). -1 takes all devices that are left."""

    fsdp: int = -1  # rows of the batch and every weight
    expert: int = 1  # rows of the batch and the routed experts
    tensor: int = 1  # heads and inner widths
    context: int = 1  # tokens of a row
    replica: int = 1  # copies of all weights; on several slices a multiple of their number


@dataclass(frozen=True)
class MemoryConfig:
    """What is traded for room on a device. What is recomputed: `ModelConfig.remat`, `remat_policy`."""

    microbatches: int = 1  # parts of a batch that are computed one after the other, their gradients added up
    expert_buffer: float = 1.25  # room for arriving rows over the mean; what does not fit takes further rounds


@dataclass(frozen=True)
class ProfileConfig:
    """A trace of `steps` steps from step `start_step` on, in `WORKDIR/xprof` (to be seen with xprof). 0 steps: none."""

    start_step: int = 10
    steps: int = 0


@dataclass(frozen=True)
class LoRAConfig:
    """Adapters learn beside frozen weights (`kimi_jax.nn.lora`). A run's model is then that of `base`, and
    `config.model` says only how it is computed (dtype, remat, scan_layers)."""

    base: str = ""  # a released directory or a workdir
    experts: str = "float"  # "int4": the routed experts of a released INT4 checkpoint stay packed
    rank: int = 16
    alpha: float = 32.0  # the adapters' product counts alpha / rank
    targets: tuple[str, ...] = ("attention", "mlp", "shared")  # names of nn.lora.TARGETS

    @property
    def scale(self) -> float:
        """What the product of the adapters is multiplied with."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class TrainConfig:
    """One run. `workdir` holds the log, the checkpoints and the report."""

    workdir: str = "runs/default"
    steps: int = 1000
    seed: int = 0
    log_interval: int = 10
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    lora: LoRAConfig | None = None  # None: all weights learn
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    xla_preset: bool = True  # options of the TPU compiler by chip: train.xla_flags


def check_schedule(config: OptimizerConfig, total_steps: int) -> None:
    """Raises ConfigError if warm-up and decay do not fit into the run, or the rates are no peak and end of one."""
    warmup = config.warmup_steps
    if total_steps < 1:
        raise ConfigError(f"a schedule needs at least one step, not {total_steps}")
    if not 0.0 <= config.decay_fraction <= 1.0:
        raise ConfigError(f"optimizer.decay_fraction must lie in 0..1, not {config.decay_fraction}")
    if not 0.0 <= config.final_lr <= config.peak_lr or config.peak_lr <= 0.0:
        raise ConfigError(
            f"optimizer.peak_lr must be positive and final_lr between 0 and it, not peak {config.peak_lr}, "
            f"final {config.final_lr}"
        )
    decay = round(config.decay_fraction * total_steps)
    if warmup < 0 or warmup + decay > total_steps:
        raise ConfigError(
            f"optimizer.warmup_steps={warmup} and a decay of {decay} steps (decay_fraction {config.decay_fraction}) do "
            f"not fit into {total_steps} steps; set warmup_steps to {total_steps - decay} at most"
        )


# -------------------------------------------------------------------------------------------------------------- presets


def _kimi_k2_5() -> ModelConfig:
    return ModelConfig()


def _moonlight_16b_a3b() -> ModelConfig:
    return ModelConfig(
        hidden_size=2048, intermediate_size=11264, num_hidden_layers=27, num_attention_heads=16, q_lora_rank=None,
        rope_scaling=None, max_position_embeddings=8192, eos_token_id=163586, vision=None,
        moe=MoEConfig(n_routed_experts=64, num_experts_per_tok=6, n_shared_experts=2, moe_intermediate_size=1408,
                      routed_scaling_factor=2.446),
    )  # fmt: skip


def _kimi_vl_a3b() -> ModelConfig:
    return dataclasses.replace(
        _moonlight_16b_a3b(), rope_theta=800000.0, max_position_embeddings=131072, vision=VisionConfig()
    )


def _small() -> ModelConfig:
    return ModelConfig(
        vocab_size=32768, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
        q_lora_rank=256, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
        rope_scaling=None, max_position_embeddings=8192,
        moe=MoEConfig(n_routed_experts=32, num_experts_per_tok=4, moe_intermediate_size=256, routed_scaling_factor=2.0),
        vision=VisionConfig(hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
                            init_pos_emb_height=32, init_pos_emb_width=32),
        media_placeholder_token_id=32767, bos_token_id=32765, eos_token_id=32766, pad_token_id=32764,
    )  # fmt: skip


def _demo() -> ModelConfig:
    return ModelConfig(
        vocab_size=2048, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        initializer_range=0.08,
        q_lora_rank=64, kv_lora_rank=48, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
        rope_scaling=YarnConfig(factor=4.0, original_max_position_embeddings=128), max_position_embeddings=512,
        moe=MoEConfig(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=96, routed_scaling_factor=1.5),
        vision=VisionConfig(hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                            init_pos_emb_height=16, init_pos_emb_width=16),
        media_placeholder_token_id=9, bos_token_id=0, eos_token_id=1, pad_token_id=2, dtype="float32",
    )  # fmt: skip


PRESETS = {
    "demo": _demo,
    "small": _small,
    "moonlight_16b_a3b": _moonlight_16b_a3b,
    "kimi_vl_a3b": _kimi_vl_a3b,
    "kimi_k2_5": _kimi_k2_5,
}


def preset(name: str) -> ModelConfig:
    """The named model. Raises ConfigError with the nearest name for an unknown one."""
    if name not in PRESETS:
        raise ConfigError(f"no model preset {name!r}{nearest(name, PRESETS)}; there are: {', '.join(PRESETS)}")
    return PRESETS[name]()


# ----------------------------------------------------------------------------------- ConfigDict <-> frozen dataclasses


def freeze(values: Any, cls: type = TrainConfig, path: str = "config") -> Any:
    """The dataclass `cls` filled from a mapping; every key must be a field.

    Raises ConfigError naming the path of the bad key and the nearest known one, or the value that has the wrong type.
    """
    hints = typing.get_type_hints(cls)
    unknown = [k for k in values if k not in hints]
    if unknown:
        key = unknown[0]
        raise ConfigError(f"unknown setting {path}.{key}{nearest(key, hints)}")
    return cls(**{k: _convert(values[k], hints[k], f"{path}.{k}") for k in values})


def _convert(value: Any, hint: Any, path: str) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None:
        if type(None) in options:
            return None
        raise ConfigError(f"{path} must not be None")
    hint = next(o for o in options if o is not type(None))
    origin = typing.get_origin(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else freeze(value, hint, path)
    if origin is dict:
        _, item = typing.get_args(hint)
        return {k: _convert(values, item, f"{path}.{k}") for k, values in value.items()}
    if origin is tuple:
        return _convert_tuple(value, typing.get_args(hint), path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{path} takes {hint.__name__}, not {value!r}")
    return value


def _convert_tuple(value: Any, items: tuple, path: str) -> tuple:
    if not isinstance(value, (tuple, list)):
        raise ConfigError(f"{path} takes a tuple, not {value!r}")
    if items[-1] is Ellipsis:
        items = (items[0],) * len(value)
    if len(items) != len(value):
        raise ConfigError(f"{path} takes {len(items)} values, not {len(value)}")
    return tuple(_convert(v, h, f"{path}[{i}]") for i, (v, h) in enumerate(zip(value, items, strict=True)))


def override(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """`config` with other values at the paths of `changes`: `override(config, {"optimizer.peak_lr": 1e-3})`.

    `{"lora.rank": 8}` turns an optional section on and `{"lora": None}` off; `{"data.sources.mine.kind": "jsonl"}`
    adds a source and `{"data.sources.mine": None}` removes one. Raises ConfigError for a setting that does not exist
    and for what `freeze` refuses.
    """
    values = dataclasses.asdict(config)
    set_paths(values, changes.items(), TrainConfig)
    return freeze(values)
