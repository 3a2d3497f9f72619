"""The steps that an engine rehearses before it serves: they show what a step can take at most."""

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


def warm_up_plans(config: EngineConfig, max_len: int) -> list[StepPlan]:
    """Steps of all rows and as many tokens as there can be, and one that decodes.

    They run every kernel there is, and leave plain rows behind. Their block tables are empty: all
    tokens go to block 0.
    """
    length = max(min(config.max_num_batched_tokens // config.max_num_seqs, max_len - 1), 1)
    spare = config.max_num_batched_tokens - config.max_num_seqs * length
    first_length = min(length + spare, max_len - 1)
    plans = []
    for params in (_COSTLY, _PLAIN):
        plan = StepPlan()
        for row in range(config.max_num_seqs):
            num_tokens = length if row else first_length
            plan.new_rows.append(
                NewRow(
                    row=row,
                    token_ids=[0] * num_tokens,
                    num_prompt_tokens=num_tokens,
                    block_tables=[],
                    params=params,
                    seed=0,
                )
            )
            plan.add(row, start=0, num_tokens=num_tokens, num_sampled=1)
        plans.append(plan)
    decoding = StepPlan()
    for row in range(config.max_num_seqs):
        decoding.add(row, start=0, num_tokens=1, num_sampled=1)
    return [*plans, decoding]
