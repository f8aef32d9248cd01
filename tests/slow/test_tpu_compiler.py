"""The TPU compiler itself, which needs no TPU: a whole training step compiled for four v5p chips by the plan's command.

Runs in an environment of its own (`make test-tpu`): where libtpu is installed, jax looks for a TPU first.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.fixtures import REPO

pytestmark = pytest.mark.tpu
pytest.importorskip("libtpu", reason="needs the extra [tpu]: make test-tpu")

TOO_LARGE = """
import jax, jax.numpy as jnp
from kimi_jax.plan import chips, program
device = program.devices_of(chips.parse_topology("v5p:2x2x1"))[0]
x = jax.ShapeDtypeStruct((2**17, 2**17), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(device))
try:
    program.compile_lowered(lambda: jax.jit(lambda x: (x @ x) @ (x.T @ x)).lower(x))
except program.DoesNotFit as error:
    print(error.needed, error.available, program.reported(program._reports()))
"""


def run(*command: str) -> str:
    """Standard output, in a process that has no settings of the tests' own compilers."""
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}
    done = subprocess.run([sys.executable, *command], cwd=REPO, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Plan and compiled text of the demo's model in bfloat16."""
    folder = tmp_path_factory.mktemp("plan")
    run(
        "-m", "kimi_jax.plan", "--config=configs/demo.py", "--config.model.dtype=bfloat16", "--config.mesh.expert=2",
        "--topology=v5p:2x2x1", f"--json={folder}/plan.json", f"--hlo={folder}/step.hlo",
    )  # fmt: skip
    (plan,) = json.loads((folder / "plan.json").read_text())
    return plan, (folder / "step.hlo").read_text()


def test_memory_counted_is_memory_refused():
    """What the plan reads from the compiler's report is what the compiler names when it gives up."""
    needed, available, reported = map(int, run("-c", TOO_LARGE).split())
    assert needed > available == pytest.approx(95.74 * 2**30, rel=1e-3)
    assert reported == pytest.approx(needed, rel=1e-3)  # the message has two digits after the point


def test_the_program_holds_the_kernels_and_collectives(compiled):
    """Tokens travel by ragged-all-to-all, experts are megablox, attention is splash; nothing stands in for them."""
    plan, text = compiled
    assert text.count(" ragged-all-to-all") >= 7  # there and back; rows, gradient, gates there and two back
    for kernel in ("gmm", "tgmm", "splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"):
        assert kernel in text, kernel
    memory, timed = plan["memory"], plan["rounds"][str(plan["usual_rounds"])]
    assert memory["fits"] and memory["arguments"] < memory["peak"]
    assert timed["unpriced_kernels"] == [] and timed["compute_seconds"] > 0
