"""A compiled grammar as what a request with structured_outputs needs before it is scheduled."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from engine.sampling.grammar.compiler import GrammarCompiler
from engine.sampling.grammar.matcher import GrammarMatchers
from engine.schedule.request import Request


class CompiledGrammars:
    """An `engine.schedule.antechamber.Prerequisite`.

    Args:
        new_compiler: called with the first request that needs one.
        matchers: get the grammars of requests that are about to be queued.
    """

    def __init__(
        self, new_compiler: Callable[[], GrammarCompiler], matchers: GrammarMatchers
    ) -> None:
        self._new_compiler = new_compiler
        self._compiler: GrammarCompiler | None = None
        self._matchers = matchers

    def begin(self, request: Request) -> "Future[Any] | None":
        wanted = request.params.structured_outputs
        if wanted is None:
            return None
        if self._compiler is None:
            self._compiler = self._new_compiler()
        return self._compiler.compile(wanted)

    def take(self, request: Request, thing: Any) -> object:
        return self._matchers.add(request, thing)

    def close(self) -> None:
        if self._compiler is not None:
            self._compiler.close()
