"""`make bench-gpu`: the Triton kernel on a GPU, beside the rate at which that copies memory; answers are checked first.

A batch of 1,024 queries over 256 bfloat16 sessions of 1,000 to 1,000,000 tokens, or as many of these as fit. The keys
of all sessions and the contents of the chunks taken must be read, each once; the time says what share of the memory's
rate is used.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from bench.figures import Figure, print_figures, say
from bench.scene import CHUNK_SIZE, DIM, HEADS, TOP_K
from htm_service.attention.positions import position_table
from htm_service.kernels.base import Attended, Batch, Kernel, Search, View
from htm_service.kernels.resolve import resolve_kernel
from htm_service.memory.arena import Arena, Budget
from htm_service.memory.chunks import KEY_ITEMSIZE, Chunks

QUERIES, SESSIONS, SHORTEST, LONGEST = 4, 256, 1_000, 1_000_000
"""Queries per session, sessions, and their lengths in tokens."""
PIECE = 1 << 16
"""Tokens put in at once."""
BAR = 0.7
SHARE_OF_MEMORY = 0.8
"""Of what is free on the GPU; the rest is for the kernels and the copy."""


def session_lengths(num_sessions: int) -> list[int]:
    """Seeded, as many of each order of magnitude; in random order."""
    share = torch.rand(num_sessions, generator=torch.Generator().manual_seed(0)).double()
    return [round(length) for length in (SHORTEST * (LONGEST / SHORTEST) ** share).tolist()]


def that_fit(lengths: Iterable[int], num_bytes: int) -> list[int]:
    """The first of the lengths whose keys and contents fit together."""
    chosen = []
    for length in lengths:
        num_chunks = -(-length // CHUNK_SIZE)
        num_bytes -= num_chunks * DIM * (CHUNK_SIZE * torch.bfloat16.itemsize + KEY_ITEMSIZE)
        if num_bytes < 0:
            break
        chosen.append(length)
    return chosen


def make_batch(lengths: Iterable[int], device: torch.device, budget: Budget) -> Batch:
    """Sessions of random tokens in one arena, and queries of all of them."""
    arena = Arena(DIM, CHUNK_SIZE, torch.bfloat16, device, budget)
    random = torch.Generator(device).manual_seed(1)
    searches = []
    for length in lengths:
        memory = Chunks(arena, budget)
        memory.reserve(-(-length // CHUNK_SIZE))
        for first in range(0, length, PIECE):
            num_tokens = min(PIECE, length - first)
            memory.append(torch.randn(num_tokens, DIM, generator=random, device=device).bfloat16())
        k = min(TOP_K, memory.num_chunks)
        searches.append(Search(memory.keys, memory.page_table, 0, 0, length, QUERIES, k))
    num_rows = QUERIES * len(searches)
    heads = torch.randn(num_rows, HEADS, DIM, generator=random, device=device) / DIM**0.5
    summary = torch.randn(num_rows, DIM, generator=random, device=device)
    return Batch(View(arena, position_table(CHUNK_SIZE, DIM).to(device), searches), summary, heads)


def num_bytes_to_read(batch: Batch, chunk_index: Tensor) -> int:
    """The keys of all sessions, and each chunk taken [R, K] once, whichever rows of its session took it."""
    num_keys = sum(len(search.keys) for search in batch.view.searches)
    rows = chunk_index.cpu().split([search.num_queries for search in batch.view.searches])
    num_pages = sum(len(taken[taken >= 0].unique()) for taken in rows)
    return num_keys * batch.view.arena.dim * KEY_ITEMSIZE + num_pages * batch.view.arena.page_bytes


def check(got: Attended, expected: Attended) -> float:
    """The relative error of the rows that took the same chunks: all but a few, whose scores nearly tie.

    Raises AssertionError when they are fewer, or the error is too large.
    """
    same = (got.chunk_index == expected.chunk_index).all(dim=1)
    assert same.float().mean() >= 0.99, f"only {same.sum()} of {len(same)} rows take the chunks that the reference does"
    error = float((got.z[same] - expected.z[same]).norm() / expected.z[same].norm())
    assert error <= 5e-5, f"the answers differ by {error:.2e}"
    return error


def seconds_of(call: Callable[[], object], repeats: int) -> float:
    """Seconds of one of several calls that follow each other on the GPU, the host's work included."""
    call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeats


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that are read and written by a copy."""
    source = torch.ones(1 << 29, device=device)  # 2 GiB
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds_of(lambda: target.copy_(source), 10) for _ in range(3))


def measure(kernel: Kernel, reference: Kernel, batch: Batch, bandwidth: float) -> Figure:
    """Answers checked, then the time of a batch."""
    attended = kernel.attend(batch)
    error = check(attended, reference.attend(batch))
    num_bytes = num_bytes_to_read(batch, attended.chunk_index)
    seconds = min(seconds_of(lambda: kernel.attend(batch), 20) for _ in range(3))
    measured = {
        "batch_ms": seconds * 1e3,
        "read_gb": num_bytes / 1e9,
        "read_gb_per_s": num_bytes / seconds / 1e9,
        "copy_gb_per_s": bandwidth / 1e9,
        "reference_ms": seconds_of(lambda: reference.attend(batch), 1) * 1e3,
        "relative_error": error,
    }
    figure = num_bytes / seconds / bandwidth
    return Figure("G1", "bytes that a batch must read, a second, to copy's", figure, BAR, measured=measured)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-gpu", description=__doc__)
    parser.add_argument("--sessions", type=int, default=SESSIONS, help="fewer for a look")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(f"bench-gpu needs a CUDA device, and torch {torch.__version__} finds none: nothing was measured")
    device = torch.device("cuda")
    kernel = resolve_kernel(device)
    if kernel.name != "triton":
        sys.exit("bench-gpu measures the Triton kernel, which cannot run here; the warning above says why")
    with torch.inference_mode():
        bandwidth = copy_bandwidth(device)
        torch.cuda.empty_cache()
        free_bytes, _ = torch.cuda.mem_get_info()
        lengths = that_fit(session_lengths(options.sessions), int(free_bytes * SHARE_OF_MEMORY))
        say(f"{len(lengths)} of {options.sessions} sessions fit; {sum(lengths):,} tokens are put in")
        batch = make_batch(lengths, device, Budget(free_bytes))
        figure = measure(kernel, resolve_kernel(device, "reference"), batch, bandwidth)
    print_figures([figure], gpu=torch.cuda.get_device_name(), sessions=len(lengths), tokens=sum(lengths))


if __name__ == "__main__":
    main()
