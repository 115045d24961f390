"""The candidates answer as the reference does; which is fastest, `make bench-candidates` says."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from bench.candidates import __main__ as candidates
from bench.candidates.timing import Timing, time_in_turns
from bench.candidates.workload import Size, make_workload
from htm_service.kernels.reference import ReferenceKernel

MANY = Size("many sessions", 17, 7 * 5, 1, dim=32, heads=8, dim_head=4, chunk_size=5, top_k=3)
ONE = Size("one session", 1, 11 * 5, 19, dim=32, heads=8, dim_head=4, chunk_size=5, top_k=3)
LONG = Size("a long session", 1, 6_000 * 5, 1, dim=512, heads=8, dim_head=4, chunk_size=5, top_k=3)


@pytest.mark.parametrize("name", [name for name in candidates.CANDIDATES if name != "torch.compile"])
@pytest.mark.parametrize("size", [MANY, ONE, LONG], ids=lambda size: size.name)
def test_candidates_answer_as_the_reference(name: str, size: Size) -> None:
    check(name, size)


@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_torch_compile_answers_as_the_reference() -> None:
    check("torch.compile", ONE)


def check(name: str, size: Size) -> None:
    if absent := candidates.missing(name):
        pytest.skip(f"{', '.join(absent)} is not installed")
    torch.manual_seed(3)
    workload = make_workload(size)
    call = candidates.CANDIDATES[name][1](workload)
    expected = workload.answer(ReferenceKernel())
    for _ in range(2):  # the second time on a workspace that was used
        answer = call()
        assert isinstance(answer, torch.Tensor)
        assert candidates.error(answer, expected) <= candidates.allowed(name)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert candidates.missing("C++") == candidates.missing("torch.compile") == ["g++"]
    assert candidates.missing("reference") == []


def test_calls_take_turns() -> None:
    made: list[str] = []
    timings = time_in_turns({name: lambda name=name: made.append(name) for name in "ABC"}, 2)  # type: ignore[misc]
    assert "".join(made) == "ABC" + "BCA" + "CAB"
    assert all(0 <= timing.best_ms <= timing.median_ms for timing in timings.values())


def test_the_table() -> None:
    found = {"S4": {"compiled": Timing(2.0, 2.5, 3.75), "other": Timing(5.0, 6.0, 5.0)}}
    head, _, kept, other = candidates.table(found).splitlines()
    assert head == "| | S4: best, ms | median | processor | of kept |"
    assert kept == "| compiled | 2 | 2.5 | 3.75 | 1.00 |"
    assert other == "| other | 5 | 6 | 5 | 2.50 |"


def test_a_quick_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(candidates, "QUICK", (MANY,))
    monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--only", "reference;C++", "--workloads", MANY.name])
    monkeypatch.setenv("PATH", "")
    candidates.main()
    printed = capsys.readouterr()
    assert "C++ is left out: g++ is not installed" in printed.err
    report = json.loads(printed.out.splitlines()[-1])
    assert report["left_out"] == {"C++": "g++"}
    assert report["ms"][MANY.name]["reference"]["best_ms"] > 0
