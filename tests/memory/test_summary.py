"""Summary keys: the bits of the plain float32 mean, and a mean of finite tokens is finite."""

import pytest
import torch

from htm_service.memory.arena import Arena, Budget
from htm_service.memory.chunks import Chunks
from htm_service.memory.summary import mean_of, sum_slots

DIM, SIZE = 13, 5


def test_only_visible_tokens_count() -> None:
    torch.manual_seed(1)
    tokens = torch.randn(3, SIZE, DIM, dtype=torch.bfloat16)
    visible = torch.tensor([[True] * SIZE, [True, False, True, False, True], [False] * 4 + [True]])
    counts = visible.sum(dim=1, keepdim=True)
    expected = (tokens.float() * visible[..., None]).sum(dim=1) / counts
    torch.testing.assert_close(mean_of(sum_slots(tokens, visible), counts), expected)


@pytest.mark.parametrize("visible", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "dim"), [(1, 1), (23, 1), (1_021, 1), (1, 2), (7, 2), (257, 3), (31, 13), (32, 512)])
def test_the_bits_are_those_of_a_plain_mean(size: int, dim: int, dtype: torch.dtype, visible: bool) -> None:
    """Databases hold keys that were made so. numpy must not add in pairs, nor keep the sign of zeros."""
    torch.manual_seed(size)
    tokens = (torch.randn(3, size, dim) * 10 ** (6 * torch.rand(3, size, dim) - 3)).to(dtype)
    tokens[1] = -0.0
    tokens[2] *= 1e-5 if dtype == torch.float16 else 1e-30
    total = torch.zeros(3, dim)
    for slot in range(size):
        total += tokens[:, slot].float()
    sums = sum_slots(tokens, torch.ones(3, size, dtype=torch.bool) if visible else None)
    assert mean_of(sums, size).numpy().tobytes() == (total / size).numpy().tobytes()
    assert mean_of(sums, torch.full((3, 1), size)).numpy().tobytes() == (total / size).numpy().tobytes()


@pytest.mark.parametrize("size", [2, 3, 23, 1_021, 1_024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_mean_of_finite_tokens_is_finite(dtype: torch.dtype, size: int) -> None:
    """Two tokens of 3.4e38 summed to infinity, and every attend to their session was refused for ever."""
    most = torch.finfo(dtype).max
    tokens = torch.full((1, size, 4), most, dtype=dtype)
    tokens[:, :, 1] *= -1
    tokens[:, size // 2 :, 2] *= -1
    tokens[:, 1:, 3] = 0
    expected = tokens.double().mean(dim=1)
    for sums in (sum_slots(tokens), sum_slots(tokens, torch.ones(1, size, dtype=torch.bool))):
        key = mean_of(sums, size)
        assert key.isfinite().all()
        torch.testing.assert_close(key.double(), expected, rtol=1e-4, atol=1e-4 * most)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parts", [[23], [1] * 23, [4, 1, 11, 7], [5, 5, 5, 5, 3]])
def test_large_tokens_give_the_same_key_however_they_arrive(parts: list[int], dtype: torch.dtype) -> None:
    torch.manual_seed(7)
    tokens = (torch.rand(23, DIM) * 2 - 1).to(dtype) * torch.finfo(dtype).max
    memory, at_once = (
        Chunks(Arena(DIM, SIZE, dtype, torch.device("cpu"), budget := Budget(1 << 24)), budget) for _ in range(2)
    )
    at_once.append(tokens)
    for part in tokens.split(parts):
        memory.append(part)
    assert memory.keys.isfinite().all() and torch.equal(memory.keys, at_once.keys)
