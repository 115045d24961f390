"""What the benchmark of the GPU's kernel counts and checks, tried on a CPU; it is run by hand where there is a GPU."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from bench import gpu
from bench.scene import CHUNK_SIZE, DIM
from htm_service.kernels.reference import ReferenceKernel
from htm_service.memory.arena import Budget

PAGE_BYTES, KEY_BYTES = CHUNK_SIZE * DIM * 2, DIM * 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would measure")
def test_without_a_gpu_it_says_so_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench-gpu"])
    with pytest.raises(SystemExit, match=r"needs a CUDA device.*nothing was measured") as exit:
        gpu.main()
    assert exit.value.code != 0 and capsys.readouterr().out == ""


def test_lengths_are_of_all_magnitudes_and_the_first_that_fit_are_taken() -> None:
    lengths = gpu.session_lengths(256)
    assert lengths == gpu.session_lengths(256) and 1_000 <= min(lengths) < 2_000 and 500_000 < max(lengths) <= 1_000_000
    assert 50 < sum(length < 10_000 for length in lengths) < 120
    chunk_bytes = PAGE_BYTES + KEY_BYTES
    assert gpu.that_fit([CHUNK_SIZE, CHUNK_SIZE + 1, 1], 3 * chunk_bytes) == [CHUNK_SIZE, CHUNK_SIZE + 1]
    assert gpu.that_fit([CHUNK_SIZE, CHUNK_SIZE + 1, 1], 3 * chunk_bytes - 1) == [CHUNK_SIZE]


def test_what_must_be_read_is_counted_once() -> None:
    with torch.inference_mode():
        batch = gpu.make_batch([20 * CHUNK_SIZE, 3 * CHUNK_SIZE - 1], torch.device("cpu"), Budget(1 << 26))
        attended = ReferenceKernel().attend(batch)
    taken = attended.chunk_index.tolist()
    assert len(taken) == 2 * gpu.QUERIES
    first, second = ({chunk for row in rows for chunk in row if chunk >= 0} for rows in (taken[:4], taken[4:]))
    assert len(first) >= 8 and second == {0, 1, 2}
    expected = 23 * KEY_BYTES + (len(first) + len(second)) * PAGE_BYTES
    assert gpu.num_bytes_to_read(batch, attended.chunk_index) == expected


def test_wrong_answers_are_not_measured() -> None:
    with torch.inference_mode():
        batch = gpu.make_batch([9 * CHUNK_SIZE], torch.device("cpu"), Budget(1 << 26))
        attended = ReferenceKernel().attend(batch)
    assert gpu.check(attended, attended) == 0
    with pytest.raises(AssertionError, match="the answers differ"):
        gpu.check(replace(attended, z=attended.z * 1.001), attended)
    with pytest.raises(AssertionError, match="only 0 of 4 rows"):
        gpu.check(replace(attended, chunk_index=attended.chunk_index + 1), attended)


def test_the_figure_is_the_share_of_the_copy_s_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "seconds_of", lambda call, repeats: 0.25 + 0 * len(call().z))
    with torch.inference_mode():
        batch = gpu.make_batch([CHUNK_SIZE], torch.device("cpu"), Budget(1 << 26))
        figure = gpu.measure(ReferenceKernel(), ReferenceKernel(), batch, bandwidth=8 * (KEY_BYTES + PAGE_BYTES))
    assert figure.figure == 0.5 and not figure.is_met
    assert figure.measured["batch_ms"] == 250 and figure.measured["relative_error"] == 0
