"""Sketches: the rotation is one, estimates are right on average, and what is kept of a session follows its chunks."""

import hashlib

import numpy as np
import pytest
import torch

from htm_service.errors import OutOfMemory
from htm_service.memory.arena import Budget
from htm_service.memory.sketches.code import (
    ERROR,
    FORMAT,
    Rotation,
    from_bytes,
    num_words,
    sketch,
    sketch_bytes,
    to_bytes,
)
from htm_service.memory.sketches.table import SketchTable

CPU = torch.device("cpu")


def signs_of(bits: torch.Tensor) -> torch.Tensor:
    """Bits [m, W, C] as +1 and -1 [m, C, W x 64]."""
    places = torch.arange(64)
    return (((bits[..., None] >> places) & 1).permute(0, 2, 1, 3).flatten(2) * 2 - 1).float()


@pytest.mark.parametrize("dim", [1, 63, 128, 130, 384, 512, 769])
def test_the_rotation_keeps_lengths_and_products(dim: int) -> None:
    torch.manual_seed(dim)
    rotation = Rotation(dim, CPU)
    vectors = torch.randn(11, dim)
    rotated = rotation.rotate(vectors)
    assert rotated.shape == (11, num_words(dim) * 64)
    torch.testing.assert_close(rotated @ rotated.T, vectors @ vectors.T, rtol=1e-4, atol=1e-4)


def test_the_rotation_is_the_same_everywhere() -> None:
    """What is on disk was made with it: a change of its signs would make all sketches there useless."""
    signs = Rotation(128, CPU).rotate(torch.eye(128)) >= 0
    digest = hashlib.sha256(np.packbits(signs.numpy()).tobytes()).hexdigest()
    assert digest.startswith("35967784276148b3")


@pytest.mark.parametrize("dim", [128, 200, 512])
@pytest.mark.parametrize("spread", [0.1, 1.0])
def test_estimates_have_no_bias_and_the_error_they_are_said_to_have(dim: int, spread: float) -> None:
    torch.manual_seed(dim)
    size, num_chunks = 32, 40
    chunks = torch.randn(num_chunks, 1, dim) + spread * torch.randn(num_chunks, size, dim)
    keys = chunks.mean(dim=1)
    rotation = Rotation(dim, CPU)
    bits, factors = sketch(chunks, keys, rotation)
    queries = torch.randn(20, dim)
    around = torch.einsum("q e, m c e -> q m c", rotation.rotate(queries), signs_of(bits)) * factors
    errors = (queries @ keys.T)[..., None] + around - torch.einsum("q d, m c d -> q m c", queries, chunks)
    told = ERROR * queries.norm(dim=1)[:, None, None] * factors
    ratio = (errors / told).double()
    assert abs(float(ratio.mean())) < 0.03
    assert 0.9 < float(ratio.std()) < 1.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_token_equal_to_its_key_and_large_ones_have_finite_sketches(dtype: torch.dtype) -> None:
    scale = 1e38 if dtype != torch.float16 else 6e4
    chunks = torch.stack([torch.full((3, 130), 0.5), torch.randn(3, 130).clamp(-1, 1) * scale, torch.zeros(3, 130)])
    chunks = chunks.to(dtype)
    keys = (chunks.float() / 3).sum(dim=1)
    _, factors = sketch(chunks, keys, Rotation(130, CPU))
    assert factors.isfinite().all()
    assert factors[0].abs().max() < 1e-6 and not factors[2].any() and factors[1].min() > 0


def test_what_sketches_take_is_counted_and_follows_trims_and_cuts() -> None:
    budget = Budget(40 * 5 * sketch_bytes(128))
    table = SketchTable(128, 5, CPU, budget, first_chunk=7)
    assert sketch_bytes(128) == 128 // 8 + 4
    table.reserve(9)
    assert table.missing(9).tolist() == [7, 8]
    table.free()
    table.reserve(19)
    assert budget.used_bytes == table.device_bytes == 12 * 5 * sketch_bytes(128) and table.num_bytes_for(19) == 0
    table.put(torch.tensor([8, 11]), torch.ones(2, 2, 5, dtype=torch.int64), torch.full((2, 5), 0.25))
    assert table.missing(13).tolist() == [7, 9, 10, 12]
    bits, factors = table.tables(8, 10)
    assert bits[0].eq(1).all() and factors[0].eq(0.25).all() and factors[1].isnan().all()
    with pytest.raises(OutOfMemory):
        table.reserve(200)
    table.trim(9)
    assert table.missing(12).tolist() == [9, 10] and table.num_known == 1
    table.reserve(22)  # the room of those that were trimmed serves
    assert budget.used_bytes == table.device_bytes and table.missing(12).tolist() == [9, 10]
    table.cut(11)
    assert table.missing(12).tolist() == [9, 10, 11]
    table.free()
    assert budget.used_bytes == 0


def test_sketches_at_rest_are_as_they_were_and_of_one_format() -> None:
    """Databases hold them: whoever changes the rotation, or the order of the bytes, must change FORMAT too."""
    tokens = torch.from_numpy(np.sin(np.arange(3 * 5 * 200, dtype=np.float64) ** 1.5)).float().view(3, 5, 200)
    bits, factors = sketch(tokens, tokens.mean(dim=1), Rotation(200, CPU))
    data = to_bytes(bits, factors)
    assert len(data) == 3 * 5 * sketch_bytes(200)
    again = from_bytes([data[: len(data) // 3], data[len(data) // 3 :]], 200, 5)
    assert torch.equal(again[0], bits) and torch.equal(again[1], factors)
    first = data[: 8 * num_words(200) * 5]
    assert (FORMAT, hashlib.sha256(first).hexdigest()[:16]) == (1, "06d5f8a71751a9a4")


def test_a_table_knows_what_the_store_has() -> None:
    table = SketchTable(128, 5, CPU, Budget(1 << 20), first_chunk=10)
    table.reserve(60)
    bits, factors = torch.ones(30, 2, 5, dtype=torch.int64), torch.full((30, 5), 0.25)
    table.put(torch.arange(20, 50), bits, factors)
    assert table.num_unkept == 30 and table.unkept(31, 99) is None and table.unkept(30, 99) == (20, 50)
    table.put_kept(5, 3 * bits[:20], factors[:20])
    assert (table.num_known, table.num_unkept) == (40, 25) and table.unkept(1, 10) == (25, 35)
    assert table.tables(24, 26)[0][:, 0, 0].tolist() == [3, 1]
    table.put_kept(55, bits, factors)
    assert (table.num_known, table.num_unkept) == (45, 25), "there is room for so many"
    table.have_kept(30, 40)
    assert table.num_unkept == 15 and table.unkept(6, 99) == (40, 50) and table.unkept(1, 99) == (25, 30)
    table.trim(28)
    table.have_kept(20, 30)
    assert table.num_unkept == 10 and table.unkept(1, 99) == (40, 50)
    table.reserve(80)
    assert table.num_unkept == 10 and table.unkept(1, 99) == (40, 50)
    table.cut(45)
    table.put(torch.arange(45, 60), bits[:15], factors[:15])
    assert table.num_unkept == 20 and table.unkept(1, 99) == (40, 60)
    table.free()
    assert (table.num_known, table.num_unkept) == (0, 0) and table.unkept(1, 99) is None
