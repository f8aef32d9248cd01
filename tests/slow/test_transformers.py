"""Every released family against transformers' own implementation on the same random weights, through `kimi.load`.

The published fixture (tests/parity) is K2.5 alone. Here Moonlight, K2-Instruct with its FP8 weights, K2-Thinking, K2.5
and Kimi-VL are written in their released layouts, with the released widths of a head and the released rotary settings,
and loaded by both sides: DeepseekV3ForCausalLM for text, Kimi_K25ForConditionalGeneration for the vision tower.

EXACT     float32: max |ours - theirs| / max |theirs|. Sums run in another order, and torch computes the rotary
          frequencies in float32, we in float64: a unit in the last place is 6e-8 of an angle of up to 150 radians, and
          four layers amplify it. Measured: 1e-6 to 7e-6. Wrong settings give 0.05 to 1.
bfloat16  root mean squares, relative to torch in float32 on the same weights, experts pinned. Every operation rounds to
          2^-9, so that torch's own bfloat16 is off by 1.7 to 2.6 %; ours, which rounds at the same places but for sums
          it holds in float32, must be no worse (measured: 0.7 to 1.0 of torch's; 1.25 is allowed). Of two such errors
          that share little, the difference is up to their root of squares: 1.5 (measured: 0.8 to 1.15).
Free routing is compared too: both must choose the same experts for every token of every layer.

Where transformers deviates from the released code, docs/released_model.md says what the release does and we follow
that:
  - with `mscale_all_dim` 0 the release scales cos and sin by the magnitude of `mscale`, transformers by that of 1;
    the variants here have mscale 1 where mscale_all_dim is 0, and `test_mscale_alone` has the other by hand;
  - transformers holds the vision tower's time table in float32 even in a bfloat16 model, the release in bfloat16;
  - `get_image_features` of 5.15 to 5.23 fails for video chunks (it splits by t*h*w/4): tower and projector are called;
  - it normalises the gate of a single chosen expert too, which the release does not: two at least are chosen here;
  - it knows no Kimi-VL: its tower is that of K2.5 for t = 1 (docs/released_model.md section 1.3), so theirs reads the
  same
    weights under K2.5's names.
Runs in the environment of lm-eval, which brings torch (`make test-lm-eval`). No network.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import kimi_jax as kimi
from kimi_jax.config import ModelConfig, MoEConfig, VisionConfig, YarnConfig
from kimi_jax.hf import stream
from kimi_jax.hf.names import leaf_shapes
from kimi_jax.nn.decoder import DecoderLayer

pytestmark = pytest.mark.transformers
if os.environ.get("KIMI_SLOW") != "lm_eval":  # there they must be installed
    pytest.importorskip("transformers", reason="needs the extra [transformers]: make test-lm-eval")
    pytest.importorskip("torch", reason="needs the extra [transformers]: make test-lm-eval")
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

EXACT = 1e-5
YARN = YarnConfig(factor=64.0, beta_fast=32.0)  # K2.5's
MOE = MoEConfig(n_routed_experts=16, num_experts_per_tok=4, moe_intermediate_size=32)
TEXT = ModelConfig(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=2, q_lora_rank=48,
    kv_lora_rank=64, rope_scaling=YARN, bos_token_id=0, eos_token_id=1, pad_token_id=2, media_placeholder_token_id=5,
    vision=None, moe=MOE, dtype="float32", param_dtype="float32",
)  # fmt: skip
# heads as wide as the released ones, 72; the table is square, as transformers supposes
VISION = VisionConfig(
    hidden_size=144, intermediate_size=200, num_hidden_layers=3, num_attention_heads=2, init_pos_emb_height=16,
    init_pos_emb_width=16,
)  # fmt: skip


def variant(config=TEXT, **changes) -> ModelConfig:
    """The model with other settings; those of its experts and of YaRN too."""
    parts = {"moe": config.moe, "rope_scaling": config.rope_scaling}
    for part, found in parts.items():
        names = {f.name for f in dataclasses.fields(found)} if found else set()
        own = {name: changes.pop(name) for name in names & changes.keys()}
        parts[part] = dataclasses.replace(found, **own) if own else found
    return dataclasses.replace(config, **(parts | changes))


# Moonlight and the language model of Kimi-VL: direct queries, two shared experts, no YaRN (docs/released_model.md
# section 1.3)
PLAIN = variant(n_shared_experts=2, routed_scaling_factor=2.446, q_lora_rank=None, rope_scaling=None)
FAMILIES = {
    "moonlight": ("deepseek_v3", PLAIN),
    "k2_instruct": ("kimi_k2", variant(factor=32.0, beta_fast=1.0, rms_norm_eps=1e-6)),
    "k2_thinking": ("kimi_k2", variant(beta_fast=1.0)),
    "k2_5_text": ("kimi_k2", TEXT),
    "kimi_vl_text": ("deepseek_v3", variant(PLAIN, rope_theta=800000.0)),
    "q_lora_without_yarn": ("deepseek_v3", variant(rope_scaling=None)),
    "direct_queries_with_yarn": ("deepseek_v3", variant(q_lora_rank=None)),
    "no_softmax_correction": ("deepseek_v3", variant(mscale_all_dim=0.0)),
    "unequal_mscales": ("deepseek_v3", variant(mscale=0.707)),
    "equal_small_mscales": ("deepseek_v3", variant(rope_scaling=YarnConfig(8.0, 64, 16.0, 2.0, 0.707, 0.707))),
    "gates_not_normalised": ("deepseek_v3", variant(norm_topk_prob=False, first_k_dense_replace=2)),
}


def weights(config, dtype="float32"):
    """Random weights: norms around 1, all else, biases too, around 0 with a standard deviation of 0.15.

    The matrices before the norms of MLA are small, so that the eps of these norms, 1e-6, can be told from 1e-5.
    """
    rng, tree = np.random.default_rng(0), {}
    for leaf, shape in leaf_shapes(config).items():
        array = (0.03 if leaf.endswith(("q_a.kernel", "kv_a.kernel")) else 0.15) * rng.standard_normal(
            shape, np.float32
        )
        array += leaf.endswith(".scale")
        stream.set_leaf(tree, leaf, array.astype(np.float32 if leaf == stream.BIAS else dtype))
    return tree


def written(path, model_type, config, dtype="float32"):
    """A random checkpoint in the family's released layout."""
    stream.save(path, config, weights(config, dtype), model_type, dtype)
    return path


