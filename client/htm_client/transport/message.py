"""HTTP/1.1 without a socket: the bytes of a request, and an answer from the bytes that come (RFC 9112).

llhttp, through httptools, reads the answers; the server reads requests with it too. Does not know connections.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlencode

import httptools
import httpx

from htm_client.calls import Call, Sink
from htm_client.errors import InvalidArgument
from htm_client.transport.base import NoResponse, Response

PORTS = {"http": 80, "https": 443}
MAX_HEAD_BYTES = 256 << 10
"""Of an answer; what sends more than this without an end of its headers is no server of ours."""
SMALL_BYTES = 64 << 10
"""Below this a head and its body are sent as one."""
_USER = re.compile(r"(?<=//)[^/?#]*@")
_SENDABLE = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is, and what every request to it says."""

    url: str
    """For sentences: without the user and the password."""
    scheme: str
    host: str
    port: int
    prefix: str
    """What stands before the path of each call."""
    authorization: Mapping[str, str]
    """The header, or nothing."""
    common: str
    """The end of the first line, and the headers that are always the same."""

    @classmethod
    def of(cls, base_url: str, api_key: str | None) -> Address:
        """The parts of a URL. Raises InvalidArgument for what is none, and for a key that no header can hold."""
        try:
            url = httpx.URL(base_url)
        except httpx.InvalidURL as error:
            raise InvalidArgument(f"{_USER.sub('', base_url)!r} is no URL: {error}") from error
        authorization = _authorization(url, api_key)
        headers = {"Host": url.netloc.decode(), "User-Agent": "htm-client", "Accept-Encoding": "identity"}
        lines = "".join(f"{name}: {value}\r\n" for name, value in (headers | authorization).items())
        return cls(
            url=_USER.sub("", base_url),
            scheme=url.scheme,
            host=url.raw_host.decode(),
            port=url.port or PORTS.get(url.scheme, 0),
            prefix=url.raw_path.decode().partition("?")[0].rstrip("/"),
            authorization=authorization,
            common=f" HTTP/1.1\r\n{lines}",
        )

    @property
    def is_secure(self) -> bool:
        """Whether connections are encrypted."""
        return self.scheme == "https"

    def check(self) -> None:
        """Raises NoResponse for an address that is not HTTP's."""
        if self.scheme not in PORTS or not self.host:
            raise NoResponse(
                f"{self.url!r} has no protocol that is known here: it must begin with http:// or https://",
                may_be_done=False,
                is_hopeless=True,
            )

    def request(self, call: Call) -> Sequence[bytes]:
        """The bytes of a request: one piece, or two when a large body would have to be copied."""
        query = f"?{urlencode(call.query, doseq=True)}" if call.query else ""
        lines = "".join([f"{name}: {value}\r\n" for name, value in call.headers.items()])
        content = call.content
        if call.source is not None:
            lines += f"Content-Length: {call.source.num_bytes}\r\n"
        elif content is not None:
            lines += f"Content-Length: {len(content)}\r\n"
        elif call.method == "POST":
            lines += "Content-Length: 0\r\n"
        head = f"{call.method} {self.prefix}{call.path}{query}{self.common}{lines}\r\n".encode("ascii")
        if not content:
            return (head,)
        return (head + content,) if len(content) < SMALL_BYTES else (head, content)


def _authorization(url: httpx.URL, api_key: str | None) -> dict[str, str]:
    if api_key is not None:
        if not _SENDABLE.fullmatch(api_key):
            raise InvalidArgument("api_key must be printable ASCII characters, without spaces")
        return {"Authorization": f"Bearer {api_key}"}
    if url.userinfo:
        return {"Authorization": f"Basic {base64.b64encode(f'{url.username}:{url.password}'.encode()).decode()}"}
    return {}


class AnswerParser:
    """Reads the answers that come over one connection, one after the other."""

    def __init__(self) -> None:
        self.can_go_on = True
        """Whether the connection may carry another request after this answer."""
        self._parser = httptools.HttpResponseParser(self)
        self.begin()

    def begin(self, sink: Sink | None = None) -> None:
        """Expect an answer from its beginning; `sink` gets its body, where it is a good one."""
        self._sink = sink
        self._headers: dict[str, str] = {}
        self._parts: list[bytes] = []
        self._status = 0
        self._num_head_bytes = 0
        self._response: Response | None = None

    def feed(self, data: bytes) -> Response | None:
        """The answer, when it is whole. Raises NoResponse for what is no HTTP, and FileFailed."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            self.can_go_on = False
            raise error.__context__ or error from None  # what a sink raised
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self.can_go_on = False
            if self._response is None:  # otherwise it is what follows that is wrong
                raise NoResponse(f"the answer is not HTTP: {error}", may_be_done=True) from error
        if not self._status:
            self._num_head_bytes += len(data)
            if self._num_head_bytes > MAX_HEAD_BYTES:
                raise NoResponse(f"the answer has more than {MAX_HEAD_BYTES:,} bytes of headers", may_be_done=True)
        return self._response

    def end(self) -> Response:
        """The answer, where the connection's end is the answer's too. Raises NoResponse where it is not."""
        if not self._status:
            raise NoResponse("the connection ended without an answer", may_be_done=True)
        if "content-length" in self._headers or "transfer-encoding" in self._headers:
            raise NoResponse("the connection ended within the answer", may_be_done=True)
        return Response(self._status, self._headers, b"".join(self._parts))

    # --- what the parser calls ---

    def on_message_begin(self) -> None:
        """An answer begins; a second one was not asked for."""
        if self._response is not None:
            self.can_go_on = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header; those after the body say nothing here."""
        if not self._status:
            key, text = name.decode("latin-1").lower(), value.decode("latin-1")
            self._headers[key] = f"{self._headers[key]}, {text}" if key in self._headers else text

    def on_headers_complete(self) -> None:
        """The head is whole."""
        if self._response is None:
            self._status = self._parser.get_status_code()
            self.can_go_on = self._parser.should_keep_alive()
            if self._sink is not None and self._status == 200:
                length = self._headers.get("content-length", "")
                self._sink.begin(int(length) if length.isdecimal() else None)

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        if self._sink is not None and self._status == 200:
            self._sink.write(body)
        else:
            self._parts.append(body)

    def on_message_complete(self) -> None:
        """The answer is whole; one that only says "wait" is followed by the real one."""
        if self._response is not None:
            return
        if self._status < 200:
            self.begin(self._sink)
        else:
            self._response = Response(self._status, self._headers, b"".join(self._parts))
            self._parts = []
