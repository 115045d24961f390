"""The summary key of a chunk: the mean of its tokens, or of those that are visible. One definition for all paths.

Tokens are added up in float32, slot by slot, each times SCALE; the sum is divided by their number times SCALE. That
order does not depend on how the tokens arrived, so the same tokens give the same key to the last bit: appended one by
one, at once, or read back after a restart. A power of two changes no digit, so these are the bits of the plain float32
mean too, which older databases hold; but a sum of finite tokens stays finite.
Shapes: m chunks, C chunk size, D width. Does not know pages, sessions or requests.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from htm_service.records import Floats

SCALE = 2.0**-13
"""For chunks of up to 4,096 tokens, with room for rounding. Only numbers below 1e-34 lose digits by it, those after the
43rd decimal place."""
MOST = 3.4028234663852886e38
"""The largest float32. Of tokens that large, the rounding of the sum alone may pass it."""
FEW_NUMBERS = 1 << 18
"""Of chunks that are quicker added up in one call to numpy than by all cores in many calls to torch."""


def add_token(total: Tensor, token: Tensor) -> None:
    """Add one token [..., D] of any dtype to a sum [..., D] float32, in place."""
    total.add_(token, alpha=SCALE)


def sum_slots(tokens: Tensor, visible: Tensor | None = None) -> Tensor:
    """The sums [m, D] float32, for `mean_of`, of the tokens [m, C, D] of m chunks, or of those `visible` [m, C]."""
    if visible is None and tokens.device.type == "cpu" and tokens.numel() <= FEW_NUMBERS and tokens.shape[2] > 1:
        # Along an axis that is not the innermost, numpy adds row to row, as the loop below does (a single column it
        # would add in pairs), and all in one call.
        scaled = tokens.float().numpy() * np.float32(SCALE)
        return torch.from_numpy(np.add.reduce(scaled, axis=1, initial=np.float32(0)))
    total = torch.zeros(tokens.shape[0], tokens.shape[2], dtype=torch.float32, device=tokens.device)
    for slot in range(tokens.shape[1]):
        token = tokens[:, slot]
        add_token(total, token if visible is None else token.masked_fill(~visible[:, slot, None], 0.0))
    return total


def mean_of(total: Tensor, num_tokens: Tensor | int, out: Tensor | None = None) -> Tensor:
    """Summary keys [..., D] of sums [..., D] of `num_tokens` [..., 1] tokens times SCALE each, into `out` if given."""
    count = num_tokens * SCALE
    if isinstance(count, float) and total.is_cuda:  # which would multiply by a number's reciprocal: other bits
        count = torch.full((1,), count, dtype=total.dtype, device=total.device)
    return torch.div(total, count, out=out).clamp_(-MOST, MOST)


class Slot(NamedTuple):
    """Where the next token [D] of an open chunk goes: `place` in its page, the sum of the `num_before` that are there,
    and the key. Views, all [D].
    """

    place: Floats
    total: Floats
    key: Floats
    num_before: int


def fill_slots(filled: Iterable[tuple[Slot, bytes]]) -> None:
    """Put a float32 token at rest into each slot, of another chunk every time: what `add_token` and `mean_of` do, but
    by numpy, for torch lets another thread in at each of its calls.
    """
    with np.errstate(over="ignore"):
        for (place, total, key, num_before), data in filled:
            place[:] = token = np.frombuffer(data, np.float32)
            total += token * np.float32(SCALE)
            np.divide(total, np.float32((num_before + 1) * SCALE), out=key)
            key.clip(-MOST, MOST, out=key)
