"""Runs step plans on all ranks, in the order in which they were scheduled."""

from concurrent.futures import Future, ThreadPoolExecutor

from engine import checkpoint
from engine.config import EngineConfig
from engine.decoder_config import DecoderConfig
from engine.group import Follower, GroupAddress, Leader
from engine.model_runner import ModelRunner, select_device
from engine.parallel import TensorParallel
from engine.step import StepPlan, StepResult


class Executor:
    """Rank 0's model runner, and the plan channel to the other ranks."""

    def __init__(self, config: EngineConfig, leader: Leader, show_progress: bool = False) -> None:
        self._leader = leader
        device = select_device(config.device)
        self.runner = load_runner(config, leader.gather(device), show_progress)
        overlap = config.async_scheduling
        if overlap is None:
            overlap = device.type == "cuda"
        # One thread runs all steps, so they run in order and beside the scheduler.
        self._thread = ThreadPoolExecutor(1, "model-runner") if overlap else None

    @property
    def max_in_flight(self) -> int:
        """Steps worth launching before the oldest one's result is awaited."""
        return 1 if self._thread is None else 2

    def launch(self, plan: StepPlan) -> "Future[StepResult]":
        """Start a step; the result is there at once unless steps overlap with scheduling."""
        self._leader.send(plan)
        if self._thread is not None:
            return self._thread.submit(self.runner.execute, plan)
        done: Future[StepResult] = Future()
        done.set_result(self.runner.execute(plan))
        return done

    def close(self) -> None:
        """Let the followers go and stop the thread. The memory goes with the object."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        self._leader.close()


def load_runner(
    config: EngineConfig, parallel: TensorParallel, show_progress: bool = False
) -> ModelRunner:
    """One rank's part of the configured model. Raises ValueError for what does not fit it."""
    directory = checkpoint.resolve(config.model, config.revision)
    model_config = DecoderConfig.from_checkpoint(directory)
    if config.max_model_len and config.max_model_len > model_config.max_position:
        raise ValueError(
            f"max_model_len ({config.max_model_len}) is longer than the model's window; it can "
            f"be at most {model_config.max_position}"
        )
    eos_token_ids = checkpoint.eos_token_ids(directory)
    return ModelRunner(config, model_config, directory, eos_token_ids, parallel, show_progress)


def follow(config: EngineConfig, rank: int, address: GroupAddress) -> None:
    """Be rank `rank`: execute the leader's plans until it hangs up."""
    follower = Follower(address)
    parallel = follower.join(rank, config.tensor_parallel_size, select_device(config.device))
    runner = load_runner(config, parallel)
    while True:
        try:
            plan = follower.receive()
        except EOFError:
            return
        runner.execute(plan)
