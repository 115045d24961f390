"""The Dockerfile and compose.yaml, linted, and held to the code: user, port, paths, commands, install lines."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import sysconfig
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from pydantic import ValidationError
from sqlalchemy import make_url

from api.app import create_app
from api.cli import build
from api.settings import Settings, env_name

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
PIN = next(
    Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")
)

Stage = list[tuple[str, str]]
"""Instructions with their arguments."""


def read_stages(text: str) -> list[Stage]:
    """What comes before the first FROM, then the stages."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    stages: list[Stage] = [[]]
    for line in filter(None, lines.replace("\\\n", " ").splitlines()):
        word, _, argument = line.partition(" ")
        if word == "FROM":
            stages.append([])
        stages[-1].append((word, " ".join(argument.split())))
    return stages


HEAD, BUILD, FINAL = read_stages(DOCKERFILE)


def arguments(stage: Stage, word: str) -> list[str]:
    return [argument for name, argument in stage if name == word]


def only(stage: Stage, word: str) -> str:
    (argument,) = arguments(stage, word)
    return argument


def environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in shlex.split(only(FINAL, "ENV")))


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sysconfig.get_path("scripts"), "hadolint")
    run = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_base_image_is_an_argument_and_new_enough() -> None:
    name, _, default = only(HEAD, "ARG").partition("=")
    assert [only(stage, "FROM").split()[0] for stage in (BUILD, FINAL)] == [f"${{{name}}}"] * 2
    match = re.fullmatch(r"python:(\d+\.\d+)-slim", default)
    assert match is not None
    assert SpecifierSet(PROJECT["project"]["requires-python"]).contains(match[1])


def test_every_install_is_constrained() -> None:
    installs = [command for command in arguments(BUILD, "RUN") if "pip install" in command]
    assert len(installs) == 2
    assert all("-c constraints.txt" in command for command in installs)
    assert "constraints.txt ./" in arguments(BUILD, "COPY")
    assert not [command for command in arguments(FINAL, "RUN") if "pip" in command]


def test_torch_can_be_chosen_and_is_the_pinned_one() -> None:
    defaults = dict(argument.partition("=")[::2] for argument in arguments(BUILD, "ARG"))
    assert (defaults["TORCH"], defaults["TORCH_INDEX"]) == (PIN.name, "")
    (version,) = PIN.specifier
    named = set(re.findall(r"torch==(\S+)", DOCKERFILE))
    assert named == {f"{version.version}+cpu"}, (
        "the head of the Dockerfile names a torch that constraints.txt does not pin"
    )


def test_what_is_copied_exists_and_is_the_code() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[0] == "*", ".dockerignore lists what may enter, nothing else does"
    sources = [source for copy in arguments(BUILD, "COPY") for source in copy.split()[:-1]]
    assert sorted(f"!{source}" for source in sources) == sorted(line for line in ignored if line.startswith("!"))
    packages = {pattern.removesuffix("*") for pattern in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    needed = {"pyproject.toml", "constraints.txt", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    assert set(sources) == packages | needed
    assert all((ROOT / source).exists() for source in sources)


def test_a_compiler_comes_only_with_triton_and_needs_no_home() -> None:
    (install,) = [command for command in arguments(FINAL, "RUN") if "apt-get" in command]
    assert install.startswith("if ") and "site-packages/triton" in install.split(";")[0] and " gcc " in install
    data = only(FINAL, "VOLUME")
    assert all(environment()[name].startswith(f"{data}/") for name in ("TRITON_CACHE_DIR", "HTM_KERNEL_CACHE"))


def test_user_is_not_root_and_owns_the_data() -> None:
    (users,) = [command for command in arguments(FINAL, "RUN") if "useradd" in command]
    user, _, group = only(FINAL, "USER").partition(":")
    created = re.search(r"useradd --uid (\d+)", users)
    assert created is not None
    assert user == group == created[1]
    assert int(user) >= 10_000
    assert re.search(r"install -d -o htm -g htm -m 0700 (\S+)", users)[1] == only(FINAL, "VOLUME")  # type: ignore[index]


def test_environment_makes_valid_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment().items():
        if name.startswith("HTM_"):
            monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError, match=r"refusing to listen on 0\.0\.0\.0 without a key"):
        Settings()
    monkeypatch.setenv("HTM_API_KEY", "the-admins-key-of-this-test")
    settings = Settings()
    assert settings.host == "0.0.0.0" and not settings.insecure
    assert settings.port == Settings.model_fields["port"].default == int(only(FINAL, "EXPOSE"))
    assert str(settings.data) == only(FINAL, "VOLUME")
    assert environment()["PYTHONDONTWRITEBYTECODE"] == "1", "the file system may be read-only"


def test_entrypoint_is_the_command() -> None:
    (script,) = json.loads(only(FINAL, "ENTRYPOINT"))
    assert script in PROJECT["project"]["scripts"]
    group = typer.main.get_command(build())
    (command,) = json.loads(only(FINAL, "CMD"))
    assert command in group.commands  # type: ignore[attr-defined]
    home = environment()["PATH"].split("/bin")[0]
    assert arguments(BUILD, "RUN")[0] == f"python3 -m venv {home}"
    assert only(FINAL, "COPY") == f"--from=build {home} {home}", "a venv works only where it was made"


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (None, 1)])
def test_health_check_follows_readyz(status: int | None, code: int) -> None:
    """The very command of the image, run against a server that answers so, or that does not answer."""
    paths = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(status or 0)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        if status is None:
            server.server_close()
        else:
            thread.start()
        command = json.loads(only(FINAL, "HEALTHCHECK").partition("CMD ")[2])
        command[0] = sys.executable
        # A proxy that the container's environment names must not be asked how the container is.
        env = {
            "HTM_PORT": str(server.server_port),
            "http_proxy": "http://127.0.0.1:9",
            "HTTP_PROXY": "http://127.0.0.1:9",
        }
        run = subprocess.run(command, env=env, capture_output=True, check=False)
        if thread.is_alive():
            server.shutdown()
            thread.join()
    assert (run.returncode, paths) == (code, [] if status is None else ["/readyz"])
    assert "/readyz" in create_app(Settings(store_url="memory://")).openapi()["paths"]


