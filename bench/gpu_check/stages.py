"""Stages that run one after the other, each in a process of its own, within a time for all of them.

A stage prints what it likes and, last, one JSON object: what it found. It has failed when it ends otherwise, or is not
done in time. Does not know what the stages are.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Stage:
    """A command, and how long it may take; with `needs_gpu` it is left out where there is none."""

    name: str
    command: Sequence[str]
    limit_s: float


@dataclass(frozen=True)
class Verdict:
    """How a stage ended; `found` is what it said."""

    name: str
    is_ok: bool
    seconds: float
    why: str = ""
    found: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For the one line at the end."""
        return {key: value for key, value in asdict(self).items() if key != "name"}


def run_all(stages: Sequence[Stage], limit_s: float) -> list[Verdict]:
    """Every stage, whatever became of those before it; none begins when the time for all is over."""
    until = time.monotonic() + limit_s
    verdicts = []
    for stage in stages:
        rest_s = until - time.monotonic()
        print(f"\n=== {stage.name} (at most {min(stage.limit_s, max(0, rest_s)):.0f} s)", flush=True)
        verdict = run(stage, rest_s) if rest_s > 1 else Verdict(stage.name, False, 0.0, "no time was left for it")
        print(f"=== {stage.name}: {'ok' if verdict.is_ok else f'FAILED: {verdict.why}'}, {verdict.seconds:.1f} s")
        verdicts.append(verdict)
    return verdicts


def run(stage: Stage, rest_s: float) -> Verdict:
    """One stage, with what it prints shown as it comes; ended, with all that it started, when its time is over."""
    began, limit_s = time.monotonic(), min(stage.limit_s, rest_s)
    lines: list[str] = []
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(stage.command, start_new_session=True, **options) as process:
        with _Alarm(process, limit_s) as alarm:
            for line in process.stdout or ():
                lines.append(line)
                sys.stdout.write(line)
                sys.stdout.flush()
        code = process.wait()
    seconds = time.monotonic() - began
    found = _last_object(lines)
    if alarm.has_rung:
        return Verdict(stage.name, False, seconds, f"it was not done within {limit_s:.0f} s", found)
    if code:
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        return Verdict(stage.name, False, seconds, f"it ended with {code}: {last[:300]}", found)
    if not found:
        return Verdict(stage.name, False, seconds, "it did not say what it found")
    return Verdict(stage.name, True, seconds, found=found)


class _Alarm:
    """Ends a process and its group when its time is over."""

    def __init__(self, process: subprocess.Popen[str], limit_s: float) -> None:
        self.has_rung = False
        self._process = process
        self._timer = threading.Timer(limit_s, self._ring)

    def _ring(self) -> None:
        self.has_rung = True
        os.killpg(self._process.pid, signal.SIGKILL)

    def __enter__(self) -> _Alarm:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


def _last_object(lines: Sequence[str]) -> dict[str, Any]:
    """The JSON object on the last line that is one, or nothing."""
    for line in reversed(lines):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    return {}
