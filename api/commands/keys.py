"""`htm-service keys create | list | revoke`: calls to a running server, with the admin's key from the environment.

Does not know: how the server keeps keys.
"""

from __future__ import annotations

import re
import urllib.parse
from enum import StrEnum
from typing import Annotated, Any

import typer

from api.commands.remote import LOCAL, Url, ask

_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhdw]?)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 7 * 86_400}

Namespace = Annotated[str | None, typer.Option(help="Whose sessions the key opens, * for all; default if left out.")]


class Role(StrEnum):
    """What a key allows."""

    READ = "read"
    WRITE = "write"
    ADMIN = "admin"


def create(
    name: Annotated[str, typer.Argument(help="What the key is called, unique in its namespace.")],
    role: Annotated[Role, typer.Option(help="What it allows; each role allows what those before it do.")],
    namespace: Namespace = None,
    expires: Annotated[str | None, typer.Option(help="For how long it counts, such as 30d, 12h or 90m.")] = None,
    requests_per_second: Annotated[float | None, typer.Option(help="How often it may be used.")] = None,
    url: Url = LOCAL,
) -> None:
    """Make a key and print it, alone on stdout: nobody can be told again."""
    wish: dict[str, Any] = {"name": name, "role": role.value}
    if namespace is not None:
        wish["namespace"] = namespace
    if expires is not None:
        wish["expires_in_s"] = seconds_of(expires)
    if requests_per_second is not None:
        wish["requests_per_second"] = requests_per_second
    print(ask(url, "POST", "/v1/keys", wish)["key"])


def list_keys(namespace: Namespace = None, url: Url = LOCAL) -> None:
    """List the keys, without their secrets."""
    for key in ask(url, "GET", "/v1/keys", namespace=namespace)["keys"]:
        limits = [f"until {key['expires_at']}"] if key["expires_at"] else []
        limits += [f"{key['requests_per_second']:g} requests/s"] if key["requests_per_second"] else []
        used = f"used {key['last_used_at']}" if key["last_used_at"] else "never used"
        print("  ".join([key["name"], key["role"], f"namespace {key['namespace']}", *limits, used]))


def revoke(
    name: Annotated[str, typer.Argument(help="The key's name.")], namespace: Namespace = None, url: Url = LOCAL
) -> None:
    """Take a key back: it is refused within a second."""
    ask(url, "DELETE", f"/v1/keys/{urllib.parse.quote(name, safe='')}", namespace=namespace)


def seconds_of(text: str) -> float:
    """A duration: a number of seconds, or with one of s, m, h, d, w behind it. Raises OSError."""
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        raise OSError(f"--expires is {text!r}, it must be such as 30d, 12h, 90m or 3600")
    return float(found[1]) * _SECONDS[found[2]]
