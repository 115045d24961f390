"""Every kernel with finite numbers as large as there are: answered or told, never wrong, and only who is concerned."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from htm_service.kernels.base import Attended, Batch, Kernel, Search, View
from htm_service.kernels.compiled import CompiledKernel
from htm_service.kernels.resolve import KERNELS, resolve_kernel
from htm_service.memory.arena import Arena, Budget
from htm_service.memory.chunks import Chunks

DIM, SIZE, HEADS, CHUNKS, ROWS = 3, 2, 2, 3, 4
MOST = float(np.finfo(np.float32).max)
NUMBERS = (0.0, 1.0, -1.0, 0.5, 1e-45, 1e-20, 1e18, -1e19, 1e20, 1e38, -1e38, MOST, -MOST)
CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
"""Triton's interpreter computes with numpy, which warns of overflows; a GPU makes them in silence."""


INTERPRETED = "TRITON_INTERPRET" in os.environ
if INTERPRETED:
    from tests.kernels import interpreter

    assert interpreter.INTERPRETED


def kernels() -> list[Kernel]:
    """Those that run on a CPU; the compiled one on one core, and shared out as far as it goes."""
    names = [name for name in KERNELS if name != "triton" or INTERPRETED]
    return [*(resolve_kernel(CPU, name) for name in names), CompiledKernel(3, products_per_thread=1)]


QUICK = [kernel for kernel in kernels() if kernel.name != "triton"]


def memory_of(tokens: Tensor) -> Chunks:
    """A session of these tokens [n, D] in an arena of their dtype."""
    budget = Budget(1 << 22)
    memory = Chunks(Arena(tokens.shape[1], SIZE, tokens.dtype, CPU, budget), budget)
    memory.append(tokens)
    return memory


def whole(memory: Chunks, num_queries: int, mask: Tensor | None = None) -> Search:
    """All chunks, of which one less is taken."""
    return Search(memory.keys, memory.page_table, 0, 0, memory.length, num_queries, memory.num_chunks - 1, mask)


def told(attended: Attended) -> Tensor:
    """Which rows [R] say that something overflowed."""
    return ~(attended.chunk_weight.isfinite().all(dim=1) & attended.z.isfinite().flatten(1).all(dim=1))


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """One session of extreme tokens that some rows look at; some of its tokens are hidden."""
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    numbers = torch.tensor(NUMBERS).clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    seed = draw(st.integers(0, 2**20))
    kinds = draw(st.sampled_from([4, len(NUMBERS)]))  # of the tokens: ordinary ones, or all
    random = torch.Generator().manual_seed(seed)

    def some(*shape: int, kinds: int = len(NUMBERS)) -> Tensor:
        return numbers[torch.randint(kinds, shape, generator=random)]

    tokens = some(CHUNKS * SIZE - 1, DIM, kinds=kinds).to(dtype)
    mask = torch.rand(len(tokens), generator=random) < 0.8 if draw(st.booleans()) else None
    memory = memory_of(tokens)
    positions = torch.rand(SIZE, DIM, generator=random) if draw(st.booleans()) else None
    return Batch(
        View(memory.arena, positions, [whole(memory, ROWS, mask)], tokens=True), some(ROWS, DIM), some(ROWS, HEADS, DIM)
    )


def check_what_is_not_told(kernel: Kernel, batch: Batch) -> None:
    """Weights that sum to one, and a mean that lies among the tokens; told is only what passes the largest float32."""
    attended, (search,) = kernel.attend(batch), batch.view.searches
    is_told = told(attended)
    tokens = batch.view.arena.take(search.pages).double()  # [M, C, D]
    place = torch.arange(CHUNKS * SIZE).view(CHUNKS, SIZE)
    visible = place < search.stop
    if search.token_mask is not None:
        visible &= search.token_mask[place.clamp(max=search.stop - 1)]
    y = tokens.where(visible[..., None], 0.0) + (0.0 if batch.view.positions is None else batch.view.positions)
    reach = y.abs() + 1  # of the sums that a kernel makes on the way: positions may be added apart
    summary, heads = batch.summary.double(), batch.heads.double()
    assert attended.token_weight is not None and attended.token_score is not None
    for row in range(ROWS):
        largest = max(
            float((summary[row].abs() * search.keys.double().abs()).sum(-1).max()),
            float(torch.einsum("hd,mcd->hmc", heads[row].abs(), reach).max()),
        )
        if is_told[row]:
            assert largest > MOST / 2, f"row {row} was told of, and its largest logit is {largest:g}"
            continue
        taken = attended.chunk_index[row]
        assert attended.chunk_weight[row].sum().item() == pytest.approx(1.0, abs=1e-5)
        seen = visible[taken]
        if not seen.any(dim=1).all():
            continue  # a chunk without a visible token would be hidden by whoever plans a batch
        shares = attended.chunk_weight[row, :, None] * attended.token_weight[row]
        assert shares.sum().item() == pytest.approx(1.0, abs=1e-4)
        assert attended.token_score[row][seen].isfinite().all()
        among = y[taken][seen]  # [tokens, D]
        slack = 1e-5 * among.abs().max(dim=0).values + 1e-6
        assert (attended.z[row] >= among.min(dim=0).values - slack).all()
        assert (attended.z[row] <= among.max(dim=0).values + slack).all()


