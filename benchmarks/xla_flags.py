"""What the compiler's options are worth, as the TPU compiler predicts it: `python -m benchmarks.xla_flags`.

Needs the extra [tpu] and no TPU. For one small slice of every kind of chip it compiles forward and backward of four
matmuls of width 2,048 under `lax.scan`, weights cut over all devices, and prints the sum of the compiler's own
`estimated_cycles` of the program text for several sizes of the room in VMEM (`kimi_jax.train.xla_flags`). A prediction
of the compute alone, never a measurement.
"""

from __future__ import annotations

import os
import re

from absl import app, flags

_TOPOLOGIES = flags.DEFINE_list("topologies", ["v5e:2x2", "v5p:2x2x2", "v6e:2x2", "tpu7x:2x2x1"], "Small slices.")
_KIB = flags.DEFINE_list("kib", ["", "32768", "65536", "98304"], "Sizes of the room; empty: the compiler's own.")
LAYERS, WIDTH, ROWS = 4, 2048, 256


def cycles(devices: list, kib: str) -> int:
    """The sum of `estimated_cycles` of the program for these devices."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from kimi_jax import sharding
    from kimi_jax.config import MeshConfig
    from kimi_jax.train.xla_flags import VMEM

    mesh = sharding.make_mesh(MeshConfig(), devices)

    def loss(weights: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, weights)[0].sum()

    shapes = [
        ((LAYERS, WIDTH, WIDTH), PartitionSpec(None, "fsdp")),
        ((len(devices) * ROWS, WIDTH), PartitionSpec("fsdp")),
    ]
    arguments = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=NamedSharding(mesh, cut)) for s, cut in shapes]
    step = jax.jit(jax.grad(loss), out_shardings=arguments[0].sharding)
    text = step.lower(*arguments).compile(compiler_options={VMEM: kib} if kib else {}).as_text()
    return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)))


def main(_: list[str]) -> None:
    """Prints one line a slice."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from kimi_jax.plan import chips, program

    print(
        f"{'estimated cycles':<16}" + "".join(f"{f'{int(k) // 1024} MiB' if k else 'default':>16}" for k in _KIB.value)
    )
    for name in _TOPOLOGIES.value:
        devices = program.devices_of(chips.parse_topology(name))
        print(f"{name:<16}" + "".join(f"{cycles(devices, kib):>16,}" for kib in _KIB.value), flush=True)


if __name__ == "__main__":
    app.run(main)
