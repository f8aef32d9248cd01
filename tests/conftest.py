"""Settings of every test: eight virtual CPU devices, shapes checked at run time, compiled programs kept between runs.

All of it has to happen before `jax` or `kimi_jax` is imported, so it stands at the top level.
"""

import os
import sys
from pathlib import Path

from tests.environment import COMPILE_FAST

if "jax" in sys.modules or "kimi_jax" in sys.modules:
    raise RuntimeError("jax or kimi_jax was imported before tests/conftest.py; remove the plugin that does it")

_FLAGS = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in _FLAGS:
    os.environ["XLA_FLAGS"] = f"{COMPILE_FAST} {_FLAGS} --xla_force_host_platform_device_count=8".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("MPLBACKEND", "Agg")

from jaxtyping import install_import_hook  # noqa: E402

import tests.typecheck  # noqa: E402, F401

install_import_hook("kimi_jax", "tests.typecheck.check")

from hypothesis import HealthCheck, settings  # noqa: E402

# no judgement of speed: the machine may be busy
SLOW = [HealthCheck.too_slow]
settings.register_profile("kimi", deadline=None, max_examples=50, print_blob=True, suppress_health_check=SLOW)
settings.load_profile("kimi")
