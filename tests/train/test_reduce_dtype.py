"""Gradients of a bfloat16 model on a mesh: every leaf is as near to float32 as one device's, and what is summed over
devices is summed in `MemoryConfig.reduce_dtype`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax import config as c
from kimi_jax import sharding
from kimi_jax.kernels.vocab import vocab_parallel
from kimi_jax.nn.kimi import Embedding, init_params
from kimi_jax.nn.param import unbox
from kimi_jax.train import state as state_lib
from kimi_jax.train.step import gradients, make_layout
from tests.nn.tiny import QUICK
from tests.train.tiny import CONFIG, make_batch, with_model

GROUPS = 16
MESHES = [
    {"fsdp": 8},
    {"fsdp": 2, "expert": 4},
    {"fsdp": 1, "expert": 8},
    {"fsdp": 2, "context": 2, "tensor": 2},
    {"replica": 2, "fsdp": 1, "expert": 2, "tensor": 2},
]


def config_of(dtype="bfloat16", scan=True, microbatches=1, reduce_dtype="float32", experts=8) -> c.TrainConfig:
    moe = dataclasses.replace(CONFIG.model.moe, n_routed_experts=experts)
    config = with_model(dtype=dtype, scan_layers=scan, moe=moe, initializer_range=0.1)
    data = dataclasses.replace(config.data, num_packs=GROUPS)
    memory = c.MemoryConfig(microbatches=microbatches, reduce_dtype=reduce_dtype)
    return dataclasses.replace(config, data=data, memory=memory)


def grads_of(config, axes=None) -> dict[str, np.ndarray]:
    """The gradient of every leaf in float64, by name; on one device without axes."""
    params = jax.jit(lambda: unbox(init_params(config.model, jax.random.key(0))), compiler_options=QUICK)()
    batch, layout = make_batch(0, GROUPS), None
    if axes is not None:
        mesh = sharding.make_mesh(c.MeshConfig(**axes))
        layout = make_layout(config, mesh)
        where = jax.tree.map(lambda x: x.sharding, state_lib.abstract_params(config.model, mesh))
        params, batch = jax.device_put(params, where), sharding.put_batch(batch, mesh)
    fn = jax.jit(lambda p, b: gradients(p, b, config, layout)[1], compiler_options=QUICK)
    flat = jax.tree_util.tree_leaves_with_path(jax.device_get(fn(params, batch)))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x, np.float64) for path, x in flat}


def errors(got, want) -> dict[str, float]:
    return {name: np.linalg.norm(got[name] - x) / max(np.linalg.norm(x), 1e-30) for name, x in want.items() if x.any()}


@pytest.fixture(scope="module")
def float32():
    return grads_of(config_of("float32"))


@pytest.fixture(scope="module")
def one_device(float32):
    return errors(grads_of(config_of()), float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "microbatches", "scan"), [(axes, 1 + i % 2, i % 3 != 1) for i, axes in enumerate(MESHES)], ids=str
)
def test_gradients_in_bfloat16_on_a_mesh_are_as_near_to_float32_as_on_one_device(
    float32, one_device, axes, microbatches, scan
):
    """Rounding of activations is a sample of one device's: half as much again, and 1 % for leaves with little of it."""
    found = errors(grads_of(config_of(scan=scan, microbatches=microbatches), axes), float32)
    assert found.keys() == one_device.keys()
    worse = {name: (e, one_device[name]) for name, e in found.items() if e > 1.5 * one_device[name] + 0.01}
    assert not worse


# -------------------------------------------------------------------------------------------------------- the embedding


def embedding_gradients(axes, reduce_dtype="float32") -> float:
    """The relative error of the table's gradient for 16,384 tokens as frequent as in text."""
    config = dataclasses.replace(config_of().model, vocab_size=256)
    rng = np.random.default_rng(0)
    frequency = 1 / np.arange(1, 257)
    tokens = rng.choice(256, size=(32, 512), p=frequency / frequency.sum()).astype(np.int32)
    width = config.hidden_size
    noise = rng.normal(size=(256, width))[tokens] + 3 * rng.normal(size=(*tokens.shape, width))
    cotangent = jnp.asarray(noise, jnp.bfloat16)
    exact = np.zeros((256, width))
    np.add.at(exact, tokens.reshape(-1), np.asarray(cotangent, np.float64).reshape(-1, width))
    layout = sharding.layout(sharding.make_mesh(c.MeshConfig(**axes)), reduce_dtype=reduce_dtype)
    params = unbox(Embedding(config).init(jax.random.key(0), jnp.asarray(tokens[:1, :2]))["params"])

    def loss(params, tokens, cotangent):
        x = Embedding(config, layout).apply({"params": params}, tokens)
        return jnp.sum(x.astype(jnp.float32) * cotangent.astype(jnp.float32))

    got = jax.jit(jax.grad(loss))(params, jnp.asarray(tokens), cotangent)["embedding"]
    return float(np.linalg.norm(np.asarray(got, np.float64) - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_embedding_gradient_on_a_mesh_is_summed_in_float32(axes):
    """1e-6: float32 sums of a few thousand terms. In bfloat16 the error is some tenths."""
    assert embedding_gradients(axes) < 1e-6


def test_embedding_gradient_in_parts_of_columns(monkeypatch):
    monkeypatch.setattr(vocab_parallel, "SCATTER_BYTES", 4 * 256 * 8)
    assert vocab_parallel._column_parts(256, 32) == 4
    assert embedding_gradients({"fsdp": 1, "expert": 8}) < 1e-6


def test_embedding_gradient_with_reduce_dtype_bfloat16_rounds_only_between_devices():
    """Eight partial sums, each rounded to 8 bits: under 1 %, but not float32."""
    assert 1e-4 < embedding_gradients({"fsdp": 1, "expert": 8}, "bfloat16") < 1e-2


# ------------------------------------------------------------------------------------------------------------ the jaxpr


def reductions(jaxpr):
    """(primitive, dtype) of every sum of floats over devices, statistics of no axes left out."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("reduce_scatter", "psum", "psum2", "psum_invariant"):
            for x in eqn.outvars:
                if x.aval.ndim and jnp.issubdtype(x.aval.dtype, jnp.floating):
                    yield eqn.primitive.name, str(x.aval.dtype)
        for value in eqn.params.values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from reductions(inner)


@pytest.mark.parametrize("reduce_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_every_sum_over_devices_is_in_reduce_dtype(axes, reduce_dtype):
    """Of the language model: the compiler places those of the vision tower."""
    config = config_of(reduce_dtype=reduce_dtype)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vision=None))
    batch = dataclasses.replace(make_batch(0, GROUPS), vision=())
    layout = make_layout(config, sharding.make_mesh(c.MeshConfig(**axes)))
    params = jax.eval_shape(lambda: unbox(init_params(config.model, jax.random.key(0))))
    jaxpr = jax.make_jaxpr(lambda p, b: gradients(p, b, config, layout)[1])(params, batch)
    found = list(reductions(jaxpr.jaxpr))
    assert len(found) > 10
    assert {dtype for _, dtype in found} == {reduce_dtype}


def test_reduce_dtype_of_another_name_is_refused():
    with pytest.raises(c.ConfigError, match="reduce_dtype"):
        make_layout(config_of(reduce_dtype="float16"), sharding.make_mesh(c.MeshConfig()))
