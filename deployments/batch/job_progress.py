"""How far the job is, how fast it goes and when it will be done."""

import time
from datetime import timedelta

from deployments.batch.engine_actor import PartReport


class Progress:
    """Counts what this run does; rows of earlier runs are done, but not part of its speed."""

    def __init__(self, total_rows: int, done_rows: int) -> None:
        self._total, self._done_before = total_rows, done_rows
        self._began = time.time()
        self._ready_at = float("inf")
        self._rows = self._errors = self._prompt_tokens = self._completion_tokens = 0

    def add(self, report: PartReport) -> None:
        self._rows += report.rows
        self._errors += report.errors
        self._prompt_tokens += report.prompt_tokens
        self._completion_tokens += report.completion_tokens
        self._ready_at = min(self._ready_at, report.ready_at)

    def line(self) -> str:
        """Speeds are averages since the first engine was ready."""
        done, seconds = self._done_before + self._rows, self._seconds
        remaining = timedelta(seconds=round((self._total - done) * seconds / max(self._rows, 1)))
        return (
            f"{done:,} of {self._total:,} rows ({done / self._total:.0%}), "
            f"{self._errors:,} errors; {self._completion_tokens / seconds:,.0f} output tok/s, "
            f"{self._prompt_tokens / seconds:,.0f} prompt tok/s; ETA {remaining}"
        )

    def summary(self) -> str:
        return (
            f"done: {self._rows:,} rows, {self._errors:,} of them errors, "
            f"{self._prompt_tokens:,} prompt tokens, {self._completion_tokens:,} output tokens "
            f"in {self._seconds:.1f} s after {self._ready_at - self._began:.1f} s of start-up "
            f"({self._completion_tokens / self._seconds:,.0f} output tok/s)"
        )

    @property
    def _seconds(self) -> float:
        return max(time.time() - self._ready_at, 1e-6)
