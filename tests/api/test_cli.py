"""The command line: the line when ready, exit codes, one sentence for what a user can cause."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import safetensors.numpy
from typer.testing import CliRunner, Result

from api.cli import build
from api.settings import Settings, flag_name
from htm_service.version import __version__
from storage.resolve import open_store
from tests.api.conftest import MODEL

Start = Callable[..., "subprocess.Popen[str]"]


def run(*arguments: str) -> Result:
    """In this process, because starting one takes seconds."""
    return CliRunner(env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}).invoke(build(), arguments)


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts servers, and ends those that are left."""
    running: list[subprocess.Popen[str]] = []

    def begin(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "api", "serve", "--device", "cpu", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    yield begin
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


def ready(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    match = re.fullmatch(r"htm-service is ready at (http://127\.0\.0\.1:\d+)\n", line)
    assert match, (line, process.poll())
    return match[1]


def test_a_life_in_one_directory(start: Start, tmp_path: Path) -> None:
    """Serve, remember, stop on SIGTERM with 0, serve again with everything there, stop on SIGINT with 0."""
    data = str(tmp_path / "data")
    first = start("--data", data, "--port", "0")
    address = ready(first)
    httpx.put(f"{address}/v1/sessions/s", json={"dim": 3}).raise_for_status()
    httpx.post(f"{address}/v1/sessions/s/memories", json={"embeddings": [1, 2, 3]}).raise_for_status()
    second = start("--data", data, "--port", "0")
    out, err = second.communicate(timeout=60)
    assert (second.returncode, out) == (1, "")
    assert err.splitlines()[-1].startswith("htm-service: ")
    assert "Traceback" not in err
    taken = run("serve", "--port", address.rsplit(":", 1)[1], "--store-url", "memory://")
    assert taken.exit_code == 1
    assert re.search(r"htm-service: cannot listen on 127\.0\.0\.1 port \d+: .*in use", taken.stderr)

    first.send_signal(signal.SIGTERM)
    out, err = first.communicate(timeout=30)
    assert (first.returncode, out) == (0, ""), err
    assert "Traceback" not in err
    checked = run("verify", data)
    assert (checked.exit_code, checked.stdout) == (0, "1 sessions, 1 tokens, 0 problems\n"), checked.stderr
    again = start("--data", data, "--port", "0")
    assert httpx.get(f"{ready(again)}/v1/sessions/s").json()["length"] == 1
    again.send_signal(signal.SIGINT)
    again.communicate(timeout=30)
    assert again.returncode == 0


def test_a_store_on_postgresql_is_verified_by_its_url(postgresql_url: str) -> None:
    empty = run("verify", postgresql_url)
    assert (empty.exit_code, empty.stdout) == (1, "")
    assert "is an empty database; start the server once to set it up" in empty.stderr
    open_store(postgresql_url).close()
    checked = run("verify", postgresql_url)
    assert (checked.exit_code, checked.stdout) == (0, "0 sessions, 0 tokens, 0 problems\n"), checked.stderr


def test_back_up_a_running_server_then_repair(start: Start, tmp_path: Path) -> None:
    data, copy = tmp_path / "data", tmp_path / "copy"
    (data / "models").mkdir(parents=True)
    (data / "models" / "none.txt").write_text("kept")
    server = start("--data", str(data), "--port", "0")
    address = ready(server)
    httpx.put(f"{address}/v1/sessions/s", json={"dim": 3}).raise_for_status()
    for _ in range(3):
        httpx.post(f"{address}/v1/sessions/s/memories", json={"embeddings": [1, 2, 3]}).raise_for_status()
    copied = run("backup", str(data), str(copy))
    assert (copied.exit_code, copied.stdout) == (0, "1 sessions, 3 tokens, 0 problems\n"), copied.stderr
    assert (copy / "models" / "none.txt").read_text() == "kept"
    refused = run("repair", str(data))
    assert refused.exit_code == 1 and "in use by another server" in refused.stderr
    server.send_signal(signal.SIGTERM)
    server.communicate(timeout=30)

    with contextlib.closing(sqlite3.connect(copy / "htm.sqlite3")) as connection, connection:
        connection.execute("UPDATE blocks SET data = zeroblob(length(data)) WHERE start = 2")
        connection.execute("UPDATE sessions SET id = 'é'")
    again = run("backup", str(copy), str(tmp_path / "second"))
    assert again.exit_code == 1 and "é: the block at position 2 does not match" in again.stdout
    lost = "session é loses the tokens 2 to 2, 1 of 3, because the block at position 2 does not match its checksum\n"
    asked = run("repair", str(copy))  # there is nobody to say yes
    assert asked.exit_code == 1 and asked.stdout.startswith(lost)
    assert run("verify", str(copy)).exit_code == 1
    for said in (lost, ""):
        done = run("repair", str(copy), "--yes")
        assert (done.exit_code, done.stdout) == (0, said + "1 sessions, 2 tokens, 0 problems\n")
    restored = start("--data", str(copy), "--port", "0")
    assert httpx.get(f"{ready(restored)}/v1/sessions/%C3%A9").status_code == 422
    restored.send_signal(signal.SIGTERM)
    restored.communicate(timeout=30)


def test_a_socket_does_not_answer_before_the_server_is_ready() -> None:
    from api.serving import address_of, listen_socket

    with listen_socket("127.0.0.1", 0) as listener:
        assert address_of(listener).startswith("http://127.0.0.1:")
        with pytest.raises(ConnectionRefusedError), socket.socket() as client:
            client.connect(listener.getsockname())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["serve", "--host", "0.0.0.0"], "refusing to listen on 0.0.0.0 without a key"),
        (["serve", "--data", "", "--port", "0"], "data: it must be the path of a directory (got '')"),
        (
            ["serve", "--data", "/dev/null/x", "--port", "0"],
            "/dev/null/x cannot be used as data directory: /dev/null is",
        ),
        (["verify", "mysql://me:secret@host/x"], "store URL begins with 'mysql', it must be"),
        (["serve", "--port", "x"], "port: Input should be a valid integer"),
        (["serve", "--store-url", "ftp://x", "--port", "0"], "store URL"),
        (["serve", "--store-url", "memory://", "--port", "0", "--models-dir", "/nonexistent"], "/nonexistent"),
        (["verify", "/nonexistent"], "/nonexistent does not exist"),
        (["backup", "/nonexistent", "x"], "/nonexistent does not exist"),
        (["repair", "/nonexistent"], "/nonexistent does not exist"),
        (["models", "convert", "/nonexistent", "x", "--from", "haiku", "--heads", "1"], "is not a file"),
    ],
)
def test_failures_are_one_sentence(arguments: list[str], sentence: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("htm-service: ")
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_a_misspelt_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTM_PROT", "1")
    done = run("serve")
    assert done.exit_code == 1
    assert "unknown environment variable HTM_PROT" in done.stderr


def test_version_and_flags() -> None:
    assert run("--version").stdout == f"htm-service {__version__}\n"
    text = run("serve", "--help").stdout
    for name, field in Settings.model_fields.items():
        assert flag_name(name, field) in text


def test_models(tmp_path: Path) -> None:
    dim, heads, dim_head = 7, 2, 3
    rng = np.random.default_rng(0)
    sizes = {
        "to_summary_queries.weight": (dim, dim),
        "to_summary_queries.bias": (dim,),
        "to_summary_keys.weight": (dim, dim),
        "to_summary_keys.bias": (dim,),
        "attn.to_q.weight": (heads * dim_head, dim),
        "attn.to_kv.weight": (2 * heads * dim_head, dim),
        "attn.to_out.weight": (dim, heads * dim_head),
        "attn.to_out.bias": (dim,),
    }
    tensors = {name: rng.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "in.safetensors")
    out = tmp_path / "navigator.safetensors"
    arguments = ["--from", "htm-pytorch", "--heads", "2", "--dim-head", "3", "--no-position-encoding"]
    done = run("models", "convert", str(tmp_path / "in.safetensors"), str(out), *arguments)
    assert done.exit_code == 0, done.stderr
    assert "model navigator, width 7, 2 heads" in done.stdout
    (tmp_path / "in.safetensors").unlink()
    listed = run("models", "list", "--models-dir", str(tmp_path))
    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["navigator", "retrieval"], listed.stderr


KEY = "the-admins-key-of-this-test"


def test_models_are_put_listed_and_removed(keyed_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    where = ["--url", keyed_server]
    file = tmp_path / "m.safetensors"
    file.write_bytes(MODEL)
    assert "there is no key" in run("models", "list", *where).stderr
    monkeypatch.setenv("HTM_API_KEY", KEY)
    assert run("models", "list", *where).stdout.startswith("retrieval  any width, 1 heads, top_k 8, chunks of 32  4e27")
    made = run("models", "put", "navigator", str(file), "--if-new", *where)
    assert made.exit_code == 0 and made.stdout.startswith("navigator  width 3, 1 heads, top_k 2, chunks of 2  ")
    hash_ = made.stdout.split()[-4]
    refused = run("models", "put", "navigator", str(file), "--if-new", *where)
    assert refused.exit_code == 1 and f"the model has the hash {hash_}" in refused.stderr
    assert run("models", "put", "navigator", str(file), "--if-match", hash_, *where).stdout == made.stdout
    assert "must match" in run("models", "put", "a@b", str(file), *where).stderr
    assert "not a safetensors file" in run("models", "put", "n", str(Path(__file__)), *where).stderr
    assert "No such file" in run("models", "put", "n", str(tmp_path / "none"), *where).stderr
    assert [line.split()[0] for line in run("models", "list", *where).stdout.splitlines()] == ["navigator", "retrieval"]
    assert run("models", "list", "--namespace", "blue", *where).stdout.startswith("retrieval")
    assert run("models", "remove", "navigator", "--if-match", "another", *where).exit_code == 1
    assert run("models", "remove", "navigator", "--if-match", hash_, *where).exit_code == 0
    assert "no model is named 'navigator'" in run("models", "remove", "navigator", *where).stderr


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1, signed by itself, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names]
    subprocess.run([*command, "-out", cert, "-keyout", key], check=True, capture_output=True)
    return cert, key


def test_https(start: Start, tmp_path: Path, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    cert, key = certificate
    process = start("--port", "0", "--data", str(tmp_path / "data"), "--tls-cert", str(cert), "--tls-key", str(key))
    assert process.stdout is not None
    found = re.fullmatch(r"htm-service is ready at (https://127\.0\.0\.1:\d+)\n", process.stdout.readline())
    assert found is not None
    with httpx.Client(base_url=found[1], verify=ssl.create_default_context(cafile=str(cert))) as client:
        assert client.get("/v1/info").status_code == 200
    monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    listed = run("keys", "list", "--url", found[1])
    assert (listed.exit_code, listed.stdout) == (0, "")
    monkeypatch.delenv("SSL_CERT_FILE")
    assert "certificate verify failed" in run("keys", "list", "--url", found[1]).stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tls-cert", "cert.pem"], "tls_cert and tls_key are given together or not at all"),
        (["--tls-cert", "no.pem", "--tls-key", "no.pem"], "cannot be used: No such file or directory"),
        (["--cors-origins", "https://a.org/path"], "cors_origins has 'https://a.org/path'"),
        (["--cors-origins", "https://a.org"], "which needs an admin's key"),
    ],
)
def test_what_cannot_be_opened_to_others(options: list[str], message: str, tmp_path: Path) -> None:
    refused = run("serve", "--port", "0", "--data", str(tmp_path / "data"), *options)
    assert refused.exit_code == 1 and message in refused.stderr and "Traceback" not in refused.stderr


