"""The compiled kernel, made ready beside a server that serves already: a process of its own fills numba's cache.

Compiling takes longer than everything else of a start, and holds up the process that does it. So it is left to a
child, of low priority, that ends with its parent; what it compiled is then read from the cache, which takes a second.
One child works at a time in a folder, whoever started it. What is there is known by a mark that names all that machine
code depends on: the processor, the versions, the source. So the first start on another processor compiles once more,
beside what is there, and none compiles twice.
Does not know batches, sessions or which kernel serves meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import importlib.metadata
import logging
import os
import platform
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # numba takes a second to import, and need not be there
    from htm_service.kernels.compiled import CompiledKernel

LOOPS = "htm_service.kernels.loops"
SOURCES = (Path(__file__).with_name("loops.py"), Path(__file__).parent / "search" / "loops.py")
CPUINFO = Path("/proc/cpuinfo")
NICENESS = 5
"""Of the child: a third of the share of who serves, so that it ends soon on a busy machine too."""


class CompilationFailed(Exception):
    """The child ended without a kernel; the message says how."""


class Compilation:
    """See the head of this module. `folder` is where machine code is kept; another one when it cannot be written."""

    def __init__(self, folder: Path) -> None:
        self.folder = writable(folder)
        self._child: asyncio.subprocess.Process | None = None

    @property
    def is_done(self) -> bool:
        """Whether the kernel only has to be read from the cache."""
        return mark_of(self.folder).exists()

    def load(self) -> CompiledKernel:
        """The kernel, ready, from the cache (any thread). Nothing is compiled here. Raises CompilationFailed."""
        use_cache(self.folder)
        from htm_service.kernels.compiled import CompiledKernel

        with refusing():
            compile_all()
        return CompiledKernel()

    def prepare(self) -> None:
        """Do now what `load` need not do beside requests: numba's import would hold all of them up for 0.1 s."""
        with contextlib.suppress(CompilationFailed):
            self.load()

    async def run(self) -> None:
        """Have the child compile what is not there yet, and wait for it. Raises CompilationFailed."""
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r}); "
        code += f"from {__name__} import compile_into; compile_into({str(self.folder)!r})"
        self._child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", code), stdin=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        try:
            assert self._child.stderr is not None
            said = await self._child.stderr.read()
            exit_code = await self._child.wait()
        finally:
            await self.stop()
        if not self.is_done:
            last = said.decode(errors="replace").strip().rpartition("\n")[2]
            raise CompilationFailed(f"the process that compiles ended with {exit_code}: {last or 'it said nothing'}")

    async def stop(self) -> None:
        """End the child, if there is one. Safe to call twice."""
        child, self._child = self._child, None
        if child is not None and child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()


def compile_into(folder: str) -> None:
    """What the child does: compile, unless another one just did, and leave the mark. It ends with its parent."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.nice(NICENESS)
    with (Path(folder) / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not mark_of(Path(folder)).exists():
            use_cache(Path(folder))
            compile_all()
            mark_of(Path(folder)).touch()


def compile_all() -> None:
    """Have all loops: from the cache, or compile them. Imports no torch: the child would do so for nothing."""
    from htm_service.kernels import loops
    from htm_service.kernels.search import loops as search_loops

    for loop, types in (*loops.signatures(), *search_loops.signatures()):
        loop.compile(types)


def _end_with_parent() -> None:
    # Until the other end is closed, however its process ended; not through `sys.stdin`, whose lock this thread would
    # hold when the interpreter ends: a fatal error.
    os.read(0, 1)
    os._exit(1)


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """While this lasts, raise CompilationFailed where numba would compile one of the loops on this thread."""
    from numba.core.event import Listener, install_listener

    here = threading.get_ident()

    class Refusal(Listener):
        def on_start(self, event: Any) -> None:
            if threading.get_ident() == here:
                raise CompilationFailed("what was compiled is not in the cache")

        def on_end(self, event: Any) -> None:
            pass

    with install_listener("numba:compile", Refusal()):
        yield


def use_cache(folder: Path) -> None:
    """Have numba keep the loops' machine code in `folder`, unless they were imported before."""
    if LOOPS not in sys.modules:
        import numba

        numba.config.CACHE_DIR = str(folder)  # type: ignore[attr-defined]


def mark_of(folder: Path) -> Path:
    """The mark that says: for this processor, these versions and this source all is in the cache."""
    sources = [f"{source} {status.st_mtime_ns} {status.st_size}" for source in SOURCES if (status := source.stat())]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("numba", "llvmlite", "numpy")]
    depends_on = [sys.version, processor(), *versions, *sources]
    return folder / f"{hashlib.sha256(repr(depends_on).encode()).hexdigest()[:16]}.ready"


def processor(cpuinfo: Path = CPUINFO) -> str:
    """What machine code may depend on of this machine's processor: its kind and features."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    told = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return f"{platform.machine()} {sorted(told)}"


def writable(folder: Path) -> Path:
    """The folder, made where it is missing; a temporary one, with a line in the log, when it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        other = Path(tempfile.mkdtemp(prefix="htm-kernels-"))
        logging.getLogger(__name__).warning(
            "the compiled kernel is kept in %s, and lost with it: %s cannot be written: %s",
            other,
            folder,
            error.strerror,
        )
        return other
