"""What chat and text completions share on the way in and out."""

from typing import Any

from pydantic import ValidationError

from deployments.api.errors import ApiError, validation_error
from deployments.api.protocol import GenerationRequest
from deployments.front import Front
from engine.sampling_params import SamplingParams
from engine.strict import explain


def check_model(front: Front, request: GenerationRequest) -> None:
    if request.model is not None and request.model != front.model_name:
        raise ApiError(
            404,
            f"the model {request.model!r} does not exist; this server has {front.model_name!r}",
            "model",
            "model_not_found",
        )


def sampling_params(front: Front, request: GenerationRequest) -> SamplingParams:
    try:
        return request.sampling_params(front.sampling_defaults)
    except ValidationError as error:
        raise validation_error(explain(error.errors())) from error


def check_prompt(front: Front, prompt: list[int], params: SamplingParams, param: str) -> None:
    """400 at the door for what the engine could never serve."""
    try:
        front.check(prompt, params)
    except ValueError as error:
        field = str(error).partition(":")[0]
        if field in SamplingParams.model_fields:
            raise ApiError(400, str(error), field) from error
        raise ApiError(400, str(error), param, "context_length_exceeded") from error


def usage(num_prompt: int, num_output: int, num_cached: int) -> dict[str, Any]:
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }
