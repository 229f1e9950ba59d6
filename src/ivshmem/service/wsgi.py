"""HTTP for a WSGI application, within the bounds of a RequestServer: one request, one answer.

Knows: where the head of a request ends, its request line and headers, how an answer is written.
Does not know: what is asked for (the application does), connections (system/requests.py does).

An application is run by the loop that serves the regions. So it gets no body of a request, and may
not wait; its whole answer is in memory before any of it is sent.

The headers are split here and not by http.client.parse_headers: that uses the parser of e-mails,
which takes the first malformed line for the end of the headers, and so would hide a Host header
that stands behind such a line.
"""

from __future__ import annotations

import io
from http import HTTPStatus
from urllib.parse import unquote_to_bytes

from ..system.named_tuple import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any, TypeAlias

    Headers: TypeAlias = list[tuple[str, str]]
    Application: TypeAlias = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class HttpRequest(NamedTuple):
    """The head of a request.

    Attributes:
        method: GET and the like, in capitals.
        path: as it was sent; without the query.
        query: what stands behind "?".
        version: "HTTP/1.1" and the like.
        headers: names in small letters, with their values, in order.
    """

    method: str
    path: str
    query: str
    version: str
    headers: Headers

    def values_of(self, name: str) -> list[str]:
        """The values of all headers of this name."""
        return [value for key, value in self.headers if key == name]


def cut_head(buffer: bytearray) -> bytes | None:
    """Remove the head of a request from what was received; None: it is not complete yet.

    A body is not waited for: GET has none, and what has one is answered without it.
    """
    ends = [(buffer.find(mark), len(mark)) for mark in (b"\r\n\r\n", b"\n\n")]
    found = [(place, length) for place, length in ends if place >= 0]
    if not found:
        return None
    place, length = min(found)
    head = bytes(buffer[:place])
    del buffer[: place + length]
    return head


def parse_head(head: bytes) -> HttpRequest | None:
    """Return the request that a head says; None: it is not HTTP/1.x."""
    lines = head.decode("latin-1").split("\r\n" if b"\r\n" in head else "\n")
    words = lines[0].split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        return None
    method, target, version = words
    path, _, query = target.partition("?")
    pairs = [line.partition(":")[::2] for line in lines[1:]]
    headers = [(name.strip().lower(), value.strip()) for name, value in pairs]
    return HttpRequest(method, path, query, version, headers)


def run(application: Application, request: HttpRequest) -> bytes:
    """Return what a WSGI application answers.

    For HEAD the application is asked as for GET, and its body is left out.

    Raises:
        Exception: whatever the application raises.
    """
    begun: list[tuple[str, Headers]] = []
    body = io.BytesIO()

    def start_response(status: str, headers: Headers, *_error: object) -> Callable[[bytes], object]:
        begun.append((status, headers))
        return body.write

    answer = application(_environ(request), start_response)
    try:
        body.writelines(answer)
    finally:
        getattr(answer, "close", lambda: None)()
    status, headers = begun[-1]
    return _answer(status, headers, body.getvalue(), head=request.method == "HEAD")


def plain_answer(status: HTTPStatus, text: str) -> bytes:
    """Return an answer with a text for people."""
    headers = [("Content-Type", "text/plain; charset=utf-8")]
    return _answer(f"{status.value} {status.phrase}", headers, text.encode())


def _answer(status: str, headers: Headers, body: bytes, *, head: bool = False) -> bytes:
    given = [*headers, ("Content-Length", str(len(body))), ("Connection", "close")]
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in given), "", ""]
    return "\r\n".join(lines).encode("latin-1") + (b"" if head else body)


def _environ(request: HttpRequest) -> dict[str, Any]:
    """What PEP 3333 has an application know of a request."""
    given: dict[str, list[str]] = {}
    for name, value in request.headers:
        given.setdefault(f"HTTP_{name.upper().replace('-', '_')}", []).append(value)
    return {
        "REQUEST_METHOD": "GET" if request.method == "HEAD" else request.method,
        "SCRIPT_NAME": "",
        "PATH_INFO": unquote_to_bytes(request.path).decode("latin-1"),
        "QUERY_STRING": request.query,
        "SERVER_NAME": "localhost",
        "SERVER_PORT": "0",
        "SERVER_PROTOCOL": request.version,
        **{name: ",".join(values) for name, values in given.items()},
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(),
        "wsgi.errors": io.StringIO(),
        "wsgi.multithread": False,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
    }
