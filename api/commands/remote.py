"""Calls to a running server, for commands: with the admin's key of the environment, no proxy, no redirect.

Does not know: any command.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

import typer

from api.settings import Settings

TIMEOUT_S = 30.0
LOCAL = ""
"""The server that the settings of this environment start, as in its container, on this machine."""

Url = Annotated[
    str,
    typer.Option(
        help="Where the server is; by default on this machine, at HTM_PORT. Its admin's key is HTM_API_KEY, or in "
        "HTM_API_KEY_FILE."
    ),
]


def ask(
    url: str,
    method: str,
    path: str,
    body: dict[str, Any] | bytes | None = None,
    namespace: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Any:
    """The server's answer. Raises OSError with what it says, or why there is none."""
    url = url or local_url()
    content = json.dumps(body).encode() if isinstance(body, dict) else body
    with opened(
        url, method, path, content, {"Content-Type": "application/json", **(headers or {})}, namespace
    ) as answer:
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
    url = url or local_url()
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


def local_url() -> str:
    """Where the server of this environment's settings is."""
    settings = Settings()
    return f"{'http' if settings.tls_cert is None else 'https'}://127.0.0.1:{settings.port}"


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
