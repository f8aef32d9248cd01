"""Rows of the log: right sums, the same whether or not the run was interrupted, and files that survive a kill."""

import contextlib
import json
import resource

import numpy as np
import pytest

from kimi_jax.train import flops, log
from kimi_jax.train.log import Log, read_rows
from kimi_jax.train.metrics import ROW, TIMED, Meter, progress_line
from kimi_jax.train.objective import MODALITIES, Last, Max, Mean, Sum
from tests.train.tiny import MODEL


def step_metrics(step, finite=True):
    rng = np.random.default_rng(step)
    f32 = lambda *shape: rng.uniform(1, 2, shape).astype(np.float32)  # noqa: E731
    nll, weight = f32(3) * [1, 1, 0] if finite else np.full(3, np.nan), f32(3) * [1, 1, 0]
    return {
        **{f"loss_{name}": Mean(nll[i], weight[i]) for i, name in enumerate(MODALITIES)},
        "loss": Mean(nll.sum(), weight.sum()),
        "spike": np.asarray(False), "finite": np.asarray(finite), "skipped_in_row": np.int32(not finite),
        "balance_loss": Mean(f32(), np.float32(1)), "grad_norm": Mean(f32(), np.float32(1)),
        "max_logit": Max(f32(3)), "clipped_heads": Sum(np.int32(1)), "expert_load": Sum(f32(2, 4)),
        "dropped": Sum(np.int32(0)), "rounds": Max(np.int32(1 + step % 3)), "imbalance": Max(f32()),
        "lr": Last(np.float32(step)), "update_rms_muon": Last(f32()), "update_rms_adamw": Last(f32()),
        **{k: Sum(np.float32(10)) for k in flops.COUNTS},
    }  # fmt: skip


def rows_of(meter, steps, bad=()):
    rows = [meter.push(step, step_metrics(step, step not in bad), {"beside": step}) for step in steps]
    return [row for row in [*rows, meter.flush()] if row]


def untimed(rows):
    return [{k: v for k, v in row.items() if k not in TIMED} for row in rows]


def test_row_is_the_mean_over_its_interval():
    first, second = rows_of(Meter(MODEL, 4, 7), range(1, 8))
    assert (first["step"], second["step"]) == (4, 7)  # a row at the end whatever the interval
    metrics = [step_metrics(step) for step in range(1, 5)]
    for name in ("loss", "loss_text"):
        nll, weight = (sum(float(m[name][i]) for m in metrics) for i in (0, 1))
        np.testing.assert_allclose(first[name], nll / weight, rtol=1e-12)
    assert first["loss_video"] is None  # no target of that kind
    assert first["lr"] == 4 and first["tokens"] == 40 and second["tokens"] == 30 and second["tokens_seen"] == 70
    assert first["clipped_heads"] == 4 and first["beside"] == 4
    np.testing.assert_allclose(first["max_logit"], np.max([m["max_logit"].value for m in metrics], axis=0), rtol=1e-7)
    assert first["rounds"] == 3 and first["imbalance"] == pytest.approx(max(m["imbalance"].value for m in metrics))
    load = sum(m["expert_load"].value.astype(np.float64) for m in metrics)
    np.testing.assert_allclose(first["load_imbalance"], load.max(-1) / load.mean(-1), rtol=1e-7)


@pytest.mark.parametrize("cut", [1, 4, 6])
def test_rows_do_not_depend_on_where_a_run_was_cut(cut):
    whole = rows_of(Meter(MODEL, 4, 9), range(1, 10))
    before = Meter(MODEL, 4, 9)
    rows = rows_of(before, range(1, cut + 1))
    state = json.loads(json.dumps(before.state()))  # as it comes back from a checkpoint
    rows += rows_of(Meter(MODEL, 4, 9, state), range(cut + 1, 10))
    assert untimed(rows) == untimed(whole)


def test_meter_reduces_whatever_an_objective_measures_as_it_says():
    """Names that nobody has heard of: each kind of reduction, and a mean without any weight."""

    def measured(step):
        kinds = {"mean": Mean(2.0 * step, 1.0 * step), "of_nothing": Mean(0.0, 0.0), "sum": Sum(0.5 * step)}
        kinds |= {"largest": Max(5 - step), "latest": Last(step)}
        return step_metrics(step) | {k: type(v)(*map(np.float32, v)) for k, v in kinds.items()}

    meter = Meter(MODEL, 3, 3)
    (row,) = [row for row in [*(meter.push(step, measured(step), {}) for step in (1, 2, 3)), meter.flush()] if row]
    assert {k: row[k] for k in row if k not in ROW} == {
        "mean": 2.0, "of_nothing": None, "sum": 3, "largest": 4, "latest": 3.0,
    }  # fmt: skip


def test_state_with_a_step_still_on_the_device_is_refused():
    meter = Meter(MODEL, 4, 9)
    meter.push(1, step_metrics(1), {})
    with pytest.raises(RuntimeError, match="flush"):
        meter.state()


