"""Kernels against each other: equal answers, unchanged arguments; the arena and memory beneath them."""

import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
import pytest
import torch
from numba.core.codegen import get_host_cpu_features

from htm_service.errors import OutOfMemory
from htm_service.kernels import Batch, Kernel, Projections, Search, View, loops, resolve, resolve_kernel
from htm_service.kernels.base import answer_in_steps
from htm_service.kernels.compiled import CompiledKernel
from htm_service.kernels.reference import ReferenceKernel
from htm_service.kernels.resolve import KERNELS
from htm_service.memory import arena as arena_module
from htm_service.memory.arena import Arena, Budget
from htm_service.memory.chunks import Chunks, sum_slots

DIM, SIZE, HEADS = 13, 5, 3
NAMES = [name for name in KERNELS if name != "triton" or "TRITON_INTERPRET" in os.environ]
"""The kernels that run on a CPU."""


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
        make_search(
            other, 3, num_queries, keys=other.keys[4:9], pages=other.page_table[4:9], first=4, start=4 * SIZE, stop=44
        ),
    ]
    check_equal(make_batch(searches, memory.arena, positions=positions))


def test_the_softmax_is_right_over_its_whole_range() -> None:
    logits = np.linspace(-100, 0, 10_007, dtype=np.float32)
    exact = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    got = logits.copy()
    loops._softmax(got)
    far = logits < -80  # from there on float32 has fewer digits, and from -87 none
    assert np.abs(got / exact - 1)[~far].max() < 3e-6
    assert np.abs(got - exact)[far].max() < 1e-36 and not got[logits < -87].any()
    got[5] = np.nan
    loops._softmax(got)
    assert np.isnan(got).all()


@pytest.mark.parametrize("features", [None, ""])
def test_vectors_are_as_wide_as_the_cpu_s_unless_its_features_are_given(
    features: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLVM left half of AVX-512 unused; what NUMBA_CPU_FEATURES says stands."""
    monkeypatch.setattr(numba.config, "CPU_FEATURES", features)
    a, b, out = torch.randn(6, 101).numpy(), torch.randn(5, 101).numpy(), np.empty((6, 5), np.float32)
    dots = numba.njit(fastmath=True)(loops._dots.py_func)  # type: ignore[attr-defined]
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
    shapes = ((DIM, DIM), (DIM,), (HEADS * 2, DIM), (HEADS * 2,), *[(HEADS, 2, DIM)] * 2, (DIM, HEADS * 2), (DIM,))
    projections = Projections(*map(torch.randn, shapes))
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


@pytest.mark.parametrize(
    ("is_there", "version", "capability", "compiler", "reason"),
    [
        (True, "3.7.1", (8, 0), "/usr/bin/cc", None),
        (False, "", (9, 0), "/usr/bin/cc", "not installed"),
        (True, "3.4.0", (9, 0), "/usr/bin/cc", "3.5 is the oldest"),
        (True, "3.10.0", (7, 5), "/usr/bin/cc", r"capability is \(7, 5\)"),
        (True, "3.7.1", (9, 0), None, "needs gcc or clang"),
    ],
)
def test_a_gpu_gets_triton_where_that_can_run(
    is_there: bool,
    version: str,
    capability: tuple[int, int],
    compiler: str | None,
    reason: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "triton" if is_there else None)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("shutil.which", lambda name: compiler)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    (tmp_path / "Python.h").touch()
    device = torch.device("cuda")
    if reason is None:
        assert resolve.why_not_triton(device) is None
    else:
        assert resolve.resolve_kernel(device).name == "reference"
        assert re.search(f"cuda gets the reference kernel.* {reason}", caplog.text)


def test_a_gpu_s_kernel_is_triton_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "why_not_triton", lambda device: None)
    if "triton" in NAMES:
        assert resolve.resolve_kernel(torch.device("cuda")).name == "triton"
    with pytest.raises(KeyError):
        resolve.resolve_kernel(torch.device("cuda"), "tpu")


def test_bad_devices_are_refused() -> None:
    from htm_service.errors import InvalidArgument
    from htm_service.memory.device import choose_device

    assert choose_device("cpu")[0].type == "cpu"
    assert choose_device("auto")[1].startswith("auto: ")
    with pytest.raises(InvalidArgument, match="device is 'tpu'"):
        choose_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(InvalidArgument, match="finds no CUDA device"):
            choose_device("cuda")
