"""python -m kimi_jax.convert COMMAND SOURCE TARGET: released checkpoints to ours and back.

  from-hf SOURCE TARGET   a released directory (bf16, fp16, fp32, INT4 or FP8 safetensors) to a checkpoint of ours
  to-hf SOURCE TARGET     a checkpoint of ours, converted or trained, to a released directory; --int4 packs the experts

Both go tensor by tensor, in memory that does not grow with the model. Interrupted, they go on where they were when
called again; TARGET appears when it is whole. Both may be gs://... (extra [tpu] for gcsfs): there TARGET is filled in
place, its last file says that it is whole, and to-hf needs room for one file in $TMPDIR. Of a run with `config.lora`
to-hf merges the adapters into their base.

from-hf --mesh=fsdp=64 shards the checkpoint for the devices that will restore it; any other mesh can restore it too.
"""

from __future__ import annotations

import sys

import rich.console
import rich.progress
from absl import app, flags

from kimi_jax.config import ConfigError, MeshConfig, freeze, nearest
from kimi_jax.hf import convert
from kimi_jax.hf.files import CheckpointError

_INT4 = flags.DEFINE_bool("int4", False, "to-hf: pack the routed experts to INT4")
_MODEL_TYPE = flags.DEFINE_string(
    "model_type", None, "to-hf, trained checkpoint: kimi_k25, kimi_vl, kimi_k2 or deepseek_v3"
)
_DTYPE = flags.DEFINE_enum("dtype", "bf16", ["bf16", "fp16", "fp32"], "to-hf, trained checkpoint: dtype of the tensors")
_VERIFY = flags.DEFINE_bool("verify", True, "from-hf: write checksums; to-hf: compare the source with its own")
_MESH = flags.DEFINE_string("mesh", None, "from-hf: the mesh to shard for, as fsdp=64")
_RELEASED_DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
COMMANDS = ("from-hf", "to-hf")


def main(argv: list[str]) -> None:
    """Runs one conversion with a progress bar; exits with status 1 and the reason if it cannot be done."""
    if len(argv) != 4 or argv[1] not in COMMANDS:
        hint = nearest(argv[1], COMMANDS) if len(argv) > 1 and argv[1] not in COMMANDS else ""
        sys.exit(f"error: say from-hf SOURCE TARGET or to-hf SOURCE TARGET{hint}; --help explains")
    _, command, source, target = argv
    try:
        with _bar(command) as progress:
            if command == "from-hf":
                notes = convert.from_hf(source, target, progress, mesh=_mesh(_MESH.value), checksum=_VERIFY.value)
            else:
                dtype = _RELEASED_DTYPES[_DTYPE.value]
                convert.to_hf(
                    source, target, int4_experts=_INT4.value, model_type=_MODEL_TYPE.value, dtype=dtype,
                    progress=progress, verify=_VERIFY.value,
                )  # fmt: skip
                notes = []
    except (CheckpointError, ConfigError, convert.ConvertError, OSError) as error:
        sys.exit(f"error: {error}")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{target} is ready")


def _mesh(text: str | None) -> MeshConfig | None:
    """`name=size,name=size`. Raises ConfigError for an axis that there is not, or what is no number."""
    if text is None:
        return None
    pairs = [part.partition("=")[::2] for part in text.split(",")]
    if not all(size.isdecimal() for _, size in pairs):
        raise ConfigError(f"--mesh={text}: write the axes with their sizes, as fsdp=64")
    return freeze({name: int(size) for name, size in pairs}, MeshConfig, "mesh")


class _bar:
    """A progress bar on stderr; entering gives the function (bytes done, bytes in all)."""

    def __init__(self, title: str):
        columns = (
            rich.progress.TextColumn(title), rich.progress.BarColumn(), rich.progress.DownloadColumn(),
            rich.progress.TransferSpeedColumn(), rich.progress.TimeRemainingColumn(),
        )  # fmt: skip
        self._progress = rich.progress.Progress(*columns, console=rich.console.Console(stderr=True))
        self._task = self._progress.add_task(title, total=None)

    def __enter__(self) -> convert.Progress:
        self._progress.start()
        return lambda done, total: self._progress.update(self._task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


if __name__ == "__main__":
    sys.modules["__main__"].__doc__ = __doc__
    app.run(main)
