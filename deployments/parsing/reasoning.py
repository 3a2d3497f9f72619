"""The ways in which models mark off what they think from what they answer."""

from dataclasses import dataclass
from typing import Literal

ReasoningParserName = Literal[
    "auto", "none", "think", "mistral", "command", "gemma", "harmony", "hunyuan", "seed"
]


@dataclass(frozen=True)
class ReasoningFormat:
    """Thoughts stand at the beginning, between two marks."""

    name: str
    open: str
    close: str
    trace: str  # what in a chat template gives the format away
    tokens: tuple[str, ...] = ()  # what of the marks may be special tokens, if it is not all of it
    has_channels: bool = False  # all of an output has marks, which are harmony's
    answer: tuple[str, str] | None = None  # marks around what is answered, if it has some too

    @property
    def marks(self) -> tuple[str, ...]:
        """What may be special tokens of a tokenizer."""
        return self.tokens or (self.open, self.close, *(self.answer or ()))

    def is_open(self, prompt_end: str) -> bool:
        """Whether the template has begun a block of thoughts for the model."""
        return not self.has_channels and prompt_end.rstrip().endswith(self.open.rstrip())

    def skip(self, prompt_end: str) -> str:
        """What a prompt goes on with so that the answer begins at once."""
        if self.has_channels:
            return FINAL
        return f"\n{self.close}\n\n" if self.is_open(prompt_end) else ""


FINAL = "<|channel|>final<|message|>"  # where harmony's answer begins
THINK = ReasoningFormat("think", "<think>", "</think>", "</think>")
HARMONY = ReasoningFormat(
    "harmony",
    "<|channel|>analysis<|message|>",
    "<|end|>",
    "<|channel|>analysis",
    (
        *("<|channel|>", "<|message|>", "<|end|>"),
        *("<|start|>", "<|constrain|>", "<|call|>", "<|return|>"),
    ),
    has_channels=True,
)
# In the order in which templates are searched for their traces.
REASONING_FORMATS: dict[str, ReasoningFormat] = {
    format.name: format
    for format in (
        HARMONY,
        ReasoningFormat("mistral", "[THINK]", "[/THINK]", "[THINK]"),
        ReasoningFormat(
            *("command", "<|START_THINKING|>", "<|END_THINKING|>", "<|END_THINKING|>"),
            answer=("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
        ),
        ReasoningFormat(
            *("gemma", "<|channel>thought\n", "<channel|>", "<|channel>"),
            ("<|channel>", "<channel|>"),
        ),
        ReasoningFormat("seed", "<seed:think>", "</seed:think>", "</seed:think>"),
        ReasoningFormat(
            *("hunyuan", "<think>", "</think>", "<answer>"), answer=("<answer>", "</answer>")
        ),
        THINK,
    )
}


def reasoning_format(
    name: ReasoningParserName, chat_template: str | None
) -> ReasoningFormat | None:
    """The format by name; with "auto", the one that the template knows, if it knows one."""
    if name != "auto":
        return REASONING_FORMATS.get(name)
    for candidate in REASONING_FORMATS.values():
        if chat_template is not None and candidate.trace in chat_template:
            return candidate
    return None
