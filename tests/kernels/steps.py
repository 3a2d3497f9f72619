"""Random steps of paged attention, which the kernels of all devices are held against."""

import random

import torch
from torch import Tensor

from kernels import Ops, reference

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
    ) -> None:
        cache_dtype = cache_dtype or dtype
        blocks_each = [-(-context // block_size) for _, context in lengths]
        num_blocks = sum(blocks_each) + 3
        free = rng.sample(range(num_blocks), num_blocks)
        shape = (num_blocks, kv_heads, block_size, head_dim)
        poison = torch.full(shape, NAN).to(cache_dtype)
        self.kv_cache = poison, poison.clone()
        tables = torch.full((len(lengths), max(blocks_each) + 2), 2**30, dtype=torch.int32)
        for i, (_, context) in enumerate(lengths):
            blocks = [free.pop() for _ in range(blocks_each[i])]
            tables[i, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
            slots = torch.arange(context)
            slots = torch.tensor(blocks)[slots // block_size] * block_size + slots % block_size
            k, v = torch.randn(2, context, kv_heads, head_dim)
            reference.store_kv(k, v, self.kv_cache, slots)
        counts = torch.tensor([queries for queries, _ in lengths])
        self.query_starts = torch.cat((torch.zeros(1), counts.cumsum(0))).int()
        self.lengths = lengths
        self.context_lens = torch.tensor([context for _, context in lengths], dtype=torch.int32)
        self.block_tables = tables
        self.q = torch.randn(int(counts.sum()), kv_heads * group, head_dim).to(dtype)
        self.scale, self.window, self.softcap = head_dim**-0.5, window, softcap
        self.device = device

    def check(self, ops: Ops, planned: bool = True) -> None:
        """The op's output is the reference's in float32, with a plan made for the step or none."""
        arguments = (self.query_starts, self.context_lens, self.block_tables)
        expected = reference.paged_attention(
            self.q.float(),
            (self.kv_cache[0].float(), self.kv_cache[1].float()),
            *arguments,
            self.scale,
            self.window,
            self.softcap,
        )
        arguments = tuple(argument.to(self.device) for argument in arguments)
        kv_cache = tuple(part.to(self.device) for part in self.kv_cache)
        q = self.q.to(self.device)
        plan = None
        if planned:
            counts = [queries for queries, _ in self.lengths]
            num_decodes = next((i for i, n in enumerate(counts) if n != 1), len(counts))
            plan = ops.plan_attention(
                *arguments[:2], num_decodes, max(counts), kv_cache[0].shape[1]
            )
        poison_allocations(self.device)
        actual = ops.paged_attention(
            q, kv_cache, *arguments, self.scale, self.window, self.softcap, plan
        )
        assert_close(actual.cpu(), expected.to(self.q.dtype))
