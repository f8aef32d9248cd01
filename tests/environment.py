"""Where the fixtures are, where files that are too large for the repository may be, and how tests compile."""

import os
from importlib.metadata import version
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
# Random weights, activations, ids, templates and images with the numbers of the published implementation
FIXTURES = REPO / "tests" / "fixtures"
# XLA flags of all tests: tiny programs, of which more are compiled than run for long; the arithmetic stays float32.
# Before jax 0.12 XLA:CPU can leave out MLIR, which takes two thirds of the time to compile a training step. What it
# makes then ran into deadlocks of collectives that had no order between them; the plain scheduler gives them one.
# One thing is left (seen with jaxlib 0.10.2, once in dozens of runs of one program): a collective inside a loop and an
# independent one behind it may start in another order on each virtual device, and the process aborts after 40 s.
_MLIR = tuple(map(int, version("jaxlib").split(".")[:2])) >= (0, 12)
COMPILE_FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true" + (
    "" if _MLIR else " --xla_cpu_use_fusion_emitters=false --xla_cpu_enable_concurrency_optimized_scheduler=false"
)


def shared(path: str) -> Path:
    """A file that is not in the repository: the official vocabulary (`kimi_tokenizer`) or a larger data set (`data`).

    Looked for in `$KIMI_SHARED`, by default in the folder `shared` beside the repository. Skips the test that asks when
    it is missing, but fails it when the variable CI is "true": there a missing file would hide that tests do not run.
    """
    root = Path(os.environ.get("KIMI_SHARED") or REPO.parent / "shared")
    if (root / path).exists():
        return root / path
    where = "from the released checkpoint" if path.startswith("kimi_tokenizer") else "from its publisher"
    message = f"{root / path} is missing: get it {where} and set KIMI_SHARED to the folder that holds {path}"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)
