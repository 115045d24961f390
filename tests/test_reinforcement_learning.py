"""docs/reinforcement-learning.md: its blocks are one script, run here against a real server, every line of it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "reinforcement-learning.md").read_text()
ADDRESS = "http://127.0.0.1:8000"


@pytest.mark.timeout(240)
def test_the_page_runs() -> None:
    assert PAGE.count(ADDRESS) == 1
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
    command = [sys.executable, "-m", "api", "serve", "--port", "0", "--store-url", "memory://", "--log-level", "error"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = server.stdout.readline().split()[-1]
        path = [str(ROOT / "client"), str(ROOT)]
        script = f"import sys; sys.path[:0] = {path!r}\n" + code.replace(ADDRESS, address)
        run = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
        server.terminate()
        assert server.wait(20) == 0
    assert run.returncode == 0, run.stderr