def pretrained(kind, path, config, dtype):
    """A transformers model of a directory, with all weights of it and no others. Attention step by step, as ours."""
    model, report = kind.from_pretrained(
        path, config=config, dtype=getattr(torch, dtype), attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def text_peer(path, dtype="float32", **rope):
    """transformers' DeepseekV3 on a text-only directory; kimi_k2 is deepseek_v3 to it. rope: settings to add."""
    released = json.loads((path / "config.json").read_text()) | {"model_type": "deepseek_v3"}
    released["rope_scaling"] = {**(released["rope_scaling"] or {}), **rope} or None
    return pretrained(
        transformers.DeepseekV3ForCausalLM, path, transformers.DeepseekV3Config.from_dict(released), dtype
    )


def asked(model, ids, expert_ids=None, **inputs):
    """(logits float32 [B, S, V], the experts of every token int [B, MoE layers, S, k]) of a transformers model.

    expert_ids: experts instead of the routers' own.
    """
    found = []

    def choose(router, _, output):
        logits, gates, experts = output
        if expert_ids is not None:
            experts = torch.tensor(expert_ids[:, len(found)].reshape(experts.shape))
            gates = logits.sigmoid().gather(1, experts)
            gates = gates / (gates.sum(-1, keepdim=True) + 1e-20) * router.routed_scaling_factor
        found.append(experts.numpy())
        return logits, gates, experts

    kind = transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3TopkRouter
    hooks = [m.register_forward_hook(choose) for m in model.modules() if isinstance(m, kind)]
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor(ids), use_cache=False, **inputs).logits
    for hook in hooks:
        hook.remove()
    return logits.float().numpy(), np.stack(found).reshape(len(found), *ids.shape, -1).swapaxes(0, 1)


