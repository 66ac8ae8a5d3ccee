"""A connection's bytes to requests: uvicorn's protocol on httptools, with what it lacks.

bytes -> head, of a bounded size -> uvicorn -> service/frame.py, which bounds the body
     `--> what is no HTTP, or has too long a head: an error in our shape
"""

from __future__ import annotations

import sys

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service import errors
from service.errors import ApiError, shown

# Of a head, of trailers, of what else is neither body nor whole: so much may come before more of it is refused. uvicorn
# takes any: one header of 60 MB stopped the event loop for 2.8 s, 60 MB of short ones took 1 GB. h11 and llhttp's
# addresses have the same limit; what a browser sends has 2 KB.
MAX_HEAD_BYTES = 1 << 16


class Connection(HttpToolsProtocol):
    """Of one client."""

    _head_bytes = 0  # since a head ended or a part of a body came, but for the pieces in which they did
    _data = b""  # that is being parsed
    _rest = b""  # that is to be parsed after it

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        self._rest = data
        while self._rest:
            self._data, self._rest = self._rest, b""
            super().data_received(self._data)
        self._data = b""  # it may have 256 KB
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            what = f"the head has more than {MAX_HEAD_BYTES} bytes; send fewer or shorter headers"
            self._refuse(ApiError("head_too_large", what))

    def on_headers_complete(self) -> None:
        self._head_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """Of bytes that are no HTTP; called where httptools said so."""
        error = sys.exception()
        why = getattr(error, "__context__", None) or error  # of an error in a callback the context says what it was
        self._refuse(ApiError("invalid_http", f"the request is no HTTP/1.1: {shown(str(why))}; send one that is"))

    def _refuse(self, error: ApiError) -> None:
        """The last answer of this connection, or its end where an answer is under way."""
        if self.cycle is None or self.cycle.response_complete:
            response = errors.answer(error, self.url.decode("latin-1") if self.scope else "")
            headers = [*response.raw_headers, (b"connection", b"close")]
            lines = b"".join(b"%b: %b\r\n" % header for header in headers)
            self.transport.write(STATUS_LINE[error.status_code] + lines + b"\r\n" + bytes(response.body))
        self.transport.close()

    # --- `Upgrade: h2c`, which Java's client sends with each connection's first request, and whatever else is asked for

    def _should_upgrade(self) -> bool:
        """Whether handle_websocket_upgrade is called instead of reading on; a CONNECT is refused as no HTTP of ours."""
        return bool(self.parser.get_method() != b"CONNECT")

    def handle_websocket_upgrade(self) -> None:
        """Read the request once more, as one that asks for nothing.

        It may be answered in the protocol that it came in. httptools takes what follows such a head for that other
        protocol, so that a body would be lost, and the next request too.
        """
        upgrade = sys.exception()
        assert isinstance(upgrade, httptools.HttpParserUpgrade)
        line = b"%b %b HTTP/%b\r\n" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        headers = b"".join(b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade")
        self._rest = line + headers + b"\r\n" + self._data[upgrade.args[0] :]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
