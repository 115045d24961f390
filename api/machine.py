"""How much memory this process may use, and how much of it is free: the machine's, or less in a limited container.

Does not know: settings, and devices other than the CPU.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

# cgroup v2 and v1; inside a container each shows the container's own limit.
CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)

MEMINFO = Path("/proc/meminfo")


def memory_bytes(limits: tuple[Path, ...] = CGROUP_LIMITS) -> int:
    """Bytes of memory: the smaller of the machine's and the control group's limit, where there is one."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in limits:
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        if text.isdigit():  # "max" means no limit
            total = min(total, int(text))
    return total


def free_bytes(meminfo: Path = MEMINFO, limits: tuple[Path, ...] = CGROUP_LIMITS) -> int:
    """Bytes that can be had without swapping: what the machine has available, or `memory_bytes` if that is less."""
    total = memory_bytes(limits)
    try:
        text = meminfo.read_text()
    except OSError:
        return total
    available = re.search(r"^MemAvailable:\s+(\d+) kB$", text, re.MULTILINE)
    return total if available is None else min(total, int(available.group(1)) << 10)
