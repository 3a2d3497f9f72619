"""What a step feeds the model, gathered from the device's tables by one kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.launch import launch
from kernels.types import StepInputs, StepRows


@triton.jit(
    do_not_specialize=["num_rows", "num_tokens"],
    do_not_specialize_on_alignment=["rows", "starts", "query_starts"],
)
def _prepare_step_kernel(
    rows, starts, query_starts, token_table, block_tables, token_stride, group_stride, block_stride,
    num_rows, num_tokens, token_ids, positions, slots, context_lens, tables_out, out_stride,
    BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (i, j, g): part j of request i's tokens, and of its block table of group g."""
    request = tl.program_id(0)
    part = tl.program_id(1)
    num_parts = tl.num_programs(1)
    group = tl.program_id(2).to(tl.int64)
    row = tl.load(rows + request).to(tl.int64)
    start = tl.load(starts + request)
    begin = tl.load(query_starts + request)
    length = tl.load(query_starts + request + 1) - begin
    real = row >= 0  # a row of -1 pads the batch: token 0 at position 0, kept nowhere
    row = tl.maximum(row, 0)
    start = tl.where(real, start, 0)
    context = tl.where(real, start + length, 0)
    if part == 0:
        tl.store(context_lens + request, context)  # the same in every group
    table = block_tables + group * group_stride + row * block_stride
    for at in range(part * BLOCK, length, num_parts * BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        inside = offsets < length
        where = tl.where(real, start + offsets, 0).to(tl.int64)
        token = tl.load(token_table + row * token_stride + where, inside & real, 0)
        block = tl.load(table + where // BLOCK_SIZE, inside & real, 0)
        slot = block.to(tl.int64) * BLOCK_SIZE + where % BLOCK_SIZE
        tl.store(token_ids + begin + offsets, token, inside)
        tl.store(positions + begin + offsets, where, inside)
        at_slot = slots + group * num_tokens + begin + offsets
        tl.store(at_slot, tl.where(real, slot, -1), inside)
    num_blocks = tl.cdiv(context, BLOCK_SIZE)
    for at in range(part * BLOCK, num_blocks, num_parts * BLOCK):
        index = at + tl.arange(0, BLOCK)
        block = tl.load(table + index, index < num_blocks, 0)
        to = tables_out + (group * num_rows + request) * out_stride + index
        tl.store(to, block, index < num_blocks)


def prepare_step(
    step: StepRows, token_table: Tensor, block_tables: Tensor, block_size: int
) -> StepInputs:
    num_rows, num_tokens, device = step.rows.shape[0], step.num_tokens, step.rows.device
    groups, _, max_blocks = block_tables.shape
    token_ids, positions = (
        torch.empty(num_tokens, dtype=torch.int64, device=device) for _ in range(2)
    )
    slots = torch.empty(groups, num_tokens, dtype=torch.int64, device=device)
    context_lens = torch.empty(num_rows, dtype=torch.int32, device=device)
    tables = torch.empty(groups, num_rows, max_blocks, dtype=torch.int32, device=device)
    launch(
        _prepare_step_kernel,
        (num_rows, 1 if num_tokens == num_rows else 8, groups),
        step.rows,
        step.starts,
        step.query_starts,
        token_table,
        block_tables,
        token_table.stride(0),
        block_tables.stride(0),
        block_tables.stride(1),
        num_rows,
        num_tokens,
        token_ids,
        positions,
        slots,
        context_lens,
        tables,
        max_blocks,
        BLOCK_SIZE=block_size,
        BLOCK=256,
        num_warps=4,
    )
    return StepInputs.of(step, token_ids, positions, context_lens, tables, slots)
