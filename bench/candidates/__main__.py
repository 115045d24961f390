"""`make bench-candidates`: ways to fold, attend and project on this CPU, in turns, beside the one that is kept."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from bench.candidates.timing import Call, Timing, time_in_turns
from bench.candidates.workload import Size, Workload, make_workload
from bench.figures import machine, say
from htm_service.kernels.reference import ReferenceKernel

SIZES = (Size("S4", 1, 20_000, 128), Size("S5", 1, 200_000, 1), Size("S6", 64, 20_000, 1))
QUICK = (Size("S4", 1, 3_200, 32), Size("S5", 1, 20_000, 1), Size("S6", 16, 3_200, 1))
KEPT = "compiled"
EXACT, NARROW = 1e-5, 2e-2
"""Relative errors allowed beside the reference, whose contents are float32; the greater for contents of 16 bits."""


def _compiled(workload: Workload, num_threads: int | None = None) -> Call:
    from htm_service.kernels.compiled import CompiledKernel

    kernel = CompiledKernel(num_threads)
    return lambda: workload.answer(kernel)


def _torch_blocks(workload: Workload) -> Call:
    from bench.candidates import torch_blocks

    return torch_blocks.prepare(workload, torch.get_num_threads())


def _torch_compile(workload: Workload) -> Call:
    from bench.candidates import torch_compile

    return torch_compile.prepare(workload)


def _cpp(workload: Workload, num_threads: int) -> Call:
    from bench.candidates import cpp

    return cpp.prepare(workload, num_threads)


def _projected(workload: Workload, dtype: torch.dtype) -> Call:
    from bench.candidates import projected

    return projected.prepare(workload, torch.get_num_threads(), dtype)


CANDIDATES: Mapping[str, tuple[tuple[str, ...], Callable[[Workload], Call]]] = {
    KEPT: (("numba",), _compiled),
    "compiled, 1 thread": (("numba",), lambda workload: _compiled(workload, 1)),
    "compiled, bfloat16": (("numba",), lambda workload: _compiled(workload.with_dtype(torch.bfloat16))),
    "compiled, float16": (("numba",), lambda workload: _compiled(workload.with_dtype(torch.float16))),
    "reference": ((), lambda workload: lambda: workload.answer(ReferenceKernel())),
    "torch blocks": ((), _torch_blocks),
    "torch.compile": (("g++",), _torch_compile),
    "C++": (("numba", "g++"), lambda workload: _cpp(workload, torch.get_num_threads())),
    "C++, 1 thread": (("numba", "g++"), lambda workload: _cpp(workload, 1)),
    "projected": (("numba",), lambda workload: _projected(workload, torch.float32)),
    "projected, bfloat16": (("numba",), lambda workload: _projected(workload, torch.bfloat16)),
}
"""What each needs, and what makes a call that answers a workload's queries of it."""


def missing(name: str) -> list[str]:
    """What a candidate needs and is not installed."""
    found = {"g++": shutil.which("g++"), "numba": importlib.util.find_spec("numba")}
    return [need for need in CANDIDATES[name][0] if found[need] is None]


def error(got: Tensor, expected: Tensor) -> float:
    """The relative error of an answer."""
    return float((got - expected).norm() / expected.norm())


def allowed(name: str) -> float:
    """The relative error that a candidate may have."""
    return NARROW if name.endswith("16") else EXACT


def measure(size: Size, names: list[str], rounds: int) -> tuple[dict[str, Timing], dict[str, float]]:
    """Times of the named candidates, checked first, and seconds until the first answer of each."""
    workload = make_workload(size)
    expected = workload.answer(ReferenceKernel())
    calls: dict[str, Call] = {}
    first_s: dict[str, float] = {}
    for name in names:
        say(f"{size.name}: {name}")
        began = time.perf_counter()
        calls[name] = CANDIDATES[name][1](workload)
        answer = calls[name]()
        first_s[name] = time.perf_counter() - began
        assert isinstance(answer, Tensor)
        assert error(answer, expected) <= allowed(name), (
            f"{name} answers {error(answer, expected):.1e} off in {size.name}"
        )
    return time_in_turns(calls, rounds), first_s


def table(found: Mapping[str, Mapping[str, Timing]]) -> str:
    """Markdown: per workload the best and median milliseconds, processor time, and the best over the kept one's."""
    lines = [
        "| | " + " | ".join(f"{name}: best, ms | median | processor | of kept" for name in found) + " |",
        "| " + "--- | " * (4 * len(found) + 1),
    ]
    for name in next(iter(found.values())):
        cells = [f"| {name} "]
        for timings in found.values():
            timing, kept = timings[name], timings.get(KEPT)
            ratio = f"{timing.best_ms / kept.best_ms:.2f}" if kept else ""
            cells.append(f"| {timing.best_ms:.3g} | {timing.median_ms:.3g} | {timing.cpu_ms:.3g} | {ratio} ")
        lines.append("".join(cells) + "|")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-candidates", description=__doc__)
    parser.add_argument("--only", default=";".join(CANDIDATES), help='names, separated by semicolons: "compiled;C++"')
    parser.add_argument("--workloads", default="S4,S5,S6", help="of these")
    parser.add_argument("--rounds", type=int, default=15, help="calls of each")
    parser.add_argument("--quick", action="store_true", help="smaller and shorter: a look, no figure")
    options = parser.parse_args()
    wanted = options.only.split(";")
    if unknown := set(wanted) - set(CANDIDATES):
        parser.error(f"unknown: {'; '.join(sorted(unknown))}; there are {'; '.join(CANDIDATES)}")
    left_out = {name: ", ".join(missing(name)) for name in wanted if missing(name)}
    for name, absent in left_out.items():
        say(f"{name} is left out: {absent} is not installed")
    names = [name for name in wanted if name not in left_out]
    sizes = [size for size in (QUICK if options.quick else SIZES) if size.name in options.workloads.split(",")]
    results = {size.name: measure(size, names, 3 if options.quick else options.rounds) for size in sizes}
    print(table({name: timings for name, (timings, _) in results.items()}))
    report = {
        name: {which: {**asdict(timing), "first_s": first_s[which]} for which, timing in timings.items()}
        for name, (timings, first_s) in results.items()
    }
    projecting = _projecting() if "projected" in names else {}
    if projecting:
        print(", ".join(f"{what.replace('_', ' ')} {figure:.3g}" for what, figure in projecting.items()))
    print(json.dumps({**machine(), "quick": options.quick, "left_out": left_out, "ms": report, **projecting}))


def _projecting() -> dict[str, float]:
    """What the projected cache costs an append, and in memory."""
    from bench.candidates.projected import us_per_token

    workload = make_workload(Size("append", 1, 32, 1))
    figures = {f"projecting_us_per_token_of_{num}": us_per_token(workload, num) for num in (1, 32, 5_000)}
    size = workload.size
    return {**figures, "bytes_per_token": 4.0 * size.dim, "projected_bytes_per_token": 8.0 * size.heads * size.dim_head}


if __name__ == "__main__":
    main()
