"""The sinusoid added to the tokens of a chunk before the in-chunk attention; one definition for all paths.

Shapes: C chunk size, D width.
Does not know: models, chunks as they are stored (stored tokens stay raw).
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_TIMESCALE = 10_000.0


def inverse_frequencies(dim: int) -> Tensor:
    """The frequencies 10000^(-2t/D) of a width D, as [ceil(D / 2)] float64 on the CPU."""
    return MAX_TIMESCALE ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)  # [ceil(D / 2)]


def position_table(chunk_size: int, dim: int) -> Tensor:
    """What slot j of a chunk gets, as [C, D] float32 on the CPU: the sinusoid at position C - 1 - j.

    The last slot is position 0. Columns are all sines, then all cosines; an odd D drops the last cosine.
    Computed in float64, so that long chunks do not lose the phase. Follows
    DeepMind's `sinusoid_position_encoding` (arXiv 2105.14039).
    """
    position = torch.arange(chunk_size - 1, -1, -1, dtype=torch.float64)  # [C]
    angle = position[:, None] * inverse_frequencies(dim)  # [C, ceil(D / 2)]
    return torch.cat((angle.sin(), angle.cos()), dim=-1)[:, :dim].float().contiguous()  # [C, D]
