"""<think>…</think>, as Qwen, DeepSeek and many others write before they answer."""

from deployments.parsing.pieces import Content, Piece, Reasoning, may_become, split_at

OPEN, CLOSE = "<think>", "</think>"


class ReasoningSplitter:
    """Splits a text that begins with a think block, or that goes on with one the prompt opened.

    Line breaks around the reasoning are dropped. A block further on in the text is not reasoning:
    it stays in the content.
    """

    def __init__(self, is_open: bool) -> None:
        self._inside = is_open
        self._after = False
        self._held = ""
        self._at_start = True  # of the reasoning, or of what follows it

    def push(self, text: str, last: bool) -> list[Piece]:
        """The pieces that this text makes certain; all that is left if it is the `last`."""
        if self._after and not self._at_start:  # what most of the calls find
            return [Content(text)] if text else []
        self._held += text
        pieces: list[Piece] = []
        if not self._inside and not self._after:
            self._begin(last)
        if self._inside:
            pieces += self._reason(last)
        if self._after:
            pieces += self._answer()
        return pieces

    def _begin(self, last: bool) -> None:
        """Is there a block at all?"""
        stripped = self._held.lstrip()
        if stripped.startswith(OPEN):
            self._inside, self._held = True, stripped[len(OPEN) :]
        elif last or not may_become(stripped, OPEN):
            self._after, self._at_start = True, False

    def _reason(self, last: bool) -> list[Piece]:
        if self._at_start:
            self._held = self._held.lstrip("\n")
        text, rest = split_at(self._held, CLOSE)
        if rest is not None:
            self._inside, self._after, self._at_start = False, True, True
            self._held = rest
            text = text.rstrip("\n")
        else:
            if last:
                text = self._held
            text = text.rstrip("\n")
            self._held = "" if last else self._held[len(text) :]
            self._at_start = self._at_start and not text
        return [Reasoning(text)] if text else []

    def _answer(self) -> list[Piece]:
        text = self._held.lstrip("\n") if self._at_start else self._held
        self._held = ""
        self._at_start = self._at_start and not text
        return [Content(text)] if text else []
