"""Kernels against each other: equal answers, unchanged arguments."""

import os
from dataclasses import replace
from typing import Any

import numba
import numpy as np
import pytest
import torch
from numba.core.codegen import get_host_cpu_features

from htm_service.kernels import loops
from htm_service.kernels.base import Batch, Kernel, Projections, Search, View, answer_in_steps
from htm_service.kernels.compiled import CompiledKernel
from htm_service.kernels.reference import ReferenceKernel
from htm_service.kernels.resolve import KERNELS, resolve_kernel
from htm_service.memory.arena import Arena, Budget
from htm_service.memory.chunks import Chunks

DIM, SIZE, HEADS = 13, 5, 3
NAMES = [name for name in KERNELS if name != "triton" or "TRITON_INTERPRET" in os.environ]
"""The kernels that run on a CPU."""


ENDS: dict[str, Any] = {
    "ends": torch.tensor([[2, 2, 2 * SIZE + 3], [0, -1, 0], [11, -1, 11 * SIZE], [0, 0, 1]]),
    "own_keys": torch.linspace(-3, 3, 4 * DIM).view(4, DIM),
}
"""Of four rows: one sees a chunk in part, one nothing, one all, one a single token."""


def make_arena(limit: int = 1 << 24, dtype: torch.dtype = torch.float32) -> tuple[Arena, Budget]:
    budget = Budget(limit)
    return Arena(DIM, SIZE, dtype, torch.device("cpu"), budget), budget


def make_memory(length: int, dtype: torch.dtype = torch.float32) -> Chunks:
    """A memory of random tokens whose unwritten slots hold NaN: they may hold anything."""
    arena, budget = make_arena(dtype=dtype)
    memory = Chunks(arena, budget)
    memory.append(torch.randn(length, DIM).to(dtype))
    if length % SIZE:
        arena.page(memory.pages[-1])[length % SIZE :] = torch.nan
    return memory


def make_search(memory: Chunks, k: int, num_queries: int = 1, **changes: Any) -> Search:
    """A look at all of a memory, but for `changes`."""
    whole = Search(memory.keys, memory.page_table, 0, 0, memory.length, num_queries, min(k, memory.num_chunks))
    return replace(whole, **changes)


def make_batch(searches: list[Search], arena: Arena, *, positions: bool = False) -> Batch:
    """Random queries for these searches."""
    num_rows = sum(search.num_queries for search in searches)
    table = torch.randn(SIZE, DIM) if positions else None
    heads = torch.randn(num_rows, HEADS, DIM)
    return Batch(View(arena, table, searches, tokens=True), torch.randn(num_rows, DIM), heads)


