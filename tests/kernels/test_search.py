"""Search kernels against a float64 scan of all tokens, and against each other: equal answers, unchanged arguments."""

import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from htm_service.kernels.compiled import CompiledKernel
from htm_service.kernels.search.base import Found, SearchKernel, TokenSearch
from htm_service.kernels.search.compiled import CompiledSearch
from htm_service.kernels.search.reference import ReferenceSearch
from htm_service.memory.arena import Arena, Budget
from htm_service.memory.chunks import Chunks
from htm_service.memory.sketches.code import Rotation, sketch

CPU = torch.device("cpu")
KERNELS: tuple[SearchKernel, ...] = (
    ReferenceSearch(),
    CompiledSearch(CompiledKernel(1)),
    CompiledSearch(CompiledKernel(3), bytes_per_thread=64),
)


def memory_of(tokens: Tensor, size: int, dtype: torch.dtype = torch.float32) -> Chunks:
    """A session's chunks; what was never written holds NaN."""
    budget = Budget(1 << 28)
    chunks = Chunks(Arena(tokens.shape[1], size, dtype, CPU, budget), budget)
    chunks.append(tokens.to(dtype))
    if chunks.length % size:
        chunks.page(chunks.num_chunks - 1)[chunks.length % size :] = torch.nan
    return chunks


def search_of(chunks: Chunks, num_wanted: int, num_queries: int = 1, **changes: Any) -> TokenSearch:
    """A search through all of a session, all sealed chunks of which have sketches."""
    size, dim = chunks.chunk_size, chunks.arena.dim
    bits = torch.zeros(chunks.num_chunks, -(-dim // 64), size, dtype=torch.int64)
    factors = torch.full((chunks.num_chunks, size), torch.nan)
    sealed = slice(0, chunks.num_sealed)
    if chunks.num_sealed:
        contents = chunks.arena.take(chunks.page_table[sealed])
        bits[sealed], factors[sealed] = sketch(contents, chunks.keys[sealed], Rotation(dim, CPU))
    whole = TokenSearch(
        *(chunks.keys, chunks.page_table, bits, factors, 0, 0, chunks.length, num_queries, num_wanted, 8 * num_wanted)
    )
    return replace(whole, **changes)


def find(kernel: SearchKernel, chunks: Chunks, searches: list[TokenSearch], queries: Tensor, **more: Any) -> Found:
    """What a kernel finds; it changes nothing."""
    rotated = Rotation(queries.shape[1], CPU).rotate(queries)
    used = [queries, rotated]
    for search in searches:
        tensors = (search.keys, search.pages, search.bits, search.factors, search.token_mask, search.known)
        used += [tensor for tensor in tensors if tensor is not None]
    before = [tensor.clone() for tensor in used]
    found = kernel.find(chunks.arena, searches, queries, rotated, more.get("slots"))
    for tensor, copy in zip(used, before, strict=True):
        assert torch.equal(tensor.nan_to_num(7), copy.nan_to_num(7))
    return found


def exact(chunks: Chunks, search: TokenSearch, queries: Tensor, slots: Tensor | None = None) -> Tensor:
    """The scores [Q, n] of all tokens in float64, -inf for those that are not visible."""
    tokens = chunks.arena.take(chunks.page_table).flatten(0, 1)[: chunks.length].double()
    scores = queries.double() @ tokens.T
    if slots is not None:
        scores += slots.double()[:, torch.arange(chunks.length) % chunks.chunk_size]
    hidden = torch.ones(chunks.length, dtype=torch.bool)
    hidden[search.start : search.stop] = False
    if search.token_mask is not None:
        hidden[search.start :] |= ~search.token_mask[: chunks.length - search.start]
    return scores.masked_fill(hidden, -torch.inf)


def share_found(found: Found, scores: Tensor, num_wanted: int) -> float:
    """How much of the best there are was found, by their scores: equal tokens are as good as each other."""
    num = min(num_wanted, int((scores[0] > -torch.inf).sum()))
    if not num:
        return 1.0
    worst = scores.sort(dim=1, descending=True).values[:, num - 1 : num]
    tolerance = 1e-5 * scores.masked_fill(scores == -torch.inf, 0.0).abs().amax()
    got = scores.gather(1, found.position[:, :num].clamp(min=0)).masked_fill(found.position[:, :num] < 0, -torch.inf)
    return float((got >= worst - tolerance).double().mean())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 4, 5, 37 * 5, 203])
