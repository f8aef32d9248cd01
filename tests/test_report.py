"""The report of a run: every part is on the page, everything is inside the one file, broken input is tolerated."""

import base64
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from kimi_jax import report, report_charts
from tests.environment import REPO
from tests.synthetic_run import write_run

VOID = {"meta", "img", "line", "rect", "br", "hr"}


class Checker(HTMLParser):
    """Collects images and fails on tags that are not closed."""

    def __init__(self):
        super().__init__()
        self.open, self.sources = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_startendtag(self, tag, attrs):
        pass  # <rect ... /> opens nothing

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def page(workdir):
    return report.render(report.load(workdir))


def test_page_is_well_formed_and_self_contained(page):
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert len(checker.sources) > 30
    assert all(source.startswith("data:image/") for source in checker.sources)
    assert "<script" not in page
    assert "url(" not in page


def test_page_shows_scores_controls_and_answers(page):
    text = re.sub(r"<[^>]+>", " ", page)
    words = ("blank image", "single frame", "lower is better", "✓ right", "✗ wrong", "What to do next")
    for expected in ("0.712", "± 0.014", "0.077", "1.871", "Which way does the square move?", *words):
        assert expected in text, expected
    assert "shuffled frames 0.533" in text
    assert re.search(r"90.0%\s+goodput", text) and re.search(r"Wall time .* steps\s+[\d.]+\s+90.0%", text)
    assert "majority 0.504" in text
    assert "&lt;which city&gt;" in page


def test_images_survive_unchanged(page, workdir):
    original = (workdir / "samples" / "image_0.png").read_bytes()
    assert base64.b64encode(original).decode() in page
    Image.open(workdir / "samples" / "image_0.png").verify()


def test_every_chart_is_drawn(workdir):
    titles = [chart.title for chart in report_charts.draw(report.load(workdir).rows, tau=100.0)]
    expected = "Loss by modality/Bits per byte/Held-out scores/Throughput/Model FLOPs utilisation/"
    expected += "Largest attention logit/Gradient norm/Learning rate/Packing/Expert load"
    assert "/".join(titles) == expected


@pytest.mark.parametrize("keys", [("step", "loss"), ("step", "loss", "max_logit"), ("step", "lr", "expert_load")])
def test_missing_keys_leave_out_their_charts_only(workdir, keys):
    rows = [{k: row[k] for k in keys} for row in report.read_rows(workdir / "metrics.jsonl")]
    assert len(report_charts.draw(rows)) == len(keys) - 1


def test_values_that_are_not_finite_are_left_out():
    rows = [{"step": s, "loss": v} for s, v in ((1, 2.0), (2, float("nan")), (3, None), (4, 1.0))]
    steps, values = report_charts.series(rows, "loss")
    np.testing.assert_array_equal(steps, [1, 4])
    np.testing.assert_array_equal(values, [2.0, 1.0])


def test_smoothing_keeps_constants_and_ends():
    np.testing.assert_allclose(report_charts.smooth(np.full(30, 3.0), 5), 3.0)
    ramp = np.arange(30.0)
    np.testing.assert_allclose(report_charts.smooth(ramp, 7), ramp)  # symmetric windows do not shift a line


def test_rows_of_one_step_are_merged_and_cut_lines_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "loss": 9}\n{"step": 1, "loss": 5}\n{"step": 2, "loss": 4}\n'
                    '{"step": 2, "speed": {"mfu": 1}}\n[1]\n{"loss": 3}\n{"step": 3, "lo')  # fmt: skip
    assert report.read_rows(path) == [{"step": 1, "loss": 5}, {"step": 2, "loss": 4, "mfu": 1}]


def test_run_without_evaluation_or_samples(workdir, tmp_path):
    (tmp_path / "metrics.jsonl").write_text((workdir / "metrics.jsonl").read_text())
    page = report.render(report.load(tmp_path))
    assert "final evaluation has not run" in page
    assert "Loss by modality" in page


def test_config_of_another_version_is_shown_as_it_is(workdir):
    run = report.load(workdir)
    run.config["unknown_setting"] = 7
    assert "unknown_setting" in report.render(run)
    del run.config["unknown_setting"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"metric": "accuracy", "score": 0.6, "control": 0.5, "stderr": 0.01}, "above"),
        ({"metric": "accuracy", "score": 0.6, "control": 0.59, "stderr": 0.01}, "even"),
        ({"metric": "accuracy", "score": 0.4, "control": 0.5, "stderr": 0.01}, "below"),
        ({"metric": "bits/byte", "score": 1.8, "control": 3.0, "stderr": 0.01}, "above"),
        ({"metric": "bits/byte", "score": 1.8, "control": None, "stderr": None}, ""),
        ({"metric": "accuracy", "score": 0.6, "control": float("nan"), "stderr": 0.01}, ""),
    ],
)
def test_verdict_respects_direction_and_error(row, expected):
    assert report.verdict(row) == expected


def test_load_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="--workdir"):
        report.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="nothing was trained"):
        report.load(tmp_path)


def test_command_writes_the_page_and_prints_the_table(workdir):
    command = [sys.executable, "-m", "kimi_jax.report", f"--workdir={workdir}"]
    env = {**os.environ, "COLUMNS": "160"}  # a wide terminal, so that no cell wraps
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600, cwd=REPO, env=env)
    assert "0.712 ± 0.014" in out.stdout
    assert "What to do next" in out.stdout
    assert (workdir / "report.html").stat().st_size > 50_000
    missing = subprocess.run([*command[:3], "--workdir=no/such"], capture_output=True, text=True, timeout=600, cwd=REPO)
    assert missing.returncode != 0
    assert "no folder" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_results_may_be_wrapped(workdir, tmp_path):
    rows = json.loads((workdir / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows}))
    assert report.load(tmp_path).results == rows
