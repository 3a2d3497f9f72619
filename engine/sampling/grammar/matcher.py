"""Which tokens the rows with a grammar may have next.

This lives beside the sampler, on the rank whose tokens count. Steps run one after another, so what
a row may have in step N + 1 follows from its token of step N although the scheduler, which planned
the step ahead, did not know that yet. The masks are computed while the model runs: a thread waits
for the tokens of step N, the device is busy with step N + 1 meanwhile.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from engine.device.transfer import ToHost
from engine.sampling.processor import LogitsRows
from engine.schedule.request import Request
from engine.schedule.step import NewRow
from kernels import Ops

# What a request may use of the processor's time for its grammar: an ambiguous one takes ever
# longer, the longer the text. Many times what honest ones need (about 0.1 ms per token).
_FREE_S = 0.5
_PER_TOKEN_S = 0.002


class _Row:
    """One request's place in its grammar."""

    def __init__(self, grammar: Any, output: Sequence[int]) -> None:
        """
        Args:
            grammar: an `xgrammar.CompiledGrammar`; None on other ranks, and when the request has
                gone before it ran.
            output: the tokens that it has already.
        """
        self._grammar = grammar
        # What the matcher has not been told: tokens, some of which are still on their way.
        self._unmatched: list[int | tuple[ToHost, int]] = [*output]
        self.error: str | None = None
        self._matcher: Any = None  # made when the first mask is
        self._num_tokens = 0
        self._seconds = 0.0

    def accept(self, tokens: ToHost, index: int) -> None:
        """The token that is, or will be, in tokens [N] at this index."""
        if self._grammar is not None and self.error is None:
            self._unmatched.append((tokens, index))

    def fill(self, bitmask: Tensor, index: int) -> None:
        """Allow what may come next in row `index` of bitmask; all, once there is nothing left.

        What goes wrong with a grammar is its request's error, and nobody else's.
        """
        if self._grammar is None or self.error is not None:
            return
        start = time.thread_time()
        tokens = [t if isinstance(t, int) else int(t[0].wait()[t[1]]) for t in self._unmatched]
        self._unmatched.clear()
        try:
            self.error = self._advance(tokens, start) or self._fill(bitmask, index)
        except Exception as error:
            self.error = f"its grammar cannot be followed: {error}"
        if self.error is not None:
            bitmask[index] = -1
        self._seconds += time.thread_time() - start

    def _fill(self, bitmask: Tensor, index: int) -> str | None:
        if not self._matcher.is_terminated():
            self._matcher.fill_next_token_bitmask(bitmask, index)
            if not bitmask[index].any():
                return "the model's vocabulary has no token that could come next"
        return None

    def _advance(self, tokens: Sequence[int], start: float) -> str | None:
        """Go on by these tokens; what is wrong, if that cannot be."""
        if self._matcher is None:
            self._matcher = _new_matcher(self._grammar)
        for token in tokens:
            self._num_tokens += 1
            if not self._matcher.is_terminated() and not self._matcher.accept_token(token):
                return f"the text so far does not match: token {token} does not fit"
            spent = self._seconds + time.thread_time() - start
            if spent > _FREE_S + self._num_tokens * _PER_TOKEN_S:
                return "this grammar is too ambiguous to follow; make it simpler"
        return None


def _new_matcher(grammar: Any) -> Any:
    from xgrammar import GrammarMatcher

    return GrammarMatcher(grammar)


class GrammarMatchers:
    """The grammars of the rows that have one.

    Tokens come in through `enter` and `accept`, and nowhere else is a grammar advanced.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._num_words = -(-vocab_size // 32)
        self._pins = device.type == "cuda"
        # By the key of its StructuredOutputs; the sequences keep them alive. Only on the leader.
        self._grammars: WeakValueDictionary[str, Any] = WeakValueDictionary()
        self._rows: dict[int, _Row] = {}
        self._thread: ThreadPoolExecutor | None = None

    def add(self, request: Request, grammar: Any) -> Any:
        """A request is about to be queued, with an `xgrammar.CompiledGrammar`.

        Returns the one that it shares with others of its kind, which must outlive the request.
        """
        assert request.params.structured_outputs is not None
        key = request.params.structured_outputs.key
        return self._grammars.setdefault(key, grammar)

    def enter(self, new: NewRow) -> None:
        """A request enters a row; with output, it is at the place that this has reached."""
        self._rows.pop(new.row, None)
        wanted = new.params.structured_outputs
        if wanted is not None:
            grammar = self._grammars.get(wanted.key)
            output = new.token_ids[new.num_prompt_tokens :]
            self._rows[new.row] = _Row(grammar, output)

    def constrained(self, rows: Sequence[int]) -> list[int]:
        """Which of these rows have a grammar, by index."""
        if not self._rows or self._rows.keys().isdisjoint(rows):
            return []
        return [i for i, row in enumerate(rows) if row in self._rows]

    def start(self, rows: Sequence[int]) -> "Future[Tensor]":
        """Compute, beside the caller, the bitmask [N, ceil(V / 32)] int32 of these rows.

        Those without a grammar may have any token, those with one come once: what may follow a
        token that is not drawn yet is not known here.
        """
        own = [rows[i] for i in self.constrained(rows)]
        assert len(set(own)) == len(own), "a row with a grammar samples one position at a time"
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "grammar-matcher")
        return self._thread.submit(self._fill, [self._rows.get(row) for row in rows])

    def _fill(self, rows: "Sequence[_Row | None]") -> Tensor:
        shape = len(rows), self._num_words
        bitmask = torch.full(shape, -1, dtype=torch.int32, pin_memory=self._pins)
        for i, row in enumerate(rows):
            if row is not None:
                row.fill(bitmask, i)
        return bitmask

    def accept(self, rows: Sequence[int], tokens: ToHost) -> dict[int, str]:
        """A step brings these rows these tokens, both [N]; why some cannot go on, by their index.

        Of those the tokens mean nothing. The others' count when the next mask is computed, which
        waits for them if need be.
        """
        errors = {}
        for i in self.constrained(rows):
            place = self._rows[rows[i]]
            place.accept(tokens, i)
            if place.error is not None:
                errors[i] = f"structured_outputs: {place.error}"
        return errors

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()


class GrammarMask:
    """The matchers as a processor; on ranks other than the leader it does nothing."""

    def __init__(
        self, matchers: GrammarMatchers, rank: int, device: torch.device, ops: Ops
    ) -> None:
        self._matchers = matchers
        self._leads = rank == 0
        self._device = device
        self._ops = ops
        self._mask: Future[Tensor] | None = None  # of the step that has begun

    def enter(self, new: NewRow) -> None:
        self._matchers.enter(new)

    def applies_to(self, rows: Sequence[int], positions: Sequence[int]) -> list[int]:
        return self._matchers.constrained(rows)

    def prepare(self, at: LogitsRows) -> None:
        self._mask = None
        if self._leads and self._matchers.constrained(at.rows):
            self._mask = self._matchers.start(at.rows)

    def process(self, logits: Tensor, at: LogitsRows) -> None:
        if self._mask is not None:
            mask = self._mask.result()
            self._ops.sampling.apply_bitmask(logits, mask.to(self._device, non_blocking=True))
