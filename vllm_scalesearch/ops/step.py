"""What a step of an engine asks of one layer's cache."""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Step:
    """Where the tokens of a batch are.

    query_start_loc: (B + 1,) int32, first query of each request among all. seq_lens: (B,) int32, tokens of
    each request, its queries included. block_table: (B, W) int32, packed pages of each request.
    full_block_table: (B, V) int32, its full-precision pages; 0 where it has none (any more).
    slots, full_slots: (T,) int64, where the queries' own tokens go, negative for padding.
    max_query_len: at least the largest number of queries of a request.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    full_block_table: torch.Tensor
    slots: torch.Tensor
    full_slots: torch.Tensor
    max_query_len: int

    def part(self, requests: slice, max_query_len: int) -> "Step":
        """Some requests in a row, for attention: queries keep their places, and nothing is written."""
        return replace(
            self,
            query_start_loc=self.query_start_loc[requests.start : requests.stop + 1],
            seq_lens=self.seq_lens[requests],
            block_table=self.block_table[requests],
            full_block_table=self.full_block_table[requests],
            max_query_len=max_query_len,
        )
