"""POST /tokenize and /detokenize, and GET /tokenizer_info, as vLLM has them."""

from collections.abc import Callable
from typing import Annotated, Any, ParamSpec

from fastapi import APIRouter, Response
from pydantic import Field, model_validator
from pydantic_core import to_json

from deployments.api.admission import check_model, max_counted_tokens, prompt_error
from deployments.api.bodies import BodyRoute
from deployments.api.errors import ApiError
from deployments.api.schema import answers
from deployments.api.schema.answers import documented
from deployments.api.schema.protocol import ModelRequest, NotTooMany, TemplateVariables
from deployments.front.front import Front
from deployments.off_loop import off_loop
from engine.sampling_params import TokenId
from engine.text.messages import Message, Tool

P = ParamSpec("P")


class TokenizeRequest(ModelRequest):
    prompt: str | None = None
    messages: Annotated[list[Message] | None, NotTooMany] = Field(None, min_length=1)
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
    router = APIRouter(route_class=BodyRoute)

    @router.post("/tokenize", response_model=None, responses=documented(answers.Tokens))
    async def tokenize(request: TokenizeRequest) -> Response:
        """The tokens of a text, or of a conversation as the model's template has it."""
        check_model(front, request)
        try:
            tokens = await _encode(front, request)
        except ValueError as error:
            field = "prompt" if request.messages is None else "messages"
            raise prompt_error(error, field) from error
        return await _answer(len(tokens), _tokens, front, tokens, request.return_token_strs)

    @router.post("/detokenize", response_model=None, responses=documented(answers.Text))
    async def detokenize(request: DetokenizeRequest) -> Response:
        """The text of tokens, with special tokens by their names."""
        check_model(front, request)
        if not front.tokenizer.knows_text:
            raise ApiError(
                400, "tokens: this checkpoint has no tokenizer: they have no text", "tokens"
            )
        size = front.tokenizer.fast.get_vocab_size()
        highest = max(request.tokens, default=0)
        if highest >= size:
            message = f"tokens: {highest} is outside the vocabulary (0 to {size - 1})"
            raise ApiError(400, message, "tokens")
        text = await front.decode(request.tokens, skip_special_tokens=False)
        return await _answer(len(text), dict, prompt=text)

    @router.get("/tokenizer_info", response_model=None, responses=documented(answers.TokenizerInfo))
    async def tokenizer_info() -> dict[str, Any]:
        """The checkpoint's tokenizer_config.json, with its class and chat template."""
        if not front.tokenizer.knows_text:
            raise ApiError(404, "this checkpoint has no tokenizer")
        return front.tokenizer.info

    return router


async def _encode(front: Front, request: TokenizeRequest) -> list[int]:
    max_len = max_counted_tokens(front)
    if request.prompt is not None:
        special = request.add_special_tokens is not False
        return await front.encode(request.prompt, special, max_len)
    return await front.encode_chat(
        [message.for_template() for message in request.messages or []],
        max_len=max_len,
        tools=[tool.for_template() for tool in request.tools],
        add_generation_prompt=request.add_generation_prompt,
        **request.chat_template_kwargs,
    )


def _tokens(front: Front, tokens: list[int], with_strings: bool) -> dict[str, Any]:
    limits = front.client.limits
    pieces = map(front.tokenizer.token_bytes, tokens)
    return {
        "count": len(tokens),
        "max_model_len": limits.max_len if limits else None,
        "tokens": tokens,
        "token_strs": [p.decode(errors="replace") for p in pieces] if with_strings else None,
    }


async def _answer(
    size: int, make: Callable[P, dict[str, Any]], *args: P.args, **kwargs: P.kwargs
) -> Response:
    """An answer that may be long: made and written off the event loop."""

    def body() -> bytes:
        return to_json(make(*args, **kwargs))

    return Response(await off_loop(size, body), media_type="application/json")
