"""The engine: requests in, tokens out, one step at a time. No text, no network, no Ray."""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from engine.checkpoint.directory import directory_of
from engine.checkpoint.source import told_of
from engine.config import EngineConfig
from engine.models.shared import WeightFiles
from engine.ranks.group import Leader
from engine.runner.commands import DraftTokens, Profile, Sleep, UpdateWeights
from engine.runner.executor import Executor
from engine.runner.new_weights import read_alike
from engine.sampling.grammar.compiler import GrammarCompiler
from engine.sampling.grammar.prerequisite import CompiledGrammars
from engine.schedule.antechamber import Antechamber
from engine.schedule.block_pool import BlockHasher
from engine.schedule.block_tables import BlockTables
from engine.schedule.request import Request, RequestLimits
from engine.schedule.scheduler import Scheduler, Step
from engine.schedule.step import StepResult, TokenDelta
from engine.speculation.select import new_speculator
from engine.text.tokenizer import Tokenizer

# How long an engine with nothing else to do waits for what requests need before it looks around.
_ANTECHAMBER_WAIT_S = 0.005
# Tokens to compute are counted in every step for so many requests, of more every so many seconds.
_FEW, _COUNT_S = 32, 0.1


class DoneStep(NamedTuple):
    """A step whose result is there."""

    number: int  # counted from the engine's start
    step: Step
    deltas: list[TokenDelta]


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A step that has been launched."""

    number: int
    step: Step
    began_at: float  # to be planned, on the clock of time.monotonic()
    wait: Callable[[], StepResult]


class Engine:
    """A scheduler and the device it feeds.

    With async scheduling, step N + 1 is planned and launched before step N's tokens are known; what
    a stop condition makes superfluous is dropped when its result arrives.
    """

    def __init__(
        self,
        config: EngineConfig,
        leader: Leader | None = None,
        show_progress: bool = False,
        files: WeightFiles | None = None,
    ) -> None:
        """
        Args:
            files: see `load_model`.
        """
        leader = leader or Leader(1)
        if leader.size != config.num_ranks:
            raise ValueError(f"{config.num_ranks} ranks need a leader of so many")
        self.executor = Executor(config, leader, show_progress, files)
        self.runner = runner = self.executor.runner
        self.config = config = runner.config  # on its device
        groups = runner.cache_layout.cache_groups(runner.num_blocks)
        hasher = BlockHasher(config.block_size, config.block_key)
        blocks = BlockTables(
            groups,
            hasher,
            config.step_size.tokens,
            config.enable_prefix_caching,
            runner.host_cache.num_slots if runner.host_cache is not None else 0,
        )
        self.limits = RequestLimits(
            vocab_size=runner.vocab_size,
            max_model_len=runner.max_len,
            num_blocks=blocks.most_blocks(runner.max_len),
            block_size=config.block_size,
            eos_token_ids=sorted(runner.eos_token_ids),
            num_labels=runner.num_labels,
        )
        self.speculator = new_speculator(
            config,
            num_ahead=self.executor.max_in_flight - 1,
            max_drafts=runner.max_drafts,
            forced=lambda row, is_settled: runner.sampler.matchers.forced(row, is_settled),
            encode=self._encode,
            draft=lambda rows: self.executor.run(DraftTokens(rows))(),
        )
        self.scheduler = Scheduler(
            config, blocks, self.limits.max_len, runner.eos_token_ids, self.speculator
        )
        grammars = CompiledGrammars(self._new_grammar_compiler, self.runner.sampler.matchers)
        self._antechamber = Antechamber([grammars])
        self._tokenizer: Future[Tokenizer] | None = None  # from the first grammar on
        self._in_flight: deque[_InFlight] = deque()
        self._brought: list[TokenDelta] = []  # by steps, not returned yet
        self.num_steps = 0
        # When set to a deque, collects all steps and what they have brought.
        self.step_log: deque[DoneStep] | None = None
        self._speed = _Speed()
        self._num_computed = 0  # tokens of all steps
        self._num_recordings = 0  # of the runner, when a step was last taken in
        self._is_profiling = False
        self.is_sleeping = False
        self._uncomputed = 0.0, 0  # when it was counted, and how many tokens

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError when it could never be served."""
        if self.is_sleeping:
            raise ValueError("the engine is asleep; wake it up first")
        self.limits.check(request.prompt_token_ids, request.params, request.output_token_ids)
        self.limits.check_tokens("prediction", request.prediction_token_ids)
        if request.params.n != 1:
            raise ValueError(
                f"n: a request has one output (got {request.params.n}); make one per choice"
            )
        if request.params.bad_words:
            raise ValueError(
                "bad_words: an engine knows no words; give their tokens as bad_words_token_ids"
            )
        if request.id in self._antechamber:
            raise ValueError(f"a request with id {request.id!r} is already live")
        if not self._antechamber.enter(request):
            self.scheduler.add(request)

    def _new_grammar_compiler(self) -> GrammarCompiler:
        directory = directory_of(self.config)
        eos = sorted(self.runner.eos_token_ids)
        if self.speculator is not None:  # beside the compiler, which takes longer
            self._tokenizer = ThreadPoolExecutor(1, "tokenizer").submit(Tokenizer, directory)
        return GrammarCompiler(directory, self.runner.vocab_size, eos)

    def _encode(self, text: str) -> list[int]:
        """What a grammar demands, in tokens."""
        assert self._tokenizer is not None
        return self._tokenizer.result().encode(text, add_special_tokens=False)

    def _queue_ready(self) -> list[TokenDelta]:
        """Queue the requests that need nothing more; returns the endings of the refused."""
        if not self._antechamber:
            return []
        if not (self._in_flight or self.scheduler.sequences):  # nothing else to do meanwhile
            self._antechamber.wait(_ANTECHAMBER_WAIT_S)
        refused = []
        for request, held, refusal in self._antechamber.release():
            if refusal is None:
                try:
                    self.scheduler.add(request, held)
                except ValueError as error:
                    refusal = str(error)
            if refusal is not None:
                refused.append(TokenDelta.failed(request.id, refusal))
        return refused

    def abort(self, request_id: str) -> None:
        """Forget a request and free what it holds; unknown ids are ignored."""
        self._antechamber.leave(request_id)
        self.scheduler.abort(request_id)

    @property
    def has_work(self) -> bool:
        """Whether another step is due: for live requests, or to retire what is in flight."""
        return bool(
            self.scheduler.sequences or self._in_flight or self._antechamber or self._brought
        )

    def step(self) -> list[TokenDelta]:
        """Launch what can be launched, retire the oldest step in flight, return its tokens.

        What it raises, or an interrupt, may have kept a step from running, whose blocks have their
        names already. So then nothing is taken for cached any more.
        """
        try:
            return self._step()
        except BaseException:
            self.scheduler.blocks.forget_cached()
            raise

    def _step(self) -> list[TokenDelta]:
        refused = self._queue_ready()
        while len(self._in_flight) < self.executor.max_in_flight:
            now, step = time.monotonic(), self.scheduler.schedule()
            if step is None:
                break
            self.num_steps += 1
            wait = self.executor.launch(step.plan)
            self._in_flight.append(_InFlight(self.num_steps, step, now, wait))
        brought, self._brought = self._brought, []
        return refused + brought + self._retire()

    def _retire(self) -> list[TokenDelta]:
        """What the oldest step in flight brings, if there is one."""
        if not self._in_flight:
            return []
        oldest = self._in_flight.popleft()
        result = oldest.wait()
        deltas = self.scheduler.update(oldest.step, result)
        self._count_step(oldest)
        if self.step_log is not None:
            self.step_log.append(DoneStep(oldest.number, oldest.step, deltas))
        return deltas

    def _count_step(self, done: _InFlight) -> None:
        plan, num_tokens = done.step.plan, done.step.plan.num_tokens
        self._num_computed += num_tokens
        seconds = self._speed.count_step(num_tokens, done.began_at)
        before, self._num_recordings = self._num_recordings, self.runner.forward_pass.num_recordings
        if self.speculator is None or before != self._num_recordings:
            return
        if plan.lengths == plan.num_sampled:  # it only decodes
            self.speculator.count(len(plan.lengths), num_tokens, seconds)

    def stats(self) -> dict[str, float]:
        """What is going on now, and counts since the start."""
        scheduler = self.scheduler
        return {
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting) + len(self._antechamber),
            "deferred": len(self._antechamber),
            "computed_tokens": self._num_computed,
            "uncomputed_tokens": self._count_uncomputed(),
            "num_blocks": scheduler.pool.num_blocks,
            "free_blocks": scheduler.pool.num_free,
            "host_blocks": scheduler.pool.host.num_slots,
            "used_host_blocks": len(scheduler.pool.host),
            "steps": self.num_steps,
            "sleeping": self.is_sleeping,
            "late_compilations": len(self.runner.late_compilations),
            "replayed_steps": self.runner.forward_pass.num_replays,
            "tokens_per_s": self._speed.tokens_per_s,
            "step_rows": self.config.step_size.rows,
            "step_tokens": self.config.step_size.tokens,
            "full_steps": self._speed.num_steps,
            **vars(scheduler.stats),
            **(self.speculator.stats() if self.speculator is not None else {}),
        }

    def start_profile(self) -> None:
        """Record what every rank does from now on; raises ValueError where that makes no sense."""
        self._profile(True)

    def stop_profile(self) -> None:
        """Write it down; raises ValueError where there is none, OSError where it cannot be."""
        self._profile(False)

    def _profile(self, starts: bool) -> None:
        """Start to record what every rank does, or end and write it down.

        Raises ValueError where that makes no sense, OSError where it cannot be written.
        """
        if self.config.profile_directory is None:
            raise ValueError("this engine has no profile_directory, where profiles would go")
        if starts == self._is_profiling:
            raise ValueError(f"a profile is {'on its way already' if starts else 'not on its way'}")
        self._is_profiling = starts
        failure = self.executor.run(Profile(starts))()
        if failure is not None:
            raise OSError(failure)

    def sleep(self, level: int = 1) -> None:
        """Give back the device's memory until `wake_up`: the KV cache, and on a GPU the weights.

        Raises ValueError without enable_sleep_mode, where there are requests, and for other levels
        than vLLM's 1, at which the weights stay in host memory.
        """
        if level != 1:
            raise ValueError(f"level: {level} is not supported: at 1 weights stay in host memory")
        if not self.config.enable_sleep_mode:
            raise ValueError("this engine has no enable_sleep_mode, so it does not sleep")
        if self.has_work:
            raise ValueError("the engine has requests, which have to end or be aborted first")
        if not self.is_sleeping:
            self.is_sleeping = True
            self.scheduler.blocks.forget_cached()
            self.executor.run(Sleep(begins=True))()

    def wake_up(self) -> None:
        """Be as before, with an empty prefix cache."""
        if self.is_sleeping:
            self.executor.run(Sleep(begins=False))()
            self.is_sleeping = False

    def update_weights_from_disk(self, model_path: str) -> None:
        """Compute with the weights of another checkpoint of the same model from now on.

        Requests go on where they are: what they have so far is computed anew. The prefix cache is
        empty. Raises ValueError where that checkpoint is of another model, or cannot be loaded;
        then all is as it was.

        Args:
            model_path: a directory, or whatever else `model` can be.
        """
        if self.is_sleeping:
            raise ValueError("the engine is asleep; wake it up first")
        with told_of("model_path"):
            read_alike(self.config, self.runner.shape, model_path)
        while self._in_flight:
            self._brought += self._retire()
        self.scheduler.forget_computed()
        failure = self.executor.run(UpdateWeights(model_path))()
        if failure is not None:
            raise ValueError(f"model_path: {model_path!r} cannot be loaded: {failure}")

    def _count_uncomputed(self) -> int:
        """Of few in every step; of thousands that wait ten times a second, for steps are short."""
        sequences, now = self.scheduler.sequences, time.monotonic()
        if len(sequences) < _FEW or now - self._uncomputed[0] > _COUNT_S:
            self._uncomputed = now, sum(s.num_uncomputed for s in sequences.values())
        return self._uncomputed[1]

    def close(self) -> None:
        """Stop what runs beside this thread: other ranks, the device thread."""
        self.executor.close()
        self.runner.sampler.close()
        self._antechamber.close()


class _Speed:
    """How fast the device computes prompts: an average over the steps that are full of tokens."""

    _FULL_STEP_TOKENS = 128
    _WEIGHT = 0.2

    def __init__(self) -> None:
        self.tokens_per_s = 1000.0  # until measured
        self.num_steps = 0  # that were full
        self._last_end = 0.0

    def count_step(self, num_tokens: int, began_at: float) -> float:
        """A step has been taken in, which began then or when the one before it was: seconds."""
        now = time.monotonic()
        seconds = max(now - max(began_at, self._last_end), 1e-9)
        if num_tokens >= self._FULL_STEP_TOKENS:
            self.num_steps += 1
            self.tokens_per_s += self._WEIGHT * (num_tokens / seconds - self.tokens_per_s)
        self._last_end = now
        return seconds