def experts_of(model, ids):
    """Which experts our routers choose for every token, sorted, [B, MoE layers, S, k]."""
    where = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape), jnp.ones(ids.shape, jnp.int32)
    x, found = jnp.asarray(model.params["embed"]["embedding"])[ids], []

    @functools.partial(jax.jit, static_argnums=0)
    def step(routed, params, x):
        layer = DecoderLayer(model.config, routed).bind({"params": params})
        attended = x + layer.attention(layer.input_norm(x), *where)[0]
        experts = layer.mlp.router(layer.post_attention_norm(attended)).experts if routed else None
        return layer(x, *where)[0], experts

    for name, routed in (("dense_layers", False), ("moe_layers", True)):
        for n in range(len(model.params[name]["input_norm"]["scale"])):
            x, experts = step(routed, jax.tree.map(lambda a, n=n: a[n], model.params[name]), x)
            found += [np.sort(experts)] if routed else []
    return np.stack(found, axis=1)


def error(ours, theirs):
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def rms(x):
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


IDS = np.random.default_rng(1).integers(6, TEXT.vocab_size, (2, 150))


# ----------------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("name", FAMILIES)
def test_text_in_float32(name, tmp_path):
    """Logits and routed experts, free; logits with their experts pinned."""
    path = written(tmp_path / "m", *FAMILIES[name])
    theirs, expert_ids = asked(text_peer(path), IDS)
    model = kimi.load(path)
    assert error(model.logits(IDS), theirs) <= EXACT
    np.testing.assert_array_equal(experts_of(model, IDS), np.sort(expert_ids))
    assert error(model.logits(IDS, routed_experts=expert_ids), theirs) <= EXACT


def test_mscale_alone(tmp_path):
    """Without mscale_all_dim the release scales cos and sin by 0.1 * mscale * ln(factor) + 1 (see above)."""
    path = written(tmp_path / "m", "kimi_k2", variant(mscale=0.707, mscale_all_dim=0.0))
    theirs, _ = asked(text_peer(path, attention_factor=0.1 * 0.707 * math.log(64.0) + 1), IDS)
    assert error(kimi.load(path).logits(IDS), theirs) <= EXACT
    assert error(asked(text_peer(path), IDS)[0], theirs) > 10 * EXACT


@st.composite
def models(draw):
    """Any sizes and settings that both can express: torch wants widths of experts of whole 16 bytes."""
    width, few = st.integers(1, 6).map(lambda n: 8 * n), st.integers(2, 4)
    yarn = st.builds(
        YarnConfig, factor=st.sampled_from((2.0, 64.0)), original_max_position_embeddings=st.sampled_from((16, 4096)),
        beta_fast=st.sampled_from((1.0, 32.0)), mscale=st.sampled_from((0.707, 1.0, 2.0)),
        mscale_all_dim=st.sampled_from((0.0, 1.0)),
    )  # fmt: skip
    moe = MoEConfig(
        n_routed_experts=draw(st.integers(4, 9)), num_experts_per_tok=draw(few), n_shared_experts=draw(few) // 2,
        moe_intermediate_size=draw(width), first_k_dense_replace=draw(st.integers(0, 2)),
        norm_topk_prob=draw(st.booleans()), routed_scaling_factor=draw(st.sampled_from((1.0, 2.446))),
    )  # fmt: skip
    return variant(
        hidden_size=draw(width), intermediate_size=draw(width), num_hidden_layers=3, num_attention_heads=draw(few),
        q_lora_rank=draw(st.one_of(st.none(), width)), kv_lora_rank=draw(width), qk_nope_head_dim=draw(few),
        qk_rope_head_dim=2 * draw(few), v_head_dim=draw(few), rope_scaling=draw(st.one_of(st.none(), yarn)), moe=moe,
        rope_theta=draw(st.sampled_from((10000.0, 800000.0))), rms_norm_eps=draw(st.sampled_from((1e-5, 1e-6))),
    )  # fmt: skip


