"""Weights from any directory that has some: released, converted, trained, or adapters merged into their base.

What `kimi_jax.load`, LoRA (`train.adapters`) and `config.init_from` (`train.init_from`) have in common.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh

from kimi_jax import sharding
from kimi_jax.config import ConfigError, MeshConfig, ModelConfig
from kimi_jax.hf import stream
from kimi_jax.nn import lora

DTYPES = ("float32", "bfloat16", "float16")
EXPERTS = ("float", "int4")


class LoadedWeights(NamedTuple):
    """A model's settings, its plain tree of parameters (`nn.kimi`), and where its tokenizer is."""

    config: ModelConfig
    params: dict[str, Any]
    tokenizer_path: str


def load_weights(
    path: str | os.PathLike[str],
    dtype: str = "float32",
    experts: str = "float",
    mesh: Mesh | None = None,
    verify: bool = True,
) -> LoadedWeights:
    """The weights of a directory, which `kimi_jax.load` describes, with its arguments and errors."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if experts not in EXPERTS:
        raise ConfigError(f"experts={experts!r} is not one of {', '.join(EXPERTS)}")
    folder = epath.Path(path)
    if (folder / "checkpoints").is_dir():
        if experts == "int4":
            raise ConfigError(
                f"{folder} is a workdir and holds floats; for INT4 experts: python -m kimi_jax.convert to-hf --int4, "
                "and load what it writes"
            )
        from kimi_jax.train import checkpoint  # here: a released directory needs neither Orbax nor its checkpoints

        one = sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
        run, params = checkpoint.load(str(folder), mesh=mesh or one, dtype=dtype, verify=verify)
        if run.lora is not None:
            base = load_weights(run.lora.base, dtype, run.lora.experts, mesh, verify)
            return base._replace(params=lora.merge(base.params, params, run.lora))
        config = dataclasses.replace(run.model, dtype=dtype, param_dtype=dtype, remat=False)
        tokenizer_path = run.data.tokenizer or str(folder / "released")  # where conversion keeps what came along
        return LoadedWeights(config, params, tokenizer_path)
    if (folder / "config.json").is_file():  # a run has one too, of its settings
        config, params = stream.load(folder, dtype, keep_int4=experts == "int4", mesh=mesh)
        return LoadedWeights(config, params, str(folder))
    raise FileNotFoundError(
        f"{folder} is no model: it has neither config.json (a released checkpoint) nor checkpoints/ (a workdir)"
    )
