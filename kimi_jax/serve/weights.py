"""New weights for a running server: POST /v1/weights {"step": 12, "running": "drain"}.

A call names the step of a checkpoint and nothing else: which folder it is in was said when the server was started
(--weights_from), so no call makes it read another path. One change at a time; the server answers meanwhile.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import jax

from kimi_jax import sharding
from kimi_jax.config import MeshConfig
from kimi_jax.infer.programs import shapes
from kimi_jax.serve.protocol import ApiError, Fields
from kimi_jax.serve.worker import EngineWorker

if TYPE_CHECKING:
    from kimi_jax.infer.engine import Engine

MAX_BODY = 4096  # bytes
MAX_STEP = 1 << 31
RUNNING = ("drain", "keep", "recompute")


class WeightsFolder:
    """The checkpoints of a workdir, read for an engine. The version of weights is their step."""

    def __init__(self, workdir: str, engine: Engine):
        self._workdir, self._engine = workdir, engine
        self._busy = False

    def read(self, step: int) -> Any:
        """The weights of a step as the engine takes them.

        Raises FileNotFoundError without such a checkpoint, ValueError if it is damaged or not of this model.
        """
        from kimi_jax.train import checkpoint  # here: a server that never changes weights needs no Orbax

        engine = self._engine
        mesh = engine.mesh or sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
        run, params = checkpoint.load(self._workdir, step, mesh, engine.config.param_dtype)
        if run.lora is not None:
            raise ValueError(f"the checkpoint of step {step} holds adapters, not weights")
        if shapes(params) != engine.shapes:
            raise ValueError(f"the checkpoint of step {step} is of another model than the one that is served")
        return params

    async def change(self, body: Any, worker: EngineWorker) -> dict[str, Any]:
        """Does what a call asks for; what it is answered. Raises ApiError, and as `EngineWorker.set_params`."""
        fields = Fields(body)
        step = fields.integer("step", None, 0, MAX_STEP)
        running = fields.take("running", str, "drain")
        fields.finish()
        if step is None or running not in RUNNING:
            raise ApiError(400, f"step is the number of a checkpoint, running one of {', '.join(RUNNING)}", "step")
        if self._busy:
            raise ApiError(409, "other weights are being read; try again later", code="busy")
        self._busy = True
        try:
            params = await asyncio.to_thread(self.read, step)
            await worker.set_params(params, step, running)
        except FileNotFoundError as error:
            raise ApiError(404, f"there is no checkpoint of step {step}", "step", "no_checkpoint") from error
        finally:
            self._busy = False
        return {"object": "weights", "step": step, "version": worker.version}
