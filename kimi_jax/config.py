"""Every setting of a run, as frozen dataclasses, and the named model presets.

`configs/*.py:get_config()` returns a mutable `ConfigDict` (so that `--config.a.b=1` works); `freeze` turns it into the
dataclasses below and refuses unknown keys. Defaults of the model are those of the released Kimi K2.5
(docs/released_model.md section 1.1); field names are the released ones.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from kimi_jax import ranges
from kimi_jax.config_rl import RLConfig as RLConfig
from kimi_jax.config_rl import RolloutConfig as RolloutConfig
from kimi_jax.config_rl import TaskConfig as TaskConfig
from kimi_jax.config_sources import ChatConfig as ChatConfig
from kimi_jax.config_sources import SourceConfig as SourceConfig
from kimi_jax.config_start import InitFromConfig as InitFromConfig
from kimi_jax.config_tree import ConfigError as ConfigError
from kimi_jax.config_tree import diff as diff
from kimi_jax.config_tree import nearest as nearest
from kimi_jax.config_tree import set_paths, unknown_setting
from kimi_jax.config_tree import thaw as thaw
from kimi_jax.ranges import (
    LARGEST,
    Count,
    Decay,
    Dtype,
    ModelDtype,
    Natural,
    NonNegative,
    OneOf,
    Positive,
    Range,
    Seed,
    Share,
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class YarnConfig:
    """Rotary scaling by YaRN; released field names."""

    factor: Annotated[float, Range(1.0, 1e30)] = 64.0
    original_max_position_embeddings: Count = 4096
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    mscale: NonNegative = 1.0
    mscale_all_dim: NonNegative = 1.0


@dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts: sigmoid router with a selection bias, dropless routed experts, shared experts."""

    n_routed_experts: Count = 384
    num_experts_per_tok: Count = 8
    n_shared_experts: Natural = 1
    moe_intermediate_size: Count = 2048
    first_k_dense_replace: Natural = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: Positive = 2.827
    int4_group_size: Count | None | None = None  # routed experts held as INT4, one scale for so many inputs; frozen

    def conflict(self) -> str:
        """What does not go together; empty if all does."""
        if self.num_experts_per_tok > self.n_routed_experts:
            return f"num_experts_per_tok = {self.num_experts_per_tok} of n_routed_experts = {self.n_routed_experts}"
        return ""


@dataclass(frozen=True)
class VisionConfig:
    """MoonViT-3D and the projector (docs/released_model.md section 2)."""

    patch_size: Count = 14
    hidden_size: Count = 1152
    intermediate_size: Count = 4304
    num_hidden_layers: Count = 27
    num_attention_heads: Count = 16
    init_pos_emb_height: Count = 64
    init_pos_emb_width: Count = 64
    init_pos_emb_time: Count = 4
    merge_kernel_size: tuple[Count, Count] = (2, 2)
    rope_theta: Positive = 10000.0
    layer_norm_eps: Positive = 1e-5
    projector_ln_eps: Positive = 1e-5

    def conflict(self) -> str:
        """What does not go together; empty if all does."""
        if self.hidden_size % self.num_attention_heads or self.hidden_size // self.num_attention_heads % 4:
            return "hidden_size must be num_attention_heads times a multiple of 4"
        return "" if self.merge_kernel_size == (2, 2) else "merge_kernel_size is (2, 2)"