def test_stop_signal_is_the_one_that_drains() -> None:
    assert only(FINAL, "STOPSIGNAL") == "SIGTERM"


@pytest.mark.parametrize("name", ["htm-service", "gpu", "postgresql"])
def test_compose_service(name: str) -> None:
    service = COMPOSE["services"][name]
    port = only(FINAL, "EXPOSE")
    assert service["ports"] == [f"127.0.0.1:{port}:{port}"], "who wants others to reach it reads docs/security.md first"
    (volume,) = service["volumes"]
    assert volume.split(":")[1] == only(FINAL, "VOLUME")
    assert volume.split(":")[0] in COMPOSE["volumes"]
    assert service["read_only"] is True
    assert service["init"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["tmpfs"] == ["/tmp"]
    scraped = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())["scrape_configs"][0]["static_configs"]
    (alias,) = service["networks"]["default"][
        "aliases"
    ]  # of the GPU's and PostgreSQL's there was only the alarm HtmDown
    assert scraped == [{"targets": [f"{alias}:{port}"]}]
    drain_seconds = Settings.model_fields["drain_seconds"].default
    assert int(service["stop_grace_period"].removesuffix("s")) > drain_seconds
    declared = {argument.partition("=")[0] for argument in arguments(BUILD, "ARG")}
    assert set(service["build"]["args"]) <= declared
    known = {env_name(setting, field) for setting, field in Settings.model_fields.items()}
    assert set(service["environment"]) <= known
    assert service["environment"]["HTM_API_KEY"] == "${HTM_API_KEY:-}"
    (secret,) = service["secrets"]
    assert service["environment"]["HTM_API_KEY_FILE"] == f"${{HTM_API_KEY_FILE:+/run/secrets/{secret}}}"
    assert COMPOSE["secrets"][secret] == {"file": "${HTM_API_KEY_FILE:-/dev/null}"}


def test_an_empty_key_of_compose_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """What compose hands over where neither is set."""
    monkeypatch.setenv("HTM_API_KEY", "")
    monkeypatch.setenv("HTM_API_KEY_FILE", "")
    assert Settings().admin_key is None


def test_compose_postgresql_service_has_its_database() -> None:
    service, database = COMPOSE["services"]["postgresql"], COMPOSE["services"]["database"]
    assert service["profiles"] == database["profiles"] == ["postgresql"]
    assert service["depends_on"] == {"database": {"condition": "service_healthy"}}
    url, account = make_url(service["environment"]["HTM_STORE_URL"]), database["environment"]
    assert (url.drivername, url.host, url.database) == ("postgresql+psycopg", "database", account["POSTGRES_USER"])
    assert (url.username, url.password) == (account["POSTGRES_USER"], account["POSTGRES_PASSWORD"])
    assert "ports" not in database, "only the server reaches it"
    assert database["volumes"][0].split(":")[0] in COMPOSE["volumes"]
    assert '".[postgresql,otel]"' in arguments(BUILD, "RUN")[-1]


def test_compose_gpu_service_asks_for_one() -> None:
    service = COMPOSE["services"]["gpu"]
    assert service["profiles"] == ["gpu"], "without the profile only the CPU's service starts"
    assert service["environment"]["HTM_DEVICE"] == "cuda"
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert "deploy" not in COMPOSE["services"]["htm-service"]
