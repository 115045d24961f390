"""The server's settings: names, defaults, meanings, and the only place where the environment is read.

Every setting `name` is also the variable HTM_NAME and the flag --name. Does not know: what is done with them.
"""

from __future__ import annotations

import ipaddress
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import platformdirs
from pydantic import BeforeValidator, Field, PrivateAttr, SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from api.machine import memory_bytes

PREFIX = "HTM_"

_OF_SERVICE = r"_(SERVICE_HOST=|SERVICE_PORT(_[A-Z0-9_]+)?=|PORT_[0-9]+_(TCP|UDP|SCTP)(_[A-Z]+)?=|PORT=[a-z]+://).*"
"""What follows the name of a Service in a variable that Kubernetes sets for it."""
_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_BINARY_UNITS = {f"{unit}I": 1024**power for power, unit in enumerate("KMGT", start=1)}
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.-]+(:\d+)?|https?://\[[0-9A-Fa-f:]+\](:\d+)?")
MIN_KEY_CHARS = 16
"""Nobody counts who tries keys, and they are compared without a slow hash: they must not be guessable."""
_KEY = re.compile(rf"[\x21-\x7e]{{{MIN_KEY_CHARS},}}")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?", re.IGNORECASE)


def parse_bytes(value: Any) -> Any:
    """`4GiB`, `500MB`, `1.5G` or a plain number of bytes; other values are left for the type check."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError(f"{value!r} is not a number of bytes such as 4294967296, 500MB or 4GiB")
    number, unit = match.groups()
    return int(float(number) * (_UNITS | _BINARY_UNITS)[(unit or "").upper()])


Bytes = Annotated[int, BeforeValidator(parse_bytes)]


def parse_directory(value: Any) -> Any:
    """A directory's path; `~` is the user's own, since not every place where a setting is written has a shell."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        raise ValueError("it must be the path of a directory")
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{error}") from error


Directory = Annotated[Path, BeforeValidator(parse_directory)]