def test_without_sketches_all_is_scored(kernel: SearchKernel, dtype: torch.dtype, length: int) -> None:
    torch.manual_seed(length)
    chunks = memory_of(torch.randn(length, 13), 5, dtype)
    queries, slots = torch.randn(7, 13), torch.randn(7, 5)
    for changes in (
        {},
        {"start": min(2, length), "stop": max(1, length - 1)},
        {"token_mask": torch.rand(length) < 0.3},
        {"token_mask": torch.zeros(length, dtype=torch.bool)},
        {"start": length, "stop": length},
    ):
        for num_wanted in (1, 3, 300):
            search = search_of(chunks, num_wanted, 7, bits=None, factors=None, **changes)
            found = find(kernel, chunks, [search], queries, slots=slots)
            scores = exact(chunks, search, queries, slots)
            best, index = scores.sort(dim=1, descending=True, stable=True)
            num = min(num_wanted, length)
            torch.testing.assert_close(found.score[:, :num].double(), best[:, :num], rtol=1e-4, atol=1e-4)
            assert torch.equal(found.position[:, :num], index[:, :num].where(best[:, :num] > -torch.inf, -1))
            assert (found.position[:, num:] == -1).all() and (found.score[:, num:] == -torch.inf).all()
            assert not len(found.lacking[0])


@pytest.mark.parametrize("kernel", KERNELS)
def test_ties_go_to_the_lower_position(kernel: SearchKernel) -> None:
    token = torch.randn(1, 130)
    chunks = memory_of(torch.cat([token.expand(40, 130), torch.zeros(7, 130), token.expand(40, 130)]), 7)
    for changes in ({"bits": None, "factors": None}, {"num_scored": 200}):
        found = find(kernel, chunks, [search_of(chunks, 50, **changes)], token)
        assert found.position[0].tolist() == [*range(40), *range(47, 57)]


