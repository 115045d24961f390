"""`htm-service keys create | list | revoke`: calls to a running server, with the admin's key from the environment.

Does not know: how the server keeps keys.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from typing import Annotated, Any

import typer

from api.settings import Settings

TIMEOUT_S = 30.0
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhdw]?)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 7 * 86_400}

Url = Annotated[str, typer.Option(help="Where the server is; its admin's key is HTM_API_KEY, or in HTM_API_KEY_FILE.")]
Namespace = Annotated[str | None, typer.Option(help="Whose sessions the key opens, * for all; default if left out.")]


class Role(StrEnum):
    """What a key allows."""

    READ = "read"
    WRITE = "write"
    ADMIN = "admin"


LOCAL = "http://127.0.0.1:8000"


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


def ask(url: str, method: str, path: str, body: dict[str, Any] | None = None, namespace: str | None = None) -> Any:
    """The server's answer. Raises OSError with what it says, or why there is none."""
    content = None if body is None else json.dumps(body).encode()
    with opened(url, method, path, content, {"Content-Type": "application/json"}, namespace) as answer:
        try:
            return json.loads(answer.read() or b"null")
        except ValueError as error:
            raise OSError(f"{url} is no htm-service: {error}") from None


class Refused(OSError):
    """The server answered with an error, of this code."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


class Unreachable(OSError):
    """There is no server."""


@contextlib.contextmanager
def opened(
    url: str,
    method: str,
    path: str,
    content: bytes | Iterable[bytes] | None = None,
    headers: Mapping[str, str] | None = None,
    namespace: str | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Iterator[http.client.HTTPResponse]:
    """The server's answer, to be read. Raises Refused, Unreachable, and OSError where it breaks off."""
    sent = dict(headers or {})
    if (key := Settings().admin_key) is not None:
        sent["Authorization"] = f"Bearer {key}"
    if namespace is not None:
        sent["X-HTM-Namespace"] = namespace
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise OSError(f"--url is {url}, it must begin with http:// or https://")
    request = urllib.request.Request(url.rstrip("/") + path, content, sent, method=method)
    # Neither a proxy that the environment names nor whoever a server points to gets the key.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), NoRedirect())
    try:
        with opener.open(request, timeout=timeout_s) as answer:
            yield answer
    except urllib.error.HTTPError as error:
        with error:
            raise refusal(error.read(), f"the server answered {error.code}") from None
    except urllib.error.URLError as error:
        raise Unreachable(f"{url} cannot be reached: {error.reason}") from None
    except http.client.HTTPException as error:
        raise OSError(f"{url} is no htm-service, or the connection broke off: {error!r}") from None


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Takes a redirect for the error that it is here."""

    def redirect_request(self, *_: Any) -> None:
        """None."""


def refusal(problem: bytes, otherwise: str) -> Refused:
    """What a problem document says."""
    try:
        told = json.loads(problem)
        return Refused(str(told["code"]), str(told["detail"]))
    except (ValueError, TypeError, KeyError):
        return Refused("", otherwise)


def seconds_of(text: str) -> float:
    """A duration: a number of seconds, or with one of s, m, h, d, w behind it. Raises OSError."""
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        raise OSError(f"--expires is {text!r}, it must be such as 30d, 12h, 90m or 3600")
    return float(found[1]) * _SECONDS[found[2]]
