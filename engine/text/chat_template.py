"""Conversations as text: a checkpoint's chat templates, by transformers' own renderer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from engine.text.control_tokens import ControlTokens, strings, unused_character

# Tags that a model writes itself, and that templates look for in its messages.
_OWN_TAGS = {"<think>", "</think>", "<tool_call>", "</tool_call>"}
# What is no variable: the renderer and its callers take it themselves.
_TAKEN = frozenset(
    (
        *("self", "messages", "conversations", "tools", "documents", "chat_template", "max_len"),
        *("add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask"),
    )
)


def check_variables(variables: dict[str, Any]) -> dict[str, Any]:
    """The same; raises ValueError for what is not a template's own variable."""
    for name in variables:
        if name in _TAKEN or not name.isidentifier():
            raise ValueError(f"{name!r} is not a variable of the template that can be set here")
    return variables


class ChatTemplates:
    """The templates of a checkpoint, by name: "default", and "tool_use" where there are tools."""

    def __init__(
        self,
        sources: dict[str, str],
        config: dict[str, Any],
        named_tokens: dict[str, str],
        special_tokens: set[str],
        other_added_tokens: set[str],
    ) -> None:
        """
        Args:
            sources: see `read_templates`.
            config: see `engine.checkpoint.files.tokenizer_config`.
            named_tokens: by name, as templates know them.
            special_tokens, other_added_tokens: what a tokenizer finds in a text before all else.
        """
        self._sources = sources
        self._named_tokens = named_tokens
        # The tokens that give a conversation its structure, as transformers tells them.
        known = config.get("chat_control_tokens") or "\0".join(self._sources.values())
        written = {t for t in other_added_tokens if t in known and not t.isspace()}
        tokens = {token for token in special_tokens | written if len(token) > 1}
        self._tokens, self._tokens_in_answers = map(ControlTokens, (tokens, tokens - _OWN_TAGS))

    def source(self, with_tools: bool = False) -> str | None:
        """The template for conversations with tools or without."""
        default = self._sources.get("default")
        return self._sources.get("tool_use", default) if with_tools else default

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> tuple[str, str]:
        """The prompt, and a character that cuts it in pieces to be encoded each by itself.

        Control tokens are those that the template writes. In the arguments they are text: there
        the character stands within each. It is "" where there are none.
        Raises ValueError when there is no template or it refuses the messages.
        """
        source = self.source(bool(tools))
        if source is None:
            raise ValueError(
                "this model has no chat template; send a text prompt to completions instead"
            )
        if tools and "tools" not in source:
            raise ValueError("tools: the model's chat template has no place for them")
        if continue_final_message and add_generation_prompt:
            raise ValueError(
                "continue_final_message: set add_generation_prompt to false to continue a message"
            )
        options: dict[str, Any] = dict(
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        given = list(messages), tools or None, variables
        try:
            texts = "\0".join(strings(given))
            if not self._tokens.are_in(texts):
                return self._render(source, *given, **options), ""
            mark = unused_character(texts + source)
            messages = [self._cut(message, mark) for message in messages]
            others = self._tokens.cut(given[1:], mark)
            return self._render(source, messages, *others, **options), mark
        except (jinja2.TemplateError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"the chat template refused the messages: {error}") from error

    def _cut(self, message: dict[str, Any], mark: str) -> dict[str, Any]:
        is_answer = message.get("role") == "assistant"
        own = ("content", "reasoning_content") if is_answer else ()
        return {
            name: (self._tokens_in_answers if name in own else self._tokens).cut(value, mark)
            for name, value in message.items()
        }

    def _render(
        self, source: str, messages: Any, tools: Any, variables: dict[str, Any], **options: bool
    ) -> str:
        """Where a template takes no system message behind a user's, it is the user's.

        At the beginning it would change the prefix of a prompt that is in the cache already.
        """
        try:
            return self._render_as_given(source, messages, tools, variables, **options)
        except jinja2.TemplateError:
            roles = [message.get("role") for message in messages]
            late = [role == "system" and "user" in roles[:i] for i, role in enumerate(roles)]
            if not any(late):
                raise
        messages = [
            message | {"role": "user"} if is_late else message
            for message, is_late in zip(messages, late, strict=True)
        ]
        return self._render_as_given(source, messages, tools, variables, **options)

    def _render_as_given(
        self, source: str, messages: Any, tools: Any, variables: dict[str, Any], **options: bool
    ) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, _ = render_jinja_template(
            [messages],
            tools=tools,
            chat_template=source,
            **options,
            **(self._named_tokens | variables),
        )
        return str(rendered[0])


def read_templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """By name. Files come before what tokenizer_config.json has, as in transformers."""
    files = {path.stem: path for path in (directory / "additional_chat_templates").glob("*.jinja")}
    default = directory / "chat_template.jinja"
    if default.exists():
        files["default"] = default
    if files:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    template = config.get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}
    return {} if template is None else {"default": template}
