"""A completion as server-sent events: a chunk per piece of a choice, `data: [DONE]` or an error at the end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from pydantic_core import to_json
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from service.choice import Piece
from service.completions import Completing, prepare, usage_of
from service.completions_schema import CompletionRequest, StreamOptions
from service.errors import ApiError, defect, fields
from service.library import Library
from service.next_token import INLINE_ENTRIES, Answered, here_or_in_a_thread
from service.sequence import Runs
from service.settings import Settings

log = logging.getLogger("actuary.service")

DONE = b"data: [DONE]\n\n"


async def stream(
    asked: CompletionRequest, library: Library, engine: Runs, settings: Settings, request_id: str
) -> Events:
    """Events whose first are there; ApiError where it does not come to that, which is answered with its status."""
    events = Events(await prepare(asked, library, settings), engine, request_id)
    try:
        await events.start()
    except BaseException:  # the client's leaving too
        events.close()
        raise
    return events


class Events:
    """An answer as server-sent events: a chunk for each piece; the last says [DONE], or an error."""

    def __init__(self, completing: Completing, engine: Runs, request_id: str) -> None:
        self._completing = completing
        self._options = completing.asked.stream_options or StreamOptions()
        self._request_id = request_id
        self._pieces = asyncio.Queue[tuple[int, Piece] | None]()  # None: the engine has ended, well or not
        self._ready: list[tuple[int, Piece]] = []
        self._ended = False
        self._generated = [0] * completing.choices
        self._begun = [False] * completing.choices
        self.tokenize_s = completing.tokenize_s
        self.answered: Answered | None = None  # once all is sent
        loop = asyncio.get_running_loop()

        def put(index: int, piece: Piece) -> None:
            loop.call_soon_threadsafe(self._pieces.put_nowait, (index, piece))

        self._work = asyncio.ensure_future(engine.run(completing.jobs(put)))
        self._work.add_done_callback(lambda _: self._pieces.put_nowait(None))

    async def start(self) -> None:
        """Wait for the first pieces: what fails before them fails here, and is answered with its status."""
        await self._fill()
        if self._ended and not self._ready:
            await self._work

    def close(self) -> None:
        """Drop what is not computed yet."""
        self._work.cancel()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            while self._ready:
                listed = sum(piece.listed for _, piece in self._ready)
                yield await here_or_in_a_thread(listed <= INLINE_ENTRIES, self._chunks)
                await self._fill()
            done = await self._work
        except ApiError as error:
            yield _event({"error": fields(error)})
        except Exception:
            log.exception("request %s failed while its answer was streamed", self._request_id)
            yield _event({"error": fields(defect(self._request_id))})
        else:
            self.answered = self._completing.answered(b"", done)
            if self._options.include_usage:
                usage = self._completing.usage(self._generated, done)
                yield _event({**self._completing.head, "choices": [], "usage": usage})
            yield DONE

    async def _fill(self) -> None:
        """The pieces that are there, at least one; none where no more will come."""
        self._ready = []
        while not self._ended and not (self._ready and self._pieces.empty()):
            piece = await self._pieces.get()
            if piece is None:
                self._ended = True
            else:
                self._ready.append(piece)

    def _chunks(self) -> bytes:
        return b"".join(self._chunk(index, piece) for index, piece in self._ready)

    def _chunk(self, index: int, piece: Piece) -> bytes:
        first, self._begun[index] = not self._begun[index], True
        self._generated[index] = piece.generated
        chunk = {**self._completing.head, "choices": [self._completing.choice(index, [piece], first=first)]}
        if self._options.include_usage:
            chunk["usage"] = None
            if self._options.continuous_usage_stats:
                prompt = self._completing.prompts[index // self._completing.asked.n]
                chunk["usage"] = usage_of(len(prompt.ids), piece.generated)
        return _event(chunk)


def _event(content: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % to_json(content)


class EventStream(StreamingResponse):
    """The response of `events`, whose work it ends however it ends itself.

    Args:
        sent: called when all of them are sent.
    """

    def __init__(self, events: Events, sent: Callable[[Answered], None]) -> None:
        headers = {"cache-control": "no-cache", "x-tokenize-ms": f"{1e3 * events.tokenize_s:.3f}"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events = events
        self._sent = sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._events.close()
        if self._events.answered:
            self._sent(self._events.answered)
