"""What a browser gets: the page of service/page/ and the installed plotly's script. Nothing from outside."""

from __future__ import annotations

import functools
import gzip
import hashlib
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from fastapi import Request, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from service.errors import ApiError

PAGE = Path(__file__).parent / "page"
WEEK_S = 7 * 24 * 3600

# plotly.js writes style attributes and makes pictures from blobs; the rest are the page's own files.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'self'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)


class Page(StaticFiles):
    """The files of service/page/, each with the policy; a browser asks again whether they changed."""

    def __init__(self) -> None:
        super().__init__(directory=PAGE, check_dir=False)

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers["content-security-policy"] = CONTENT_SECURITY_POLICY
        response.headers["referrer-policy"] = "no-referrer"
        response.headers["cache-control"] = "no-cache"
        return response


page = Page()


@dataclass(frozen=True)
class Compressed:
    """Bytes that do not change while we run, held plain and as gzip."""

    plain: bytes
    gzipped: bytes
    etag: str
    media_type: str

    @classmethod
    def of(cls, plain: bytes, media_type: str) -> Compressed:
        etag = f'"{hashlib.sha256(plain).hexdigest()[:32]}"'
        return cls(plain, gzip.compress(plain, 6, mtime=0), etag, media_type)

    def answer(self, request: Request, max_age_s: int) -> Response:
        headers = {
            "etag": self.etag,
            "cache-control": f"public, max-age={max_age_s}",
            "vary": "accept-encoding",
        }
        if self.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        if _takes_gzip(request.headers.get("accept-encoding", "")):
            headers["content-encoding"] = "gzip"
            return Response(self.gzipped, headers=headers, media_type=self.media_type)
        return Response(self.plain, headers=headers, media_type=self.media_type)


def _takes_gzip(accepted: str) -> bool:
    """Whether an Accept-Encoding names gzip, and not with the weight 0, which refuses it."""
    parts = (part.partition(";") for part in accepted.lower().split(","))
    weights = {name.strip(): weight for name, _, weight in parts}
    return "gzip" in weights and not re.fullmatch(r"\s*q=0(\.0*)?\s*", weights["gzip"])


@functools.cache
def plotly() -> Compressed:
    """plotly.js (4.8 MB; 0.2 s to compress, once). Found without importing plotly, which would cost 40 MB."""
    spec = find_spec("plotly")
    if spec is None or spec.origin is None:
        raise ApiError("not_found", "plotly is not installed; pip install plotly, and the page draws")
    script = Path(spec.origin).parent / "package_data" / "plotly.min.js"
    return Compressed.of(script.read_bytes(), "text/javascript; charset=utf-8")
