"""`make gpu-check` without a GPU: stages run in turn, fail alone, end in time; parity and load on a CPU."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.gpu_check import __main__ as check
from bench.gpu_check import machine, parity, served, stages, tests
from bench.gpu_check.stages import Stage

pytestmark = pytest.mark.timeout(300)


def python(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", code]


def test_a_stage_that_fails_is_told_and_the_next_one_runs() -> None:
    found = stages.run_all(
        [
            Stage("well", python("print('working'); print('{\"figure\": 3}')"), 20),
            Stage("raises", python("print('{\"half\": 1}'); raise ValueError('no such device')"), 20),
            Stage("silent", python("print('done')"), 20),
            Stage("dies", python("import os; os.kill(os.getpid(), 9)"), 20),
            Stage("well again", python("print('{\"a\": [1]}'); print('bye')"), 20),
        ],
        60,
    )
    assert [one.is_ok for one in found] == [True, False, False, False, True]
    assert found[0].found == {"figure": 3} and found[4].found == {"a": [1]}
    assert "ended with 1: ValueError: no such device" in found[1].why and found[1].found == {"half": 1}
    assert found[2].why == "it did not say what it found" and "ended with -9" in found[3].why


def test_a_stage_ends_in_time_with_all_that_it_started(tmp_path: Path) -> None:
    code = f"""
import subprocess, sys, pathlib
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(child.pid))
child.wait()
"""
    began = time.monotonic()
    hanging, late = stages.run_all([Stage("hangs", python(code), 3), Stage("late", python("print({})"), 20)], 3.5)
    assert time.monotonic() - began < 20
    assert not hanging.is_ok and hanging.why == "it was not done within 3 s"
    assert not late.is_ok and late.why == "no time was left for it"
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(OSError):  # a zombie of another parent's is no process to wait for
        for _ in range(200):
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                raise ProcessLookupError
            time.sleep(0.02)


def test_the_summary_has_a_line_for_each_and_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    verdicts = [stages.Verdict("one", True, 1.0, found={"x": 2}), stages.Verdict("two", False, 2.0, "it broke")]
    found = json.loads(json.dumps(check.summary(verdicts, 3.04)))
    assert found["is_ok"] is False and found["seconds"] == 3.0
    assert found["stages"]["one"] == {"is_ok": True, "seconds": 1.0, "why": "", "found": {"x": 2}}
    said = capsys.readouterr().out
    assert "one " in said and "FAILED" in said and "it broke" in said


def test_all_stages_are_commands_that_exist_and_fit_into_six_minutes() -> None:
    assert check.LIMIT_S <= 360
    for stage in check.stages():
        module = stage.command[3]
        assert __import__("importlib.util").util.find_spec(module) is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would check")
def test_without_a_gpu_it_says_so_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"needs an NVIDIA GPU.*nothing was checked"):
        check.main()
    assert capsys.readouterr().out == ""


def test_versions_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "NEEDED", ("torch", "no-such-package"))
    found = machine.versions()
    assert found["torch"] == torch.__version__ and found["no-such-package"] is None


def test_what_pytest_says_is_counted() -> None:
    assert tests.count("....\n4 passed, 2 skipped in 3.1s\n") == {"passed": 4, "failed": 0, "skipped": 2}
    assert tests.count("x\n1 failed, 3 passed, 1 error in 3s\n") == {"passed": 3, "failed": 1, "error": 1}
    assert tests.count("no tests ran in 0.1s") == {"passed": 0, "failed": 0}


def test_parity_of_a_server_on_a_cpu() -> None:
    found = parity.measure("cpu", "bfloat16", dim=64, length=3_007, budget=1 << 20)
    for errors in (found["errors"], found["errors_after_restart"]):
        assert set(errors) == {"random", "retrieval"} and max(errors.values()) <= 1e-5
    assert found["kernel"] in ("compiled", "reference") and found["fetched_pages"] > 0


def test_a_wrong_answer_fails_the_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: object) -> object:
        return right(*arguments) * 1.001  # type: ignore[arg-type]

    right = parity.expected
    monkeypatch.setattr(parity, "expected", wrong)
    with pytest.raises(AssertionError, match=r"model random, \[\]: the answers differ by 9.99e-04"):
        parity.measure("cpu", "float32", dim=32, length=100, budget=1 << 20)


def test_attends_are_counted_on_a_cpu() -> None:
    found = served.measure("cpu", sessions=2, length=100, seconds=1.0, budget=16 << 20)
    assert found["attends_per_s"] > 10 and found["sessions"] == 2
    assert found["device_busy_share"] is None or 0 < found["device_busy_share"] <= 1
