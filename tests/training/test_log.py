"""The run log: whole lines, cut back on resume, torn tails mended."""

import json
import math

from reinforce_ada.training.log import RunLog, read_log


def test_records_come_back_and_nan_is_null(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    log.write({"kind": "step", "step": 1, "loss": math.nan, "parts": (1.0, math.inf)})
    assert read_log(tmp_path / "log.jsonl") == [{"kind": "step", "step": 1, "loss": None, "parts": [1.0, None]}]


def test_a_torn_last_line_is_dropped_and_swallows_nothing(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"kind": "step", "step": 1}) + "\n" + '{"kind": "st')
    log = RunLog(path)
    log.write({"kind": "step", "step": 2})
    assert [r["step"] for r in read_log(path)] == [1, 2]


def test_a_resumed_log_keeps_what_was_before(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    for record in ({"kind": "run"}, {"kind": "eval", "step": 0, "k": 2}, {"kind": "step", "step": 1}, {"kind": "step", "step": 2}):
        log.write(record)
    assert log.resume(1, 2) == []
    assert (
        read_log(tmp_path / "log.jsonl")
        == log.records
        == [{"kind": "run"}, {"kind": "eval", "step": 0, "k": 2}, {"kind": "step", "step": 1}]
    )
    assert log.evaluation(0) is not None
    assert log.evaluation(2) is None
