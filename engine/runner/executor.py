"""Runs commands on all ranks, in the order in which they are given."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from engine.config import EngineConfig
from engine.device.select import select_device
from engine.generation_config import eos_token_ids
from engine.models.shared import WeightFiles
from engine.ranks.group import Leader
from engine.ranks.rank_group import Ranks
from engine.runner.commands import Command, LaunchStep, Result
from engine.runner.model_runner import ModelRunner
from engine.runner.preflight import read_model
from engine.schedule.step import StepPlan, StepResult


class Executor:
    """Rank 0's model runner, and the channel to the other ranks."""

    def __init__(
        self,
        config: EngineConfig,
        leader: Leader,
        show_progress: bool = False,
        files: WeightFiles | None = None,
    ) -> None:
        self._leader = leader
        device = select_device(config.device)
        self.runner = load_runner(config, leader.gather(device), show_progress, files)
        self._overlaps = config.async_scheduling
        if self._overlaps is None:
            self._overlaps = device.type == "cuda"
        # A GPU runs beside the host anyway, a CPU in a thread: one, so that steps stay in order.
        in_thread = self._overlaps and device.type == "cpu"
        self._thread = ThreadPoolExecutor(1, "model-runner") if in_thread else None

    @property
    def max_in_flight(self) -> int:
        """Steps to launch before the oldest one's result is awaited."""
        return 2 if self._overlaps else 1

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Start a step behind those before it. What is returned waits for its result."""
        launched = self.run(LaunchStep(plan))
        return lambda: launched().result()

    def run(self, command: Command[Result]) -> Callable[[], Result]:
        """Start a command on all ranks, behind those before it.

        What is returned waits until this rank has run it, and raises what it raised.
        """
        self._leader.send(command)
        if self._thread is None:
            result = command.run(self.runner)
            return lambda: result
        return self._thread.submit(command.run, self.runner).result

    def close(self) -> None:
        """Let the followers go and stop the thread. The memory goes with the object."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        self._leader.close()


def load_runner(
    config: EngineConfig,
    ranks: Ranks,
    show_progress: bool = False,
    files: WeightFiles | None = None,
) -> ModelRunner:
    """One rank's part of the configured model. Raises ValueError for what does not fit it."""
    directory, (of_weights, shape), draft = read_model(config)
    eos = frozenset(id for id in eos_token_ids(directory) if 0 <= id < shape.vocab_size)
    return ModelRunner(config, shape, of_weights, eos, ranks, show_progress, files, draft)
