"""What an engine looks like from outside: a picture of its pool, its batch and its queue.

Nothing is recorded and nothing is built unless an `Observer` is attached, that is, while somebody
watches. A picture is plain data (numbers, strings, lists, dicts), bounded in size: a pool of more
than `MAX_CELLS` blocks is drawn with several blocks to a cell.
"""

import time
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, TypedDict

from engine.schedule.scheduler import Step
from engine.schedule.sequence import Sequence
from engine.schedule.step import TokenDelta

if TYPE_CHECKING:  # imports torch, which a front that reads pictures never does
    from engine.engine import DoneStep, Engine

MAX_CELLS = 4096
MAX_ROWS = 64
MAX_STEPS = 32


class RowView(TypedDict):
    """A running request."""

    id: str
    row: int  # in the device's tables
    num_prompt: int  # tokens of the prompt
    num_tokens: int  # of prompt and output so far
    num_computed: int  # whose keys and values are in the cache
    num_cached: int  # of the prompt, found in the prefix cache when it entered
    num_drafted: int  # tokens that were guessed for it
    num_accepted: int  # of those, what came true
    cells: list[int]  # its block table


class WaitingView(TypedDict):
    """A request in the queue."""

    id: str
    num_tokens: int
    preempted: bool  # it has run before


class StepView(TypedDict):
    """What one step computed."""

    step: int  # counted from the engine's start
    # (request id, row, tokens, and how many of them were drafts that came to nothing)
    chunks: list[tuple[str, int, int, int]]


class EngineView(TypedDict):
    """One picture. A cell of `pool` is as many blocks as `blocks_per_cell`, and shows the fullest.

    `pool` has a character per cell: "." free, "c" free with cached content, "o" held by one block
    table, "s" shared by several.
    """

    time: float  # seconds on the engine's clock
    stats: dict[str, float]  # `Engine.stats`
    device: str
    ops: str
    tensor_parallel_size: int
    block_size: int
    num_blocks: int
    blocks_per_cell: int
    pool: str
    rows: list[RowView]  # in order of admission, at most MAX_ROWS
    waiting: list[WaitingView]  # next first, at most MAX_ROWS
    steps: list[StepView]  # since the picture before, at most MAX_STEPS


class Observer:
    """Notes what steps compute, and draws; `close` leaves the engine as it was."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._steps: deque[DoneStep] = deque(maxlen=MAX_STEPS)
        engine.step_log = self._steps

    def close(self) -> None:
        self._engine.step_log = None

    def draw(self) -> EngineView:
        """The engine now, with the steps since the last drawing."""
        engine, pool = self._engine, self._engine.scheduler.pool
        per_cell = -(-pool.num_blocks // MAX_CELLS)
        occupancy = pool.occupancy()
        if per_cell > 1:
            starts = range(0, len(occupancy), per_cell)
            occupancy = "".join(max(occupancy[i : i + per_cell]) for i in starts)
        steps = [_step(*done) for done in self._steps]
        self._steps.clear()
        scheduler = engine.scheduler
        return {
            "time": time.monotonic(),
            "stats": engine.stats(),
            "device": str(engine.runner.device),
            "ops": engine.runner.ops.name,
            "tensor_parallel_size": engine.runner.ranks.tensor.size,
            "block_size": engine.limits.block_size,
            "num_blocks": pool.num_blocks,
            "blocks_per_cell": per_cell,
            "pool": occupancy,
            "rows": [_row(sequence, per_cell) for sequence in scheduler.running[:MAX_ROWS]],
            "waiting": [_waiting(sequence) for sequence in islice(scheduler.waiting, MAX_ROWS)],
            "steps": steps,
        }


class Watch:
    """Draws for whoever watches, at most ten times and for a fiftieth of the time.

    Watching lasts as long as it is renewed: nobody has to take leave.
    """

    _INTERVAL_S = 0.1
    _SHARE_OF_TIME = 0.02

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._observer: Observer | None = None
        self._until = self._next = 0.0

    def renew(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds
        if self._observer is None:
            self._observer = Observer(self._engine)

    def picture(self) -> EngineView | None:
        """The engine now; None when nobody watches or the last picture is too recent."""
        if self._observer is None:
            return None
        now = time.monotonic()
        if now > self._until:
            self._observer.close()
            self._observer = None
            return None
        if now < self._next:
            return None
        picture = self._observer.draw()
        spent = time.monotonic() - now
        self._next = now + max(self._INTERVAL_S, spent / self._SHARE_OF_TIME)
        return picture


def _row(sequence: Sequence, per_cell: int) -> RowView:
    return {
        "id": sequence.id,
        "row": sequence.row,
        "num_prompt": sequence.num_prompt,
        "num_tokens": sequence.num_tokens,
        "num_computed": sequence.num_computed,
        "num_cached": sequence.num_cached or 0,
        "num_drafted": sequence.num_drafted,
        "num_accepted": sequence.num_accepted,
        "cells": list(dict.fromkeys(b // per_cell for b in sequence.block_tables[0] if b >= 0)),
    }


def _waiting(sequence: Sequence) -> WaitingView:
    return {
        "id": sequence.id,
        "num_tokens": sequence.num_tokens,
        "preempted": sequence.num_cached is not None,
    }


def _step(number: int, step: Step, deltas: list[TokenDelta]) -> StepView:
    plan, brought = step.plan, {delta.request_id: len(delta.token_ids) for delta in deltas}
    rows = zip(step.sequences, plan.rows, plan.lengths, plan.num_sampled, strict=True)
    chunks = [
        (sequence.id, row, length, max(num_sampled - max(brought.get(sequence.id, 0), 1), 0))
        for sequence, row, length, num_sampled in rows
    ]
    return {"step": number, "chunks": chunks[:MAX_ROWS]}
