"""Chunks and their keys as tokens come."""

import pytest
import torch

from htm_service.errors import OutOfMemory
from htm_service.memory.arena import Arena, Budget
from htm_service.memory.chunks import Chunks

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