@dataclass(frozen=True)
class ModelConfig:
    """The whole model. `vision=None` is a text-only model; `moe=None` makes every layer dense."""

    vocab_size: Count = 163840
    hidden_size: Count = 7168
    intermediate_size: Count = 18432
    num_hidden_layers: Count = 61
    num_attention_heads: Count = 64
    q_lora_rank: Count | None | None = 1536
    kv_lora_rank: Count = 512
    qk_nope_head_dim: Count = 128
    qk_rope_head_dim: Count = 64
    v_head_dim: Count = 128
    rms_norm_eps: Positive = 1e-5
    lora_norm_eps: Positive = 1e-6
    rope_theta: Positive = 50000.0
    rope_scaling: YarnConfig | None = field(default_factory=YarnConfig)
    max_position_embeddings: Count = 262144
    initializer_range: Positive = 0.02
    moe: MoEConfig | None = field(default_factory=MoEConfig)
    vision: VisionConfig | None = field(default_factory=VisionConfig)
    media_placeholder_token_id: Natural = 163605
    bos_token_id: Natural = 163584
    eos_token_id: Natural = 163585
    pad_token_id: Natural = 163839
    dtype: ModelDtype = "bfloat16"  # activations
    param_dtype: ModelDtype = "float32"  # stored weights
    scan_layers: bool = True  # False unrolls the same stacked weights
    remat: bool = False  # recompute each layer in the backward pass; the vision tower as a whole always is
    remat_policy: str = "layer_inputs"  # what of a decoder layer is kept all the same: nn.decoder.REMAT_POLICIES

    @property
    def qk_head_dim(self) -> int:
        """Width of one query/key head: the part without rotary plus the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def conflict(self) -> str:
        """What does not go together; empty if all does."""
        if self.qk_rope_head_dim % 2:
            return f"qk_rope_head_dim must be even, not {self.qk_rope_head_dim}"
        if self.num_moe_layers < 0:
            return (
                f"moe.first_k_dense_replace = {self.num_dense_layers} of num_hidden_layers = {self.num_hidden_layers}"
            )
        return ""

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
class DataConfig:
    """Shapes, mixture, workers. A pack is the unit of packing: `rows_per_pack` rows and the bins beside it."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    tokenizer: str = ""  # path of a tokenizer file (`.json` of `tokenizers`, or a released `tiktoken.model`)
    sequence_length: Annotated[int, Range(2, LARGEST)] = 4096  # S, tokens a row
    rows_per_pack: Count = 1  # R
    num_packs: Count = 8  # G: logical shards of the stream; global batch G * R rows. A multiple of the device count
    vision_bins: tuple[tuple[Count, Count], ...] = ((4096, 1),)  # (P patches, bins a pack), ascending P
    vision_ratio: tuple[tuple[Share, Share], ...] = ((0.0, 0.1),)  # (from this share of training, vision token share)
    exact_vision_ratio: bool = False  # every pack delivers its share of vision tokens: kimi_jax.data.vision_budget
    buffer_size: Count = 64  # examples that may wait for a pack with room
    num_workers: Natural = 1  # worker processes a host; 0 reads in the training process
    prefetch: Natural = 4  # packs each worker keeps ready
    max_bad_fraction: Share = 0.01  # a run with a larger share of unusable records stops
    seed: Seed = 0

    def conflict(self) -> str:
        """What does not go together; empty if all does."""
        begins = [begin for begin, _ in self.vision_ratio]
        if begins != sorted(begins):
            return f"the parts of vision_ratio must begin one after the other, not {begins}"
        if self.exact_vision_ratio and any(source.min_per_pack for source in self.sources.values()):
            return "exact_vision_ratio leaves no room for a min_per_pack of a source"
        return ""


# ------------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class OptimizerConfig:
    """MuonClip (docs/paper_notes.md section 2.4) and the WSD schedule (2.5)."""

    peak_lr: NonNegative = 2e-4
    final_lr: NonNegative = 2e-5
    warmup_steps: Natural = 500
    decay_fraction: Share = 0.35  # last part of training, cosine from peak to final
    weight_decay: NonNegative = 0.1
    matrices: Annotated[str, OneOf(("muon", "adamw"))] = "muon"  # what updates matrices; "adamw" is the baseline
    muon_momentum: Decay = 0.95
    muon_nesterov: bool = True
    newton_schulz_steps: Count = 5
    update_rms: Positive = 0.2  # Moonlight's RMS matching: update times 0.2 * sqrt(max(rows, columns))
    adam_b1: Decay = 0.9
    adam_b2: Decay = 0.95
    adam_eps: Positive = 1e-8
    momentum_dtype: Dtype = "float32"  # of Muon's momentum and Adam's first moment; "bfloat16" halves them
    grad_clip_norm: NonNegative = 1.0  # 0 switches clipping off
    qk_clip_tau: NonNegative = 100.0  # 0 switches QK-clip off
    router_bias_rate: NonNegative = 1e-3
    balance_loss_weight: NonNegative = 1e-4


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and how much to keep. `interval=0` saves at the end and on Ctrl-C only."""

    interval: Natural = 500
    keep: Count = 3
    verify: bool = True  # checksums are written with every checkpoint and compared before it is restored
    check_data: bool = True  # a run does not go on with a tokenizer or sources whose content has changed


@dataclass(frozen=True)
class RecoveryConfig:
    """What a run does about a loss that is not finite or spikes. The update of such a batch is always left out.

    After `max_skipped_in_row` of them the weights and moments of the newest checkpoint from before are taken instead,
    while data and step count go on; after `max_rollbacks` such returns the run stops.
    """

    spike_sigmas: NonNegative = (
        0.0  # a loss so many standard deviations above its running mean is a spike; 0: never judged
    )
    spike_after: Natural = 100  # updates before the running mean is trusted
    max_skipped_in_row: Count = 10
    max_rollbacks: Natural = 0


@dataclass(frozen=True)
class EvalConfig:
    """Periodic evaluation inside training. `tasks` are names of `kimi_jax.eval.tasks`."""

    tasks: tuple[str, ...] = ()
    interval: Natural = 0
    limit: Count = 128  # questions a task, each time
    final_limit: Count = 1000  # questions a task, at the end


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh (`kimi_jax.sharding`). -1 takes all devices that are left."""

    fsdp: Annotated[int, Range(-1, LARGEST)] = -1  # rows of the batch and every weight
    expert: Annotated[int, Range(-1, LARGEST)] = 1  # rows of the batch and the routed experts
    tensor: Annotated[int, Range(-1, LARGEST)] = 1  # heads and inner widths
    context: Annotated[int, Range(-1, LARGEST)] = 1  # tokens of a row
    replica: Annotated[int, Range(-1, LARGEST)] = (
        1  # copies of all weights; on several slices a multiple of their number
    )


