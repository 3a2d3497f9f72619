"""POST /v1/responses, and what is kept of them for those that go on from there."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import TypeAdapter

from deployments.api.bodies import BodyRoute
from deployments.api.chat import AnswerDelta, Chat, as_chat
from deployments.api.errors import ApiError, report
from deployments.api.response_store import ResponseStore, StoredResponse
from deployments.api.schema import answers
from deployments.api.schema.answers import documented
from deployments.api.schema.responses.items import InputItem, to_messages
from deployments.api.schema.responses.output import ResponseOutput
from deployments.api.schema.responses.request import ENCRYPTED, OTHER_NAMES, ResponseRequest
from deployments.api.schema.tools import left_out_header
from deployments.api.scope import scope
from deployments.api.streaming import EventStream, named_event, once_accepted
from deployments.front.front import Front
from deployments.front.generation import TextDelta
from engine.strict import shown
from engine.text.messages import Message

_ITEMS: TypeAdapter[list[InputItem]] = TypeAdapter(list[InputItem])


def routes(front: Front) -> APIRouter:
    router = APIRouter(route_class=BodyRoute)
    store = ResponseStore()

    @router.post(
        "/v1/responses",
        response_model=None,
        responses=documented(answers.Response, streams=True),
    )
    async def create_response(request: ResponseRequest) -> Response:
        before = request.previous_response_id
        history = _find(store, before, "previous_response_id").messages if before else []
        chat = await Chat.start(front, as_chat(lambda: request.to_chat(history), OTHER_NAMES))
        head = request.head(front.model_name, chat.params)
        output = ResponseOutput(head, request.toolbox, ENCRYPTED in request.include)
        events = _events(chat, output)
        if request.is_stored:
            events = _stored(events, output, store, [*history, *request.messages])
        headers = left_out_header(request.toolbox.left_out)
        if request.stream:
            events = await once_accepted(events, chat.params)
            return EventStream(events, lambda error: _failed(output, error), headers)
        async with aclosing(events):
            async for _ in events:
                pass
        return JSONResponse(output.response(), headers=headers)

    @router.get("/v1/responses/{response_id}", responses=documented(answers.Response))
    async def get_response(response_id: str, stream: bool = False) -> dict[str, Any]:
        """One that is still stored: the last some thousand of each replica are."""
        if stream:
            message = "stream: what is stored is told as a whole; leave it out"
            raise ApiError(400, message, "stream", "unsupported_value")
        return _find(store, response_id).body

    @router.delete("/v1/responses/{response_id}", responses=documented(answers.Deleted))
    async def delete_response(response_id: str) -> dict[str, Any]:
        _find(store, response_id)
        store.delete(scope().tenant, response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    return router


def _find(store: ResponseStore, response_id: str, param: str | None = None) -> StoredResponse:
    """Raises ApiError for one that is not there."""
    found = store.get(scope().tenant, response_id)
    if found is None:
        message = (
            f"the response {shown(response_id)} is not stored here: a replica keeps its last ones, "
            "in memory, unless they had store=false; send the whole conversation instead"
        )
        where = f"{param}: " if param else ""
        code = "previous_response_not_found" if param else None
        raise ApiError(400 if param else 404, where + message, param, code)
    return found


async def _stored(
    events: AsyncGenerator[str], output: ResponseOutput, store: ResponseStore, said: list[Message]
) -> AsyncGenerator[str]:
    """The same events; before the last one the response is stored, to be gone on from."""
    tenant = scope().tenant
    async with aclosing(events):
        async for event in events:
            if output.is_complete:
                body = output.response()
                answer = to_messages(_ITEMS.validate_python(body["output"]))
                store.put(tenant, body, said + answer)
            yield event


async def _events(chat: Chat, output: ResponseOutput) -> AsyncGenerator[str]:
    opening = list(map(named_event, output.begin()))
    step: AnswerDelta | None = None
    async with aclosing(chat.answers()) as answers:
        async for steps in answers:
            for _, step in steps:
                news = [named_event(e) for piece in step.pieces for e in output.add(piece)]
                if opening or news:
                    yield "".join(opening + news)
                    opening = []
    assert step is not None, "a stream has at least one delta"
    usage = await _usage(chat, output, step.delta)
    yield "".join(map(named_event, output.end(step.finish_reason, usage)))


def _failed(output: ResponseOutput, error: Exception | None) -> str:
    return "" if error is None else named_event(output.fail(report(error)))


async def _usage(chat: Chat, output: ResponseOutput, last: TextDelta) -> dict[str, Any]:
    num_thinking = await chat.count_tokens(output.reasoning)
    cached = last.num_cached_tokens
    details = {"cached_tokens": cached, "cache_write_tokens": len(chat.prompt) - cached}
    return {
        "input_tokens": len(chat.prompt),
        "input_tokens_details": details,
        "output_tokens": last.num_tokens,
        "output_tokens_details": {"reasoning_tokens": num_thinking},
        "total_tokens": len(chat.prompt) + last.num_tokens,
    }
