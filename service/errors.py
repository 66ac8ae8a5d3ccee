"""Every error that the API answers with: one table from its kind to the HTTP status, and one shape.

    {"error": {"message": "...", "type": "model_not_found", "param": "model", "code": 404}}

The code is the status. Under /v2 the Open Inference Protocol says {"error": "..."}.
"""

from __future__ import annotations

import difflib
import json
import reprlib
import sys
from collections.abc import Collection, Mapping
from typing import Any

from fastapi import Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

STATUS = {
    "invalid_http": 400,
    "invalid_json": 400,
    "invalid_inference": 400,  # what the Open Inference Protocol expects
    "invalid_request": 422,
    "model_not_found": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "timeout": 408,
    "conflict": 409,
    "gone": 410,
    "too_large": 413,
    "queue_full": 429,
    "head_too_large": 431,
    "client_gone": 499,  # nobody reads this one
    "internal": 500,
    "unavailable": 503,
}
# What the web framework raises by itself arrives with a status only.
_KIND = {400: "invalid_json", 404: "not_found", 405: "method_not_allowed", 413: "too_large"}


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        try:
            return super().repr_int(x, level)
        except ValueError:  # as of the interpreter's own limit
            return f"a number of more than {sys.get_int_max_str_digits()} digits"


_short = _Short()
_short.maxstring = _short.maxother = _short.maxlong = 60


class ApiError(HTTPException):
    """An answer other than 200: `kind` of STATUS, a message that says what to do, the field it is about."""

    def __init__(
        self, kind: str, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(STATUS[kind], message, headers)
        self.kind = kind
        self.param = param


class Invalid(ApiError):
    """JSON that asks for what cannot be: 422."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__("invalid_request", message, param)


def shown(value: object) -> str:
    """`value` as a message may hold it: short, and without a character that UTF-8 cannot carry."""
    return utf8(_short.repr(value))


def utf8(text: str) -> str:
    """`text` with each character that UTF-8 cannot carry, as in a file's name of other bytes, as its code."""
    return text.encode("utf-8", "backslashreplace").decode()


def nearest(name: str, known: Collection[str]) -> str:
    """'; did you mean ...?' where something known is near, else nothing."""
    near = difflib.get_close_matches(name[:128], known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def defect(request_id: str) -> ApiError:
    """What a caller is told of an exception that nobody foresaw."""
    return ApiError("internal", f"this is a defect of ours; report it with request id {request_id}")


def fields(error: HTTPException) -> dict[str, Any]:
    """What `error` holds in an answer's JSON."""
    if isinstance(error, ApiError):
        kind, message, param = error.kind, error.detail, error.param
    else:
        kind, param = _KIND.get(error.status_code, "internal"), None
        message = error.detail if error.__cause__ is None else f"the body cannot be read: {error.__cause__}"
    return {"message": message, "type": kind, "param": param, "code": error.status_code}


def answer(error: HTTPException, path: str) -> Response:
    """The error as a response in the shape of the route at `path`."""
    body = fields(error)
    shape = body["message"] if path == "/v2" or path.startswith("/v2/") else body
    return Response(
        json.dumps({"error": shape}, ensure_ascii=False).encode(),
        status_code=error.status_code,
        headers=error.headers,
        media_type="application/json",
    )


def from_validation(error: RequestValidationError) -> ApiError:
    """The first thing wrong with a request, said with its place and its value."""
    first: dict[str, Any] = error.errors()[0]
    place, kind, value = first["loc"], first["type"], first.get("input")
    if kind == "json_invalid":
        what = first["ctx"]["error"]
        return ApiError("invalid_json", f"the body is not JSON: {what} at character {place[-1]}")
    if len(place) == 1 and isinstance(value, bytes):
        return Invalid("the body was not read: send it with `content-type: application/json`")
    if len(place) == 1:
        what = {"missing": "is empty", "model_attributes_type": f"is {shown(value)}"}.get(kind)
        return Invalid(
            f"the body {what}; send a JSON object" if what else first["msg"], first.get("ctx", {}).get("param")
        )
    param = "".join(f"[{at}]" if isinstance(at, int) else f".{at}" for at in place[1:]).removeprefix(".")
    got = "" if kind == "missing" else f"; got {shown(value)}"
    return Invalid(f"{param}: {first['msg']}{got}", param)
