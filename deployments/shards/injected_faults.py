"""Faults on purpose, for `benchmarks.chaos`: where MANTA_FAULT_INJECTION=1 is set, and only there.

An engine dies at a random place of a step on SIGUSR1, as a device fault would have it, and of a
request whose prompt begins like `POISON`.
"""

import os
import signal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.schedule.step import StepPlan

POISON = [5, 6, 7, 8] * 4


def are_on() -> bool:
    return os.environ.get("MANTA_FAULT_INJECTION") == "1"


def raise_fault(*_: Any) -> None:
    raise RuntimeError("injected fault")


def prepare_process() -> None:
    if are_on():
        signal.signal(signal.SIGUSR1, raise_fault)


def prepare_engine(engine: "Engine") -> None:
    if not are_on():
        return
    launch = engine.runner.launch

    def launch_or_die(plan: "StepPlan") -> Any:
        if any(row.token_ids[: len(POISON)] == POISON for row in plan.new_rows):
            raise_fault()
        return launch(plan)

    engine.runner.launch = launch_or_die  # type: ignore[method-assign]