def test_steps_without_update_are_counted_and_kept_out_of_the_means():
    (row,) = rows_of(Meter(MODEL, 3, 3), range(1, 4), bad=(2,))
    assert row["skipped"] == 1 and np.isfinite(row["loss"])
    (row,) = rows_of(Meter(MODEL, 2, 2), range(1, 3), bad=(1, 2))
    assert row["skipped"] == 2 and row["loss"] is None
    assert "SKIPPED 2" in progress_line(row) and json.loads(json.dumps(row, allow_nan=False)) == row


def test_log_cuts_what_was_lost_and_half_a_line(tmp_path):
    rows = rows_of(Meter(MODEL, 2, 8), range(1, 9))
    log = Log(str(tmp_path), 0)
    for row in rows:
        log.train(row)
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [2, 4, 6, 8]
    log = Log(str(tmp_path), 5)
    log.train(rows[2])
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [json.dumps(row) for row in rows[:3]]


def test_progress_line_names_what_matters():
    (row,) = rows_of(Meter(MODEL, 1, 1), [1])
    line = progress_line(row | {"mfu": 0.31, "goodput_run": 0.874})
    for part in ("loss", "text", "image", "tok/s", "patch/s", "MFU 31.0%", "imbalance", "dropped 0", "max logit"):
        assert part in line
    assert "rounds 2" in line and "goodput 87%" in line
    assert "video" not in line


def test_rows_wait_while_files_cannot_grow(tmp_path):
    """A limit on the size of files cuts the second row in half: it is said, and written whole when there is room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    said: list[str] = []
    with contextlib.closing(Log(str(tmp_path), 0, said.append)) as found:
        found.train({"step": 1})
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 5, hard))
        try:
            found.train({"step": 2})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert any("cannot write" in line and "metrics.jsonl" in line and "1 lines wait" in line for line in said)
        found.train({"step": 3})
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(json.dumps({"step": n}) + "\n" for n in (1, 2, 3))


def test_on_an_object_store_files_are_written_whole(tmp_path, monkeypatch):
    """Nothing can be appended there: the old rows are written again with the new ones."""
    monkeypatch.setattr(log, "_is_remote", lambda path: "tensorboard" not in str(path))
    for start in (0, 2):
        with contextlib.closing(Log(str(tmp_path), start)) as found:
            for step in (start + 1, start + 2, start + 3):
                found.train({"step": step})
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_quarantine_lists_every_record_once(tmp_path):
    with contextlib.closing(Log(str(tmp_path), 0)) as found:
        for met in ({"3": ["broken_image", "a.png", "cut off"]}, {"3": ["broken_image", "a.png", "cut off"]}):
            found.quarantine({"vqa": met})
    assert read_rows(tmp_path / "quarantine.jsonl") == [
        {"source": "vqa", "index": 3, "reason": "broken_image", "key": "a.png", "detail": "cut off"}
    ]


ODD = [b"\x00\x00\x00", b'{"step": 3, "lo', b"[1]", b'{"loss": 3}', b'{"step": "4"}', b"\xff\xfe", b"[" * 100_000, b"7"]


def test_odd_lines_of_a_log_cost_no_row_and_are_reported_once(tmp_path):
    """Rows before and behind a bad line stay, character for character; bad lines get a file of their own."""
    rows = [json.dumps({"step": step, "text": "\u2028é"}, ensure_ascii=False).encode() for step in range(1, 99)]
    for name in ("metrics.jsonl", "eval.jsonl"):
        (tmp_path / name).write_bytes(b"\n".join([*rows[:50], *ODD, *rows[50:]]) + b"\n")
    said: list[str] = []
    with contextlib.closing(Log(str(tmp_path), 98, said.append)) as found:
        assert found.evaluated() == set(range(1, 99))
        found.train({"step": 99})
    assert len(said) == 2 and all(f"{len(ODD)} lines" in line for line in said)
    want = b"".join(line + b"\n" for line in [*rows, b'{"step": 99}'])
    assert (tmp_path / "metrics.jsonl").read_bytes() == want
    moved = [line for line in ODD if line not in ODD[3:5]] + ODD[3:5]  # rows without a step behind what is no JSON
    assert (tmp_path / "metrics.jsonl.odd").read_bytes() == b"".join(line + b"\n" for line in moved)
    Log(str(tmp_path), 99, said.append).close()
    assert len(said) == 2 and (tmp_path / "metrics.jsonl").read_bytes() == want


def test_log_of_a_run_that_starts_anew_is_kept(tmp_path):
    said: list[str] = []
    for _ in range(2):
        with contextlib.closing(Log(str(tmp_path), 0, said.append)) as found:
            found.train({"step": 10})
    assert read_rows(tmp_path / "metrics.jsonl") == read_rows(tmp_path / "metrics.jsonl.1") == [{"step": 10}]
    assert len(said) == 1 and "the old ones are kept in" in said[0]
