"""Which tokens the rows with a grammar may have next.

This lives beside the sampler, on the rank whose tokens count. Steps run one after another, so what
a row may have in step N + 1 follows from its token of step N although the scheduler, which planned
the step ahead, did not know that yet. The masks are computed while the model runs: a thread waits
for the tokens of step N, the device is busy with step N + 1 meanwhile.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from engine.device.transfer import ToHost
from engine.sampling.processor import LogitsRows
from engine.schedule.request import Request
from engine.schedule.step import NewRow, count_accepted
from kernels import Ops

# What a request may use of the processor's time for its grammar: an ambiguous one takes ever
# longer, the longer the text. Many times what honest ones need (about 0.1 ms per token).
_FREE_S = 0.5
_PER_TOKEN_S = 0.002


class _Row:
    """One request's place in its grammar."""

    def __init__(self, grammar: Any, token_ids: Sequence[int], num_prompt: int) -> None:
        """
        Args:
            grammar: an `xgrammar.CompiledGrammar`; None on other ranks, and when the request has
                gone before it ran.
            token_ids: prompt and output, as far as it has come.
        """
        self._grammar = grammar
        # What the matcher has not been told: tokens, some of which are still on their way.
        self._unmatched: list[int | _Brought] = [*token_ids[num_prompt:]]
        self._num_prompt = num_prompt
        # What must follow so many tokens of its text.
        self.forced: tuple[int, str] = 0, ""
        self.error: str | None = None
        self._matcher: Any = None  # made when the first mask is
        self._num_tokens = 0
        self._seconds = 0.0

    def accept(self, tokens: ToHost, index: int, drafts: Sequence[int]) -> None:
        """What is, or will be, in tokens [N] from this index on, as far as drafts come true."""
        if self._grammar is not None and self.error is None:
            self._unmatched.append(_Brought(tokens, index, drafts))

    def fill(self, bitmask: Tensor, index: int, drafts: Sequence[int]) -> None:
        """Allow what may come next in row `index` of bitmask; all, once there is nothing left.

        And in the rows after that what may follow the drafts, each of them.
        """
        self._follow(lambda: self._fill_all(bitmask, index, drafts))
        if self.error is not None:
            bitmask[index] = -1

    def look(self) -> None:
        """See what is forced now, while no step is about this row."""
        self._follow(self._look)

    def _follow(self, then: Callable[[], str | None]) -> None:
        """Go on by the tokens that have come, and do something there.

        What goes wrong with a grammar is its request's error, and nobody else's.
        """
        if self._grammar is None or self.error is not None:
            return
        start = time.thread_time()
        try:
            self.error = self._advance(start) or then()
        except Exception as error:
            self.error = f"its grammar cannot be followed: {error}"
        self._seconds += time.thread_time() - start

    def _fill_all(self, bitmask: Tensor, index: int, drafts: Sequence[int]) -> str | None:
        error = self._fill(bitmask, index)
        if error is None:
            self._look_on(bitmask, index, drafts)
        return error

    def _fill(self, bitmask: Tensor, index: int) -> str | None:
        if not self._matcher.is_terminated():
            self._matcher.fill_next_token_bitmask(bitmask, index)
            if not bitmask[index].any():
                return "the model's vocabulary has no token that could come next"
        return None

    def _look(self) -> None:
        num_tokens = self._num_prompt + self._num_tokens
        if self.forced[0] != num_tokens:
            text = ""
            with suppress(UnicodeDecodeError):  # in the middle of a character
                if not self._matcher.is_terminated():
                    text = self._matcher.find_jump_forward_string()
            self.forced = num_tokens, text

    def _look_on(self, bitmask: Tensor, index: int, drafts: Sequence[int]) -> None:
        """Go through the drafts and come back. After one that does not fit nothing matters."""
        self._look()
        matcher = self._matcher
        num_fit = 0
        for i, token in enumerate(drafts, 1):
            if matcher.is_terminated() or not matcher.accept_token(token):
                break
            num_fit += 1
            if self._fill(bitmask, index + i) is not None:
                bitmask[index + i] = -1  # its own error, if it comes to that
                break
        matcher.rollback(num_fit)

    def _advance(self, start: float) -> str | None:
        """Go on by the tokens that have come; what is wrong, if that cannot be."""
        if self._matcher is None:
            self._matcher = _new_matcher(self._grammar)
        tokens = [
            token
            for part in self._unmatched
            for token in ([part] if isinstance(part, int) else part.wait())
        ]
        self._unmatched.clear()
        for token in tokens:
            self._num_tokens += 1
            if not self._matcher.is_terminated() and not self._matcher.accept_token(token):
                return f"the text so far does not match: token {token} does not fit"
            spent = self._seconds + time.thread_time() - start
            if spent > _FREE_S + self._num_tokens * _PER_TOKEN_S:
                return "this grammar is too ambiguous to follow; make it simpler"
        return None


