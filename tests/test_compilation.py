"""The compiled kernel beside a server that serves already: who compiles, when it is known, what may fail."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from htm_client import HTMClient

from htm_service.config import EngineConfig
from htm_service.engine import Engine
from htm_service.kernels import compilation, loops
from htm_service.kernels.compilation import Compilation, CompilationFailed, mark_of, processor
from storage.in_memory import MemoryStore
from tests.served.server import Server

pytestmark = pytest.mark.timeout(300)


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kernel_of(server: Server) -> tuple[str, str]:
    """Which kernel serves, and why."""
    with HTMClient(server.url) as client:
        info = client.info()
    return info["kernel"], info["kernel_reason"]


async def test_a_server_serves_before_its_kernel_is_compiled_and_with_it_then(tmp_path: Path) -> None:
    """The first start once took 23 s, most of it for compiling. Answers are the same before and after."""
    server = Server(tmp_path, environment={"HTM_KERNEL_CACHE": str(tmp_path / "kernels")})
    tokens = np.random.default_rng(1).standard_normal((70, 16)).astype(np.float32)
    try:
        await asyncio.to_thread(server.start)
        kernel, reason = kernel_of(server)
        assert kernel == "reference" and "on its way" in reason
        with HTMClient(server.url) as client:
            client.create_session("s", dim=16)
            client.append("s", tokens)
            first = client.attend("s", tokens[:3])
            deadline = time.monotonic() + 120
            while kernel_of(server)[0] != "compiled":
                assert time.monotonic() < deadline, server.log.read_text()
                await asyncio.sleep(0.2)
            second = client.attend("s", tokens[:3])
        assert first.output is not None and second.output is not None
        np.testing.assert_allclose(second.output, first.output, rtol=1e-4, atol=1e-5)
        assert "took over" in kernel_of(server)[1] or "until it was compiled" in kernel_of(server)[1]
        assert not children(server.pid), "who compiled has ended"
        await asyncio.to_thread(server.restart, signal.SIGTERM)
        assert kernel_of(server) == ("compiled", "the fastest that this device has")
    finally:
        server.close()


async def test_who_compiles_ends_with_the_server(tmp_path: Path) -> None:
    server = Server(tmp_path, environment={"HTM_KERNEL_CACHE": str(tmp_path / "kernels")})
    try:
        for how in (signal.SIGKILL, signal.SIGTERM):
            await asyncio.to_thread(server.start)
            for _ in range(100):
                if found := children(server.pid):
                    break
                await asyncio.sleep(0.05)
            (child,) = found
            assert os.getpriority(os.PRIO_PROCESS, child) in (0, compilation.NICENESS)
            await asyncio.to_thread(server.end, how)
            for _ in range(200):
                if not is_there(child):
                    break
                await asyncio.sleep(0.05)
            assert not is_there(child)
    finally:
        server.close()
    assert not mark_of(tmp_path / "kernels").exists()


async def test_a_kernel_that_cannot_be_compiled_leaves_the_reference_serving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compilation, "__name__", "no_such_module")
    engine = Engine(EngineConfig(device="cpu", kernel_cache=tmp_path), MemoryStore())
    await engine.start()
    try:
        for _ in range(500):
            if "cannot be had" in engine.kernel_reason:
                break
            await asyncio.sleep(0.02)
        info = await engine.info()
    finally:
        await engine.close()
    assert info.kernel == "reference" and "No module named 'no_such_module'" in info.kernel_reason
    assert "the reference kernel goes on serving, slowly" in caplog.text


async def test_a_mark_without_its_kernel_is_no_kernel(tmp_path: Path) -> None:
    """A server never compiles: what a child left nothing of is told, and the reference goes on serving."""
    mark_of(tmp_path).touch()
    code = f"import asyncio, pathlib, sys; from {compilation.__name__} import Compilation\n"
    code += "one = Compilation(pathlib.Path(sys.argv[1])); asyncio.run(one.run()); one.load()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
    assert done.returncode == 1 and "CompilationFailed: what was compiled is not in the cache" in done.stderr


def test_who_compiles_does_not_import_torch() -> None:
    code = f"import sys, {compilation.__name__}, {loops.__name__}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


async def test_a_child_that_says_nothing_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(CompilationFailed, match="ended with 1: it said nothing"):
        await Compilation(tmp_path).run()


def test_the_mark_is_of_one_processor_and_one_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that was built, or a volume that was filled, on another processor is compiled for once more."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor: 0\nmodel name: A\nflags: avx2\ncpu MHz: 1\nprocessor: 1\nmodel name: A\nflags: avx2\n"
    )
    first = processor(cpuinfo)
    cpuinfo.write_text(cpuinfo.read_text().replace("MHz: 1", "MHz: 2"))
    assert processor(cpuinfo) == first
    cpuinfo.write_text(cpuinfo.read_text().replace("flags: avx2", "flags: avx2 avx512f"))
    assert processor(cpuinfo) != first != processor(tmp_path / "missing")
    compiled = Compilation(tmp_path)
    mark_of(tmp_path).touch()
    assert compiled.is_done
    monkeypatch.setattr(compilation, "processor", lambda: "another")
    assert not compiled.is_done
    monkeypatch.undo()
    monkeypatch.setattr(compilation, "SOURCES", (cpuinfo,))
    assert not compiled.is_done


def test_a_folder_that_cannot_be_written_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    compiled = Compilation(tmp_path / "file" / "kernels")
    with contextlib.ExitStack() as stack:
        stack.callback(compiled.folder.rmdir)
        assert compiled.folder.is_dir() and not compiled.is_done
        assert f"{tmp_path / 'file' / 'kernels'} cannot be written" in caplog.text


def test_another_processors_machine_code_is_left_alone(tmp_path: Path) -> None:
    """numba knows it by the processor's name and features: it compiles for this one beside it."""
    program = (
        "import numba, sys; numba.config.CACHE_DIR = sys.argv[1]; sys.path.insert(0, sys.argv[2]);"
        "import loop_of_a_test as loop; print(loop.twice(21), sum(loop.twice.stats.cache_hits.values()))"
    )
    (tmp_path / "loop_of_a_test.py").write_text(
        "import numba\n@numba.njit(cache=True)\ndef twice(number):\n    return 2 * number\n"
    )

    def run(**environment: str) -> str:
        command = [sys.executable, "-c", program, str(tmp_path / "cache"), str(tmp_path)]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert run(NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="") == "42 0"
    assert run() == "42 0"
    assert [run(), run(NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="")] == ["42 1", "42 1"]
