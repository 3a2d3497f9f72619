"""How far something slow has come: a bar on a terminal, a line now and then in a log."""

import io
import sys
import time
from typing import Any

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
