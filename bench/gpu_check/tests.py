"""The tests that need a GPU, all of them (`-m gpu`), and what became of them. Fails when none ran."""

from __future__ import annotations

import json
import re
import subprocess
import sys


def count(report: str) -> dict[str, int]:
    """What pytest's last line says: how many passed, failed, were skipped, could not be collected."""
    numbers = re.findall(r"(\d+) (passed|failed|skipped|error)", report.strip().rpartition("\n")[2])
    return {"passed": 0, "failed": 0} | {what: int(number) for number, what in numbers}


def main() -> None:
    """Run them, show what pytest prints, print the counts."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--continue-on-collection-errors", "--timeout", "100"]
    done = subprocess.run([*command, "-p", "no:cacheprovider"], stdout=subprocess.PIPE, text=True, check=False)
    sys.stdout.write(done.stdout)
    counts = count(done.stdout)
    print(json.dumps(counts))
    if done.returncode or not counts["passed"]:
        sys.exit(done.returncode or "no test ran")


if __name__ == "__main__":
    main()
