"""MaxText's train step through the TPU compiler, left in files for `benchmarks.maxtext_plan`, which starts this.

usage: PYTHON_OF_MAXTEXT benchmarks/maxtext_compile.py FOLDER arguments of MaxText's train_compile ...
Writes FOLDER/step.hlo (the compiled program) and FOLDER/step.json (its devices in the order of its partitions, bytes,
versions), or FOLDER/refused.txt with the compiler's words; FOLDER/seconds.json says how long it took.
Needs `maxtext[tpu]==0.2.5` (Python 3.12) and nothing of this repository.
"""

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import jax
import maxtext
from absl import app
from maxtext.trainers.pre_train import train_compile

FOLDER = Path(sys.argv.pop(1))
seconds: dict[str, float] = {}
compile_step = train_compile.jit_and_compile


def keep(*args: Any) -> Any:
    """`jit_and_compile` of MaxText, whose fourth argument is the mesh; its result is written down."""
    try:
        compiled = compile_step(*args)
    except jax.errors.JaxRuntimeError as error:
        (FOLDER / "refused.txt").write_text(str(error))
        raise
    finally:
        (FOLDER / "seconds.json").write_text(json.dumps(seconds))
    mesh, memory = args[3], compiled.memory_analysis()
    step = {
        "mesh": dict(mesh.shape),
        "places": [list(map(int, device.coords)) for device in mesh.devices.flat],
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
    }
    (FOLDER / "step.hlo").write_text(compiled.as_text())
    (FOLDER / "step.json").write_text(json.dumps(step))
    return compiled


jax.monitoring.register_event_duration_secs_listener(lambda name, took, **_: seconds.update({name: took}))
train_compile.jit_and_compile = keep
sys.argv.insert(1, str(Path(maxtext.__file__).parent / "configs" / "base.yml"))
app.run(train_compile.main)
