"""The TPU compiler itself, which needs no TPU: a whole training step compiled for four v5p chips by the plan's command,
and K2.5's experts as INT4 with adapters.

Runs in an environment of its own (`make test-tpu`): where libtpu is installed, jax looks for a TPU first.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.environment import REPO

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

# 4 of the 64 expert devices of K2.5, with 6 experts each; value and gradients
INT4_EXPERTS = """
import json, re
import jax
from jax.sharding import NamedSharding
from kimi_jax import sharding
from kimi_jax.config import MeshConfig
from kimi_jax.kernels.moe.expert_weights import LoRAWeights, Int4
from kimi_jax.kernels.moe.expert_parallel import expert_parallel
from kimi_jax.nn.moe import EXPERT_AXES, ExpertWeights, shard_experts
from kimi_jax.plan import chips, program

D, F, GROUP, RANK, EACH, PICKS, DEVICES, TOKENS = 7168, 2048, 32, 16, 384 // 64, 8, 4, 64
mesh = sharding.make_mesh(MeshConfig(fsdp=1, expert=DEVICES), program.devices_of(chips.parse_topology("v5p:2x2x1")))
layout = sharding.layout(mesh)

def array(axes, shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, layout.spec(axes, shape)))

def expert_weight(name, inputs, outputs):
    num, axes = EACH * DEVICES, EXPERT_AXES[name]
    words, scales = (num, inputs // 8, outputs), (num, inputs // GROUP, outputs)
    a = array((axes[0], axes[1], "lora"), (num, inputs, RANK), "float32")
    b = array((axes[0], "lora", axes[2]), (num, RANK, outputs), "float32")
    return LoRAWeights(Int4(array(axes, words, "int32"), array(axes, scales, "bfloat16")), a, b)

def tokens(width, dtype):
    return array(("batch", "sequence", None), (DEVICES, TOKENS, width), dtype)

def run(x, experts, gates, expert_weights):
    def value(x, gates, pairs):
        adapted = ExpertWeights(*(LoRAWeights(w.base, *pair) for w, pair in zip(expert_weights, pairs)))
        return expert_parallel(shard_experts(layout, x.shape, adapted), x, experts, gates, tuple(adapted))[0]

    y, pullback = jax.vjp(value, x, gates, [(expert_weight.a, expert_weight.b) for expert_weight in expert_weights])
    return y, pullback(y)

expert_weights = ExpertWeights(expert_weight("gate", D, F), expert_weight("up", D, F), expert_weight("down", F, D))
args = tokens(D, "bfloat16"), tokens(PICKS, "int32"), tokens(PICKS, "float32"), expert_weights
compiled = jax.jit(run).lower(*args).compile()
text = compiled.as_text()
print(json.dumps({
    "floats": re.findall(r"(?:f32|bf16)\\[[0-9,]*(?:7168,2048|2048,7168)\\]", text),
    "words": re.findall(r"s32\\[6,896,2048\\]", text),
    "kernels": sorted({name for name in ("int4_gmm", "tgmm", "ragged-all-to-all") if name in text}),
    "temporaries": compiled.memory_analysis().temp_size_in_bytes,
    "expert_weight": EACH * D * F * 2,
}))
"""

# one layer's attention of K2.5's decoding on one chip: 64 rows of 4,096 tokens, 64 heads
PAGED_LATENTS = """
import sys
import jax, jax.numpy as jnp
from kimi_jax.kernels.attention import paged_latent
from kimi_jax.plan import chips, program
device = program.devices_of(chips.parse_topology(sys.argv[1]))[0]
here = jax.sharding.SingleDeviceSharding(device)
array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=here)
shapes = ((64, 64, 640), "bfloat16"), ((4097, 64, 640), "bfloat16"), ((64, 64), "int32"), ((64,), "int32")
compiled = jax.jit(lambda *a: paged_latent.attend(*a, 512, 0.1)).lower(*(array(*each) for each in shapes)).compile()
text = compiled.as_text()
print("paged_latent_attention" in text, compiled.memory_analysis().temp_size_in_bytes)
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


def test_program_holds_the_kernels_and_collectives(compiled):
    """Tokens are sent by ragged-all-to-all, experts are megablox, attention is splash; nothing stands in for them."""
    plan, text = compiled
    assert text.count(" ragged-all-to-all") >= 7  # there and back; rows, gradient, gates there and two back
    for kernel in ("gmm", "tgmm", "splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"):
        assert kernel in text, kernel
    memory, timed = plan["memory"], plan["rounds"][str(plan["usual_rounds"])]
    assert memory["fits"] and memory["arguments"] < memory["peak"]
    assert timed["unpriced_kernels"] == [] and timed["compute_seconds"] > 0


def test_int4_experts_stay_words():
    """At K2.5's widths, a device's 6 experts: the kernel compiles, forward and for the inputs' gradient; no matrix of
    floats is in the program, whose temporaries (most of them adapters, whose rank of 16 takes 128 lanes) are smaller
    than two of the three expert weights would be in bfloat16."""
    found = json.loads(run("-c", INT4_EXPERTS).splitlines()[-1])
    assert found["kernels"] == ["int4_gmm", "ragged-all-to-all", "tgmm"]
    assert found["words"] and not found["floats"]
    assert found["temporaries"] < 2 * found["expert_weight"]


@pytest.mark.parametrize("topology", ["v5p:2x2x1", "tpu7x:2x2x1"])
def test_decoding_attention_compiles_and_copies_no_page(topology):
    """At K2.5's sizes: the pages of one layer are 336 MB, and nothing of that size is made."""
    found, temporaries = run("-c", PAGED_LATENTS, topology).split()
    assert found == "True" and int(temporaries) < 1 << 20
