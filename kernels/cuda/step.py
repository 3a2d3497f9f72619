"""What a step feeds the model, gathered from the device's tables by one kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import StepInputs


@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=["rows", "starts", "query_starts"],
)
def _prepare_step_kernel(
    rows, starts, query_starts, token_table, block_table, token_stride, block_stride, num_rows,
    token_ids, positions, slots, context_lens, block_tables, out_stride,
    BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (i, j): part j of request i's tokens, and of its block table."""
    request = tl.program_id(0)
    part = tl.program_id(1)
    num_parts = tl.num_programs(1)
    row = tl.load(rows + request).to(tl.int64)
    start = tl.load(starts + request)
    begin = tl.load(query_starts + request)
    length = tl.load(query_starts + request + 1) - begin
    real = row >= 0  # a row of -1 pads the batch: token 0 at position 0, kept nowhere
    row = tl.maximum(row, 0)
    start = tl.where(real, start, 0)
    context = tl.where(real, start + length, 0)
    if part == 0:
        tl.store(context_lens + request, context)
    for at in range(part * BLOCK, length, num_parts * BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        inside = offsets < length
        where = tl.where(real, start + offsets, 0).to(tl.int64)
        token = tl.load(token_table + row * token_stride + where, inside & real, 0)
        block = tl.load(block_table + row * block_stride + where // BLOCK_SIZE, inside & real, 0)
        slot = block.to(tl.int64) * BLOCK_SIZE + where % BLOCK_SIZE
        tl.store(token_ids + begin + offsets, token, inside)
        tl.store(positions + begin + offsets, where, inside)
        tl.store(slots + begin + offsets, tl.where(real, slot, -1), inside)
    num_blocks = tl.cdiv(context, BLOCK_SIZE)
    for at in range(part * BLOCK, num_blocks, num_parts * BLOCK):
        index = at + tl.arange(0, BLOCK)
        block = tl.load(block_table + row * block_stride + index, index < num_blocks, 0)
        to = block_tables + request.to(tl.int64) * out_stride + index
        tl.store(to, block, index < num_blocks)


def prepare_step(
    rows: Tensor,
    starts: Tensor,
    query_starts: Tensor,
    num_tokens: int,
    token_table: Tensor,
    block_table: Tensor,
    block_size: int,
) -> StepInputs:
    num_rows, device = rows.shape[0], rows.device
    token_ids, positions, slots = (
        torch.empty(num_tokens, dtype=torch.int64, device=device) for _ in range(3)
    )
    inputs = StepInputs(
        token_ids,
        positions,
        slots,
        context_lens=torch.empty(num_rows, dtype=torch.int32, device=device),
        block_tables=torch.empty(num_rows, block_table.shape[1], dtype=torch.int32, device=device),
    )
    _prepare_step_kernel[(num_rows, 1 if num_tokens == num_rows else 8)](
        rows,
        starts,
        query_starts,
        token_table,
        block_table,
        token_table.stride(0),
        block_table.stride(0),
        num_rows,
        token_ids,
        positions,
        slots,
        inputs.context_lens,
        inputs.block_tables,
        inputs.block_tables.stride(0),
        BLOCK_SIZE=block_size,
        BLOCK=256,
        num_warps=4,
    )
    return inputs
