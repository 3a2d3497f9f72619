"""What goes wrong in more than one room."""


class PromptTooLongError(ValueError):
    """More tokens than there is room for: in words that OpenAI's and Anthropic's clients know."""

    def __init__(self, max_len: int, what: str) -> None:
        super().__init__(
            f"This model's maximum context length is {max_len} tokens. However, {what}: prompt is "
            "too long"
        )
