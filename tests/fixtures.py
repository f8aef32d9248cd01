"""Where the published fixtures are: the folder `shared` beside the repository, or `$KIMI_SHARED`; how tests compile."""

import os
from importlib.metadata import version
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
# XLA flags of all tests: tiny programs, of which more are compiled than run for long; the arithmetic stays float32.
# Before jax 0.12 XLA:CPU can leave out MLIR, which takes two thirds of the time to compile a training step. What it
# makes then ran into deadlocks of collectives that had no order between them; the plain scheduler gives them one.
_MLIR = tuple(map(int, version("jaxlib").split(".")[:2])) >= (0, 12)
COMPILE_FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true" + (
    "" if _MLIR else " --xla_cpu_use_fusion_emitters=false --xla_cpu_enable_concurrency_optimized_scheduler=false"
)


def shared_root() -> Path:
    """The folder that holds `fixtures`, `data` and `docs`; it need not exist."""
    return Path(os.environ.get("KIMI_SHARED") or REPO.parent / "shared")


def shared(path: str) -> Path:
    """The file or folder `path` of the shared folder.

    Skips the test that asks when it is missing, but fails it when the variable CI is "true": there a missing fixture
    would hide that the parity tests do not run.
    """
    found = shared_root() / path
    if found.exists():
        return found
    message = f"{found} is missing; set KIMI_SHARED to the folder that holds {path.split('/')[0]}/"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)
