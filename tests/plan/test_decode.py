"""What is planned is what decodes: the engine's own program, weights and pages sharded as in the engine."""

import dataclasses

import jax
import numpy as np
import pytest

from kimi_jax import sharding
from kimi_jax.config import MeshConfig
from kimi_jax.infer.engine import Engine
from kimi_jax.infer.forward import Chunk
from kimi_jax.infer.sampler import Settings
from kimi_jax.nn.kimi import init_params
from kimi_jax.nn.param import unbox
from kimi_jax.plan import decode
from tests.train.tiny import MODEL

pytestmark = pytest.mark.slow

SLOTS, LENGTH, PAGE = 8, 64, 16


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(MeshConfig(fsdp=2, expert=4))


@pytest.fixture(scope="module", params=[None, 16], ids=["floats", "int4"])
def engine(mesh, request):
    config = decode.served(MODEL)
    config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, int4_group_size=request.param))
    params = jax.jit(lambda: unbox(init_params(config, jax.random.key(0))))()
    return Engine(config, params, slots=SLOTS, page_size=PAGE, max_sequence_length=LENGTH, mesh=mesh)


def test_weights_are_those_of_the_engine(engine, mesh):
    planned = decode.abstract_weights(engine.config, mesh)
    for want, got in zip(jax.tree.leaves(engine._weights), jax.tree.leaves(planned), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert got.sharding.is_equivalent_to(want.sharding, want.ndim), (got.sharding, want.sharding)


def test_plan_lowers_the_function_that_the_engine_jits(engine, mesh):
    rows, width = np.zeros(SLOTS, np.int32), LENGTH // PAGE
    chunk = Chunk(rows[:, None], rows, rows, np.zeros((SLOTS, width), np.int32))
    settings = Settings(rows.astype(np.float32), rows.astype(np.float32), rows.astype(np.uint32), rows, rows)
    decoded = engine._program.lower(engine._weights, engine._cache, chunk, settings).as_text()
    planned = decode.lower(engine.config, mesh, SLOTS, LENGTH, PAGE).as_text()
    assert planned.replace("jit_next_tokens", "jit_run") == decoded
