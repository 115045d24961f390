"""The Triton kernel: the reference's answers, on a GPU when there is one, else in the interpreter; and it compiles."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from htm_service.config import EngineConfig
from htm_service.engine import Engine
from htm_service.kernels.base import Batch, Projections, Search, View
from htm_service.kernels.reference import ReferenceKernel
from htm_service.kernels.triton_gpu import TritonKernel
from htm_service.memory.arena import Arena, Budget
from htm_service.memory.chunks import Chunks
from htm_service.records import AppendRequest, AttendRequest, CreateRequest
from storage.resolve import open_store
from tests.engine.models import write_model
from tests.kernels.interpreter import INTERPRETED
from tests.names import named
from tests.reference import htm_reference, relative_error

DIM, SIZE, HEADS = 13, 5, 3
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="on a GPU; TRITON_INTERPRET=1 to interpret")),
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="no GPU")],
    ),
]
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
"""The interpreter computes with numpy what is masked afterwards; a GPU does so in silence."""


class Scene:
    """Memories in one arena, and searches of them, on a device."""

    def __init__(self, device: str, dtype: torch.dtype = torch.float32, dim: int = DIM, size: int = SIZE) -> None:
        torch.manual_seed(dim * size)
        self.arena = Arena(dim, size, dtype, torch.device(device), Budget(1 << 20))
        self.searches: list[Search] = []

    def memory(self, length: int) -> Chunks:
        """Random tokens; slots that were never written hold NaN: they may hold anything."""
        memory = Chunks(self.arena, Budget(1 << 22))
        memory.append(torch.randn(length, self.arena.dim).to(self.arena.dtype))
        if length % self.arena.chunk_size:
            self.arena.page(memory.pages[-1])[length % self.arena.chunk_size :] = torch.nan
        return memory

    def search(self, memory: Chunks, k: int, num_queries: int = 1, **changes: Any) -> None:
        """A look at all of a memory, but for `changes`."""
        on_device: dict[str, Any] = {
            name: value.to(self.arena.device) if isinstance(value, Tensor) else value for name, value in changes.items()
        }
        whole = Search(memory.keys, memory.page_table, 0, 0, memory.length, num_queries, min(k, memory.num_chunks))
        self.searches.append(replace(whole, **on_device))

    def batch(self, num_heads: int = HEADS, *, positions: bool = False) -> Batch:
        """Random queries for the searches."""
        num_rows, arena = sum(search.num_queries for search in self.searches), self.arena
        summary, heads = torch.randn(num_rows, arena.dim), torch.randn(num_rows, num_heads, arena.dim)
        table = torch.randn(arena.chunk_size, arena.dim).to(arena.device) if positions else None
        view = View(arena, table, self.searches, tokens=True)
        return Batch(view, summary.to(arena.device), heads.to(arena.device))


def ragged(device: str, dtype: torch.dtype = torch.float32, *, positions: bool = False) -> Batch:
    """Sessions of several lengths, and every way to hide their tokens and chunks."""
    scene = Scene(device, dtype)
    short, other = scene.memory(3 * SIZE + 2), scene.memory(7 * SIZE)
    scene.search(short, 3, 2)
    scene.search(other, 1)
    scene.search(scene.memory(0), 7, 2)
    scene.search(other, 7, start=SIZE + 2, stop=6 * SIZE + 1)
    scene.search(other, 7, token_mask=torch.rand(7 * SIZE) < 0.4)
    scene.search(other, 2, token_mask=torch.zeros(7 * SIZE, dtype=torch.bool))
    scene.search(other, 6, 2, hidden=torch.rand(7) < 0.5)
    scene.search(other, 6, 2, hidden=torch.rand(2, 7) < 0.5)
    ends = torch.tensor([[2, 2, 2 * SIZE + 3], [0, -1, 0], [7, -1, 7 * SIZE], [0, 0, 1]])
    for mask in (None, torch.rand(7 * SIZE) < 0.7):
        scene.search(other, 6, 4, ends=ends, own_keys=torch.randn(4, DIM), token_mask=mask)
    part = slice(2, 6)
    scene.search(other, 3, keys=other.keys[part], pages=other.page_table[part], first=2, start=2 * SIZE, stop=29)
    return scene.batch(positions=positions)


def given(batch: Batch) -> list[Tensor]:
    """Copies of all that the kernel must leave as it is, NaN as 7."""
    searches, arena = batch.view.searches, batch.view.arena
    contents = [arena.take(search.pages) for search in searches]
    keys = [search.keys for search in searches]
    return [tensor.nan_to_num(7) for tensor in (batch.summary, batch.heads, *contents, *keys)]


def check_equal(batch: Batch) -> None:
    """Its answers are the reference's, and its arguments unchanged."""
    before = given(batch)
    expected, result = ReferenceKernel().attend(batch), TritonKernel(batch.view.arena.device).attend(batch)
    assert torch.equal(result.chunk_index, expected.chunk_index)
    for field in ("chunk_weight", "z", "token_weight", "token_score"):
        got, want = getattr(result, field), getattr(expected, field)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert all(map(torch.equal, given(batch), before))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "positions"), [(torch.float32, True), (torch.bfloat16, False), (torch.float16, True)]
)
def test_answers_equal_the_reference(device: str, dtype: torch.dtype, positions: bool) -> None:
    check_equal(ragged(device, dtype, positions=positions))


