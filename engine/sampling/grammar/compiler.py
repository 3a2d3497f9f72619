"""Turns constraints into grammars beside the step loop, and remembers the last ones."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from engine.structured_outputs import StructuredOutputs

# What one grammar may take where nothing else runs: longer and larger than any in honest use.
TIMEOUT_S = 10.0
MEMORY_GIB = 4
# Compiled at once: one that takes long holds up no others.
_NUM_AT_ONCE = 4
_MAX_CACHED = 128
_MAX_CACHED_BYTES = 512 << 20


class GrammarCompiler:
    """Compiles with the help of a process that starts with the first grammar.

    Args:
        directory, vocab_size, eos_token_ids: see `engine.sampling.grammar.worker.tokenizer_info`.
    """

    def __init__(self, directory: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._vocabulary: dict[str, Any] = {
            "directory": str(directory),
            "vocab_size": vocab_size,
            "eos_token_ids": list(eos_token_ids),
        }
        self._threads = ThreadPoolExecutor(_NUM_AT_ONCE, "grammar-compiler")
        self._worker = _Worker(self._vocabulary)
        self._lock = threading.Lock()
        self._cache: OrderedDict[str, Future[Any]] = OrderedDict()

    def compile(self, wanted: StructuredOutputs) -> "Future[Any]":
        """An `xgrammar.CompiledGrammar`, or ValueError with what is wrong with it."""
        cached = self._cache.get(wanted.key)
        if cached is not None and not isinstance(_error(cached), _LimitError):
            self._cache.move_to_end(wanted.key)
            return cached
        future = self._cache[wanted.key] = self._threads.submit(self._compile, wanted)
        while len(self._cache) > _MAX_CACHED or self._cached_bytes > _MAX_CACHED_BYTES:
            self._cache.popitem(last=False)
        return future

    @property
    def _cached_bytes(self) -> int:
        return sum(
            future.result().memory_size_bytes
            for future in self._cache.values()
            if future.done() and _error(future) is None
        )

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._worker.kill()

    @cached_property
    def _tokenizer_info(self) -> Any:
        from engine.sampling.grammar.worker import tokenizer_info

        if not self._vocabulary["eos_token_ids"]:
            raise ValueError(
                "structured_outputs: the model has no end-of-sequence token to end them with"
            )
        return tokenizer_info(**self._vocabulary)

    def _compile(self, wanted: StructuredOutputs) -> Any:
        self._worker.start()  # which takes as long as the imports here
        with self._lock:
            info = self._tokenizer_info
        from xgrammar import CompiledGrammar

        serialized, reason = self._worker.ask(wanted)
        if serialized is None:
            raise ValueError(f"structured_outputs: {reason}")
        return CompiledGrammar.deserialize_json(serialized, info)


class _LimitError(ValueError):
    """Not for good, perhaps: on a machine with less to do it may be compiled."""


class _Worker:
    """The process, from the outside."""

    def __init__(self, vocabulary: dict[str, Any]) -> None:
        self._limits = {"timeout_s": TIMEOUT_S, "memory_gib": MEMORY_GIB}
        self._arguments = [json.dumps(vocabulary), json.dumps(self._limits)]
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def ask(self, wanted: StructuredOutputs) -> tuple[str | None, str | None]:
        """Its answer, see the worker's `serve`. Raises _LimitError if there is none."""
        ours, theirs = Pipe()
        with ours:
            try:
                with theirs:
                    self._hand_over(theirs.fileno())
                ours.send(wanted)
                return ours.recv()
            except (EOFError, OSError) as error:
                raise _LimitError(
                    "structured_outputs: compiling it takes more than "
                    "{timeout_s:g} s or {memory_gib} GiB; make it simpler".format(**self._limits)
                ) from error

    def _hand_over(self, fd: int) -> None:
        self.start()
        with self._lock:
            assert self._control is not None
            socket.send_fds(self._control, [b"."], [fd])

    def start(self) -> None:
        """If it does not run."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()

    def _start(self) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "engine.sampling.grammar.worker"),
                    *(str(theirs.fileno()), *self._arguments),
                ],
                pass_fds=[theirs.fileno()],
                env=os.environ
                | {"PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""},
                start_new_session=True,  # one group with its forks, and no Ctrl-C from a terminal
            )

    def kill(self) -> None:
        """With all its forks."""
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()


def _error(future: "Future[Any]") -> BaseException | None:
    return future.exception() if future.done() else None