@st.composite
def memories(draw: Any) -> tuple[Tensor, Tensor]:
    """Tokens [n, D] of many kinds, easy and hard for sketches, and queries [Q, D]."""
    dim = draw(st.sampled_from([128, 131, 256]))
    torch.manual_seed(draw(st.integers(0, 10_000)))
    length = draw(st.integers(200, 2_500))
    kind = draw(st.sampled_from(["random", "clustered", "duplicated", "flat", "lengths", "one far away", "sparse"]))
    tokens = torch.randn(length, dim)
    if kind == "clustered":
        tokens = torch.randn(9, dim)[torch.randint(9, (length,))] + 0.2 * tokens
    elif kind == "duplicated":
        tokens = tokens[torch.randint(max(1, length // 20), (length,))]
    elif kind == "flat":
        tokens = torch.randn(length, 3) @ torch.randn(3, dim)
    elif kind == "lengths":
        tokens = tokens * torch.logspace(-3, 3, length)[torch.randperm(length), None]
    elif kind == "one far away":
        tokens[length // 2] *= 1e4
    elif kind == "sparse":
        tokens = tokens * (torch.rand(length, dim) < 0.02)
    near = tokens[torch.randint(length, (5,))] + 0.3 * torch.randn(5, dim)
    return tokens, torch.cat([near, torch.randn(5, dim)])


@settings(max_examples=40, deadline=None)
@given(memories(), st.sampled_from([1, 8, 50]), st.sampled_from([5, 32]))
def test_by_sketches_nearly_all_that_is_best_is_found(made: tuple[Tensor, Tensor], num_wanted: int, size: int) -> None:
    tokens, queries = made
    chunks = memory_of(tokens, size)
    search = search_of(chunks, num_wanted, len(queries))
    scores = exact(chunks, search, queries)
    for kernel in KERNELS:
        found = find(kernel, chunks, [search], queries)
        assert share_found(found, scores, num_wanted) >= 0.9  # of one draw; on average see below


def test_by_sketches_at_least_98_percent_is_found_on_average() -> None:
    torch.manual_seed(3)
    shares = []
    for dim, size, length in ((128, 32, 6_000), (512, 32, 6_000), (384, 16, 3_001)):
        for tokens in (torch.randn(length, dim), torch.randn(60, dim).repeat(length // 60, 1) + torch.randn(1, dim)):
            chunks = memory_of(tokens + 0.1 * torch.randn_like(tokens), size)
            queries = torch.cat([torch.randn(20, dim), tokens[:20] + torch.randn(20, dim)])
            search = search_of(chunks, 10, len(queries))
            scores = exact(chunks, search, queries)
            shares += [share_found(find(kernel, chunks, [search], queries), scores, 10) for kernel in KERNELS]
    assert min(shares) >= 0.98, shares


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dim", [128, 512])
def test_data_made_against_the_rotation_is_found_less_well(kernel: SearchKernel, dim: int) -> None:
    """Residuals that P turns into two spikes: their signs say little. The page says how well they are found."""
    torch.manual_seed(0)
    turned = torch.linalg.inv(Rotation(dim, CPU).rotate(torch.eye(dim)))
    spikes = turned[torch.randint(dim, (3_000,))] * torch.randn(3_000, 1) + turned[torch.randint(dim, (3_000,))]
    chunks = memory_of(torch.stack([spikes, -spikes], dim=1).flatten(0, 1), 32)  # whose means are zero
    queries = torch.randn(20, dim)
    search = search_of(chunks, 8, len(queries))
    scores = exact(chunks, search, queries)
    assert share_found(find(kernel, chunks, [search], queries), scores, 8) >= 0.85
    whole = replace(search, num_scored=chunks.length)
    assert share_found(find(kernel, chunks, [whole], queries), scores, 8) == 1


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_several_sessions_ranges_and_masks_in_one_batch(kernel: SearchKernel, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    chunks = memory_of(torch.randn(1_003, 130), 7, dtype)
    other = Chunks(chunks.arena, Budget(1 << 24))
    other.append(torch.randn(500, 130).to(dtype))
    empty = Chunks(chunks.arena, Budget(1 << 24))
    searches = [
        search_of(chunks, 10, 3),
        search_of(empty, 4, 2),
        search_of(other, 5, 1, start=3, stop=400),
        search_of(other, 5, 2, token_mask=torch.rand(500) < 0.05),
        search_of(chunks, 20, 1, token_mask=torch.rand(1_003) < 0.5, start=10),
    ]
    owners = [chunks, empty, other, other, chunks]
    queries, slots = torch.randn(9, 130), torch.randn(9, 7)
    found = find(kernel, chunks, searches, queries, slots=slots)
    assert found.position.shape == (9, 20)
    row = 0
    for search, owner in zip(searches, owners, strict=True):
        rows = slice(row, row := row + search.num_queries)
        part = Found(found.position[rows], found.score[rows], [])
        if owner is empty:
            assert (part.position == -1).all()
            continue
        scores = exact(owner, search, queries[rows], slots[rows])
        assert share_found(part, scores, search.num_wanted) >= 0.9
        num = min(search.num_wanted, int((scores[0] > -torch.inf).sum()))
        expected = scores.gather(1, part.position[:, :num])
        torch.testing.assert_close(part.score[:, :num].double(), expected, rtol=1e-4, atol=1e-4)
        assert (part.score[:, :num].diff(dim=1) <= 0).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_not_here_is_named_and_scores_that_are_known_need_no_contents(kernel: SearchKernel) -> None:
    torch.manual_seed(7)
    chunks = memory_of(torch.randn(1_000, 128), 10)
    queries = torch.randn(2, 128)
    search = search_of(chunks, 5, 2, num_scored=10)
    whole = find(kernel, chunks, [search], queries)
    scores = exact(chunks, search, queries)
    pages = search.pages.clone()
    lacking: set[int] = set()
    known = torch.full((2, 1_000), torch.nan)
    for _ in range(6):  # what is best is known by and by
        pages[:] = -1
        found = find(kernel, chunks, [replace(search, pages=pages, known=known)], queries)
        if not len(found.lacking[0]):
            break
        new = set(found.lacking[0].tolist())
        assert not new & lacking
        lacking |= new
        for chunk in new:
            known[:, chunk * 10 : chunk * 10 + 10] = scores[:, chunk * 10 : chunk * 10 + 10].float()
    assert torch.equal(found.position, whole.position)
    torch.testing.assert_close(found.score, whole.score)
    assert 2 <= len(lacking) < 100
    unsketched = replace(search, pages=pages, bits=None, factors=None)
    assert len(find(kernel, chunks, [unsketched], queries).lacking[0]) == 100
    known[:] = scores.float()
    found = find(kernel, chunks, [replace(unsketched, known=known)], queries)
    assert found.position[0].tolist() == scores[0].argsort(descending=True)[:5].tolist()


@pytest.mark.parametrize("kernel", KERNELS)
def test_scores_that_overflow_are_told(kernel: SearchKernel) -> None:
    tokens = torch.randn(60, 128)
    tokens[33] = 3e38
    chunks = memory_of(tokens, 10)
    queries = torch.stack([torch.randn(128), torch.full((128,), 10.0), torch.zeros(128)])
    for changes in ({}, {"bits": None, "factors": None}):
        found = find(kernel, chunks, [search_of(chunks, 60, 3, **changes)], queries)
        assert found.score[1].isnan().all() and (found.position[1] == -1).all()
        assert not found.score[2].isnan().any() and found.position[2].tolist() == list(range(60))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_chunk_whose_key_overflows_is_looked_into(kernel: SearchKernel, sign: float) -> None:
    """Where its product with the query was minus infinity, the other tokens of its chunk were not found, and
    nobody was told.
    """
    torch.manual_seed(6)
    tokens = torch.randn(60, 128)
    tokens[33:37] = sign * 3e38
    chunks = memory_of(tokens, 10)
    query = torch.full((1, 128), 10.0)
    search = search_of(chunks, 60)
    for one in (search, replace(search, bits=None, factors=None)):
        found = find(kernel, chunks, [one], query)
        assert found.score.isnan().all() and (found.position == -1).all()


def test_lists_are_as_long_as_what_is_kept_in_them() -> None:
    """Where nothing is guessed a row had places for all guesses it might have made: 400 rows took a gigabyte."""
    chunks = memory_of(torch.ones(2_000, 1), 32)
    search = search_of(chunks, 10, 200, bits=None, factors=None, num_scored=100_000)
    find(KERNELS[1], chunks, [search], torch.ones(200, 1))
    tracemalloc.start()
    try:
        find(KERNELS[1], chunks, [search], torch.ones(200, 1))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20, peak


def test_kernels_agree_to_the_position() -> None:
    torch.manual_seed(11)
    chunks = memory_of(torch.randn(2_003, 192), 32)
    queries = torch.randn(16, 192)
    search = search_of(chunks, 10, 16)
    first, *others = (find(kernel, chunks, [search], queries) for kernel in KERNELS)
    for other in others:
        same = (first.position == other.position).double().mean()
        assert same > 0.97, float(same)  # the compiled ones quantise the query
    assert np.isfinite(first.score.numpy()).all()
