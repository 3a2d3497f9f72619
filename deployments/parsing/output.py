"""Everything that is found in one output: reasoning first, then content and tool calls."""

from deployments.parsing.formats import ToolParser
from deployments.parsing.pieces import CallStart, Content, Piece
from deployments.parsing.reasoning import ReasoningSplitter


class OutputParser:
    """Chains the parsers of one output."""

    def __init__(
        self,
        reasoning: ReasoningSplitter | None,
        tools: ToolParser | None,
        single_call: bool = False,
    ) -> None:
        self._reasoning = reasoning
        self._tools = tools
        self._single_call = single_call
        self.num_calls = 0

    @property
    def is_over(self) -> bool:
        """Whether all that may be said has been: one call, when no more are allowed."""
        return self._single_call and self._tools is not None and self._tools.num_ended > 0

    def push(self, text: str, last: bool) -> list[Piece]:
        """The pieces that this text makes certain; all that is left if it is the `last`."""
        pieces: list[Piece] = [Content(text)] if text else []
        if self._reasoning is not None:
            pieces = self._reasoning.push(text, last)
        if self._tools is None:
            return pieces
        thoughts = [piece for piece in pieces if not isinstance(piece, Content)]
        content = "".join(piece.text for piece in pieces if isinstance(piece, Content))
        found = self._tools.push(content, last)
        self.num_calls += sum(isinstance(piece, CallStart) for piece in found)
        if self._single_call and self.num_calls > 1:
            found = [p for p in found if isinstance(p, Content) or p.index == 0]  # type: ignore[union-attr]
            self.num_calls = 1
        return [*thoughts, *found]
