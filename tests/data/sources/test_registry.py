"""The registry: known kinds, lazy imports, and messages that say what to install or write."""

import subprocess
import sys

import pytest

from kimi_jax.config import ConfigError, SourceConfig
from kimi_jax.data import sources
from kimi_jax.data.sources import open_source


def test_unknown_kind_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'parquet'"):
        open_source(SourceConfig(kind="parkett"))


@pytest.mark.parametrize("kind, package", [("tfds", "tensorflow_datasets"), ("seqio", "seqio"), ("parquet", "pyarrow")])
def test_missing_extra_says_how_to_install_it(monkeypatch, kind, package):
    """As on a machine without the package, whatever this one has."""

    def missing(name):
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(sources.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=rf"pip install 'kimi_jax\[{kind}\]'"):
        open_source(SourceConfig(kind=kind, path="x?template={a}"))


def test_fault_of_our_own_is_not_called_a_missing_package(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'kimi_jax.gone'", name="kimi_jax.gone")

    monkeypatch.setattr(sources.importlib, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match="kimi_jax.gone"):
        open_source(SourceConfig(kind="tfds", path="x?template={a}"))


def test_registry_costs_nothing():
    """Opening the package imports no reader's library: no TensorFlow, no pyarrow, no jax."""
    code = "import sys, kimi_jax.data.sources; print([m for m in ('tensorflow', 'pyarrow', 'jax') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
