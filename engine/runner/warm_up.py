"""The steps that an engine rehearses before it serves: they show what a step can take at most."""

from collections.abc import Sequence

from engine.config import EngineConfig
from engine.sampling_params import SamplingParams
from engine.schedule.step import NewRow, StepPlan

# Everything that takes memory by row and vocabulary, which is much of what a step takes.
_COSTLY = SamplingParams(
    temperature=1.0,
    top_k=50,
    top_p=0.9,
    min_p=0.1,
    repetition_penalty=1.1,
    allowed_token_ids=[0],
    logprobs=20,
)
_PLAIN = SamplingParams(temperature=0.0)


def warm_up_plans(config: EngineConfig, max_len: int, max_drafts: int) -> list[StepPlan]:
    """Steps of as many tokens as there can be, in all rows and in one, and some that decode.

    They run every kernel there is, and leave plain rows behind. Their block tables are empty: all
    tokens go to block 0.
    """
    rows, tokens = config.step_size
    longest = max_len - 1
    length = max(min(tokens // rows, longest), 1)
    lengths = [min(length + tokens - rows * length, longest), *[length] * (rows - 1)]
    decoding = StepPlan()
    for row in range(rows):
        decoding.add(row, start=0, num_tokens=1, num_sampled=1)
    # Attention has tiles of two sizes.
    with_drafts = []
    for num_drafts in {1, max_drafts} if max_drafts else ():
        num_tokens = min(1 + num_drafts, longest, config.max_sampled)
        own_rows = min(rows, config.max_sampled // num_tokens)
        with_drafts.append(_prompts([1] * own_rows, _COSTLY, num_tokens - 1))
    return [
        _prompts(lengths, _COSTLY),
        *with_drafts,
        _prompts(lengths, _PLAIN),
        _prompts([min(tokens, longest)], _PLAIN),
        decoding,
    ]


def _prompts(lengths: Sequence[int], params: SamplingParams, num_drafts: int = 0) -> StepPlan:
    plan = StepPlan()
    for row, length in enumerate(lengths):
        plan.new_rows.append(
            NewRow(
                row=row,
                token_ids=[0] * length,
                num_prompt_tokens=length,
                block_tables=[],
                params=params,
                seed=0,
            )
        )
        drafts = [0] * num_drafts
        plan.add(row, 0, length + num_drafts, num_sampled=1 + num_drafts, drafts=drafts)
    return plan