@pytest.fixture
def keyed_server(start: Start, tmp_path: Path) -> str:
    """The address of a server that was given its key as an argument, which nobody sees."""
    process = start("--port", "0", "--data", str(tmp_path / "data"), "--api-key", KEY)
    url = ready(process)
    assert KEY.encode() not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
    return url


def test_keys_are_made_listed_and_revoked(keyed_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    where = ("--url", keyed_server)
    refused = run("keys", "list", *where)
    assert refused.exit_code == 1 and "there is no key; send one" in refused.stderr
    (tmp_path / "key").write_text(KEY)
    monkeypatch.setenv("HTM_API_KEY_FILE", str(tmp_path / "key"))
    assert run("keys", "list", *where).stdout == ""
    monkeypatch.setenv("HTM_PORT", keyed_server.rpartition(":")[2])
    assert run("keys", "list").exit_code == 0, "as in a container with another port: it asked 8000"
    options = ("--role", "write", "--namespace", "team", "--expires", "30d", "--requests-per-second", "5")
    made = run("keys", "create", "agent", *options, *where)
    assert made.exit_code == 0, made.stderr
    key = made.stdout.strip()
    with httpx.Client(base_url=keyed_server, headers={"Authorization": f"Bearer {key}"}) as client:
        assert client.put("/v1/sessions/s", json={"dim": 3}).status_code == 201
        listed = run("keys", "list", *where).stdout
        assert re.search(r"^agent  write  namespace team  until \S+  5 requests/s  used \S+Z\n$", listed), listed
        assert run("keys", "revoke", "agent", *where).exit_code == 1
        assert run("keys", "revoke", "agent", "--namespace", "team", *where).exit_code == 0
        assert client.get("/v1/sessions/s").status_code == 401
    monkeypatch.delenv("HTM_API_KEY_FILE")
    monkeypatch.setenv("HTM_API_KEY", KEY)
    assert "it must be such as 30d" in run("keys", "create", "b", "--role", "read", "--expires", "soon", *where).stderr


def test_keys_say_what_is_wrong_with_the_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    refused = run("keys", "list", "--url", f"http://127.0.0.1:{port}")
    assert refused.exit_code == 1 and "cannot be reached" in refused.stderr and "Traceback" not in refused.stderr
    assert "must begin with http" in run("keys", "list", "--url", "file:///etc/passwd").stderr
