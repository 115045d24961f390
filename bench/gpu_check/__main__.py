"""All stages, then a summary, then one JSON line. Ends within six minutes, and goes on after a failure."""

from __future__ import annotations

import json
import sys
import time

import torch

from bench.gpu_check.stages import Stage, Verdict, run_all

LIMIT_S = 350
"""For all stages."""


def stages() -> list[Stage]:
    """In the order of what one wants to know first."""

    def run(module: str, *options: str) -> list[str]:
        return [sys.executable, "-u", "-m", module, *options]  # -u: what fails is said last

    dtypes = ("float32", "bfloat16", "float16")
    return [
        Stage("machine", run("bench.gpu_check.machine"), 60),
        *(Stage(f"parity {dtype}", run("bench.gpu_check.parity", "--dtype", dtype), 80) for dtype in dtypes),
        Stage("tests", run("bench.gpu_check.tests"), 120),
        Stage("bench-gpu", run("bench.gpu", "--sessions", "128"), 90),
        Stage("served", run("bench.gpu_check.served"), 100),
    ]


def summary(verdicts: list[Verdict], seconds: float) -> dict[str, object]:
    """A line for each, and the JSON object of all."""
    print(f"\n{'stage':20} {'verdict':8} {'seconds':>8}  why")
    for verdict in verdicts:
        print(f"{verdict.name:20} {'ok' if verdict.is_ok else 'FAILED':8} {verdict.seconds:8.1f}  {verdict.why}")
    return {
        "is_ok": all(verdict.is_ok for verdict in verdicts),
        "seconds": round(seconds, 1),
        "stages": {verdict.name: verdict.as_json() for verdict in verdicts},
    }


def main() -> None:
    """Exit code 0 when every stage is well."""
    if not torch.cuda.is_available():
        sys.exit(f"gpu-check needs an NVIDIA GPU, and torch {torch.__version__} finds none: nothing was checked")
    began = time.monotonic()
    verdicts = run_all(stages(), LIMIT_S)
    found = summary(verdicts, time.monotonic() - began)
    print(json.dumps(found), flush=True)
    sys.exit(0 if found["is_ok"] else 1)


if __name__ == "__main__":
    main()