@pytest.mark.parametrize("device", DEVICES)
def test_large_chunks_many_heads_and_wide_tokens_are_taken_in_blocks(device: str) -> None:
    scene = Scene(device, dim=67, size=37)
    scene.search(scene.memory(2 * 37 + 3), 2)
    check_equal(scene.batch(num_heads=17, positions=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("k", "num_queries"), [(3, 17), (200, 1)])
def test_the_best_of_many_keys_are_found_in_pieces(device: str, k: int, num_queries: int) -> None:
    scene = Scene(device, size=1)
    memory = scene.memory(307)
    scene.search(memory, k, num_queries)
    scene.search(memory, k, 1, hidden=torch.rand(1, 307) < 0.5)
    batch = scene.batch()
    assert torch.equal(TritonKernel(batch.view.arena.device).select(batch), ReferenceKernel().select(batch))


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_but_empty_sessions(device: str) -> None:
    scene = Scene(device)
    scene.search(scene.memory(0), 5, 2)
    batch = scene.batch()
    found = TritonKernel(batch.view.arena.device).attend(batch)
    assert found.chunk_index.shape == (2, 0) and found.z.eq(0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_equal_scores_go_to_the_lower_index_in_whichever_piece(device: str) -> None:
    scene = Scene(device, size=1)
    memory = scene.memory(300)
    memory.keys.zero_()
    memory.keys[270, 0] = memory.keys[40, 0] = 2.0
    scene.search(memory, 4)
    batch = scene.batch()
    batch.summary.fill_(1.0)
    assert TritonKernel(batch.view.arena.device).select(batch).tolist() == [[40, 270, 0, 1]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("score", [torch.inf, -torch.inf, torch.nan])
def test_an_overflow_is_told_wherever_it_is(device: str, score: float) -> None:
    scene = Scene(device, size=1)
    memory = scene.memory(3)
    memory.keys[1] = score
    scene.search(memory, 2, hidden=torch.tensor([False, True, False]))
    scene.search(memory, 2)
    found = TritonKernel(scene.arena.device).attend(scene.batch())
    assert found.chunk_weight[0].sum() == 1 and found.chunk_weight[1].isnan().all()
    assert found.chunk_index[1].tolist() == [-1, -1]


@pytest.mark.parametrize("device", DEVICES)
def test_chunks_without_a_page_are_selected_and_add_nothing(device: str) -> None:
    scene = Scene(device)
    scene.search(scene.memory(2 * SIZE), 2, pages=torch.tensor([-1, -1]))
    batch = scene.batch()
    kernel = TritonKernel(batch.view.arena.device)
    assert sorted(kernel.select(batch)[0].tolist()) == [0, 1]
    assert kernel.attend(batch).z.eq(0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_from_queries_to_answers(device: str) -> None:
    """What `fold` gives is not contiguous."""
    scene = Scene(device)
    scene.search(scene.memory(3 * SIZE), 2, 2)
    shapes = ((DIM, DIM), (DIM,), (HEADS * 2, DIM), (HEADS * 2,), *[(HEADS, 2, DIM)] * 2, (DIM, HEADS * 2), (DIM,))
    projections = Projections(*(torch.randn(shape).to(device) for shape in shapes))
    queries = torch.randn(2, DIM).to(device)
    answers = []
    for kernel in (TritonKernel(scene.arena.device), ReferenceKernel()):
        summary, heads = kernel.fold(projections, queries)
        attended = kernel.attend(Batch(View(scene.arena, None, scene.searches), summary, heads))
        assert attended.token_weight is None and attended.token_score is None
        answers.append(kernel.project(projections, attended.z))
    torch.testing.assert_close(*answers, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
async def test_an_engine_serves_with_it(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Concurrent attends of all kinds, against the definition."""
    monkeypatch.setattr("htm_service.engine.resolve_for_start", lambda device, cache: (TritonKernel(device), None))
    config, weights = write_model(tmp_path / "trained.safetensors", dim=DIM, heads=HEADS, dim_head=7)
    random = np.random.default_rng(3)
    tokens, queries = (random.standard_normal((num, DIM)).astype(np.float32) for num in (6 * SIZE + 3, 2))
    mask, chunk_mask = random.random(len(tokens)) < 0.6, random.random((2, 7)) < 0.5
    place = np.arange(len(tokens))
    asked: list[tuple[dict[str, Any], dict[str, Any]]] = [  # options of a request, and what they mean
        ({}, {}),
        ({"top_k": 1, "stop": 17}, {"top_k": 1, "visible": place < 17}),
        ({"top_k": 9, "start": 8, "stop": 21}, {"top_k": 9, "visible": (place >= 8) & (place < 21)}),
        ({"mask": mask}, {"visible": mask}),
        ({"chunk_mask": chunk_mask}, {"chunk_mask": chunk_mask}),
    ]
    engine = Engine(EngineConfig(device=device, models_dir=tmp_path), store := open_store("memory://"))
    await engine.start()
    try:
        await engine.create(named("s"), CreateRequest(dim=DIM, chunk_size=SIZE, model="trained"))
        await engine.append(named("s"), AppendRequest(embeddings=tokens))
        requests = [AttendRequest(queries=queries, **options) for options, _ in asked]
        results = await asyncio.gather(*(engine.attend(named("s"), request) for request in requests))
        info = await engine.info()
    finally:
        await engine.close()
        store.close()
    assert info.kernel == "triton" and info.device.startswith(device)
    for (_, meaning), result in zip(asked, results, strict=True):
        expected = htm_reference(queries, tokens, config, weights, chunk_size=SIZE, **meaning)
        assert relative_error(result.output, expected.output) <= 1e-5
        np.testing.assert_array_equal(result.chunk_index, expected.chunk_index[:, : result.chunk_index.shape[1]])


def test_the_host_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU torch itself refuses what waits; without one, the calls that would are refused."""
    device = "cpu" if INTERPRETED else "cuda"
    batch, kernel = ragged(device), TritonKernel(torch.device(device))
    if device == "cuda":
        kernel.attend(batch)  # compiled, and loaded onto the device

    def refuse(*args: object, **named: object) -> None:
        raise AssertionError("this waits for the device")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "cpu", "nonzero", "unique", "__bool__", "__int__", "__index__", "__float__"):
            patch.setattr(torch.Tensor, name, refuse)
        with pytest.raises(AssertionError, match="waits"):
            batch.summary.sum().item()
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            kernel.select(batch)
            kernel.attend(batch)
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def test_it_is_made_ready() -> None:
    TritonKernel(torch.device("cpu" if INTERPRETED else "cuda")).warm_up()


@pytest.mark.skipif(sys.platform != "linux", reason="the wheels with the assembler are Linux's")
def test_all_of_it_compiles_for_gpus_of_two_generations(tmp_path: Path) -> None:
    """The interpreter lets errors of types pass. Needs no GPU: Triton brings NVIDIA's assembler."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.kernels.compiled_ahead"],
        cwd=Path(__file__).parents[2],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert {item["kernel"] for item in found} == {"score_keys", "choose", "score_tokens", "add_up"}
    assert {item["capability"] for item in found} == {80, 90}
    for item in found:
        assert item["shared_bytes"] <= 99 << 10 and item["stack_bytes"] <= 64, item  # no registers spilled
