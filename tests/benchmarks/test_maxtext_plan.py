"""What `benchmarks/maxtext_compile.py` leaves behind, read as a plan: time, traffic and memory, or the refusal.

The programs are written by hand, so that every number is known; MaxText is not needed.
"""

import json

import numpy as np
import pytest

from benchmarks import maxtext_plan, plan
from kimi_jax.plan.chips import parse_topology

POD = parse_topology("v5p:8x8x8")
# 1.75e9 cycles are one second; 64 chips gather 1 MiB each
PROGRAM = """HloModule step

ENTRY %main (p: f32[262144]) -> f32[16777216] {
  %p = f32[262144]{0} parameter(0)
  %f = f32[262144]{0} fusion(%p), kind=kLoop, calls=%c, backend_config={"estimated_cycles":"1750000000"}
  ROOT %g = f32[16777216]{0} all-gather(%f), replica_groups=[8,64]<=[512], dimensions={0}
}

%c (x: f32[262144]) -> f32[262144] {
  ROOT %x = f32[262144]{0} parameter(0)
}
"""
REPORT = "Memory Space: default (hbm)\nTotal bytes: 3221225472 (3.00GiB)\n"


@pytest.fixture
def folder(tmp_path):
    places = [list(map(int, place)) for place in np.ndindex(8, 8, 8)]
    step = {"mesh": {"data": 1, "fsdp": 8, "expert": 64}, "places": places, "arguments": 2**30, "outputs": 0,
            "temporaries": 5 * 2**30, "jax": "0", "libtpu": "0"}  # fmt: skip
    (tmp_path / "step.json").write_text(json.dumps(step))
    (tmp_path / "step.hlo").write_text(PROGRAM)
    (tmp_path / "seconds.json").write_text('{"/jax/core/compile/backend_compile_duration": 120.5}')
    (tmp_path / "module_0001.tpu-memory-usage-report.txt").write_text(REPORT)
    return tmp_path


def test_compiled_step_is_priced(folder):
    found = maxtext_plan.read(folder, POD, sequences=2)
    assert found["memory"]["peak"] == 3 * 2**30 and found["memory"]["temporaries"] == 2 * 2**30
    assert found["memory"]["fits"] and found["memory"]["compile_seconds"] == 120.5
    timed = found["rounds"]["1"]
    assert timed["tokens"] == 8192 and timed["patches"] == 0
    assert timed["compute_seconds"] == pytest.approx(1.0)
    assert timed["wire_bytes"] == 63 * 2**20
    assert [t["axis"] for t in timed["traffic"]] == ["expert"]
    cells = [cell.strip() for cell in maxtext_plan.row("maxtext", found).split("|")]
    assert cells[1:5] == ["maxtext", "v5p:8x8x8", "512", "fsdp 8 x expert 64"]
    assert len(cells) == len(maxtext_plan.header().split("|"))
    assert "122" in cells  # us of compute a token


def test_of_two_accounts_of_the_memory_the_smaller_is_believed(folder):
    (folder / "module_0001.tpu-memory-usage-report.txt").write_text(REPORT.replace("3221225472", "99999999999"))
    assert maxtext_plan.read(folder, POD, sequences=2)["memory"]["peak"] == 6 * 2**30


def test_refused_step_says_what_it_needed(folder):
    (folder / "refused.txt").write_text("RESOURCE_EXHAUSTED: ... Used 120.50G of 95.74G hbm. Exceeded ...")
    found = maxtext_plan.read(folder, POD, sequences=4)
    assert not found["memory"]["fits"] and found["memory"]["peak"] == int(120.5 * 2**30)
    assert len(maxtext_plan.row("maxtext", found).split("|")) == len(maxtext_plan.header().split("|"))


def test_another_failure_is_not_taken_for_a_lack_of_memory(folder):
    (folder / "refused.txt").write_text("INTERNAL: something broke")
    with pytest.raises(RuntimeError, match="something broke"):
        maxtext_plan.read(folder, POD, sequences=4)


def test_flops_are_those_of_text_alone():
    """6 FLOPs a token and active weight, and attention: 430 us a token at a v5p's peak for the weights."""
    from kimi_jax.plan import report
    from kimi_jax.train import flops

    config = maxtext_plan.text_only(POD, 4)
    counts = report.full_counts(config, POD.devices)
    seconds = flops.train_flops(config.model, counts) / counts["tokens"] / POD.chip.flops
    assert counts["tokens"] == 4 * 4096 and 430e-6 < seconds < 460e-6


def test_both_pods_have_a_layout():
    assert set(maxtext_plan.LAYOUTS) <= set(plan.PODS)