@settings(max_examples=6, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # each is compiled: none made smaller
@given(config=models())
def test_random_models_in_float32(config, tmp_path_factory):
    """Load and agree; rotary magnitudes by the release's rule, as above."""
    path, yarn, rope = written(tmp_path_factory.mktemp("any") / "m", "deepseek_v3", config), config.rope_scaling, {}
    if yarn:
        size, of_scores = (0.1 * m * math.log(yarn.factor) + 1 for m in (yarn.mscale, yarn.mscale_all_dim))
        rope["attention_factor"] = size / of_scores
    ids = IDS[:, :13]
    theirs, expert_ids = asked(text_peer(path, **rope), ids)
    model = kimi.load(path)
    assert error(model.logits(ids), theirs) <= EXACT
    assert error(model.logits(ids, routed_experts=expert_ids), theirs) <= EXACT


@pytest.mark.parametrize(
    "wrong",
    [
        {"lora_norm_eps": 1e-5}, {"rms_norm_eps": 1e-6}, {"beta_fast": 1.0}, {"factor": 32.0}, {"mscale_all_dim": 0.0},
        {"mscale": 0.707}, {"rope_scaling": None}, {"rope_theta": 10000.0}, {"routed_scaling_factor": 2.446},
        {"norm_topk_prob": False},
    ],
    ids=str,
)  # fmt: skip
def test_these_weights_tell_settings_apart(wrong, tmp_path):
    """With any one setting of another family the logits are off by far more than the tolerance."""
    path = written(tmp_path / "m", "kimi_k2", TEXT)
    model = kimi.load(path)
    want = model.logits(IDS)
    assert error(kimi.Model(variant(**wrong), model.params).logits(IDS), want) > 10 * EXACT


def test_fp8_of_k2_instruct(tmp_path):
    """Blocks of 128 x 128, each with a scale of its own, partial ones at the edges, against torch's float8.

    transformers cannot read it: it takes rows / scales for the height of a block, which partial blocks belie. So
    theirs is the checkpoint that torch dequantises to bfloat16, as DeepSeek-V3's own conversion does.
    """
    _, config = FAMILIES["k2_instruct"]
    config = variant(config, hidden_size=192, intermediate_size=320, moe_intermediate_size=160, q_lora_rank=144)
    plain = written(tmp_path / "plain", "kimi_k2", config, "bfloat16")
    packed, tensors, rng = {}, load_file(plain / "model.safetensors"), np.random.default_rng(2)
    for name, weight in list(tensors.items()):
        if "proj" not in name:
            packed[name] = weight
            continue
        scales = torch.tensor(rng.uniform(1e-3, 4e-3, [-(-n // 128) for n in weight.shape]), dtype=torch.float32)
        whole = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]
        packed[name] = (weight / whole).to(torch.float8_e4m3fn)
        packed[name + "_scale_inv"] = scales
        tensors[name] = (packed[name].float() * whole).to(torch.bfloat16)
    assert sum(t.dtype == torch.float8_e4m3fn for t in packed.values()) > 150
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    released = json.loads((plain / "config.json").read_text())
    released["quantization_config"] = {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    }  # fmt: skip
    (tmp_path / "fp8").mkdir()
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(released))
    save_file(packed, tmp_path / "fp8" / "model.safetensors", {"format": "pt"})
    theirs, expert_ids = asked(text_peer(plain), IDS)
    model = kimi.load(tmp_path / "fp8")
    # weights of scales that differ by block: 7e-6 and 1.2e-5 on two processors; a scale of the wrong block gives tenths
    assert error(model.logits(IDS), theirs) <= 2 * EXACT
    np.testing.assert_array_equal(experts_of(model, IDS), np.sort(expert_ids))


@pytest.mark.parametrize("name", ["moonlight", "k2_instruct", "k2_5_text"])
def test_text_in_bfloat16(name, tmp_path):
    """With the experts of float32: no further from float32 than torch in bfloat16 is, and no further from torch."""
    path = written(tmp_path / "m", *FAMILIES[name], "bfloat16")
    truth, expert_ids = asked(text_peer(path), IDS)
    theirs, _ = asked(text_peer(path, "bfloat16"), IDS, expert_ids)
    check_bfloat16(kimi.load(path, dtype="bfloat16").logits(IDS, routed_experts=expert_ids), theirs, truth)


def check_bfloat16(ours, theirs, truth):
    limit = rms(theirs - truth)
    assert 0 < limit < 0.05 * rms(truth)
    assert rms(ours - truth) <= 1.25 * limit
    assert rms(ours - theirs) <= 1.5 * limit


# --------------------------------------------------------------------------------------------------------------- vision


IMAGES = ((1, 16, 16), (1, 10, 24), (1, 2, 2), (1, 32, 6), (1, 4, 4))  # the table as it is, larger, smaller, both
CHUNKS = ((4, 8, 6), (1, 10, 4), (3, 4, 20), (2, 2, 2))
VISUAL = {
    "kimi_k25": (variant(vision=VISION), IMAGES + CHUNKS),
    "kimi_vl": (variant(PLAIN, rope_theta=800000.0, vision=VISION), IMAGES),
}


def vision_peer(path, config, dtype="float32"):
    """transformers' Kimi K2.5 on a released directory. It does not read the released names of settings."""
    v, text = config.vision, json.loads((path / "config.json").read_text())["text_config"]
    native = transformers.Kimi_K25Config(
        text_config=text | {"model_type": "deepseek_v3"},
        vision_config={
            "patch_size": v.patch_size, "pos_emb_height": v.init_pos_emb_height, "pos_emb_width": v.init_pos_emb_width,
            "pos_emb_time": v.init_pos_emb_time, "num_attention_heads": v.num_attention_heads,
            "num_hidden_layers": v.num_hidden_layers, "hidden_size": v.hidden_size,
            "intermediate_size": v.intermediate_size,
        },
        projection_hidden_size=v.hidden_size, image_token_id=config.media_placeholder_token_id,
        tie_word_embeddings=False,
    )  # fmt: skip
    return pretrained(transformers.Kimi_K25ForConditionalGeneration, path, native, dtype)


def features_of(model, pixels, grids):
    """[F, D] of the tower and the projector, item by item (see above why not all by `get_image_features`)."""
    tower, found = model.model.vision_tower, []
    with torch.inference_mode():
        for grid, item in zip(grids, np.split(pixels, np.cumsum(grids.prod(-1))[:-1]), strict=True):
            pooled = tower(torch.tensor(item, dtype=model.dtype), grid_thw=torch.tensor(grid[None])).pooler_output
            found.append(model.model.mm_projector(pooled).squeeze(1))
    return torch.cat(found)


def multimodal(grids):
    """(ids [1, S] with a pad for each feature, pixels, grids [items, 3])."""
    rng, parts = np.random.default_rng(3), []
    for _, h, w in grids:
        parts += [rng.integers(6, TEXT.vocab_size, 5), np.full(h * w // 4, TEXT.media_placeholder_token_id)]
    pixels = rng.uniform(-1, 1, (sum(math.prod(g) for g in grids), 3, 14, 14)).astype(np.float32)
    return np.concatenate([*parts, [7]])[None], pixels, np.array(grids)


def answers(model, ids, pixels, grids, expert_ids=None):
    """(features, logits, expert_ids) of transformers."""
    features = features_of(model, pixels, grids)
    media = {"image": SimpleNamespace(pooler_output=(features,))}
    return features.float().numpy(), *asked(model, ids, expert_ids, mm_encoder_outputs=media)


@pytest.mark.parametrize("model_type", VISUAL)
def test_images_and_video_in_float32(model_type, tmp_path):
    """Features of items of many sizes in one call, and multimodal logits, free and pinned."""
    config, grids = VISUAL[model_type]
    ids, *media = multimodal(grids)
    theirs = vision_peer(written(tmp_path / "theirs", "kimi_k25", config), config)
    features, logits, expert_ids = answers(theirs, ids, *media)
    model = kimi.load(written(tmp_path / "ours", model_type, config))
    assert error(model.vision_features(*media), features) <= EXACT
    assert error(model.logits(ids, *media), logits) <= EXACT
    assert error(model.logits(ids, *media, routed_experts=expert_ids), logits) <= EXACT


@pytest.mark.parametrize("model_type", VISUAL)
def test_images_and_video_in_bfloat16(model_type, tmp_path):
    """As for text. The experts are pinned to those of float32."""
    config, grids = VISUAL[model_type]
    ids, *media = multimodal(grids)
    path = written(tmp_path / "theirs", "kimi_k25", config, "bfloat16")
    *truth, expert_ids = answers(vision_peer(path, config), ids, *media)
    features, logits, _ = answers(vision_peer(path, config, "bfloat16"), ids, *media, expert_ids)
    model = kimi.load(written(tmp_path / "ours", model_type, config, "bfloat16"), dtype="bfloat16")
    check_bfloat16(model.vision_features(*media), features, truth[0])
    check_bfloat16(model.logits(ids, *media, routed_experts=expert_ids), logits, truth[1])
