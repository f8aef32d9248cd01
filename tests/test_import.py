"""`import kimi_jax` costs nothing, and nothing in its public surface brings in TensorFlow or torch.

The promise is "less than a second beyond jax"; importing no other module at all is the same promise without a clock.
"""

import importlib.util
import json
import subprocess
import sys

import pytest

import kimi_jax

HEAVY = {"tensorflow", "torch", "seqio", "tensorflow_datasets", "transformers", "lm_eval", "pyarrow", "matplotlib"}


def modules_after(code: str) -> set[str]:
    """Top-level packages loaded in a fresh interpreter that ran `code`."""
    code += "\nimport json, sys; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=600)
    return set(json.loads(out.stdout.splitlines()[-1]))


def test_import_loads_no_library():
    new = modules_after("import kimi_jax") - modules_after("")
    third_party = {m for m in new if m not in sys.stdlib_module_names and m != "kimi_jax"}
    # `site` hooks of the environment (editable installs) may differ from run to run, hence the names by hand
    assert not third_party & ({"jax", "flax", "numpy", "grain", "optax", "orbax", "PIL", "av"} | HEAVY)


def test_public_surface_is_there_and_light():
    loaded = modules_after("import kimi_jax, kimi_jax.data.sources\nfor n in kimi_jax.__all__: getattr(kimi_jax, n)")
    assert not loaded & HEAVY, f"the public surface imports {sorted(loaded & HEAVY)}"


@pytest.mark.parametrize("name", sorted(kimi_jax.__all__))
def test_every_public_name_resolves(name):
    assert getattr(kimi_jax, name) is not None


def test_unknown_name_says_what_there_is():
    with pytest.raises(AttributeError, match="ModelConfig"):
        kimi_jax.Modelconfig  # noqa: B018


def test_names_match_those_shown_to_type_checkers():
    source = importlib.util.find_spec("kimi_jax").loader.get_source("kimi_jax")
    block = source.split("if TYPE_CHECKING:")[1].split("__version__")[0]
    assert all(name in block for name in kimi_jax.__all__)


def test_dir_lists_the_surface():
    assert set(kimi_jax.__all__) <= set(dir(kimi_jax))
