"""How much memory a process may use: limits of control groups, real ones where this machine lets them be made."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from api.machine import memory_bytes

MIB = 1 << 20
SAY = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); "
SAY += "from api.machine import memory_bytes; print(memory_bytes())"


def system(root: Path, groups: str, mounts: str, limits: dict[str, str]) -> Path:
    """The files of a system in which this process has these groups."""
    files = {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts, **limits}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n"
V1 += "36 31 0:33 / /sys/fs/cgroup/devices rw,relatime shared:9 - cgroup cgroup rw,devices\n"
CONTAINER = "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro,relatime master:9 - cgroup cgroup rw,memory\n"


@pytest.mark.parametrize(
    ("groups", "mounts", "limits", "expected"),
    [
        pytest.param(
            "0::/system.slice/htm.service\n", V2,
            {"system.slice/htm.service/memory.max": f"{64 * MIB}\n", "system.slice/memory.max": "max\n"}, 64,
            id="a service",
        ),
        pytest.param(
            "0::/agents.slice/htm.service\n", V2,
            {"agents.slice/htm.service/memory.max": "max\n", "agents.slice/memory.max": f"{64 * MIB}\n"}, 64,
            id="a slice above it",
        ),
        pytest.param(
            "0::/agents.slice/htm.service\n", V2,
            {"agents.slice/htm.service/memory.high": f"{32 * MIB}\n", "agents.slice/memory.max": f"{64 * MIB}\n"}, 32,
            id="a limit beyond which it is slowed down",
        ),
        pytest.param("0::/\n", V2, {"memory.max": f"{64 * MIB}\n"}, 64, id="a container"),
        pytest.param(
            "4:memory:/slurm/uid_0/job_7/step_0\n1:cpu:/slurm\n0::/\n", V1,
            {"memory/slurm/uid_0/job_7/memory.limit_in_bytes": f"{64 * MIB}\n",
             "memory/slurm/uid_0/job_7/step_0/memory.limit_in_bytes": f"{1 << 62}\n"}, 64,
            id="a job of Slurm",
        ),
        pytest.param(
            "4:cpu,memory:/docker/abc\n", CONTAINER, {"memory/memory.limit_in_bytes": f"{64 * MIB}\n"}, 64,
            id="a container of version 1",
        ),
        pytest.param(
            "4:memory:/docker/abc/inner\n", CONTAINER, {"memory/inner/memory.limit_in_bytes": f"{64 * MIB}\n"}, 64,
            id="a group within a container of version 1",
        ),
        pytest.param("0::/a\n", V2, {"a/memory.max": "max\n"}, None, id="no limit"),
        pytest.param("0::/../../other\n", V2, {}, None, id="a group that cannot be seen"),
        pytest.param("", "", {}, None, id="no groups"),
    ],
)  # fmt: skip
def test_limits_of_groups(
    tmp_path: Path, groups: str, mounts: str, limits: dict[str, str], expected: int | None
) -> None:
    """Only the uppermost group was looked at: a budget of 12 GB where 1 GiB was allowed."""
    files = {f"sys/fs/cgroup/{name}": text for name, text in limits.items()}
    found = memory_bytes(system(tmp_path / "root", groups, mounts, files))
    assert found == (memory_bytes(tmp_path) if expected is None else expected * MIB)


@contextlib.contextmanager
def group_below(parent: Path, limit: str) -> Iterator[Path]:
    """A group with a limit, and one within it, which has none; the inner one."""
    outer = parent / "htm-test-slice"
    inner = outer / "job"
    inner.mkdir(parents=True)
    try:
        (outer / limit).write_text(str(256 * MIB))
        yield inner
    finally:
        inner.rmdir()
        outer.rmdir()


def test_a_real_group(tmp_path: Path) -> None:
    own = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    parent = Path("/sys/fs/cgroup/memory" + own["memory"]) if "memory" in own else Path("/sys/fs/cgroup" + own[""])
    limit = "memory.limit_in_bytes" if "memory" in own else "memory.max"
    try:
        with group_below(parent, limit) as group:
            command = [sys.executable, "-c", SAY, str(group / "cgroup.procs")]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except OSError as error:
        pytest.skip(f"no group can be made here: {error}")
    assert int(said) == 256 * MIB
