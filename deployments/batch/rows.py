"""One row: a request of the OpenAI API in, its answer or its error out."""

import random
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from deployments.api import scope
from deployments.api.errors import ApiError, report, validation_error
from deployments.api.routes.chat import complete_chat
from deployments.api.routes.completions import complete_text
from deployments.api.schema.completion_request import CompletionRequest
from deployments.api.schema.protocol import ChatCompletionRequest
from deployments.api.schema.structured import FormFields
from deployments.api.scope import RequestScope
from deployments.front.engine_client import EngineUnavailableError
from deployments.front.front import Front
from engine.strict import explain

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@dataclass(frozen=True)
class Row:
    """A request as the input has it, or what is wrong with it."""

    url: str = COMPLETIONS
    body: dict[str, Any] = field(default_factory=dict)
    custom_id: str | None = None
    error: ApiError | None = None


@dataclass(frozen=True)
class Answer:
    """What the server would have answered: a completion, or {"error": …}."""

    status: int
    body: dict[str, Any]

    @property
    def error(self) -> dict[str, Any] | None:
        return self.body.get("error")

    @property
    def usage(self) -> dict[str, Any]:
        return self.body.get("usage", {})


async def answer(
    front: Front,
    row: Row,
    defaults: dict[str, Any],
    seed: int,
    tenant: str = "",
    cache_owner: str = "",
) -> Answer:
    """Never fails because of the row; raises EngineUnavailableError when there is no engine.

    Args:
        defaults: sampling parameters for what the row leaves open.
        seed: of its random numbers, if the row has none.
        tenant, cache_owner: see `RequestScope`.
    """
    own = RequestScope(request_id=row.custom_id or "", tenant=tenant, cache_owner=cache_owner)
    scope.enter(own)
    try:
        if row.error is not None:
            raise row.error
        body = row.body | _left_open(row, defaults)
        return Answer(200, await _complete(front, row.url, body, seed))
    except EngineUnavailableError:
        raise
    except ValidationError as error:
        return Answer(400, validation_error(explain(error.errors(), row.body)).body())
    except Exception as error:
        told = report(error)
        return Answer(told.status, told.body())
    finally:
        front.client.metrics.count_key(tenant, own.records)


def _left_open(row: Row, defaults: dict[str, Any]) -> dict[str, Any]:
    """Those of the defaults that the row does not set, in the words of its API."""
    given = {name for name, value in row.body.items() if value is not None}
    if given.intersection(FormFields.model_fields):
        given.add("structured_outputs")
    unset = {name: value for name, value in defaults.items() if name not in given}
    if row.url == CHAT and "logprobs" in unset:
        if "top_logprobs" not in given:
            unset["top_logprobs"] = unset["logprobs"]
        unset["logprobs"] = True
    return unset


async def _complete(front: Front, url: str, body: dict[str, Any], seed: int) -> dict[str, Any]:
    if body.get("stream"):
        raise ApiError(400, "stream: a batch has no streams; leave it out", "stream")
    if body.get("seed") is None:
        body = body | {"seed": seed}
    if url == CHAT:
        whole = await complete_chat(front, ChatCompletionRequest.model_validate(body))
    else:
        whole = await complete_text(front, CompletionRequest.model_validate(body))
    return await whole.content()


def row_seed(seed: int, index: int) -> int:
    """A row's own seed, the same in every run, whichever replica takes the row."""
    return random.Random(f"{seed}/{index}").getrandbits(63)