@pytest.mark.parametrize("kernel", QUICK, ids=lambda kernel: kernel.name)
@given(batch=batches())
@settings(max_examples=120, deadline=None, derandomize=True)
def test_what_is_not_told_is_right(kernel: Kernel, batch: Batch) -> None:
    check_what_is_not_told(kernel, batch)


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
@given(batch=batches())
@settings(max_examples=8, deadline=None, derandomize=True)
def test_what_triton_does_not_tell_is_right(batch: Batch) -> None:
    check_what_is_not_told(resolve_kernel(CPU, "triton"), batch)


@pytest.mark.parametrize("kernel", QUICK, ids=lambda kernel: kernel.name)
@given(batch=batches(), place=st.integers(0, ROWS - 1))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_row_answers_alike_whatever_the_others_are(kernel: Kernel, batch: Batch, place: int) -> None:
    """Of one batch, beside a session of ordinary tokens."""
    (search,) = batch.view.searches
    alone = Batch(
        replace(batch.view, searches=[replace(search, num_queries=1)]),
        batch.summary[place : place + 1],
        batch.heads[place : place + 1],
    )
    expected, found = kernel.attend(alone), kernel.attend(batch)
    assert told(expected)[0] == told(found)[place]
    if not told(expected)[0]:
        assert torch.equal(expected.chunk_index[0], found.chunk_index[place])
        for name in ("chunk_weight", "z", "token_weight", "token_score"):
            torch.testing.assert_close(getattr(found, name)[place], getattr(expected, name)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", kernels(), ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("number", [MOST, -MOST])
def test_a_mean_of_the_largest_tokens_is_answered(kernel: Kernel, number: float) -> None:
    """Shares such as a third are rounded up: their sum times the largest number was infinity."""
    budget = Budget(1 << 22)
    memory = Chunks(Arena(DIM, 64, torch.float32, CPU, budget), budget)
    memory.append(torch.full((64, DIM), number))
    heads = torch.zeros(1, HEADS, DIM)
    searches = [replace(whole(memory, 1), stop=num_tokens, k=1) for num_tokens in (1, 3, 7, 11, 23, 41, 64)]
    heads = heads.expand(len(searches), -1, -1).contiguous()
    z = kernel.attend(Batch(View(memory.arena, None, searches), heads[:, 0].contiguous(), heads)).z
    torch.testing.assert_close(z, torch.full_like(z, number), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kernel", kernels(), ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_logit_in_a_chunk_that_overflows_is_told(kernel: Kernel, sign: float) -> None:
    """One of -infinity counted as a token that is not visible: with several heads its weight was left out."""
    memory = memory_of(torch.tensor([[1e30, 0, 0], [0, 0, 0]]))
    heads = torch.tensor([[[sign * 1e20, 0, 0], [0, 0, 0]]])
    search = replace(whole(memory, 1), k=1)
    for mask, is_told in ((None, True), ([True, True], True), ([False, True], False)):
        seen = replace(search, token_mask=None if mask is None else torch.tensor(mask))
        found = kernel.attend(Batch(View(memory.arena, None, [seen]), torch.zeros(1, DIM), heads))
        assert bool(told(found).all()) == is_told


@pytest.mark.parametrize("kernel", kernels(), ids=lambda kernel: kernel.name)
def test_the_mean_over_heads_of_large_scores_is_finite(kernel: Kernel) -> None:
    """Two heads whose logits are 3e38 each: their sum is infinity, their mean is not."""
    memory = memory_of(torch.tensor([[1.0, 0, 0], [2.0, 0, 0]]))
    heads = torch.tensor([[[1.5e38, 0, 0], [1.5e38, 0, 0]]])
    search = replace(whole(memory, 1), k=1)
    found = kernel.attend(Batch(View(memory.arena, None, [search], tokens=True), torch.zeros(1, DIM), heads))
    assert found.token_score is not None
    torch.testing.assert_close(found.token_score, torch.tensor([[[1.5e38, 3e38]]]))
