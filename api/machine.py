"""How much memory this process may use: the machine's, or less in a limited container.

Does not know: settings, and devices other than the CPU.
"""

from __future__ import annotations

import os
from pathlib import Path

# cgroup v2 and v1; inside a container each shows the container's own limit.
CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


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
