"""How much memory this process may use: the machine's, or less where its control groups have a limit.

Does not know: settings, and devices other than the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

LIMITS = {"cgroup2": ("memory.max", "memory.high"), "cgroup": ("memory.limit_in_bytes",)}
"""By the type of the file system, version 2 and 1, the files of a group that say a limit."""


def memory_bytes(root: Path = Path("/")) -> int:
    """Bytes of memory: the least of the machine's and of the limits of this process's control group and all above it.

    A service has its limit in a group of its own, a slice or a job in one above that, a container in the uppermost
    that it sees. `root` is where the system's files are.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *_limits(root)])


def _limits(root: Path) -> Iterator[int]:
    paths = _paths_of_groups(root)
    for kind, mounted, mount in _mounts(root):
        path = paths.get(kind, mounted)
        # In a container without a namespace of its own the path is the machine's, and what is mounted its own group.
        group = mount / path.relative_to(mounted) if path.is_relative_to(mounted) else mount
        for folder in (group, *group.parents):
            if folder.is_relative_to(mount):
                for name in LIMITS[kind]:
                    text = "".join(_lines(root / folder.relative_to("/") / name)).strip()
                    if text.isdigit():  # "max" means no limit
                        yield int(text)


def _paths_of_groups(root: Path) -> dict[str, PurePosixPath]:
    """This process's group in each hierarchy that limits memory (cgroups(7): `number:controllers:path`)."""
    paths = {}
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0":
            paths["cgroup2"] = PurePosixPath(path)
        elif "memory" in controllers.split(","):
            paths["cgroup"] = PurePosixPath(path)
    return paths


def _mounts(root: Path) -> Iterator[tuple[str, PurePosixPath, PurePosixPath]]:
    """Type, group that is mounted, and where, of each such hierarchy (proc(5): /proc/pid/mountinfo)."""
    for line in _lines(root / "proc/self/mountinfo"):
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.partition(" ")
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in options.split()[-1].split(",")):
            mounted, mount = fields.split()[3:5]
            yield kind, PurePosixPath(mounted), PurePosixPath(mount)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
