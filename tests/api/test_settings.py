"""Settings: the environment, flags, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from api.machine import memory_bytes
from api.settings import Settings, env_name, flag_name, of_services, parse_bytes, sentence


@pytest.mark.parametrize(
    ("text", "number"),
    [("4096", 4096), ("4GiB", 4 << 30), ("1.5G", 1_500_000_000), ("10 kb", 10_000), ("2MiB", 2 << 20), ("1t", 10**12)],
)
def test_sizes(text: str, number: int) -> None:
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "many", "-1", "4 Gigs", "1e9"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="not a number of bytes"):
        parse_bytes(text)


def test_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    settings = Settings()
    assert settings.data == tmp_path / "htm-service"
    assert settings.url_of_store == f"sqlite:///{tmp_path}/htm-service/htm.sqlite3"
    assert settings.directory_of_models is None
    assert settings.memory_budget_bytes == memory_bytes() // 2
    assert (settings.host, settings.port, settings.insecure) == ("127.0.0.1", 8000, False)


def test_the_users_own_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where a shell has not put it in: it was a directory of the name `~` in the current one."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HTM_KERNEL_CACHE", "~/kernels")
    flags: dict[str, Any] = {"data": "~/data", "models_dir": "~/models"}
    settings = Settings(**flags)
    directories = settings.data, settings.directory_of_models, settings.directory_of_kernels
    assert directories == (tmp_path / "data", tmp_path / "models", tmp_path / "kernels")


@pytest.mark.parametrize("name", ["data", "models_dir", "kernel_cache"])
def test_an_empty_path_is_refused(name: str) -> None:
    """It was the current directory, which then held a database."""
    flags: dict[str, Any] = {name: ""}
    with pytest.raises(ValidationError) as refused:
        Settings(**flags)
    assert sentence(refused.value) == f"{name}: it must be the path of a directory (got '')"


def test_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    for name, value in {
        "HTM_PORT": "9000",
        "HTM_DATA": str(tmp_path),
        "HTM_MEMORY_BUDGET": "3GiB",
        "HTM_MAX_BODY_BYTES": "1MiB",
        "HTM_CREATE_ON_APPEND": "1",
        "HTM_MODELS_DIR": "",  # as compose files write "not set"
    }.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.port == 9000
    assert settings.memory_budget_bytes == 3 << 30
    assert settings.max_body_bytes == 1 << 20
    assert settings.create_on_append
    assert settings.directory_of_models == tmp_path / "models"
    monkeypatch.setenv("HTM_STORE_URL", "memory://")  # as in compose.yaml, which names a PostgreSQL and /data
    assert Settings().directory_of_models == tmp_path / "models"
    monkeypatch.delenv("HTM_DATA")
    assert Settings().directory_of_models is None
    monkeypatch.delenv("HTM_STORE_URL")
    assert Settings(port=1).port == 1  # a flag wins


def test_every_setting_is_read_from_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A validation alias replaces the prefix, so that MEMORY_BUDGET without HTM_ could slip in."""
    monkeypatch.setenv("MEMORY_BUDGET", "no number")
    monkeypatch.setenv("PORT", "no number")
    Settings()
    for name, field in Settings.model_fields.items():
        monkeypatch.setenv(env_name(name, field), "\x01 no such value")
        if field.annotation is str and name == "host":
            with pytest.raises(ValidationError, match="refusing to listen"):
                Settings()
        elif name not in ("data", "store_url", "models_dir", "kernel_cache"):
            with pytest.raises(ValidationError):
                Settings()
        monkeypatch.delenv(env_name(name, field))


def test_unknown_variables_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTM_PROT", "9000")
    with pytest.raises(ValidationError, match="unknown environment variable HTM_PROT") as caught:
        Settings()
    assert sentence(caught.value).startswith("unknown environment variable HTM_PROT; known are HTM_")


def test_each_has_a_description_and_a_flag() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
        assert flag_name(name, field).startswith("--")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_nothing(host: str) -> None:
    assert Settings(host=host).host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_other_hosts_need_a_key(host: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"without a key.*HTM_API_KEY.*HTM_API_KEY_FILE.*openssl rand -hex 32"):
        Settings(host=host)
    assert Settings(host=host, insecure=True).host == host
    assert Settings(host=host, api_key=SecretStr("a-key-of-32-characters-or-so")).host == host
    (tmp_path / "key").write_text("a-key-from-a-file-of-docker\n")
    assert Settings(host=host, api_key_file=tmp_path / "key").admin_key == "a-key-from-a-file-of-docker"


