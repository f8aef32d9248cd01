"""The floor of a decoding step, counted by hand for a model whose sizes are small enough to."""

import dataclasses
import math

import jax

from kimi_jax import sharding
from kimi_jax.config import MeshConfig
from kimi_jax.nn.kimi import count_params
from kimi_jax.plan import decode
from tests.train.tiny import MODEL

LENGTH = 64


def test_floor_is_every_weight_that_is_touched_and_every_latent_once():
    """float32 on one device. One slot touches k of E experts, very many slots all of them; the embedding is no matrix
    that is read, and the vision tower does not decode."""
    config, moe = decode.served(MODEL), MODEL.moe
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    experts = config.num_moe_layers * moe.n_routed_experts * 3 * config.hidden_size * moe.moe_intermediate_size
    rest = count_params(config)["text"] - experts - config.vocab_size * config.hidden_size
    latents = LENGTH * config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim)
    one = rest + experts * moe.num_experts_per_tok // moe.n_routed_experts + latents
    assert decode.floor_bytes(config, mesh, 1, LENGTH) == 4 * one
    many = 4 * (rest + experts + 1000 * latents)
    assert math.isclose(decode.floor_bytes(config, mesh, 1000, LENGTH), many, rel_tol=1e-9)


def test_floor_of_more_devices_is_less_and_of_half_the_bytes_half():
    mesh = sharding.make_mesh(MeshConfig(fsdp=1, expert=4), jax.devices()[:4])
    one = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    config = decode.served(MODEL)
    half = decode.served(dataclasses.replace(MODEL, dtype="bfloat16"))
    assert decode.floor_bytes(config, mesh, 8, LENGTH) < decode.floor_bytes(config, one, 8, LENGTH) / 2
    assert decode.floor_bytes(half, one, 8, LENGTH) < 0.6 * decode.floor_bytes(config, one, 8, LENGTH)
