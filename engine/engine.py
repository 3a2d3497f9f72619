"""The engine: requests in, tokens out, one step at a time. No text, no network, no Ray."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict

from engine import checkpoint
from engine.block_pool import BlockPool
from engine.config import EngineConfig
from engine.decoder_config import DecoderConfig
from engine.model_runner import ModelRunner
from engine.request import Request, RequestLimits
from engine.scheduler import Scheduler
from engine.step import StepPlan, StepResult, TokenDelta


class Engine:
    """A scheduler and the device it feeds.

    With async scheduling, step N + 1 is planned and launched before step N's tokens are known; what
    a stop condition makes superfluous is dropped when its result arrives.
    """

    def __init__(self, config: EngineConfig, show_progress: bool = False) -> None:
        directory = checkpoint.resolve(config.model, config.revision)
        model_config = DecoderConfig.from_checkpoint(directory)
        if config.max_model_len and config.max_model_len > model_config.max_position:
            raise ValueError(
                f"max_model_len ({config.max_model_len}) is longer than the model's window; it can "
                f"be at most {model_config.max_position}"
            )
        eos_token_ids = checkpoint.eos_token_ids(directory)
        self.runner = ModelRunner(
            config, model_config, directory, eos_token_ids, show_progress=show_progress
        )
        self.limits = RequestLimits(
            vocab_size=model_config.vocab_size,
            max_model_len=self.runner.max_len,
            num_blocks=self.runner.num_blocks,
            block_size=config.block_size,
        )
        pool = BlockPool(self.runner.num_blocks, config.enable_prefix_caching)
        self.scheduler = Scheduler(config, pool, self.limits.max_len, eos_token_ids)
        overlap = config.async_scheduling
        if overlap is None:
            overlap = self.runner.device.type == "cuda"
        # One thread runs all steps, so they run in the order in which they were scheduled.
        self._device_thread = ThreadPoolExecutor(1, "model-runner") if overlap else None
        self._max_in_flight = 2 if overlap else 1
        self._in_flight: deque[tuple[StepPlan, Future[StepResult]]] = deque()
        self.num_steps = 0

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError when it could never be served."""
        self.limits.check(request.token_ids, request.params)
        self.scheduler.add(request)

    def abort(self, request_id: str) -> None:
        """Forget a request and free what it holds; unknown ids are ignored."""
        self.scheduler.abort(request_id)

    @property
    def has_work(self) -> bool:
        """Whether another step is due: for live requests, or to retire what is in flight."""
        return bool(self.scheduler.requests or self._in_flight)

    def step(self) -> list[TokenDelta]:
        """Launch what can be launched, retire the oldest step in flight, return its tokens."""
        while len(self._in_flight) < self._max_in_flight:
            plan = self.scheduler.schedule()
            if plan is None:
                break
            self._in_flight.append((plan, self._launch(plan)))
            self.num_steps += 1
        if not self._in_flight:
            return []
        plan, result = self._in_flight.popleft()
        return self.scheduler.update(plan, result.result())

    def _launch(self, plan: StepPlan) -> "Future[StepResult]":
        if self._device_thread is not None:
            return self._device_thread.submit(self.runner.execute, plan)
        done: Future[StepResult] = Future()
        done.set_result(self.runner.execute(plan))
        return done

    def stats(self) -> dict[str, int]:
        """What is going on now, and counts since the start."""
        scheduler = self.scheduler
        return {
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "num_blocks": scheduler.pool.num_blocks,
            "free_blocks": scheduler.pool.num_free,
            "steps": self.num_steps,
            **asdict(scheduler.stats),
        }

    def close(self) -> None:
        """Stop the device thread. The memory goes with the object."""
        if self._device_thread is not None:
            self._device_thread.shutdown(cancel_futures=True)
