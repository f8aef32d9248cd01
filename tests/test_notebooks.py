"""The notebooks run from a clean state and lie here executed, small and without traces of a machine.

Each runs in a kernel of its own in an empty folder, as a reader would; a last cell, added here, checks its results.
"""

import base64
import io
import os
import re
import time

import numpy as np
import PIL.Image
import pytest

from tests.environment import REPO

nbformat = pytest.importorskip("nbformat", reason="needs the extra [notebooks]")
nbclient = pytest.importorskip("nbclient", reason="needs the extra [notebooks]")

NOTEBOOKS = sorted((REPO / "notebooks").glob("*.ipynb"))
MAX_BYTES = 500_000
PATIENCE = 120  # seconds for a whole notebook, so that one that hangs ends (18 to 44 on two busy cores)
# Bounds with room: 94 % and 1e-6 when written; chance is 1/8, and a wrong walk or packing is off by 1 or more.
CHECKS = {
    "vision_tower": """
assert accuracy > 0.6, accuracy
assert float(jnp.abs(features[:mine] - alone[:mine]).max()) < 1e-4
assert float(jnp.abs(reached - ends).max()) < 1e-4
whole = (some.coords[..., 1:] < 4).all(-1)  # without the edge of the padding
shape = whole & (some.patches.std(-1) > 0.2)
share = [float(np.mean((m[-1][:, :, :4].mean((1, 2)) * shape).sum(-1))) for m in (untrained, trained)]
assert share[1] > 1.3 * share[0], share  # the corner has learned to look at the shape
""",
    "released_checkpoint": """
assert len(reply.content) > 0 and model.generate(messages, **settings) == reply
assert float(np.abs(final @ model.params["lm_head"]["kernel"] - logits).max()) < 1e-3 * float(np.abs(logits).max())
assert len(routings) == config.num_moe_layers and is_image.sum() == h * w // 4
""",
    "muonclip": """
losses = [found[0][-10:].mean() for found in (clipped, free, tight)]
assert max(losses) < 0.5 and clipped[0][0] > 4, losses  # log 64 = 4.16
assert free[1][-20:].max() > 1.3 * tight[1][-20:].max(), (free[1][-20:], tight[1][-20:])
flat, steep = (np.linalg.svd(found[2][STEPS // 2], compute_uv=False) for found in (clipped, adam[best]))
assert flat[-8] / flat[0] > 2 * steep[-8] / steep[0]
""",
    "rl_loss": """
assert (metrics["below"] + metrics["above"] > 0.3) and bool(jnp.isfinite(loss))
outside = jnp.log(jnp.array([0.3, 5.0]))
assert not curve(lambda d, a: k25(d, a, 0.0), outside, 1.0)[1].any()
assert curve(ppo, outside, 1.0)[1].any() and curve(ppo, outside, -1.0)[1].any()
""",
}


def read(path):
    return nbformat.read(path, as_version=4)


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def images(notebook):
    """Every PNG of the outputs as an array."""
    found = [o.data["image/png"] for o in outputs(notebook) if "image/png" in o.get("data", {})]
    return [np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")) for png in found]


def test_notebooks_are_those_that_are_checked():
    assert {path.stem for path in NOTEBOOKS} == set(CHECKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_executed_and_clean(path):
    notebook = read(path)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "not executed from top to bottom"
    assert not [o for o in outputs(notebook) if o.output_type == "error" or o.get("name") == "stderr"]
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    assert all(image.std() > 5 for image in images(notebook)) and len(images(notebook)) >= 3
    assert path.stat().st_size < MAX_BYTES
    # assembled, so that this file does not find itself
    trace = re.compile("|".join(("/wo" + "rk/", "/ro" + "ot", "/ho" + "me/", "/t" + "mp/", r"\.py:\d+")))
    for cell in notebook.cells:
        texts = [cell.source]
        for output in cell.get("outputs", []):
            texts += [output.get("text", ""), *(v for k, v in output.get("data", {}).items() if k != "image/png")]
        assert not trace.search("\n".join(texts)), trace.search("\n".join(texts))
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs_from_a_clean_state(path, tmp_path):
    """No errors and nothing on stderr (no warnings), as many images as were committed, and the results hold."""
    notebook = read(path)
    committed = len(images(notebook))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    notebook.cells.append(nbformat.v4.new_code_cell(CHECKS[path.stem]))
    dropped = ("MPLBACKEND", "KIMI_CHECKPOINT", "XLA_FLAGS")  # a reader's kernel draws inline and has one device
    environment = {k: v for k, v in os.environ.items() if k not in dropped}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPO), os.environ.get("PYTHONPATH"))))
    end = time.monotonic() + PATIENCE
    client = nbclient.NotebookClient(
        notebook,
        timeout_func=lambda cell: max(1, int(end - time.monotonic())),  # of a cell: what the others have left of it
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute(env=environment)
    noise = [o.text for o in outputs(notebook) if o.get("name") == "stderr"]
    assert not noise, noise
    assert len(images(notebook)) == committed
    assert not list(tmp_path.iterdir()), "leaves files behind"
