"""Flags of the TPU compiler, by kind of chip: what XLA's own defaults leave undone for this model.

They are given to the compiler with the training step (`compiler_options`), so that train and plan compile the same, and
a name that this version of libtpu does not know is an error that says so. The names are those of the public list of
MaxText, `benchmarks/xla_flags_library.py`; the values are those with which libtpu 0.0.42.1 estimates the fewest cycles
for a stack of matmuls of width 2,048 (`python -m benchmarks.xla_flags`). Predictions, never measured on a chip.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

VMEM = "xla_tpu_scoped_vmem_limit_kib"  # room for the operands of a fusion
# jax's name of the device: option -> value. v5p ("TPU v5") and TPU7x are better off with what XLA chooses
PRESETS: dict[str, dict[str, str]] = {
    "TPU v5 lite": {VMEM: "65536"},
    "TPU v6 lite": {VMEM: "65536"},
}
# with several slices: sums of gradients between them overlap with the backward pass
SLICES = {
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
}


def options(devices: Sequence[Any], preset: bool = True, env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """`compiler_options` for a program on these (jax) devices, by name; empty for other devices than TPUs.

    Flags that $LIBTPU_INIT_ARGS names are the user's own and left out. preset: False leaves out all.
    """
    if devices[0].platform != "tpu" or not preset:
        return {}
    slices = {getattr(device, "slice_index", 0) for device in devices}
    chosen = PRESETS.get(devices[0].device_kind, {}) | (SLICES if len(slices) > 1 else {})
    own = {flag.lstrip("-").split("=")[0] for flag in env.get("LIBTPU_INIT_ARGS", "").split()}
    return {name: value for name, value in chosen.items() if name not in own}