class _Brought(NamedTuple):
    """Tokens that a step brings: those after the drafts that come true, and one more."""

    tokens: ToHost
    first: int
    drafts: Sequence[int]

    def wait(self) -> list[int]:
        sampled = self.tokens.wait()[self.first : self.first + len(self.drafts) + 1].tolist()
        return sampled[: count_accepted(self.drafts, sampled) + 1]


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
            self._rows[new.row] = _Row(grammar, new.token_ids, new.num_prompt_tokens)

    def constrained(self, rows: Sequence[int]) -> list[int]:
        """Which of these rows have a grammar, by index."""
        if not self._rows or self._rows.keys().isdisjoint(rows):
            return []
        return [i for i, row in enumerate(rows) if row in self._rows]

    def start(self, at: LogitsRows) -> "Future[Tensor]":
        """Compute, beside the caller, the bitmask [N, ceil(V / 32)] int32 of these rows.

        Those without a grammar may have any token.
        """
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "grammar-matcher")
        places = [(i, self._rows[row], drafts) for i, row, drafts in self._own(at)]
        return self._thread.submit(self._fill, len(at.rows), places)

    def _own(self, at: LogitsRows) -> list[tuple[int, int, Sequence[int]]]:
        """(index of its first position, row, drafts) of each row with a grammar."""
        rows = at.rows
        firsts = [i for i in self.constrained(rows) if i == 0 or rows[i] != rows[i - 1]]
        return [(i, rows[i], at.drafts.get(rows[i], ())) for i in firsts]

    def _fill(self, count: int, places: list[tuple[int, _Row, Sequence[int]]]) -> Tensor:
        shape = count, self._num_words
        bitmask = torch.full(shape, -1, dtype=torch.int32, pin_memory=self._pins)
        for i, row, drafts in places:
            row.fill(bitmask, i, drafts)
        return bitmask

    def forced(self, row: int, is_settled: bool) -> tuple[int, str]:
        """(number of tokens, what the text must go on with after so many); "" where it is free.

        Args:
            is_settled: no step in flight is about the row, so that it can be looked at now.
        """
        place = self._rows.get(row)
        if place is None:
            return 0, ""
        if is_settled:
            place.look()
        return place.forced

    def accept(self, at: LogitsRows, tokens: ToHost) -> dict[int, str]:
        """A step brings these rows these tokens [N]; why some cannot go on, by their index.

        Of those the tokens mean nothing. The others' count when the next mask is computed, which
        waits for them if need be.
        """
        errors = {}
        for i, row, drafts in self._own(at):
            place = self._rows[row]
            place.accept(tokens, i, drafts)
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
            self._mask = self._matchers.start(at)

    def process(self, logits: Tensor, at: LogitsRows) -> None:
        if self._mask is not None:
            mask = self._mask.result()
            self._ops.sampling.apply_bitmask(logits, mask.to(self._device, non_blocking=True))
