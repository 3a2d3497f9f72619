"""POST /classify: texts or conversations by a classifier's labels, as vLLM has it."""

import secrets
import time
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import Field, model_validator

from deployments.api.admission import check_model, prompt_error
from deployments.api.bodies import BodyRoute
from deployments.api.errors import ApiError
from deployments.api.routes.embeddings import PooledRequest, encode, pool
from deployments.api.schema import answers
from deployments.api.schema.answers import documented
from deployments.api.schema.completion_request import Prompt, listed
from deployments.api.schema.protocol import NotTooMany, TemplateVariables
from deployments.front.front import Front
from engine.sampling_params import Pooling
from engine.text.messages import Message


class ClassificationRequest(PooledRequest):
    input: Prompt | None = None
    messages: Annotated[list[Message] | None, NotTooMany] = Field(
        None, min_length=1, description="Instead: one conversation, as reward models judge it."
    )
    add_generation_prompt: bool = False
    chat_template_kwargs: TemplateVariables = Field(default_factory=dict)
    use_activation: bool = Field(
        True, description="Probabilities, as the checkpoint's config means them; false: logits."
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> "ClassificationRequest":
        if (self.input is None) == (self.messages is None):
            raise ValueError("input: give either input or messages")
        of_chats = {"add_generation_prompt", "chat_template_kwargs"} & self.model_fields_set
        if self.messages is None and of_chats:
            raise ValueError(f"{min(of_chats)}: only for messages")
        return self


def routes(front: Front) -> APIRouter:
    router = APIRouter(route_class=BodyRoute)

    @router.post("/classify", response_model=None, responses=documented(answers.Classifications))
    async def classify(request: ClassificationRequest) -> Response:
        check_model(front, request)
        classifier = front.classifier
        if classifier is None:
            message = f"{front.model_name!r} is no classifier: its head writes words"
            raise ApiError(400, message, "model", "unsupported_value")
        prompts, fields = await _prompts(front, request)
        logits, usage = await pool(front, prompts, request, fields, Pooling(kind="labels"))
        data: list[dict[str, Any]] = []
        for index, own in enumerate(logits):
            values = own.tolist()
            probs = classifier.probabilities(values) if request.use_activation else values
            label = classifier.labels[max(range(len(values)), key=values.__getitem__)]
            data.append({"index": index, "label": label, "probs": probs, "num_classes": len(probs)})
        head = {"id": f"classify-{secrets.token_hex(12)}", "created": int(time.time())}
        head |= {"object": "list", "model": front.model_name, "usage": usage}
        return JSONResponse(head | {"data": data})

    return router


async def _prompts(
    front: Front, request: ClassificationRequest
) -> tuple[list[list[int]], list[str]]:
    """(in tokens, the field that each comes from)"""
    if request.messages is None:
        texts = listed(request.input or "")
        fields = ["input"] * len(texts)
        return await encode(front, texts, request, fields), fields
    messages = [message.for_template() for message in request.messages]
    variables = {"add_generation_prompt": request.add_generation_prompt}
    try:
        prompt = await front.encode_chat(messages, **variables, **request.chat_template_kwargs)
    except ValueError as error:
        raise prompt_error(error, "messages") from error
    return [prompt], ["messages"]
