"""Kernels against each other: equal answers, unchanged arguments; the arena and memory beneath them."""

import pytest
import torch

from htm_service import arena as arena_module
from htm_service.arena import Arena, Budget
from htm_service.errors import OutOfMemory
from htm_service.kernels import ChunkBatch, Kernel, resolve_kernel
from htm_service.kernels.resolve import KERNELS
from htm_service.memory import Memory, sum_slots

DIM, SIZE, HEADS = 13, 5, 3


def make_arena(limit: int = 1 << 24, dtype: torch.dtype = torch.float32) -> tuple[Arena, Budget]:
    budget = Budget(limit)
    return Arena(DIM, SIZE, dtype, torch.device("cpu"), budget), budget


def make_batch(*, num_rows: int, k: int, positions: bool, hidden: float, dtype: torch.dtype) -> ChunkBatch:
    torch.manual_seed(num_rows * 100 + k)
    arena, budget = make_arena(dtype=dtype)
    memory = Memory(arena, budget)
    memory.append(torch.randn(17 * SIZE, DIM).to(dtype))
    arena.page(memory.pages[3])[2:] = torch.nan  # slots that were never written hold anything
    visible = torch.rand(num_rows, k, SIZE) >= hidden
    pages = memory.page_table[torch.randint(0, 17, (num_rows, k))]
    visible &= ~((pages == memory.pages[3])[..., None] & (torch.arange(SIZE) >= 2))
    weights = torch.rand(num_rows, k).softmax(dim=-1) if k else torch.zeros(num_rows, 0)
    table = torch.randn(SIZE, DIM) if positions else None
    return ChunkBatch(arena, pages, visible, weights, torch.randn(num_rows, HEADS, DIM), table)


@pytest.mark.parametrize("name", ["blocked", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("hidden", [0.0, 0.5, 1.1])
@pytest.mark.parametrize(("num_rows", "k"), [(1, 1), (1, 7), (19, 3)])
def test_kernels_equal_the_reference(
    name: str, num_rows: int, k: int, hidden: float, positions: bool, dtype: torch.dtype
) -> None:
    batch = make_batch(num_rows=num_rows, k=k, positions=positions, hidden=hidden, dtype=dtype)
    clones = [tensor.clone() for tensor in (batch.pages, batch.visible, batch.weights, batch.heads)]
    contents = batch.arena.take(batch.pages.flatten())
    expected = resolve_kernel(torch.device("cpu"), "reference").attend_chunks(batch, tokens=True)
    result = resolve_kernel(torch.device("cpu"), name).attend_chunks(batch, tokens=True)
    for field in ("z", "token_weights", "token_scores"):
        got, want = getattr(result, field), getattr(expected, field)
        finite = want.isfinite()
        assert torch.equal(finite, got.isfinite()), field
        difference = (got[finite] - want[finite]).abs()
        if len(difference):
            print(f"{name} {field}: max {difference.max():.2e}, mean {difference.mean():.2e}")
        torch.testing.assert_close(got[finite], want[finite], rtol=1e-5, atol=1e-5)
    for before, after in zip(clones, (batch.pages, batch.visible, batch.weights, batch.heads), strict=True):
        assert torch.equal(before, after)
    assert torch.equal(contents.nan_to_num(7), batch.arena.take(batch.pages.flatten()).nan_to_num(7))


@pytest.mark.parametrize("name", KERNELS)
def test_selection_is_descending_and_ties_go_to_the_lower_index(name: str) -> None:
    kernel: Kernel = resolve_kernel(torch.device("cpu"), name)
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0], [5.0, 1.0, 2.0, 4.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    values, index = kernel.select(logits, 2)
    assert index.tolist() == [[1, 2], [0, 3], [0, 1]] and values.tolist() == [[3, 3], [5, 4], [0, 0]]
    values, index = kernel.select(logits, 5)
    assert index.tolist() == [[1, 2, 4, 3, 0], [0, 3, 4, 2, 1], [0, 1, 2, 3, 4]]


def test_pages_are_taken_and_given_back_in_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    page_bytes = DIM * SIZE * 4
    monkeypatch.setattr(arena_module, "SLAB_BYTES", 3 * page_bytes)
    arena, budget = make_arena(limit=100 * page_bytes)
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


@pytest.mark.parametrize("parts", [[23], [1] * 23, [4, 1, 11, 7], [5, 5, 5, 5, 3]])
def test_keys_are_the_same_bits_however_tokens_arrive(parts: list[int]) -> None:
    torch.manual_seed(5)
    tokens = torch.randn(23, DIM)
    arena, budget = make_arena()
    memory, at_once = Memory(arena, budget), Memory(arena, budget)
    at_once.append(tokens)
    for part in tokens.split(parts):
        memory.append(part)
    assert torch.equal(memory.keys, at_once.keys)
    means = torch.stack([part.mean(dim=0) for part in tokens.split(SIZE)])
    torch.testing.assert_close(memory.keys, means, rtol=1e-6, atol=1e-6)
    assert torch.equal(memory.contents(torch.arange(4)).view(-1, DIM), tokens[:20])
    assert (memory.length, memory.num_chunks) == (23, 5)
    used = budget.used_bytes
    memory.release()
    assert budget.used_bytes < used and memory.num_chunks == 0


def test_an_append_that_does_not_fit_changes_nothing() -> None:
    arena, budget = make_arena(limit=4_000)
    memory = Memory(arena, budget)
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


def test_bad_devices_are_refused() -> None:
    from htm_service.device import choose_device
    from htm_service.errors import InvalidArgument

    assert choose_device("cpu")[0].type == "cpu"
    assert choose_device("auto")[1].startswith("auto: ")
    with pytest.raises(InvalidArgument, match="device is 'tpu'"):
        choose_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(InvalidArgument, match="finds no CUDA device"):
            choose_device("cuda")
