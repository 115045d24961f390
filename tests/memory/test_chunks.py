"""Chunks and their keys as tokens come."""

import pytest
import torch

from htm_service.errors import OutOfMemory
from htm_service.memory.arena import Arena, Budget
from htm_service.memory.chunks import Chunks, sum_slots

DIM, SIZE = 13, 5


def make_arena(limit: int = 1 << 24) -> tuple[Arena, Budget]:
    budget = Budget(limit)
    return Arena(DIM, SIZE, torch.float32, torch.device("cpu"), budget), budget


@pytest.mark.parametrize("parts", [[23], [1] * 23, [4, 1, 11, 7], [5, 5, 5, 5, 3]])
def test_keys_are_the_same_bits_however_tokens_arrive(parts: list[int]) -> None:
    torch.manual_seed(5)
    tokens = torch.randn(23, DIM)
    arena, budget = make_arena()
    memory, at_once = Chunks(arena, budget), Chunks(arena, budget)
    at_once.append(tokens)
    for part in tokens.split(parts):
        memory.append(part)
    assert torch.equal(memory.keys, at_once.keys)
    means = torch.stack([part.mean(dim=0) for part in tokens.split(SIZE)])
    torch.testing.assert_close(memory.keys, means, rtol=1e-6, atol=1e-6)
    assert torch.equal(memory.contents(torch.arange(4)).view(-1, DIM), tokens[:20])
    assert (memory.length, memory.num_chunks) == (23, 5)
    used = budget.used_bytes
    memory.free()
    assert budget.used_bytes < used and memory.num_chunks == 0


def test_an_append_that_does_not_fit_changes_nothing() -> None:
    arena, budget = make_arena(limit=4_000)
    memory = Chunks(arena, budget)
    memory.append(torch.ones(7, DIM))
    with pytest.raises(OutOfMemory):
        memory.append(torch.ones(100, DIM))
    assert (memory.length, memory.num_chunks) == (7, 2)
    memory.append(torch.ones(4, DIM))
    assert memory.length == 11 and torch.equal(memory.keys, torch.ones(3, DIM))


def test_sum_slots_counts_only_what_is_visible() -> None:
    tokens = torch.randn(3, SIZE, DIM, dtype=torch.bfloat16)
    visible = torch.rand(3, SIZE) < 0.5
    expected = (tokens.float() * visible[..., None]).sum(dim=1)
    torch.testing.assert_close(sum_slots(tokens, visible), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "dim"), [(1, 1), (23, 1), (1_021, 1), (1, 2), (7, 2), (257, 3), (31, 13), (32, 512)])
def test_few_chunks_are_summed_slot_by_slot(size: int, dim: int, dtype: torch.dtype) -> None:
    """To the last bit as many are: numpy must not add in pairs, nor keep the sign of zeros."""
    tokens = (torch.randn(3, size, dim) * 10 ** (6 * torch.rand(3, size, dim) - 3)).to(dtype)
    tokens[1] = -0.0
    total = torch.zeros(3, dim)
    for slot in range(size):
        total += tokens[:, slot].float()
    assert sum_slots(tokens).numpy().tobytes() == total.numpy().tobytes()
