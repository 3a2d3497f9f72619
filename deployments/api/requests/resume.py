"""Streams that go on where others broke: the same text, from any replica.

Every event of a stream of one choice may end with an id, SEED.POSITION: of what follows, seed and
position decide alone. Who sends the request again with the last id gets what comes after it.
"""

from dataclasses import replace
from typing import Annotated

from pydantic import Field, ValidationError, model_validator

from deployments.api.errors import ApiError
from deployments.api.scope import scope
from deployments.front.front import Front
from deployments.front.request_options import RequestOptions
from engine.sampling_params import MAX_SEED, SamplingParams, TokenId
from engine.strict import shown
from engine.text.request_model import RequestModel

HEADER = "last-event-id"


class Resume(RequestModel):
    """What the client has: tokens or text, which are computed as a prompt is, or only their number.

    By number they are made again, which takes as long as it did, and are not sent.
    """

    seed: int = Field(ge=-MAX_SEED - 1, le=MAX_SEED)
    position: int | None = Field(None, ge=0, lt=2**31, description="Output tokens so far.")
    token_ids: list[TokenId] | None = Field(None, description="Those tokens.")
    text: str | None = Field(
        None, description="Their text: exact if its tokens are those that the model would write."
    )

    @model_validator(mode="after")
    def _one_of_three(self) -> "Resume":
        if sum(what is not None for what in (self.position, self.token_ids, self.text)) != 1:
            raise ValueError("give one of position, token_ids and text")
        return self


WhereToGoOn = Annotated[
    Resume | None, Field(description="Of a stream that broke. Events of streams have ids.")
]


def event_id(params: SamplingParams, position: int) -> str:
    """To be put before the last event of what a step brings."""
    return f"id: {params.seed}.{position}\n"


def given_resume(resume: Resume | None) -> Resume | None:
    """The request's own, or by the header that browsers send."""
    last = scope().headers.get(HEADER)
    if resume is not None or last is None:
        return resume
    seed, _, position = last.partition(".")
    try:
        return Resume.model_validate({"seed": seed, "position": position})
    except ValidationError as error:
        raise ApiError(
            400, f"{HEADER} should be SEED.POSITION, as ids of events are (got {shown(last)})"
        ) from error


async def go_on(
    resume: Resume | None,
    front: Front,
    params: SamplingParams,
    options: RequestOptions,
    num_prompts: int = 1,
) -> tuple[SamplingParams, RequestOptions]:
    """How the request is gone on with; raises ApiError where it cannot be."""
    if resume is None:
        return params, options
    if params.n * num_prompts != 1 or not options.stream:
        raise _fault("only a stream of one choice can be gone on with (stream=true, n=1)")
    if params.logprobs is not None and resume.position is None:
        raise _fault("with logprobs, give the position, not the tokens or their text")
    tokens = resume.token_ids or []
    if resume.text is not None:
        tokens = await front.encode(resume.text, add_special_tokens=False)
    if params.max_tokens is not None and len(tokens) > params.max_tokens:
        raise _fault(f"these {len(tokens)} tokens are more than max_tokens allows")
    position = resume.position if resume.position is not None else len(tokens)
    return (
        params.model_copy(update={"seed": resume.seed}),
        replace(options, known_tokens=tuple(tokens), position=position),
    )


def _fault(message: str) -> ApiError:
    return ApiError(400, f"resume: {message}", "resume")
