"""How far something slow has come: a bar on a terminal, a line now and then in a log."""

import io
import sys
import time
from typing import Any

from tqdm import tqdm
from tqdm.asyncio import tqdm_asyncio  # what the hub's client asks for, and no slower

# Seconds between the lines of a log.
LINE_INTERVAL_S = 5.0


class Progress(tqdm_asyncio):  # type: ignore[type-arg]  # not subscriptable when run
    """tqdm, but where its output is no terminal (a Ray worker's log, a pipe) it prints whole lines.

    A bar there would be one endless line that is shown when all is over.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        file = options.get("file") or sys.stderr
        self._by_line = not file.isatty()
        self._shown = ""
        self._next_line = 0.0
        super().__init__(*args, **options | {"file": file})

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if not self._by_line:
            super().display(msg, pos)
            return
        done = self.total is not None and self.n >= self.total
        now = time.monotonic()
        if now < self._next_line and not done:
            return
        self._next_line = now + LINE_INTERVAL_S
        line = self._line()
        if line != self._shown:
            self._shown = line
            print(line, file=self.fp, flush=True)

    def close(self) -> None:
        if self._by_line and not self.disable:
            self._next_line = 0.0
            self.display()
            self.fp = io.StringIO()  # tqdm would end its bar's line here
        super().close()

    def _line(self) -> str:
        def size(number: float) -> str:
            return tqdm_asyncio.format_sizeof(number) if self.unit_scale else f"{number:,g}"

        line = f"{self.desc or 'Progress'}: ".replace(": : ", ": ")
        if self.total:
            line += f"{self.n / self.total:.0%}, {size(self.n)} of {size(self.total)} {self.unit}"
        else:
            line += f"{size(self.n)} {self.unit}"
        return line


class PromptProgress:
    """A tqdm bar of finished prompts with the current token rates."""

    def __init__(self, total: int, disable: bool) -> None:
        self._bar = tqdm(total=total, desc="Processed prompts", disable=disable)
        self._start = time.monotonic()
        self._first: tuple[int, ...] = ()

    def __enter__(self) -> "PromptProgress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def count_finished(self) -> None:
        self._bar.update()

    def show_speed(self, *counts: int) -> None:
        """Of the tokens of prompts and outputs that there have been so far."""
        first = self._first = self._first or counts
        seconds = max(time.monotonic() - self._start, 1e-9)
        speeds = [(now - then) / seconds for now, then in zip(counts, first, strict=True)]
        self._bar.set_postfix_str(
            f"prompt: {speeds[0]:.0f} tok/s, output: {speeds[1]:.0f} tok/s", refresh=False
        )