class Settings(BaseSettings):
    """All settings, checked. Raises pydantic's ValidationError; `sentence` makes one sentence of it."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", populate_by_name=True, env_ignore_empty=True
    )

    host: str = Field(default="127.0.0.1", description="Address to listen on; anything but loopback needs a key.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    data: Directory = Field(
        default_factory=lambda: Path(platformdirs.user_data_dir("htm-service", appauthor=False)),
        description="Directory of the data, created when missing. Default: the user's data directory.",
    )
    store_url: str | None = Field(
        default=None,
        description="Where tokens are kept: `sqlite:///PATH`, `postgresql+psycopg://...` or `memory://`. "
        "Default: a file in `data`.",
    )
    lease_seconds: float = Field(
        default=10.0,
        ge=1,
        le=3600,
        description="On PostgreSQL: how long a server that says nothing keeps its data from the next one.",
    )
    models_dir: Directory | None = Field(
        default=None,
        description="Directory of model files `NAME.safetensors`. Default: `models` in `data`, if there; none where "
        "`store_url` is given and `data` is not.",
    )
    kernel_cache: Directory | None = Field(
        default=None,
        description="Directory where the compiled kernel is kept from one start to the next. Default: `htm-service` in "
        "the user's cache directory.",
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$",
        description="`auto`, `cpu` or `cuda`; `auto` takes a GPU if any.",
    )
    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        default="float32", description="The dtype in which sessions keep their tokens when they do not say."
    )
    memory_budget_bytes: Bytes = Field(
        default_factory=lambda: memory_bytes() // 2,
        ge=1 << 20,
        validation_alias=f"{PREFIX}MEMORY_BUDGET",
        description="Device memory for tokens, such as `4GiB`. Default: half of what the process may use.",
    )
    api_key: SecretStr | None = Field(
        default=None,
        description="The admin's key, which makes others: 16 or more printable ASCII characters, hard to guess.",
    )
    api_key_file: Directory | None = Field(default=None, description="A file with the admin's key, such as a secret's.")
    insecure: bool = Field(default=False, description="Answer everyone, on any address, when there are no keys.")
    metrics_open: bool = Field(default=False, description="Whether `/metrics` is answered without a key.")
    tls_cert: Directory | None = Field(
        default=None, description="A file with the certificate, and those up to its root: the server then speaks HTTPS."
    )
    tls_key: Directory | None = Field(default=None, description="A file with the private key of `tls_cert`.")
    cors_origins: str = Field(
        default="",
        description="Origins whose pages may call with a key, such as `https://app.example.org`; several with commas.",
    )
    max_body_bytes: Bytes = Field(default=64 << 20, ge=1 << 10, description="Largest request body.")
    max_json_body_bytes: Bytes = Field(
        default=4 << 20,
        ge=1 << 10,
        description="Largest JSON body (parsing JSON stops everything else); more data goes as safetensors.",
    )
    max_import_bytes: Bytes = Field(
        default=1 << 40,
        ge=1 << 10,
        description="Largest session's file that `import` takes; it is read in portions, whatever it has.",
    )
    max_answer_bytes: Bytes = Field(
        default=64 << 20,
        ge=1 << 10,
        description="Most bytes of tensors, payloads and recalled tokens that one answer may hold; more is refused.",
    )
    max_held_bytes: Bytes = Field(
        default_factory=lambda: memory_bytes() // 8,
        ge=1 << 10,
        description="Most bytes of large bodies and answers at one time; more is answered 503. Default: an eighth of "
        "what the process may use.",
    )
    keep_alive_seconds: int = Field(
        default=75,
        ge=1,
        le=86_400,
        description="How long a connection may be idle before it is closed: longer than those who connect keep theirs.",
    )
    create_on_append: bool = Field(default=False, description="Whether an append to a missing session creates it.")
    default_timeout_ms: float = Field(
        default=30_000, gt=0, le=3_600_000, description="Deadline of an attend without its own."
    )
    max_waiting: int = Field(default=4096, ge=1, description="Requests that may wait; more are answered 503.")
    max_batch_products: int = Field(
        default=512 << 20,
        ge=1,
        description="Multiply-adds of one batch on the device (about 20 ms of a core); more is done in parts.",
    )
    oversample: int = Field(
        default=4,
        ge=1,
        le=100,
        description="Tokens that a search scores at least for each one wanted, where it looks through sketches.",
    )
    payload_cache_bytes: Bytes = Field(
        default=256 << 20,
        ge=0,
        validation_alias=f"{PREFIX}PAYLOAD_CACHE",
        description="Host memory for payloads, those that came or were read last; 0 keeps none.",
    )
    recalls_per_session: int = Field(
        default=64, ge=0, le=10_000, description="Recalls kept per session for inspection."
    )
    max_recall_bytes: Bytes = Field(
        default=256 << 20,
        ge=0,
        description="Host memory for the recalls of all sessions; beyond it those of sessions used longest ago go.",
    )
    retrieval_summary_scale: float = Field(
        default=20.0, gt=0, allow_inf_nan=False, description="`summary_scale` of the built-in model `retrieval`."
    )
    retrieval_attention_scale: float = Field(
        default=20.0, gt=0, allow_inf_nan=False, description="`attention_scale` of the built-in model `retrieval`."
    )
    drain_seconds: float = Field(
        default=8.0,
        ge=0,
        le=3600,
        description="How long a stopping server finishes what it has begun; 1.5 s later the process ends in any case.",
    )
    stuck_seconds: float = Field(
        default=120.0,
        gt=0,
        description="A thread that is at one batch for longer counts as stuck, and the server ends with code 70.",
    )
    otlp_endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://\S+$",
        description="Address of an OpenTelemetry collector, such as `http://localhost:4318`, that gets a trace of each "
        "request. Default: none does.",
    )
    _admin_key: str | None = PrivateAttr(None)
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="Least level logged.")
    log_format: Literal["text", "json"] = Field(
        default="text", description="A line of the log is text, or a JSON object with the request's id."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        # A misspelt variable that is silently ignored costs its author an evening.
        known = {env_name(name, field) for name, field in type(self).model_fields.items()}
        ours = {key for key in map(str.upper, os.environ) if key.startswith(PREFIX)} - set(of_services())
        if unknown := sorted(ours - known):
            raise ValueError(f"unknown environment variable {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        if self.max_answer_bytes < self.max_json_body_bytes:
            raise ValueError(
                f"max_answer_bytes is {self.max_answer_bytes}, below max_json_body_bytes {self.max_json_body_bytes}: "
                "the largest payload could not be read back"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key are given together or not at all")
        self._admin_key = self._read_key()
        for origin in self.origins:
            if _ORIGIN.fullmatch(origin) is None:
                raise ValueError(f"cors_origins has {origin!r}, it must be such as https://app.example.org")
        if self.origins and self._admin_key is None:
            raise ValueError("cors_origins lets pages of elsewhere call, which needs an admin's key: HTM_API_KEY")
        if self._admin_key is None and not self.insecure and not is_loopback(self.host):
            raise ValueError(
                f"refusing to listen on {self.host} without a key: anyone who reaches it could read and delete every "
                "session. Give an admin's key, HTM_API_KEY or a file HTM_API_KEY_FILE (openssl rand -hex 32 makes "
                "one), or use a loopback address, or --insecure in a guarded network"
            )
        return self

    def _read_key(self) -> str | None:
        """The admin's key, from wherever. What is wrong is said without it."""
        if self.api_key is not None and self.api_key_file is not None:
            raise ValueError("both api_key and api_key_file are given; one is enough")
        if self.api_key is not None:
            key = self.api_key.get_secret_value()
        elif self.api_key_file is not None:
            try:
                key = self.api_key_file.read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"api_key_file cannot be read: {error}") from error
        else:
            return None
        if _KEY.fullmatch(key) is None:
            raise ValueError(
                f"the admin's key has {len(key)} characters; it must have {MIN_KEY_CHARS} or more, printable ASCII "
                "without spaces, and be hard to guess: openssl rand -hex 32 makes one"
            )
        return key

    @property
    def origins(self) -> list[str]:
        """The origins of `cors_origins`."""
        return [origin.strip() for origin in self.cors_origins.split(",") if origin.strip()]

    @property
    def admin_key(self) -> str | None:
        """The admin's key, or None where there is none."""
        return self._admin_key

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """What is passed, then the environment without what is not meant for us."""
        assert isinstance(env_settings, EnvSettingsSource)
        others = {key.lower() for key in of_services()}
        env_settings.env_vars = {key: value for key, value in env_settings.env_vars.items() if key not in others}
        return init_settings, env_settings

    @property
    def url_of_store(self) -> str:
        """The store's URL, from `store_url` or the data directory."""
        return self.store_url or f"sqlite:///{(self.data / 'htm.sqlite3').absolute()}"

    @property
    def directory_of_kernels(self) -> Path:
        """Where a server keeps the compiled kernel, so that no later start waits for it."""
        return self.kernel_cache or Path(platformdirs.user_cache_dir("htm-service", appauthor=False))

    @property
    def directory_of_models(self) -> Path | None:
        """The directory of model files, or None where none is given and the default does not exist."""
        if self.models_dir is not None:
            return self.models_dir
        if self.store_url is not None and "data" not in self.model_fields_set:
            return None  # whoever names a store only does not ask for the user's data directory
        default = self.data / "models"
        return default if default.is_dir() else None


