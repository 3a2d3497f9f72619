"""What one output holds: reasoning, then content and tool calls."""

import re
from dataclasses import replace

from deployments.parsing.formats.harmony import ChannelReader
from deployments.parsing.functions import ANY, Functions
from deployments.parsing.pieces import CallStart, Content, Piece, Reasoning, joined
from deployments.parsing.reasoning import THINK, ReasoningFormat
from deployments.parsing.source import BLANKS, CHARACTER, NEWLINES, SPACE, Reading, Source
from deployments.parsing.tool_format import ToolFormat, beginning_of

_SEPARATORS = re.compile(r"[,;]+")  # of calls
_LEFTOVERS = re.compile(r"[}\]]+")  # of a call with a bracket too many, or of an array of them
_ANYTHING = re.compile(r".+", re.DOTALL)


class OutputParser:
    """Reads one output. What it finds depends on the text alone, not on how that is cut.

    A think block stands at the beginning; line breaks around the reasoning are dropped. So is white
    space before a call, and behind the last one. All that is no call is content as it was written.
    A call in a think block is a thought, but if the output ends with it, the block was meant to end
    before it.
    """

    def __init__(
        self,
        opens_thinking: bool | None,
        tools: ToolFormat | None,
        single_call: bool = False,
        forced_prefix: str | None = None,
        functions: Functions = ANY,
        reasoning: ReasoningFormat = THINK,
        num_called: int = 0,
    ) -> None:
        """
        Args:
            opens_thinking: whether the prompt has begun a think block; None if none is looked for.
            tools: None if there are no calls to look for.
            single_call: nothing is read behind the first call.
            forced_prefix: the prompt's end, if it begins a call, without which there is nothing.
            functions: those that may be called: what calls another is content.
            reasoning: how thoughts are marked.
            num_called: calls that the conversation has had before.
        """
        self._functions = functions
        self._reasoning = reasoning
        self._tools = tools
        self._single_call = single_call
        self._is_forced = forced_prefix is not None
        self._num_called = num_called
        self._source = Source()
        self._pieces: list[Piece] = []
        self._reading = self._read(opens_thinking)
        self.num_calls = 0
        self.is_over = False  # before the text is: the single call is complete
        if forced_prefix:
            self.push(forced_prefix, last=False)

    @property
    def num_waiting(self) -> int:
        """Characters that have come and say nothing without those to come."""
        return self._source.num_waiting

    def push(self, text: str, last: bool) -> list[Piece]:
        """The pieces that this text makes certain; all that is left if it is the `last`."""
        if not self.is_over:
            self._source.add(text, last)
            next(self._reading, None)
        pieces = [
            self._with_id(piece) if isinstance(piece, CallStart) else piece
            for piece in joined(self._pieces)
        ]
        self._pieces.clear()
        if self._is_forced:
            pieces = [piece for piece in pieces if not isinstance(piece, Content)]
        return pieces

    def _with_id(self, piece: CallStart) -> CallStart:
        assert self._tools is not None
        return replace(piece, id=self._tools.new_id(piece.name, self._num_called + piece.index))

    def _read(self, opens_thinking: bool | None) -> Reading[None]:
        is_tools = self._tools is not None and self._tools.has_channels
        if is_tools or (opens_thinking is not None and self._reasoning.has_channels):
            functions = self._functions if self._tools is not None else None
            yield from ChannelReader(self._source, self._pieces, functions, self._next_call).read()
            return
        if opens_thinking is not None:
            yield from self._read_thoughts(opens_thinking)
        end = (yield from self._open_answer()) if opens_thinking is not None else ""
        if self._tools is not None or end:
            yield from self._read_answer(self._tools, end)
            return
        while (yield from self._source.more()):
            self._source.take(_ANYTHING)
            self._say(Content)
        self._say(Content)

    def _open_answer(self) -> Reading[str]:
        """Takes the mark before an answer; returns the one to come behind it, if it has any."""
        if self._reasoning.answer is None:
            return ""
        opener, closer = self._reasoning.answer
        yield from self._source.all_of(SPACE)
        if not (yield from self._source.skip(opener)):
            return ""
        yield from self._source.all_of(NEWLINES)
        self._source.taken()
        return closer

    def _next_call(self, name: str) -> CallStart | None:
        """The start of a call in a channel; None if it is one too many."""
        if self._single_call and self.num_calls:
            self.is_over = True
            return None
        self.num_calls += 1
        return CallStart(self.num_calls - 1, name)

    def _say(self, kind: type[Content] | type[Reasoning], but: str = "") -> None:
        """What has been taken is text of this kind, but for these characters at its end."""
        self._pieces.append(kind(self._source.taken(but)))

    def _read_answer(self, tools: ToolFormat | None, end: str) -> Reading[None]:
        """Content and calls, to the end.

        Args:
            end: a mark that is not said where the text ends with it, or "".
        """
        source = self._source
        firsts, beginnings = end[:1], [beginning_of(end)] if end else []
        if tools is not None:
            firsts, beginnings = firsts + tools.first_characters, [*beginnings, tools.beginning]
        text = _text_run(BLANKS, firsts, "|".join(beginnings))
        follows = False  # the last thing was a call
        while (yield from source.more()):
            before = source.num_taken
            if not follows and source.take(text):
                self._say(Content)
            elif source.take(SPACE) or (follows and source.take(_SEPARATORS)):
                pass  # said with what follows, if that is content
            elif end and (yield from self._ends(end)):
                return
            elif tools and follows and (yield from self._leaves_over(tools)):
                source.taken()
            elif tools and (
                yield from self._read_call(tools, self._pieces, self.num_calls, follows)
            ):
                source.taken()
                self.num_calls += 1
                follows = True
                if self._single_call:
                    self.is_over = True
                    return
            else:
                if source.num_taken == before:
                    source.take(CHARACTER)
                self._say(Content, BLANKS)
                follows = False
        if not follows:
            self._say(Content)
        source.taken()

    def _ends(self, mark: str) -> Reading[bool]:
        """Whether the text goes on with this mark, and ends with it."""
        if not (yield from self._source.skip(mark)):
            return False
        yield from self._source.all_of(SPACE)
        if (yield from self._source.more()):
            return False
        self._source.taken()
        return True

    def _leaves_over(self, tools: ToolFormat) -> Reading[bool]:
        """Takes what a call has too much of, or its end."""
        return bool(self._source.take(_LEFTOVERS)) or (yield from self._closes(tools))

    def _read_call(
        self, tools: ToolFormat, pieces: list[Piece], index: int, follows: bool
    ) -> Reading[bool]:
        return (yield from tools.read_call(self._source, pieces, self._functions, index, follows))

    def _closes(self, tools: ToolFormat) -> Reading[bool]:
        return (yield from self._source.skip(*tools.closers))

    def _read_thoughts(self, is_open: bool) -> Reading[None]:
        """The think block, if the text begins with one or, where it is open, goes on with it."""
        source, tools, close = self._source, self._tools, self._reasoning.close
        yield from source.all_of(SPACE)
        if not (yield from source.skip(self._reasoning.open)) and not is_open:
            return
        firsts, beginning = close[0], beginning_of(close)
        if tools is not None:
            firsts, beginning = firsts + tools.first_characters, f"{beginning}|{tools.beginning}"
        text = _text_run("\n", firsts, beginning)
        yield from source.all_of(NEWLINES)
        source.taken()
        while (yield from source.more()):
            before = source.num_taken
            if source.take(text):
                self._say(Reasoning)
            elif source.take(NEWLINES):
                pass  # said with what follows, if that is a thought
            elif (yield from source.skip(close)):
                yield from source.all_of(NEWLINES)
                break
            elif tools and (yield from self._read_last_calls(tools)):
                break
            else:
                if source.num_taken == before:
                    source.take(CHARACTER)
                self._say(Reasoning, "\n")
        source.taken()

    def _read_last_calls(self, tools: ToolFormat) -> Reading[bool]:
        """Calls in a think block, meant if the output ends with them; whether the block is over."""
        source = self._source
        calls: list[Piece] = []
        count = 0
        others: list[Piece] = [] if self._single_call else calls
        while (yield from self._read_call(tools, others if count else calls, count, count > 0)):
            count += 1
            while (yield from source.more()) and (
                source.take(SPACE)
                or source.take(_SEPARATORS)
                or source.take(_LEFTOVERS)
                or (yield from self._closes(tools))
            ):
                pass
        if count == 0:
            return False
        is_closed = yield from source.skip(self._reasoning.close)
        if is_closed:
            yield from source.all_of(NEWLINES)
        if not (yield from source.more()):
            self._pieces += calls
            self.num_calls = 1 if self._single_call else count
            return True
        if is_closed:
            thought = source.taken().rpartition(self._reasoning.close)[0]
            self._pieces.append(Reasoning(thought.rstrip("\n")))
        return is_closed


def _text_run(blanks: str, firsts: str, beginning: str) -> re.Pattern[str]:
    """Text up to where something else may begin, or blanks that may not be text.

    Args:
        firsts: the characters with which other things begin.
        beginning: a regular expression for how they do.
    """
    firsts = re.escape(firsts)
    text = rf"(?:[^{blanks}{firsts}]++|(?!{beginning})[{firsts}])++"
    return re.compile(rf"(?:[{blanks}]*+{text})++")
