"""What the leader has all ranks do, in the same order: a step, and whatever else there may be.

A kind of command is a small, picklable dataclass; followers need not be told of it beforehand.
"""

from dataclasses import dataclass
from typing import Protocol, TypeVar

from engine.runner.model_runner import ModelRunner
from engine.sampling.pending_step import PendingStep
from engine.schedule.step import DraftedTokens, DraftRow, StepPlan

Result = TypeVar("Result", covariant=True)


class Command(Protocol[Result]):
    def run(self, runner: ModelRunner) -> Result:
        """On this rank, behind the commands before it; the result counts on the leader only."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Start recording what the device does, or end."""

    starts: bool

    def run(self, runner: ModelRunner) -> str | None:
        """Why it could not be written, if it could not."""
        if self.starts:
            runner.profiler.start()
            return None
        return runner.profiler.stop()


@dataclass(frozen=True, slots=True)
class Sleep:
    """Give back the memory of the device, or take it again."""

    begins: bool

    def run(self, runner: ModelRunner) -> None:
        if self.begins:
            runner.sleep()
        else:
            runner.wake_up()


@dataclass(frozen=True, slots=True)
class UpdateWeights:
    """Compute with those of another checkpoint from now on."""

    path: str

    def run(self, runner: ModelRunner) -> str | None:
        """Why a rank cannot, if one cannot; then none does."""
        return runner.update_weights(self.path)


@dataclass(frozen=True, slots=True)
class LaunchStep:
    plan: StepPlan

    def run(self, runner: ModelRunner) -> PendingStep:
        return runner.launch(self.plan)


@dataclass(frozen=True, slots=True)
class DraftTokens:
    rows: list[DraftRow]

    def run(self, runner: ModelRunner) -> DraftedTokens:
        assert runner.draft is not None
        return runner.draft.draft(self.rows)
