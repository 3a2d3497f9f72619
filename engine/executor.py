"""Runs step plans on all ranks, in the order in which they were scheduled."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from engine import checkpoint
from engine.config import EngineConfig
from engine.decoder_config import DecoderConfig
from engine.generation_config import eos_token_ids
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
        self._leader.send(plan)
        if self._thread is None:
            return self.runner.launch(plan).result
        launched = self._thread.submit(self.runner.launch, plan)
        return lambda: launched.result().result()

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
    eos = eos_token_ids(directory)
    return ModelRunner(config, model_config, directory, eos, parallel, show_progress)


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
        runner.launch(plan)
