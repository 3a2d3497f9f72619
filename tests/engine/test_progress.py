"""Progress in a log: whole lines, few of them, and always the last."""

import io

import pytest

from engine.progress import LINE_INTERVAL_S, Progress


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("engine.progress.time.monotonic", lambda: now[0])
    log = io.StringIO()
    with Progress(
        total=3_000_000, desc="Loading weights", unit="B", unit_scale=True, file=log, mininterval=0
    ) as progress:
        for _ in range(30):
            progress.update(100_000)
            now[0] += LINE_INTERVAL_S / 8
    assert log.getvalue().splitlines() == [
        "Loading weights: 0%, 0.00 of 3.00M B",
        "Loading weights: 30%, 900k of 3.00M B",
        "Loading weights: 57%, 1.70M of 3.00M B",
        "Loading weights: 83%, 2.50M of 3.00M B",
        "Loading weights: 100%, 3.00M of 3.00M B",
    ]


def test_it_can_be_silent() -> None:
    log = io.StringIO()
    assert list(Progress([1, 2], file=log, disable=True)) == [1, 2]
    assert log.getvalue() == ""
