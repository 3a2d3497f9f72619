"""POST /tokenize and /detokenize, as vLLM has them."""

from typing import Any

from fastapi import APIRouter
from pydantic import Field, model_validator

from deployments.api.admission import check_messages, check_model, prompt_error
from deployments.api.errors import ApiError
from deployments.api.schema import answers
from deployments.api.schema.answers import documented
from deployments.api.schema.protocol import ModelRequest, TemplateVariables
from deployments.front.front import Front
from engine.sampling_params import TokenId
from engine.text.messages import Message, Tool


class TokenizeRequest(ModelRequest):
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = Field(
        None, description="Default: true for a prompt; templates write their own."
    )
    return_token_strs: bool = False
    add_generation_prompt: bool = True
    tools: list[Tool] = Field(default_factory=list, max_length=128)
    chat_template_kwargs: TemplateVariables = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_of_two(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: give either prompt or messages")
        if self.messages is not None and self.add_special_tokens is not None:
            raise ValueError("add_special_tokens: only for a prompt; templates write their own")
        of_chats = {
            "tools",
            "chat_template_kwargs",
            "add_generation_prompt",
        } & self.model_fields_set
        if self.messages is None and of_chats:
            raise ValueError(f"{min(of_chats)}: only for messages")
        return self


class DetokenizeRequest(ModelRequest):
    tokens: list[TokenId] = Field(max_length=1_000_000)


def routes(front: Front) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize", responses=documented(answers.Tokens))
    async def tokenize(request: TokenizeRequest) -> dict[str, Any]:
        """The tokens of a text, or of a conversation as the model's template has it."""
        check_model(front, request)
        if request.prompt is not None:
            tokens = await front.encode(request.prompt, request.add_special_tokens is not False)
        else:
            tokens = await _encode_chat(front, request)
        strings = None
        if request.return_token_strs:
            pieces = map(front.tokenizer.token_bytes, tokens)
            strings = [piece.decode(errors="replace") for piece in pieces]
        limits = front.client.limits
        return {
            "count": len(tokens),
            "max_model_len": limits.max_len if limits else None,
            "tokens": tokens,
            "token_strs": strings,
        }

    @router.post("/detokenize", responses=documented(answers.Text))
    async def detokenize(request: DetokenizeRequest) -> dict[str, Any]:
        """The text of tokens, with special tokens by their names."""
        check_model(front, request)
        size = front.tokenizer.fast.get_vocab_size()
        for token in request.tokens:
            if token >= size:
                message = f"tokens: {token} is outside the vocabulary (0 to {size - 1})"
                raise ApiError(400, message, "tokens")
        return {"prompt": front.tokenizer.decode(request.tokens, skip_special_tokens=False)}

    return router


async def _encode_chat(front: Front, request: TokenizeRequest) -> list[int]:
    messages = request.messages or []
    check_messages(messages)
    try:
        return await front.encode_chat(
            [message.for_template() for message in messages],
            tools=[tool.for_template() for tool in request.tools],
            add_generation_prompt=request.add_generation_prompt,
            **request.chat_template_kwargs,
        )
    except ValueError as error:
        raise prompt_error(error, "messages") from error
