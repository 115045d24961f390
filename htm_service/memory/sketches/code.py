"""A token's sketch: one bit per dimension around its chunk's summary key, and one number.

After RaBitQ (Gao and Long, SIGMOD 2024, arXiv 2405.12497), whose clusters are here the chunks and whose centroids the
summary keys: of a token x of chunk i with key s, r = x - s; the bits are the signs of P r, P a fixed rotation; and with
`factor` f = |r|^2 / |P r|_1, <u, x> is about <u, s> + f <P u, b>, b being the signs as +1 and -1. The error has no bias
and is of the order |u| |r| / sqrt(D).

Sketches depend on tokens alone, never on weights, so one serves every model.
Shapes: m chunks, C chunk size, D width, W = ceil(D / 64) words, N vectors. Does not know sessions, pages or queries.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

FORMAT = 1
"""Of sketches at rest: what another rotation, or another order of the bytes, made has another number."""
WORD_BITS = 64
LEAST_DIM = 128
"""Of narrower tokens no sketches are made: their estimates are worse, and reading all tokens is cheap."""
ERROR = (1 - 2 / math.pi) ** 0.5
"""The standard deviation of an estimate's error for a factor of 1 and a query of length 1: signs agree with a random
vector by sqrt(2 / pi) of its length, on average."""
NUM_ROUNDS = 2
FACTOR_ITEMSIZE = 4
CHUNKS_AT_ONCE = 64
"""Chunks that are rotated together: bounds the workspace."""


def num_words(dim: int) -> int:
    """W, the words of 64 bits of one token's sketch."""
    return -(-dim // WORD_BITS)


def sketch_bytes(dim: int) -> int:
    """Bytes of one token's sketch."""
    return num_words(dim) * WORD_BITS // 8 + FACTOR_ITEMSIZE


class Rotation:
    """P, the same on every machine: twice, random signs and then a cosine transform in two dimensions.

    [D] is padded with zeros to W words and seen as [a, b], whose columns and rows are transformed: a + b products per
    number instead of D, each by a matrix product. Cosines, because they are there for every length; Hadamard's
    transform, for powers of two alone, is no quicker that way.
    """

    def __init__(self, dim: int, device: torch.device) -> None:
        self.dim = dim
        self.padded_dim = num_words(dim) * WORD_BITS
        self._columns = math.isqrt(self.padded_dim)
        while self.padded_dim % self._columns:
            self._columns -= 1
        self._left = _cosines(self._columns).to(device)
        self._right = _cosines(self.padded_dim // self._columns).T.contiguous().to(device)
        self._signs = _signs(NUM_ROUNDS, self.padded_dim).to(device)

    def rotate(self, vectors: Tensor) -> Tensor:
        """Vectors [N, D] float32, on the rotation's device, as P times them [N, W x 64]."""
        if vectors.device.type == "cpu":  # by NumPy: torch wakes threads for a few rows, and waits for them
            return torch.from_numpy(self._rotated(vectors.numpy()))
        rotated = functional.pad(vectors, (0, self.padded_dim - self.dim))
        for signs in self._signs:
            grid = (rotated * signs).view(len(vectors), self._columns, -1)
            rotated = (self._left @ grid @ self._right).flatten(1)
        return rotated

    def _rotated(self, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        left, right = self._left.numpy(), self._right.numpy()
        rotated = np.zeros((len(vectors), self.padded_dim), np.float32)
        rotated[:, : self.dim] = vectors
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is scored, or refused
            for signs in self._signs.numpy():
                grid = (rotated * signs).reshape(len(vectors), self._columns, -1)
                rotated = (left @ grid @ right).reshape(len(vectors), -1)
        return rotated


def sketch(chunks: Tensor, keys: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """The sketches of whole chunks [m, C, D] of any dtype, with their summary keys [m, D] float32.

    Bits [m, W, C] int64, dimension d being bit d % 64 of word d // 64, and factors [m, C] float32.
    """
    size, dim, words = chunks.shape[1], chunks.shape[2], num_words(chunks.shape[2])
    bits = torch.empty(len(chunks), words, size, dtype=torch.int64, device=chunks.device)
    factors = torch.empty(len(chunks), size, dtype=torch.float32, device=chunks.device)
    for first in range(0, len(chunks), CHUNKS_AT_ONCE):
        some = slice(first, first + CHUNKS_AT_ONCE)
        residuals = (chunks[some].float() - keys[some, None]).view(-1, dim)
        # By their largest number, or the squares of large ones would overflow.
        largest = residuals.abs().amax(dim=1, keepdim=True)
        rotated = rotation.rotate(residuals / largest.clamp(min=torch.finfo(torch.float32).tiny))
        length = rotated.square().sum(dim=1) / rotated.abs().sum(dim=1)
        factors[some] = (length.nan_to_num(0.0) * largest[:, 0]).view(-1, size)
        bits[some] = _packed(rotated >= 0).view(-1, size, words).transpose(1, 2)
    return bits, factors


def to_bytes(bits: Tensor, factors: Tensor) -> bytes:
    """Sketches [m, W, C] and [m, C] at rest: chunk by chunk, as many bytes for each."""
    records = np.empty(len(bits), _record(bits.shape[1], bits.shape[2]))
    records["bits"], records["factors"] = bits.cpu().numpy(), factors.cpu().numpy()
    return records.tobytes()


def from_bytes(data: Sequence[bytes], dim: int, chunk_size: int) -> tuple[Tensor, Tensor]:
    """What `to_bytes` made of the sketches of chunks that follow each other."""
    records = np.frombuffer(b"".join(data), _record(num_words(dim), chunk_size))
    bits, factors = (records[name].astype(records[name].dtype.newbyteorder("=")) for name in ("bits", "factors"))
    return torch.from_numpy(bits), torch.from_numpy(factors)


def _record(words: int, chunk_size: int) -> np.dtype[np.void]:
    return np.dtype([("bits", "<i8", (words, chunk_size)), ("factors", "<f4", (chunk_size,))])


def _packed(flags: Tensor) -> Tensor:
    """Flags [N, W x 64] as words [N, W] int64."""
    if flags.device.type == "cpu":
        return torch.from_numpy(np.packbits(flags.numpy(), axis=1, bitorder="little").view(np.int64))
    places = torch.arange(WORD_BITS, device=flags.device)
    return (flags.view(len(flags), -1, WORD_BITS).long() << places).sum(dim=2)


def _cosines(size: int) -> Tensor:
    """The orthonormal cosine transform [size, size] (DCT-II)."""
    row, column = np.arange(size)[:, None], np.arange(size)
    matrix = np.sqrt(2 / size) * np.cos(np.pi * (column + 0.5) * row / size)
    matrix[0] /= np.sqrt(2)
    return torch.from_numpy(matrix.astype(np.float32))


def _signs(num_rounds: int, dim: int) -> Tensor:
    """+1 and -1 [num_rounds, dim], from a hash, so that no library's generator decides what is on disk."""
    digest = hashlib.shake_256(f"htm-service sketches {FORMAT}".encode()).digest(num_rounds * dim // 8)
    bits = np.unpackbits(np.frombuffer(digest, np.uint8)).reshape(num_rounds, dim)
    return torch.from_numpy(bits.astype(np.float32) * 2 - 1)