@dataclass(frozen=True)
class MemoryConfig:
    """Memory and compute trade-offs. What is recomputed: `ModelConfig.remat`, `remat_policy`."""

    microbatches: Count = 1  # parts of a batch that are computed one after the other, their gradients added up
    expert_capacity_factor: Positive = 1.25  # of arriving rows over the mean; what overflows takes another round
    # In which dtype devices sum gradients of weights and, over `tensor` and `context`, parts of activations. Rounding
    # at every hop of a ring grows with the mesh, and Kimi K2 (arXiv:2507.20534) sums gradients in float32; "bfloat16"
    # sends half the bytes.
    reduce_dtype: Dtype = "float32"


@dataclass(frozen=True)
class ProfileConfig:
    """A trace of `steps` steps from step `start_step` on, in `WORKDIR/xprof` (to be seen with xprof). 0 steps: none."""

    start_step: Natural = 10
    steps: Natural = 0


@dataclass(frozen=True)
class LoRAConfig:
    """Adapters learn beside frozen weights (`kimi_jax.nn.lora`). A run's model is then that of `base`, and
    `config.model` says only how it is computed (dtype, remat, scan_layers)."""

    base: str = ""  # a released directory or a workdir; not copied into this run's workdir, which needs it there
    experts: Annotated[str, OneOf(("float", "int4"))] = (
        "float"  # "int4": the routed experts of a released INT4 checkpoint stay packed
    )
    rank: Count = 16
    alpha: Positive = 32.0  # the adapters' product counts alpha / rank
    targets: tuple[str, ...] = ("attention", "mlp", "shared")  # names of nn.lora.TARGETS

    @property
    def scale(self) -> float:
        """What the product of the adapters is multiplied with."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class TrainConfig:
    """One run. `workdir` holds the log, the checkpoints and the report."""

    workdir: str = "runs/default"
    steps: Count = 1000
    seed: Seed = 0
    log_interval: Count = 10
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    init_from: InitFromConfig = field(default_factory=InitFromConfig)
    freeze: tuple[str, ...] = ()  # names of parts that do not learn, as parameters declare them: nn.param.freeze
    lora: LoRAConfig | None = None  # None: all weights learn that are not frozen
    rl: RLConfig | None = None  # reinforcement learning: python -m kimi_jax.rl
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
    """The dataclass `cls` filled from a mapping; every key must be a field and every value in its range.

    Raises ConfigError naming the path of the bad key and the nearest known one, or the value and what is allowed.
    """
    config = _build(values, cls, path)
    check(config, path)
    return config


def check(config: Any, path: str = "config") -> None:
    """Raises ConfigError for the first value that is out of its range, or for two that do not go together.
    Settings that were built in Python have not been checked before."""
    if found := ranges.problem(config, path):
        raise ConfigError(found)


def _build(values: Any, cls: type, path: str) -> Any:
    if not hasattr(values, "keys"):
        raise ConfigError(f"{path} is a section of settings, not {values!r:.40}")
    hints = typing.get_type_hints(cls)
    unknown = [k for k in values if k not in hints]
    if unknown:
        key = unknown[0]
        raise ConfigError(unknown_setting(path, key, hints))
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
        return value if isinstance(value, hint) else _build(value, hint, path)
    if origin is dict:
        _, item = typing.get_args(hint)
        if not hasattr(value, "keys"):
            raise ConfigError(f"{path} is a section of settings, not {ranges.shown(value)}")
        return {k: _convert(values, item, f"{path}.{k}") for k, values in value.items()}
    if origin is tuple:
        return _convert_tuple(value, typing.get_args(hint), path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > 10**300:
            raise ConfigError(f"{path} takes a finite number, not {ranges.shown(value)}")
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{path} takes {hint.__name__}, not {ranges.shown(value)}")
    return value


def _convert_tuple(value: Any, items: tuple, path: str) -> tuple:
    if not isinstance(value, (tuple, list)):
        raise ConfigError(f"{path} takes a tuple, not {ranges.shown(value)}")
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