def check_equal(batch: Batch) -> None:
    """The compiled kernel answers as the reference does, on one core and shared out, and changes nothing."""
    tensors = (batch.summary, batch.heads, *(search.keys for search in batch.view.searches), batch.view.arena.contents)
    before = [None if tensor is None else tensor.nan_to_num(7) for tensor in tensors]
    expected = resolve_kernel(torch.device("cpu"), "reference").attend(batch)
    for num_threads, products_per_thread in ((1, 64), (3, 64), (3, 1 << 20)):
        kernel = CompiledKernel(num_threads, products_per_thread)
        result = kernel.attend(batch)
        assert torch.equal(result.chunk_index, expected.chunk_index)
        assert torch.equal(kernel.select(batch), expected.chunk_index)
        for field in ("chunk_weight", "z", "token_weight", "token_score"):
            got, want = getattr(result, field), getattr(expected, field)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)
        quiet = kernel.attend(replace(batch, view=replace(batch.view, tokens=False)))
        assert torch.equal(quiet.z.nan_to_num(7), result.z.nan_to_num(7)) and quiet.token_weight is None
    for tensor, copy in zip(tensors, before, strict=True):
        assert tensor is None or copy is None or torch.equal(tensor.nan_to_num(7), copy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize(("num_queries", "k", "length"), [(1, 1, 3), (1, 7, 17 * SIZE), (19, 3, 16 * SIZE + 2)])
def test_compiled_answers_equal_the_reference(
    num_queries: int, k: int, length: int, positions: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(length + k)
    memory = make_memory(length, dtype)
    other = Chunks(memory.arena, Budget(1 << 20))
    other.append(torch.randn(11 * SIZE, DIM).to(dtype))
    searches = [
        make_search(memory, k, num_queries),
        make_search(other, 2),
        make_search(Chunks(memory.arena, Budget(1 << 20)), k, 2),  # an empty session
        make_search(other, 9, num_queries, start=SIZE + 2, stop=6 * SIZE + 1),
        make_search(other, 9, num_queries, token_mask=torch.rand(11 * SIZE) < 0.4),
        make_search(other, 9, num_queries, token_mask=torch.zeros(11 * SIZE, dtype=torch.bool)),
        make_search(other, 9, num_queries, hidden=torch.rand(11) < 0.5),
        make_search(other, 9, num_queries, hidden=torch.rand(num_queries, 11) < 0.5),
        make_search(other, 9, 4, **ENDS),
        make_search(other, 9, 4, hidden=torch.rand(4, 11) < 0.5, token_mask=torch.rand(11 * SIZE) < 0.7, **ENDS),
        make_search(
            other, 3, num_queries, keys=other.keys[4:9], pages=other.page_table[4:9], first=4, start=4 * SIZE, stop=44
        ),
    ]
    check_equal(make_batch(searches, memory.arena, positions=positions))


def test_the_softmax_is_right_over_its_whole_range() -> None:
    """Of many chunks' logits, best first; the contents do not matter."""
    logits = np.linspace(0, -100, 10_007, dtype=np.float32)
    exact = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    keys, summary = torch.zeros(len(logits), DIM), torch.zeros(1, DIM)
    keys[:, 0], summary[0, 0] = torch.from_numpy(logits), 1.0
    arena, _ = make_arena()
    search = Search(keys, torch.tensor(arena.allocate(1) * len(keys)), 0, 0, 0, 1, len(keys))
    got = CompiledKernel(1).attend(Batch(View(arena, None, [search]), summary, torch.zeros(1, HEADS, DIM)))
    weight = got.chunk_weight[0].numpy()
    far = logits < -80  # from there on float32 has fewer digits, and from -87 none
    assert np.abs(weight / exact - 1)[~far].max() < 3e-6
    assert np.abs(weight - exact)[far].max() < 1e-36 and not weight[logits < -87].any()


@pytest.mark.parametrize("features", [None, ""])
def test_vectors_are_as_wide_as_the_cpu_s_unless_its_features_are_given(
    features: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLVM left half of AVX-512 unused; what NUMBA_CPU_FEATURES says stands."""
    monkeypatch.setattr(numba.config, "CPU_FEATURES", features)
    a, b, out = torch.randn(6, 101).numpy(), torch.randn(5, 101).numpy(), np.empty((6, 5), np.float32)
    dots = numba.njit(fastmath=True)(loops.dots.py_func)  # type: ignore[attr-defined]
    dots(a, b, out)
    torch.testing.assert_close(torch.tensor(out), torch.tensor(a @ b.T), rtol=1e-5, atol=1e-5)
    assert (loops.WIDE_VECTORS in dots.inspect_llvm(dots.signatures[0])) == (features is None)
    if features is None:
        is_there = "+avx512f" in get_host_cpu_features()  # type: ignore[no-untyped-call]
        assert ("zmm" in dots.inspect_asm(dots.signatures[0])) == is_there


@pytest.mark.parametrize("num_keys", [1, 5, 63, 64, 65, 200])
@pytest.mark.parametrize("num_queries", [1, 3, 4, 9])
def test_compiled_selection_equals_the_reference(num_keys: int, num_queries: int) -> None:
    torch.manual_seed(num_keys * num_queries)
    memory = make_memory(num_keys * SIZE)
    searches = [
        make_search(memory, 7, num_queries, hidden=hidden)
        for hidden in (None, torch.rand(num_keys) < 0.3, torch.rand(num_queries, num_keys) < 0.3)
    ]
    check_equal(make_batch(searches, memory.arena))


def logits_of(rows: list[list[float]], k: int, hidden: torch.Tensor | None = None) -> Batch:
    """A batch whose logits are `rows`: the summary keys are unit vectors."""
    arena, budget = make_arena()
    memory = Chunks(arena, budget)
    memory.append(torch.randn(len(rows[0]) * SIZE, DIM))
    summary = torch.nn.functional.pad(torch.tensor(rows), (0, DIM - len(rows[0])))
    search = make_search(memory, k, len(rows), keys=torch.eye(DIM)[: len(rows[0])].contiguous(), hidden=hidden)
    return Batch(View(arena, None, [search]), summary, torch.randn(len(rows), HEADS, DIM))


def make_projections() -> Projections:
    """Of HEADS heads of width 2."""
    shapes = ((DIM, DIM), (DIM,), (HEADS * 2, DIM), (HEADS * 2,), *[(HEADS, 2, DIM)] * 2, (DIM, HEADS * 2), (DIM,))
    return Projections(*map(torch.randn, shapes))


def all_kernels() -> list[Kernel]:
    """Each by its name, and the compiled one as it shares out rows, and the keys of the smallest batch."""
    named = [resolve_kernel(torch.device("cpu"), name) for name in NAMES]
    return [*named, CompiledKernel(3), CompiledKernel(3, products_per_thread=1)]


@pytest.mark.parametrize("kernel", all_kernels(), ids=lambda kernel: kernel.name)
def test_selection_is_descending_and_ties_go_to_the_lower_index(kernel: Kernel) -> None:
    rows = [[1.0, 3.0, 3.0, 2.0, 3.0], [5.0, 1.0, 2.0, 4.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]]
    found = kernel.attend(logits_of(rows, 2))
    assert found.chunk_index.tolist() == [[1, 2], [0, 3], [0, 1]]
    expected = torch.tensor([[3.0, 3.0], [5.0, 4.0], [0.0, 0.0]]).softmax(dim=-1)
    torch.testing.assert_close(found.chunk_weight, expected)
    found = kernel.attend(logits_of(rows, 5))
    assert found.chunk_index.tolist() == [[1, 2, 4, 3, 0], [0, 3, 4, 2, 1], [0, 1, 2, 3, 4]]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # as below
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", all_kernels(), ids=lambda kernel: kernel.name)
def test_from_queries_to_answers_in_one_call(kernel: Kernel, dtype: torch.dtype) -> None:
    """Equal to the reference's steps; nothing of what it is given changes, a row without a chunk is 0."""
    torch.manual_seed(8)
    memory = make_memory(7 * SIZE + 2, dtype)
    empty = Chunks(memory.arena, Budget(1 << 20))
    all_hidden = torch.ones(8, dtype=torch.bool)
    searches = [
        make_search(memory, 3, 19),
        make_search(empty, 3, 2),
        make_search(memory, 5, 8, start=SIZE + 1),
        make_search(memory, 2, 1, hidden=all_hidden),
    ]
    projections = make_projections()
    queries = torch.randn(30, DIM)
    given = [tensor.clone() for tensor in (queries, *projections)]
    for tokens in (True, False):
        view = View(memory.arena, torch.randn(SIZE, DIM) if tokens else None, searches, tokens)
        wanted, expected = answer_in_steps(ReferenceKernel(), projections, queries, view)
        attended, output = kernel.answer(projections, queries, view)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        assert output[[19, 20, 29]].eq(0).all() and output.any(dim=1).sum() == 27
        assert torch.equal(attended.chunk_index, wanted.chunk_index)
        for field in ("chunk_weight", "z", "token_weight", "token_score") if tokens else ("chunk_weight", "z"):
            torch.testing.assert_close(getattr(attended, field), getattr(wanted, field), rtol=1e-4, atol=1e-5)
        assert (attended.token_weight is None) == (attended.token_score is None) == (not tokens)
    assert all(map(torch.equal, given, (queries, *projections)))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy in Triton's interpreter, of inf x 0
@pytest.mark.parametrize("kernel", all_kernels(), ids=lambda kernel: kernel.name)
def test_no_hidden_chunk_is_taken_and_an_overflow_is_told(kernel: Kernel) -> None:
    rows = [[4.0, 3.0, 2.0], [4.0, 3.0, 2.0], [torch.inf, 0.0, 0.0], [0.0, 0.0, torch.inf]]
    hidden = torch.tensor([[True, False, True], [True, True, True], [False, True, True], [False, True, False]])
    found = kernel.attend(logits_of(rows, 2, hidden))
    assert found.chunk_index[:2].tolist() == [[1, -1], [-1, -1]]
    assert found.chunk_weight[:2].tolist() == [[1, 0], [0, 0]]
    assert found.z[1].eq(0).all() and found.chunk_weight[2:].isnan().all()


@pytest.mark.parametrize("products_per_thread", [1, 1 << 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_that_is_called_is_compiled_ahead(dtype: torch.dtype, products_per_thread: int) -> None:
    """Else a later request would wait for seconds: each loop knows the types of `loops.signatures` and no others."""
    kernel = CompiledKernel(2, products_per_thread)
    kernel.warm_up()
    arena = Arena(DIM, SIZE, dtype, torch.device("cpu"), Budget(1 << 20))
    search = Search(torch.randn(2, DIM), torch.tensor(arena.allocate(2)), 0, 0, SIZE, 7, 1, torch.ones(SIZE).bool())
    projections = make_projections()
    for positions, tokens in ((None, False), (torch.randn(SIZE, DIM), True)):
        view = View(arena, positions, [search], tokens)
        summary, heads = kernel.fold(projections, torch.randn(7, DIM))
        kernel.select(Batch(view, summary, heads))
        kernel.project(projections, kernel.attend(Batch(view, summary, heads)).z)
        kernel.answer(projections, torch.randn(7, DIM), view)
    for loop, types in loops.signatures():
        others = {tuple(map(numba.types.unliteral, known)) for known in loop.signatures} - {types}
        assert not others, f"{loop} was compiled for {others}"
