"""Pages in slabs, within a budget."""

import tracemalloc

import pytest
import torch

from htm_service.errors import OutOfMemory
from htm_service.memory import arena as arena_module
from htm_service.memory.arena import Arena, Budget

DIM, SIZE = 13, 5


def test_pages_are_taken_and_given_back_in_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    page_bytes = DIM * SIZE * 4
    monkeypatch.setattr(arena_module, "SLAB_BYTES", 3 * page_bytes)
    budget = Budget(100 * page_bytes)
    arena = Arena(DIM, SIZE, torch.float32, torch.device("cpu"), budget)
    pages = arena.allocate(7)
    assert pages == list(range(7)) and budget.used_bytes == 9 * page_bytes
    for page in pages:
        arena.page(page)[:] = page
    taken = arena.take(torch.tensor([6, 0, 3, 3, 1]))
    assert taken[:, 0, 0].tolist() == [6, 0, 3, 3, 1]
    arena.free(pages[3:6])
    assert budget.used_bytes == 6 * page_bytes
    assert arena.allocate(4) == [7, 8, 3, 4] and budget.used_bytes == 9 * page_bytes
    with pytest.raises(OutOfMemory, match="are in use"):
        arena.allocate(1000)
    assert arena.allocate(1) == [5]


def test_a_slab_of_small_pages_takes_no_memory_besides() -> None:
    """Its free pages were a list of numbers: the first token of width 2 in chunks of 1 took five times its slab."""
    arena = Arena(2, 1, torch.float16, torch.device("cpu"), Budget(1 << 30))
    tracemalloc.start()
    try:
        pages = arena.allocate(3)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert arena.slab_pages == 1 << 24
    assert pages == [0, 1, 2]
    assert most < 1 << 20
