"""What every request gets on every route: an id, its total time, a bounded body, errors in our shape."""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections.abc import Awaitable
from time import perf_counter
from typing import TypeVar

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import STATUS, ApiError, Invalid, answer, defect, shown
from service.metrics import NONE, OTHER, Metrics

T = TypeVar("T")
WATCH_AFTER_S = 0.05  # who answers sooner need not watch for the client's leaving, which costs a task, 40 us
log = logging.getLogger("actuary.service")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")  # what a caller may choose: safe in logs and headers


class Frame:
    """ASGI middleware around the whole application.

    Leaves in the request's state: `request_id`, and `arrived`, by perf_counter. Counts the request under the `model`
    that its route left there, if any: a label of service/metrics.py.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, timeout_s: float, metrics: Metrics) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._timeout_s = timeout_s
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        arrived = perf_counter()
        body_due: float | None = asyncio.get_running_loop().time() + self._timeout_s
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        scope.setdefault("state", {}).update(arrived=arrived, request_id=request_id.decode())
        status = 0  # until the answer starts
        received = 0

        async def send_framed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                total_ms = b"%.3f" % (1e3 * (perf_counter() - arrived))
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id),
                    (b"x-total-ms", total_ms),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        async def receive_bounded() -> Message:
            nonlocal received, body_due
            try:
                async with asyncio.timeout_at(body_due):
                    message = await receive()
            except TimeoutError:
                raise self._too_late() from None
            if not message.get("more_body"):
                body_due = None  # what comes next is the end of the connection, whenever that is
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise self._too_large(f"more than {self._max_body_bytes}")
            return message

        try:
            announced = headers.get(b"content-length", b"0")
            if announced.isdigit() and int(announced[:20]) > self._max_body_bytes:
                raise self._too_large(announced[:20].decode())
            if b"content-encoding" in headers and not scope["path"].startswith("/v2/"):
                _check_plain(headers[b"content-encoding"].decode("latin-1"))
            await self._app(scope, receive_bounded, send_framed)
        except Exception as error:
            if not isinstance(error, ApiError):
                name = request_id.decode()
                log.exception("request %s failed: %s %s", name, scope["method"], shown(scope["path"]))
                error = defect(name)
            if status:
                raise
            await answer(error, scope["path"])(scope, receive, send_framed)
        finally:
            route = getattr(scope.get("route"), "path", OTHER)
            model = scope["state"].get("model", NONE)
            self._metrics.answered(route, model, status or STATUS["client_gone"], perf_counter() - arrived)
        return None

    def _too_late(self) -> ApiError:
        return ApiError(
            "timeout",
            f"the body was not complete within {self._timeout_s:g} s; send all of it",
            headers={"connection": "close"},  # whatever comes of it later is no next request
        )

    def _too_large(self, size: str) -> ApiError:
        return ApiError(
            "too_large", f"the body has {size} bytes; allowed: {self._max_body_bytes}; send smaller requests"
        )


def _check_plain(encoding: str) -> None:
    """Refuse a compressed body, which only the Open Inference Protocol's route reads."""
    if encoding.strip().lower() not in ("", "identity"):
        raise Invalid(f"the content-encoding {shown(encoding)} is not read here; send the body as it is, without it")


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What `work` gives; cancels it when the client hangs up first, which drops it from the queue.

    To be called once the body is read.
    """
    this = asyncio.current_task()
    assert this
    hung_up: asyncio.Task[None] | None = None
    working = True

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    def watch() -> None:
        nonlocal hung_up
        hung_up = asyncio.ensure_future(gone())
        hung_up.add_done_callback(cancel)

    def cancel(_: asyncio.Task[None]) -> None:
        if working:  # it may be called a turn after the work ended
            this.cancel()

    timer = asyncio.get_running_loop().call_later(WATCH_AFTER_S, watch)
    try:
        return await work
    except asyncio.CancelledError:
        if hung_up is None or not hung_up.done():
            raise
        this.uncancel()
        raise ApiError("client_gone", "the client closed the connection") from None
    finally:
        working = False
        timer.cancel()
        if hung_up:
            hung_up.cancel()
