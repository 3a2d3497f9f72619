"""Random steps of paged attention, which the kernels of all devices are held against."""

import random
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from kernels import Ops, reference
from kernels.types import AttentionInputs, Decodes, KVCache, PagedKV, SamplingTable, StepInputs

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
NAN = float("nan")
CPU = torch.device("cpu")


def random_lengths(rng: random.Random) -> list[tuple[int, int]]:
    """(queries, context) of a few requests, at the edges of blocks and tiles and elsewhere."""
    lengths = []
    for _ in range(rng.randint(1, 7)):
        context = rng.choice([1, 2, 31, 32, 33, 63, 64, 65, rng.randint(1, 400)])
        queries = rng.choice([0, 1, 1, context, rng.randint(1, context)])
        lengths.append((queries, context))
    return lengths


def assert_close(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def poison_allocations(device: torch.device = CPU) -> None:
    """New tensors of common sizes then reuse memory full of NaN, so that gaps in outputs show."""
    for size in (256, 4096, 65536):
        torch.full((size,), NAN, device=device)


def poisoned_cache(num_blocks: int, spec: PagedKV, device: torch.device = CPU) -> KVCache:
    """A cache in which whatever is read without having been written shows."""
    cache = reference.attention.new_cache(num_blocks, spec, device)
    for part in cache.tensors:
        part.copy_(torch.full(part.shape, NAN))
    return cache


def each_tensor(cache: KVCache, change: Callable[[Tensor], Tensor]) -> KVCache:
    """A cache of changed tensors: moved to a device, converted."""
    keys, values = map(change, cache.tensors)
    return replace(cache, spec=replace(cache.spec, dtype=keys.dtype), keys=keys, values=values)


def sampling_on(device: torch.device, ops: Ops) -> Callable[..., Tensor]:
    """`ops.sampling.sample` of tensors on the CPU: taken to the device, the tokens brought back."""

    def sample(logits: Tensor, table: SamplingTable, rows: Tensor, positions: Tensor) -> Tensor:
        own = SamplingTable(*(column.to(device) for column in table))
        where = rows.to(device), positions.to(device)
        return ops.sampling.sample(logits.to(device), own, *where).cpu()

    return sample


def inputs_of(
    lengths: list[tuple[int, int]], block_tables: Tensor, device: torch.device = CPU, most: int = 1
) -> AttentionInputs:
    """Of a step of requests with these (queries, context), the first of which decode: those that
    have `most` queries at most."""
    counts = [queries for queries, _ in lengths]
    return AttentionInputs(
        torch.tensor([sum(counts[:i]) for i in range(len(counts) + 1)]).int().to(device),
        torch.tensor([context for _, context in lengths]).int().to(device),
        block_tables.to(device),
        slots=torch.empty(0, dtype=torch.int64, device=device),  # all is stored already
        decodes=Decodes.of(counts, most),
        max_query_len=max(counts),
    )


def assert_same_inputs(actual: StepInputs, expected: StepInputs, block_size: int) -> None:
    assert_equal(actual.token_ids, expected.token_ids)
    assert_equal(actual.positions, expected.positions)
    for got, wanted in zip(actual.attention, expected.attention, strict=True):
        for name in ("query_starts", "context_lens", "slots"):
            assert_equal(getattr(got, name), getattr(wanted, name))
        assert got.decodes == wanted.decodes and got.max_query_len == wanted.max_query_len
        for i, context in enumerate(wanted.context_lens.tolist()):
            used = -(-context // block_size)  # what lies past a context is not looked at
            assert_equal(got.block_tables[i, :used], wanted.block_tables[i, :used])


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype and actual.cpu().equal(expected)


class Attention:
    """A random step of paged attention: NaN wherever no key or value belongs."""

    def __init__(
        self,
        rng: random.Random,
        dtype: torch.dtype,
        lengths: list[tuple[int, int]],  # (queries, context) of each request
        head_dim: int,
        kv_heads: int,
        group: int,
        block_size: int,
        window: int | None = None,
        device: torch.device = CPU,
        cache_dtype: torch.dtype | None = None,
        softcap: float | None = None,
        has_sinks: bool = False,
    ) -> None:
        blocks_each = [-(-context // block_size) for _, context in lengths]
        num_blocks = sum(blocks_each) + 3
        poisoned, *free = rng.sample(range(num_blocks), num_blocks)
        self.cache = poisoned_cache(
            num_blocks, PagedKV(block_size, kv_heads, head_dim, cache_dtype or dtype)
        )
        tables = torch.full((len(lengths), max(blocks_each) + 2), 2**30, dtype=torch.int32)
        for i, (queries, context) in enumerate(lengths):
            blocks = [free.pop() for _ in range(blocks_each[i])]
            tables[i, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
            slots = torch.arange(context)
            slots = torch.tensor(blocks)[slots // block_size] * block_size + slots % block_size
            k, v = torch.randn(2, context, kv_heads, head_dim)
            reference.attention.store(k, v, self.cache, slots)
            if window is not None:  # blocks that no query sees any more are somebody else's
                tables[i, : max(context - queries - window + 1, 0) // block_size] = poisoned
        self.block_tables = tables
        self.lengths = lengths
        num_tokens = sum(queries for queries, _ in lengths)
        self.q = torch.randn(num_tokens, kv_heads * group, head_dim).to(dtype)
        self.scale, self.window, self.softcap = head_dim**-0.5, window, softcap
        self.sinks = torch.randn(kv_heads * group).to(dtype) * 3 if has_sinks else None
        self.device = device

    def check(self, ops: Ops, most: int = 1) -> None:
        """The op's output is the reference's in float32, where requests with at most `most` queries
        decode."""
        settings = (self.scale, self.window, self.softcap, self.sinks)
        expected = reference.attention.attend(
            self.q.float(),
            each_tensor(self.cache, Tensor.float),
            inputs_of(self.lengths, self.block_tables),
            *settings,
        )
        cache = each_tensor(self.cache, lambda tensor: tensor.to(self.device))
        q = self.q.to(self.device)
        inputs = inputs_of(self.lengths, self.block_tables, self.device, most)
        planned = ops.attention.plan(inputs, cache.spec)
        poison_allocations(self.device)
        actual = ops.attention.attend(q, cache, planned, *settings)
        assert_close(actual.cpu(), expected.to(self.q.dtype))
