"""`/v1/comparisons`: list, start, watch, stop; the report of each as `actuary compare` drew it."""

from __future__ import annotations

import asyncio
import ipaddress
import json
from contextlib import suppress

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse

from service.comparisons.live import Comparisons
from service.comparisons.request import ComparisonRequest
from service.errors import ApiError
from service.openapi import READ, Comparison, ComparisonList, refused

router = APIRouter(prefix="/v1/comparisons", tags=["comparisons"])

# The report's script stands in the file itself. It may draw, and ask nobody for anything.
REPORT_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; sandbox allow-scripts allow-downloads"
)

_MEANS = {
    404: "No such comparison, or variant.",
    409: "One runs already; or it runs, and was not started here.",
    503: "Comparisons are off here; the message says how to have them.",
}


def _comparisons(request: Request) -> Comparisons:
    comparisons: Comparisons = request.app.state.service.comparisons
    return comparisons


def _json(content: object, status: int = 200) -> Response:
    return Response(json.dumps(content, ensure_ascii=False).encode(), status, media_type="application/json")


@router.get("", response_model=ComparisonList)
async def get_comparisons(request: Request) -> Response:
    """Those kept in the folder of --compare, newest first; and why none can be started, where that is so."""
    comparisons = _comparisons(request)
    data = await comparisons.all()
    return _json({"object": "list", "data": data, "enabled": comparisons.runs is not None, "why": comparisons.why_not})


@router.post("", status_code=201, response_model=Comparison, responses=refused(404, 409, 503, *READ, means=_MEANS))
async def post_comparison(asked: ComparisonRequest, request: Request) -> Response:
    """Begin a comparison of variants served here, under load from this machine. One at a time."""
    if request.app.state.service.draining:
        raise ApiError("unavailable", "the service is stopping")
    return _json(await _comparisons(request).start(asked, _url(request)), 201)


@router.get("/{id}", response_model=Comparison, responses=refused(404, 503, means=_MEANS))
async def get_comparison(id: str, request: Request) -> Response:
    """How far it is, each arm's p50 by round; the verdict when it has ended."""
    return _json(await _comparisons(request).one(id))


@router.delete("/{id}", response_model=Comparison, responses=refused(404, 409, 503, means=_MEANS))
async def delete_comparison(id: str, request: Request) -> Response:
    """Stop it. What was measured is judged, which takes some seconds, and kept."""
    return _json(await _comparisons(request).stop(id))


@router.get(
    "/{id}/report",
    response_class=FileResponse,
    responses={200: {"content": {"text/html": {}}}, **refused(404, 503, means=_MEANS)},
)
async def get_report(id: str, request: Request) -> Response:
    """Its report.html."""
    path = await asyncio.to_thread(_comparisons(request).report, id)
    # Whole, whatever part is asked for: to a range that is none the framework answers 400 in a shape of its own.
    request.scope["headers"] = [header for header in request.scope["headers"] if header[0] != b"range"]
    headers = {"content-security-policy": REPORT_POLICY, "cache-control": "no-cache", "referrer-policy": "no-referrer"}
    return FileResponse(path, media_type="text/html", headers=headers)


def _url(request: Request) -> str:
    """This service, by the address that the request came in at: of the socket, not what its sender calls us."""
    host, port = request.scope["server"]
    with suppress(ValueError):
        host = f"[{host}]" if ipaddress.ip_address(host).version == 6 else host
    return f"http://{host}:{port}"
