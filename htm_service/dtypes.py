"""The element types of stored tokens: names, torch types, and the way between tensors and bytes at rest.

Bytes are little-endian, C order, [T, D]. Does not know pages or sessions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch

from htm_service.errors import InvalidArgument

if TYPE_CHECKING:
    from htm_service.records import DType, Floats

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def itemsize(dtype: DType) -> int:
    """Bytes of one element."""
    return TORCH_DTYPES[dtype].itemsize


def to_bytes(embeddings: Floats, dtype: DType) -> bytes:
    """Embeddings [T, D] float32 as tokens of `dtype` at rest; a copy.

    Raises InvalidArgument when a value is finite in float32 and is not in `dtype`.
    """
    if dtype == "float32":
        return embeddings.tobytes()
    flags = embeddings.flags
    if not (flags.c_contiguous and flags.writeable):  # torch takes nothing else
        embeddings = np.array(embeddings, order="C")
    tokens = torch.from_numpy(embeddings).to(TORCH_DTYPES[dtype])
    if not bool(torch.isfinite(tokens).all()):  # bfloat16 too: the largest float32 rounds up
        largest = float(np.abs(embeddings).max())
        raise InvalidArgument(f"embeddings hold {largest:g}, the largest {dtype} is {torch.finfo(tokens.dtype).max:g}")
    return tokens.view(torch.int16).numpy().tobytes()


def from_bytes(parts: Iterable[bytes], dtype: DType, dim: int) -> torch.Tensor:
    """Parts that follow each other as tokens [T, D] on the CPU; a copy, because torch takes no read-only memory."""
    return torch.frombuffer(bytearray().join(parts), dtype=TORCH_DTYPES[dtype]).view(-1, dim)