@pytest.mark.parametrize(
    "key", ["short", "has a space in its middle", "ключ-который-длинный", "tab\tin-the-middle-of-it"]
)
def test_a_key_that_is_none_is_refused_without_being_told(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTM_API_KEY", key)
    with pytest.raises(ValidationError, match="the admin's key has") as caught:
        Settings()
    assert key not in sentence(caught.value)


def test_the_key_is_never_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HTM_API_KEY", "a-key-of-32-characters-or-so")
    settings = Settings()
    assert settings.admin_key == "a-key-of-32-characters-or-so"
    for shown in (repr(settings), str(settings), settings.model_dump_json(), str(settings.model_copy())):
        assert "a-key-of" not in shown
    with pytest.raises(ValidationError, match="both api_key and api_key_file are given"):
        Settings(api_key_file=tmp_path / "key")
    monkeypatch.setenv("HTM_PORT", "none")
    with pytest.raises(ValidationError) as caught:
        Settings()
    assert "a-key-of" not in sentence(caught.value)
    monkeypatch.delenv("HTM_API_KEY")
    monkeypatch.delenv("HTM_PORT")
    with pytest.raises(ValidationError, match=f"api_key_file cannot be read: .*{tmp_path}/nothing"):
        Settings(api_key_file=tmp_path / "nothing")


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 70000},
        {"device": "tpu"},
        {"dtype": "int8"},
        {"default_timeout_ms": 0},
        {"retrieval_summary_scale": float("nan")},
        {"max_waiting": 0},
        {"log_level": "loud"},
        {"prot": 1},
    ],
)
def test_wrong_values(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings(**wrong)
    assert next(iter(wrong)) in sentence(caught.value)


def test_the_largest_payload_can_be_read_back() -> None:
    with pytest.raises(ValidationError) as caught:
        Settings(max_answer_bytes=2_000, max_json_body_bytes=2_001)
    assert "max_answer_bytes is 2000, below max_json_body_bytes 2001" in sentence(caught.value)


OF_SERVICES = {
    "HTM_SERVICE_SERVICE_HOST": "10.96.1.7",
    "HTM_SERVICE_SERVICE_PORT": "8000",
    "HTM_SERVICE_SERVICE_PORT_HTTP": "8000",
    "HTM_SERVICE_PORT": "tcp://10.96.1.7:8000",
    "HTM_SERVICE_PORT_8000_TCP": "tcp://10.96.1.7:8000",
    "HTM_SERVICE_PORT_8000_TCP_ADDR": "10.96.1.7",
    "HTM_SERVICE_PORT_8000_TCP_PORT": "8000",
    "HTM_SERVICE_PORT_8000_TCP_PROTO": "tcp",
    "HTM_SERVICE_HOST": "fd00::7",  # of a Service called `htm`
    "HTM_PORT": "tcp://[fd00::7]:8000",
    "HTM_PORT_8000_TCP": "tcp://[fd00::7]:8000",
}
"""What Kubernetes sets in each pod for Services called `htm-service` and `htm`."""


def test_variables_of_kubernetes_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pod that shared a namespace with a Service of our name could not start."""
    for name, value in OF_SERVICES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HTM_HOST", "127.0.0.2")
    assert (Settings().host, Settings().port) == ("127.0.0.2", 8000)
    assert of_services() == sorted(OF_SERVICES)


@pytest.mark.parametrize(
    ("name", "value", "others"),
    [
        ("HTM_SERVICE_HOST", "10.96.1.7", {}),  # without a port it is nobody's
        ("HTM_SERVICE_HOST", "localhost", {"HTM_SERVICE_PORT": "8000"}),
        ("HTM_PORT", "tcp://10.96.1.7:8000", {}),
        ("HTM_PORTS", "8000", OF_SERVICES),
        ("HTM_API_SERVICE_HOSTS", "10.96.1.7", OF_SERVICES),
    ],
)
def test_a_real_mistake_is_still_one(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, others: dict[str, str]
) -> None:
    for key, text in {**others, name: value}.items():
        monkeypatch.setenv(key, text)
    with pytest.raises(ValidationError, match=rf"{name}|port"):
        Settings()


def test_a_port_of_ours_beside_a_service_of_our_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**OF_SERVICES, "HTM_PORT": "9000"}.items():  # what a pod sets itself wins over Kubernetes
        monkeypatch.setenv(name, value)
    assert Settings().port == 9000
