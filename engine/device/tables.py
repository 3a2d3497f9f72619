"""What the device knows of the running requests, one row each."""

from copy import copy

import torch

from engine.device.transfer import to_device
from engine.schedule.step import Drafts, NewBlock, NewRow
from kernels.types import SamplingTable


class DeviceTables:
    """Tokens, block tables and sampling parameters by row.

    A sampled token is written here and read by the next step without visiting the host.
    """

    def __init__(
        self,
        num_rows: int,
        max_len: int,
        block_size: int,
        device: torch.device,
        num_groups: int = 1,
    ) -> None:
        self._device = device
        self.token_ids = torch.zeros(num_rows, max_len, dtype=torch.int64, device=device)
        max_blocks = -(-max_len // block_size)
        # By cache group; where a request has given back a block, or never had it, any number.
        shape = num_groups, num_rows, max_blocks
        self.block_tables = torch.zeros(shape, dtype=torch.int32, device=device)
        # One below the other, so that a row enters each of the two in one go.
        self._sampling_floats = torch.zeros(3, num_rows, device=device)
        self._sampling_ints = torch.zeros(2, num_rows, dtype=torch.int64, device=device)
        temperature, top_p, min_p = self._sampling_floats
        top_k, seeds = self._sampling_ints
        self.sampling = SamplingTable(temperature, top_k, top_p, min_p, seeds)

    @property
    def first_group(self) -> "DeviceTables":
        """The same, as seen by a model whose layers all lie in the blocks of the first group."""
        tables = copy(self)
        tables.block_tables = self.block_tables[:1]
        return tables

    def enter(self, new: NewRow) -> None:
        """A request enters a row; what the row held before is gone."""
        row, params = new.row, new.params
        tokens = to_device(new.token_ids, torch.int64, self._device)
        self.token_ids[row, : len(new.token_ids)] = tokens
        if new.block_tables and new.block_tables[0]:
            blocks = to_device(new.block_tables, torch.int32, self._device).clamp(min=0)
            self.block_tables[:, row, : blocks.shape[1]] = blocks
        floats = [params.temperature, params.top_p, params.min_p]
        self._sampling_floats[:, row] = to_device(floats, torch.float32, self._device)
        ints = [max(params.top_k, 0), new.seed]
        self._sampling_ints[:, row] = to_device(ints, torch.int64, self._device)

    def write_drafts(self, drafts: list[Drafts]) -> None:
        """Where the step reads its tokens, and writes those that it samples."""
        entries = [
            (row, first + i, token)
            for row, first, tokens in drafts
            for i, token in enumerate(tokens)
        ]
        if entries:
            rows, positions, tokens = to_device(
                [*zip(*entries, strict=True)], torch.int64, self._device
            )
            self.token_ids[rows, positions] = tokens

    def append_blocks(self, new: list[NewBlock]) -> None:
        """The new blocks of all rows of a step, in one go."""
        if new:
            *where, blocks = to_device([*zip(*new, strict=True)], torch.int64, self._device)
            self.block_tables[tuple(where)] = blocks.int()
