"""What chat and text completions share on the way in and out."""

import math
import secrets
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from deployments.api.errors import RETRY_AFTER_S, ApiError, validation_error
from deployments.api.schema.protocol import GenerationRequest, ModelRequest, ServedRequest
from deployments.api.scope import scope
from deployments.front.front import Front
from deployments.front.places import Places
from deployments.front.request_options import RequestOptions
from engine.errors import PromptTooLongError
from engine.sampling_params import SamplingParams
from engine.strict import explain

_MAX_COUNTED_TOKENS = 2**16


def check_model(front: Front, request: ModelRequest) -> None:
    if request.model is not None and request.model != front.model_name:
        raise ApiError.no_such_model(request.model, front.model_name)


async def sampling_params(front: Front, request: GenerationRequest) -> SamplingParams:
    """The request's, with a seed, and with words as the tokens that the engine knows.

    Raises ApiError for what it could never take.
    """
    current = scope()
    current.names = request.other_names() | current.names
    try:
        params = request.sampling_params(front.sampling_defaults)
        if params.seed is None:  # drawn here, for ids of events tell it
            params = params.model_copy(update={"seed": secrets.randbits(63)})
        return await front.in_tokens(params) if params.bad_words else params
    except ValidationError as error:
        raise validation_error(explain(error.errors())) from error
    except ValueError as error:
        raise ApiError(400, str(error), "bad_words") from error


def check_prompt(
    front: Front, prompt: list[int], params: SamplingParams, param: str, known: Sequence[int] = ()
) -> None:
    """400 at the door for what the engine could never serve.

    Args:
        known: tokens of the output that are there already.
    """
    try:
        front.check(prompt, params, known)
    except ValueError as error:
        raise prompt_error(error, param) from error


def prompt_error(error: ValueError, param: str) -> ApiError:
    """400 for what is said of a prompt, in the field `param`, or of the field that it names."""
    field = str(error).partition(":")[0]
    if field in SamplingParams.model_fields or field in ("tools", "continue_final_message"):
        return ApiError(400, str(error), field)
    is_too_long = isinstance(error, PromptTooLongError)
    return ApiError(400, str(error), param, "context_length_exceeded" if is_too_long else None)


def max_counted_tokens(front: Front) -> int:
    """Texts may be longer than the window, whoever cuts them must count first; not without end."""
    limits = front.client.limits
    return max(limits.max_len if limits else 0, _MAX_COUNTED_TOKENS)


def check_queue(front: Front, num_requests: int, num_tokens: int = 0) -> None:
    """429 when the queue has no room for so many more requests, or for their prompts' tokens.

    An empty queue takes what could be served at all: a limit on tokens never bars a long prompt.
    """
    limits, flow, client = scope().service, scope().flow, front.client
    most = limits.max_queued_requests
    if most is not None and not Places().has_room(flow, num_requests, most):
        raise ApiError(
            400,
            f"{num_requests} prompts or choices in one request are more than it may have in the "
            f"queue ({(most + 1) // 2}); send fewer",
        )
    for name, queue, more, limit in (
        ("requests", client.queue, num_requests, most),
        ("prompt tokens", client.queue_tokens, num_tokens, limits.max_queued_tokens),
    ):
        if limit is not None and queue.taken and not queue.has_room(flow, more, limit):
            raise ApiError(
                429,
                f"{queue.taken} {name} are waiting, of at most {limit}, and there is no room for "
                f"{more} more; try again later",
                code="queue_full",
                headers={"Retry-After": str(_queue_time_s(client.stats))},
            )


def _queue_time_s(stats: dict[str, Any]) -> int:
    """A guess of when there is room: the prompts that wait, at the engine's speed; 1 to 60 s."""
    if not stats:
        return RETRY_AFTER_S
    seconds = stats["uncomputed_tokens"] / max(stats["tokens_per_s"], 1.0)
    return min(max(math.ceil(seconds), 1), 60)


def request_options(front: Front, request: ServedRequest) -> RequestOptions:
    """How the server treats the request: its own wishes within the limits, and whose it is."""
    if request.priority != 0 and not front.has_priorities:
        raise ApiError(
            400,
            "priority: this server takes requests as they come; deploy it with "
            "scheduling_policy=priority",
            "priority",
            "unsupported_value",
        )
    current = scope()
    timeouts = [t for t in (request.timeout, current.service.request_timeout_s) if t is not None]
    return RequestOptions(
        stream=request.stream,
        cache_salt=request.cache_salt,
        cache_owner=current.cache_owner,
        priority=request.priority,
        flow=current.flow,
        weight=current.quota.weight,
        timeout_s=min(timeouts, default=None),
        records=current.records,
    )


def metrics(request: GenerationRequest, options: RequestOptions) -> dict[str, Any]:
    """How the request went, if it wants to know."""
    if not request.return_metrics:
        return {}
    is_one = len(options.records) == 1
    return {"metrics": options.records[0].metrics() if is_one else None}


def usage(num_prompt: int, num_output: int, num_cached: int) -> dict[str, Any]:
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }
