"""What goes wrong in more than one room."""


class PromptTooLongError(ValueError):
    """More tokens than there is room for."""
