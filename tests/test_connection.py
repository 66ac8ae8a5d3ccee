"""What comes over a socket before it is a request: heads of any size, upgrades, bytes that are no HTTP."""

from __future__ import annotations

import contextlib
import json
import socket

import pytest

from service.connection import MAX_HEAD_BYTES
from service.schema import ErrorAnswer

BODY = json.dumps({"model": "gelu", "prompt": [1, 2], "top_k": 1}).encode()
# As java.net.http.HttpClient sends it with the first request of each connection.
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAA\r\n"
LAST = b"GET /health/live HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"


def post(headers: bytes = b"", body: bytes = BODY) -> bytes:
    head = b"POST /v1/next-token HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%b\r\n"
    return head % (len(body), headers) + body


def said(url: str, *pieces: bytes) -> bytes:
    """All that the service says to `pieces`, until it ends the connection."""
    host, port = url.removeprefix("http://").split(":")
    heard = b""
    with socket.create_connection((host, int(port)), timeout=300) as connection:
        # It has said all, and reads no more of what is sent.
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                connection.sendall(piece)
        with contextlib.suppress(ConnectionError):
            while more := connection.recv(1 << 16):
                heard += more
    return heard


def refusal(answer: bytes) -> tuple[int, str, str]:
    """Status, type and message of an error that is the last answer of a connection."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    error = ErrorAnswer.model_validate_json(body, strict=True).error
    assert error.code == status
    assert b"connection: close" in head
    return status, error.type, error.message


@pytest.mark.parametrize("upgrade", [H2C, b"Connection: upgrade\r\nUpgrade: websocket\r\n"], ids=["h2c", "websocket"])
@pytest.mark.parametrize("cuts", [[], [20, 150], [-5]], ids=["at once", "in its head", "in its body"])
def test_a_request_that_asks_for_another_protocol_is_answered_in_this_one(
    server_url: str, upgrade: bytes, cuts: list[int]
) -> None:
    """With its body, and the next ones on its connection too."""
    asked = post(upgrade)
    pieces = [asked[begin:end] for begin, end in zip([None, *cuts], [*cuts, None], strict=True)]
    answer = said(server_url, *pieces, post(), post(upgrade) + LAST)
    assert answer.count(b"HTTP/1.1 200 OK") == 4
    assert answer.count(b'"object":"next_token"') == 3


def test_pipelined_upgrades_are_answered_one_by_one(server_url: str) -> None:
    answer = said(server_url, post(H2C) * 2000 + LAST)
    assert answer.count(b'"object":"next_token"') == 2000


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nHost: h\r\nX-Long: " + b"a" * 2_000_000,
        b"GET /health HTTP/1.1\r\nHost: h\r\n" + b"X-Many: a\r\n" * 200_000,
        b"GET /" + b"a" * 2_000_000,
        b"\r\n" * 1_000_000,
    ],
    ids=["header", "headers", "path", "empty lines"],
)
def test_a_head_that_does_not_end_is_refused(server_url: str, head: bytes) -> None:
    status, kind, message = refusal(said(server_url, head))
    assert (status, kind) == (431, "head_too_large")
    assert str(MAX_HEAD_BYTES) in message


def test_trailers_that_do_not_end_end_the_connection(server_url: str) -> None:
    head = b"POST /v1/next-token HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n"
    assert b"200 OK" not in said(server_url, head, b"X-Many: a\r\n" * 1_000_000)


def test_long_heads_and_bodies_in_many_pieces_are_taken(server_url: str) -> None:
    """What counts is a head alone, and not what came before it."""
    long = b"X-Long: %b\r\n" % (b"a" * (MAX_HEAD_BYTES // 2))
    spaces = BODY + b" " * 500_000
    chunks = (
        b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (BODY[:3], BODY[3:], b" " * 100_000)) + b"0\r\n\r\n"
    )
    chunked = post(long).partition(b"Content-Length")[0] + b"Transfer-Encoding: chunked\r\n\r\n" + chunks
    answer = said(server_url, post(long) * 5, post(long, spaces), post(long, spaces), chunked + LAST)
    assert answer.count(b'"object":"next_token"') == 8


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "method"),
        (b"FETCH /v1/next-token HTTP/1.1\r\nHost: h\r\n\r\n", "method"),
        (b"GET /v1/models/\xff HTTP/1.1\r\nHost: h\r\n\r\n", "path"),
        (b"GET http://[/v1/models HTTP/1.1\r\nHost: h\r\n\r\n", "url"),
        (b"CONNECT h:1 HTTP/1.1\r\nHost: h\r\n\r\n", "h:1"),
        (post(b"Content-Length: 3\r\n"), "Content-Length"),
        (post(b"Transfer-Encoding: chunked\r\n"), "Transfer-Encoding"),
        (b"GET /health HTTP/1.1\r\nHost: h\r\nX: \0\r\n\r\n", "header"),
    ],
    ids=["TLS", "method", "path", "address", "CONNECT", "two lengths", "length and chunks", "NUL"],
)
def test_what_is_no_http_is_refused_in_the_shape_of_all_errors(server_url: str, request_: bytes, says: str) -> None:
    status, kind, message = refusal(said(server_url, request_))
    assert (status, kind) == (400, "invalid_http")
    assert says in message
