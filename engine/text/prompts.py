"""What `LLM` takes for prompts and their parameters: one or many."""

import operator
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from engine.sampling_params import SamplingParams

Prompt = str | Sequence[int] | Mapping[str, Any]


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, (str, Mapping)) or (
        len(prompts) > 0 and isinstance(prompts[0], Integral)  # also numpy's
    ):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def token_ids_of(prompt: Sequence[int]) -> list[int]:
    """Raises ValueError for what is no list of integers."""
    try:
        return [operator.index(token) for token in prompt]
    except TypeError as error:
        raise ValueError(f"should be a text or a list of token ids ({error})") from error


def one_each(
    params: SamplingParams | Sequence[SamplingParams], count: int
) -> Sequence[SamplingParams]:
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise ValueError(f"{count} prompts, but {len(params)} sampling_params; give one or {count}")
    return params