def of_services() -> list[str]:
    """The variables that Kubernetes sets in each pod for a Service whose name begins as ours do, `htm` for instance.

    For a Service it sets NAME_SERVICE_HOST, NAME_SERVICE_PORT, NAME_PORT=tcp://... and one or four for each port.
    """
    found: set[str] = set()
    for key, value in os.environ.items():
        name = key.removesuffix("_SERVICE_HOST")
        if name == key or not f"{name}_".startswith(PREFIX) or not _is_address(value):
            continue
        if f"{name}_SERVICE_PORT" in os.environ:  # `htm`'s has the name of `htm-service`'s PORT: either may be there
            pattern = re.compile(re.escape(name) + _OF_SERVICE)
            found |= {other for other, text in os.environ.items() if pattern.fullmatch(f"{other}={text}")}
    return sorted(found)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def flag_name(name: str, field: FieldInfo) -> str:
    """The flag of a setting, such as `--max-body-bytes`."""
    return "--" + env_name(name, field).removeprefix(PREFIX).lower().replace("_", "-")


def env_name(name: str, field: FieldInfo) -> str:
    """The environment variable of a setting, such as `HTM_MAX_BODY_BYTES`."""
    return str(field.validation_alias or f"{PREFIX}{name.upper()}")


def hide_key() -> None:
    """Begin this program again with the key of `--api-key` in the environment, if it was given so.

    All users of a machine see the arguments of its processes, and only their owner what is in their environment.
    """
    name, field = "api_key", Settings.model_fields["api_key"]
    kept, found = [sys.executable], None
    rest = iter(sys.orig_argv[1:])
    for argument in rest:
        flag, equals, value = argument.partition("=")
        if flag != flag_name(name, field):
            kept.append(argument)
        else:
            found = value if equals else next(rest, "")
    if found is not None:
        os.execve(sys.executable, kept, {**os.environ, env_name(name, field): found})


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address; names other than `localhost` count as reachable."""
    if host == "localhost":
        return True
    return _is_address(host) and ipaddress.ip_address(host).is_loopback


def sentence(error: ValidationError) -> str:
    """One sentence for whoever started the server."""
    parts = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        parts.append(
            f"{name}: {message} (got {item['input']!r})" if name and "api_key" not in name.lower() else message
        )
    return "; ".join(parts)
