"""`/v1/experiments`: begin and end experiments, read their verdicts, report the tokens that really came."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response

from service.errors import ApiError, Invalid
from service.experiments.definition import EQUIVALENCE, MAX_ARMS, MAX_SALT, MAX_SHADOWS, loads
from service.experiments.live import Experiments
from service.openapi import (
    READ,
    EndedExperiment,
    Experiment,
    Experimenting,
    Outcome,
    Responses,
    Verdict,
    Verdicts,
    refused,
)
from service.schema import OutcomeRequest

T = TypeVar("T")
# Of its own: while a database is locked or away, what waits for it must not hold the threads that write large answers.
_THREADS = ThreadPoolExecutor(2, thread_name_prefix="experiments")

router = APIRouter(prefix="/v1/experiments", tags=["experiments"])

_DEFINITION = {"arms": {"gelu": 1, "swiglu": 1}, "baseline": "gelu", "equivalence": EQUIVALENCE}
_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["arms"],
    "additionalProperties": False,
    "properties": {
        "arms": {
            "description": "Variants and their weights; two, or one with shadows.",
            "type": "object",
            "minProperties": 1,
            "maxProperties": MAX_ARMS,
            "additionalProperties": {"type": "number", "exclusiveMinimum": 0},
        },
        "baseline": {"description": "What the others are compared with; the first, if not given.", "type": "string"},
        "salt": {
            "description": "Other keys go to other arms; the name, if not given.",
            "type": "string",
            "minLength": 1,
            "maxLength": MAX_SALT,
        },
        "shadows": {
            "description": "Variants that have a copy of the traffic, and answer nothing.",
            "type": ["array", "null"],
            "items": {"type": "string"},
            "maxItems": MAX_SHADOWS,
            "uniqueItems": True,
        },
        "equivalence": {
            "description": "A difference that does not matter, as a share.",
            "type": "number",
            "exclusiveMinimum": 0,
            "exclusiveMaximum": 1,
            "default": EQUIVALENCE,
        },
    },
}
_MEANS = {
    404: "No such experiment; the message lists those that run.",
    409: "Another process changed it at the same time; or its outcome came already.",
    410: "The answer's logits are no longer kept; the message says how to keep more.",
    503: "The experiments' database does not answer, or cannot be had.",
}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {**_SCHEMA, "examples": [_DEFINITION]}}},
    }
}

_BEGUN: Responses = {
    201: {"model": Experiment, "description": "It is new, or begins from nothing."},
    **refused(409, 503, *READ, means=_MEANS),
}


def _experiments(request: Request) -> Experiments:
    """Those of the service, which know of all that it has answered."""
    experiments: Experiments = request.app.state.service.experiments
    experiments.settle()
    return experiments


async def _blocking(work: Callable[..., T], *arguments: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(_THREADS, work, *arguments)


def _json(content: object, status: int = 200) -> Response:
    return Response(json.dumps(content, ensure_ascii=False).encode(), status, media_type="application/json")


async def _fields(request: Request) -> Any:
    """The body, in which no object names a thing twice."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Invalid("the body was not read: send it with `content-type: application/json`")
    try:
        return loads(await request.body())
    except RecursionError:
        raise Invalid("the body is nested too deeply") from None
    except ValueError as error:
        raise ApiError("invalid_json", f"the body is not JSON: {error}") from None


@router.get("", response_model=Verdicts, responses=refused(503, means=_MEANS))
async def get_experiments(request: Request) -> Response:
    """The verdict of every experiment that runs."""
    return _json({"object": "list", "data": await _blocking(_experiments(request).verdicts)})


@router.get("/{name}", response_model=Verdict, responses=refused(404, 503, means=_MEANS))
async def get_experiment(name: Experimenting, request: Request) -> Response:
    """What each arm has been found to cost so far; may be looked at as often as one likes."""
    return _json(await _blocking(_experiments(request).verdict, name))


@router.post("/{name}", response_model=Experiment, openapi_extra=_BODY, responses=_BEGUN)
@router.put("/{name}", response_model=Experiment, openapi_extra=_BODY, responses=_BEGUN)
async def put_experiment(name: Experimenting, request: Request) -> Response:
    """Begin an experiment: 201. As it runs already: 200. Where it runs otherwise, it begins from nothing: 201."""
    experiments = _experiments(request)
    running, new = await _blocking(experiments.begin, name, await _fields(request))
    return _json(experiments.summary(running), 201 if new else 200)


@router.delete("/{name}", response_model=EndedExperiment, responses=refused(404, 503, means=_MEANS))
async def delete_experiment(name: Experimenting, request: Request) -> Response:
    """End an experiment. Its records stay in the database; one that is begun later by that name has its own."""
    experiments = _experiments(request)
    return _json({**experiments.summary(await _blocking(experiments.end, name)), "deleted": True})


@router.post("/{name}/outcomes", response_model=Outcome, responses=refused(404, 409, 410, 503, *READ, means=_MEANS))
async def post_outcome(name: Experimenting, asked: OutcomeRequest, request: Request) -> Response:
    """The token that really came, for an answer's x-exposure-id; each counts once."""
    return _json(_experiments(request).outcome(name, asked.id, asked.token, asked.prompt_index))
