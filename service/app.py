"""The application: its routes and what they share. `create_app(settings)` opens the bundles and makes it."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.routing import Match

from service import assets, errors
from service.comparisons.live import Comparisons
from service.comparisons.routes import router as comparisons_router
from service.completions import complete
from service.completions_schema import CompletionAnswer, CompletionRequest
from service.engine import Engine
from service.errors import ApiError, Invalid
from service.events import EventStream, stream
from service.experiments.live import Experiments
from service.experiments.routes import router as experiments_router
from service.frame import Frame, unless_gone
from service.inference_protocol import v2
from service.library import Library, open_library
from service.metrics import CONTENT_TYPE, Metrics, model_label
from service.next_token import Answered, next_token
from service.openapi import (
    ALL,
    READ,
    Experiment,
    Health,
    Listed,
    Live,
    Model,
    Models,
    Named,
    Serving,
    refused,
    without_the_frameworks,
)
from service.prefix_cache import prefix_caches
from service.runtime import Runtime
from service.schema import (
    DetokenizeAnswer,
    DetokenizeRequest,
    NextTokenAnswer,
    NextTokenRequest,
    ScoreAnswer,
    ScoreRequest,
    TokenizeAnswer,
    TokenizeRequest,
    TokenizerInfo,
)
from service.score import score
from service.sequence import Runs
from service.settings import Settings
from service.shortcut import Shortcut
from service.studies import Studies
from service.studies import router as studies_router
from service.tokens import Tokens
from service.variant import Variant


@dataclass
class Service:
    """What the routes share; `app.state.service`."""

    settings: Settings
    library: Library
    engine: Engine
    no_cuda: str  # why `auto` runs on the CPU; empty where it does not
    activations: assets.Compressed
    tokens: Tokens
    metrics: Metrics
    experiments: Experiments
    comparisons: Comparisons
    studies: Studies
    draining: bool = False

    @property
    def ready(self) -> bool:
        return self.engine.serving and not self.draining


def create_app(settings: Settings) -> FastAPI:
    """Open the bundles and build the application; BadInput where nothing can be served."""
    runtime = Runtime(settings.provider, settings.threads, settings.ops)
    library = open_library(settings.bundles, runtime)
    engine = Engine(
        settings.max_queue,
        settings.max_batch_tokens,
        settings.timeout_s,
        runtime.lanes,
        max_queue_tokens=settings.max_queue_tokens,
        max_queue_bytes=settings.max_queue_mb << 20,
        caches=prefix_caches(library.variants.values(), settings.cache_mb << 20),
    )
    experiments = Experiments(settings, library, engine)
    service = Service(
        settings,
        library,
        engine,
        runtime.no_cuda,
        assets.Compressed.of(_activations(library, runtime), "application/json"),
        Tokens(library, settings),
        Metrics(engine.metrics, engine.tell, experiments.counters.all),
        experiments,
        Comparisons(settings.compare, library, experiments),
        Studies(settings.studies),
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        experiments.start()
        async with service.engine:
            yield
        await service.comparisons.close()
        experiments.answer_no_more()
        await asyncio.to_thread(experiments.close)

    app: FastAPI = FastAPIOffline(
        title="Actuary",
        version=importlib.metadata.version("actuary"),
        description="What an activation function costs to serve, and what it buys: next-token probabilities, "
        "softmax beside sigmoid, of one variant or of several.",
        lifespan=lifespan,
        redoc_url=None,  # its script asks a CDN for a picture
    )
    app.state.service = service
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_bad_request)
    app.add_middleware(Shortcut, routes=v1.routes)  # within the frame
    app.add_middleware(
        Frame, max_body_bytes=settings.max_body_bytes, timeout_s=settings.timeout_s, metrics=service.metrics
    )
    for router in _routers():
        app.include_router(router)
    without_the_frameworks(app)
    if assets.PAGE.is_dir():
        app.mount("/page", assets.page)
    return app


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if not isinstance(error, ApiError) and error.status_code in (404, 405):
        error.detail = f"{request.method} {errors.shown(request.url.path)} is not offered; /docs lists what is"
    if error.status_code == 405 and (methods := _methods(request)):
        error.headers = {"Allow": ", ".join(sorted(methods))}  # the framework names those of the first route there
    return errors.answer(error, request.url.path)


def _routers() -> tuple[APIRouter, ...]:
    return v1, experiments_router, comparisons_router, studies_router, v2, aliases, health, browser


def _methods(request: Request) -> set[str]:
    """Those that a path has, over all of its routes."""
    routes = chain(request.app.routes, *(router.routes for router in _routers()))
    here = (route for route in routes if route.matches(request.scope)[0] != Match.NONE)
    return {method for route in here for method in getattr(route, "methods", None) or ()}


async def _on_bad_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return errors.answer(errors.from_validation(error), request.url.path)


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _named(request: Request, models: Sequence[str]) -> Service:
    """The service, for a request that names `models`: it is counted under them."""
    service = _service(request)
    request.state.model = model_label(models, service.library.variants)
    return service


def _json(content: object, status: int = 200) -> Response:
    return _body(json.dumps(content, ensure_ascii=False).encode(), status)


def _body(body: bytes, status: int = 200) -> Response:
    return Response(body, status, media_type="application/json")


v1 = APIRouter(prefix="/v1", tags=["API"])


@v1.post("/next-token", response_model=NextTokenAnswer, response_model_exclude_none=True, responses=refused(*ALL))
async def post_next_token(asked: NextTokenRequest, request: Request) -> Response:
    """Probabilities of the token after each prompt, under each variant."""
    service = _service(request)
    if exposure := service.experiments.expose(asked, request):
        return await exposure.around(_next_token(asked, [exposure.variant], request, exposure.engine))
    return await _next_token(asked, asked.model, request, service.engine)


async def _next_token(asked: NextTokenRequest, names: Sequence[str], request: Request, engine: Runs) -> Response:
    service = _named(request, names)
    work = next_token(asked, service.library.choose(names), engine, service.settings, request.state.arrived)
    return _timed(request, await unless_gone(request, work))


@v1.post("/score", response_model=ScoreAnswer, responses=refused(*ALL))
async def post_score(asked: ScoreRequest, request: Request) -> Response:
    """Probabilities of given tokens right after query + item, in SGLang's shape."""
    service = _named(request, [asked.model])
    work = score(asked, service.library, service.engine, service.settings)
    return _timed(request, await unless_gone(request, work))


_STREAMED = {"text/event-stream": {"example": "data: {...}\n\ndata: [DONE]\n\n"}}


@v1.post(
    "/completions",
    response_model=CompletionAnswer,
    responses={
        **refused(*ALL),
        200: {"content": _STREAMED, "description": "With stream true, events of the same shape."},
    },
)
async def post_completions(asked: CompletionRequest, request: Request) -> Response:
    """What comes after each prompt, in OpenAI's shape with vLLM's additions; streamed or not."""
    service = _service(request)
    if exposure := service.experiments.expose(asked, request):
        asked = asked.model_copy(update={"model": exposure.variant})
        return await exposure.around(_completions(asked, request, exposure.engine))
    return await _completions(asked, request, service.engine)


async def _completions(asked: CompletionRequest, request: Request, engine: Runs) -> Response:
    service = _named(request, [asked.model])
    if not asked.stream:
        work = complete(asked, service.library, engine, service.settings)
        return _timed(request, await unless_gone(request, work))
    begun = stream(asked, service.library, engine, service.settings, request.state.request_id)
    return EventStream(await unless_gone(request, begun), lambda answered: _count_stages(request, answered))


def _count_stages(request: Request, answered: Answered) -> None:
    _service(request).metrics.stages(
        request.state.model, answered.tokenize_ms / 1e3, answered.queue_ms / 1e3, answered.infer_ms / 1e3
    )


def _timed(request: Request, answered: Answered) -> Response:
    _count_stages(request, answered)
    times = {
        "x-tokenize-ms": f"{answered.tokenize_ms:.3f}",
        "x-queue-ms": f"{answered.queue_ms:.3f}",
        "x-infer-ms": f"{answered.infer_ms:.3f}",
    }
    return Response(answered.body, media_type="application/json", headers=times)


@v1.get("/models", response_model=Models)
async def get_models(request: Request) -> Response:
    """The variants that serve, in OpenAI's list shape with facts of their manifests; the bundles refused.

    Experiments stand beside, in a list of their own: who goes through `data`, as our page and load test do, takes each
    for a variant.
    """
    service = _service(request)
    data = [_model(variant) for variant in service.library.variants.values()]
    experiments = service.experiments.summaries()
    return _json({"object": "list", "data": data, "refused": _refused(service.library), "experiments": experiments})


@v1.get("/models/{name}", response_model=Model | Experiment, responses=refused(404))
async def get_model(name: Named, request: Request) -> Response:
    """One variant of that list, or one experiment."""
    service = _service(request)
    experiment = next((each for each in service.experiments.summaries() if each["id"] == name), None)
    return _json(experiment or _model(service.library.one(name)))


@v1.get("/activations", response_model=Listed)
async def get_activations(request: Request) -> Response:
    """Every activation: formula, kind, paper, curve and slope, and the variants that have it."""
    return _service(request).activations.answer(request, max_age_s=0)


aliases = APIRouter(include_in_schema=False)  # where vLLM has what is also under /v1


@aliases.get("/tokenizer_info")
@v1.get("/tokenizer_info", response_model=TokenizerInfo, responses=refused(404, 422))
async def get_tokenizer_info(request: Request, model: str = "*") -> Response:
    """The special tokens and sizes of a variant's tokenizer; without `model`, of the one that all share."""
    names = [name for name, _ in request.query_params.multi_items()]
    for name in names:
        if name != "model":
            raise Invalid(f"unknown parameter {errors.shown(name)}; known: model{errors.nearest(name, ['model'])}")
    if len(names) > 1:
        raise Invalid(f"model is given {len(names)} times; give it once", "model")
    model = _service(request).experiments.tokenizer_of(model)
    return _body(_named(request, [model]).tokens.info(model))


@aliases.post("/tokenize")
@v1.post("/tokenize", response_model=TokenizeAnswer, responses=refused(404, *READ))
async def post_tokenize(asked: TokenizeRequest, request: Request) -> Response:
    """The token ids of a text, in vLLM's shape."""
    asked = asked.model_copy(update={"model": _service(request).experiments.tokenizer_of(asked.model)})
    return _body(await unless_gone(request, _named(request, [asked.model]).tokens.tokenize(asked)))


@aliases.post("/detokenize")
@v1.post(
    "/detokenize",
    response_model=DetokenizeAnswer,
    response_model_exclude_none=True,
    responses=refused(404, *READ),
)
async def post_detokenize(asked: DetokenizeRequest, request: Request) -> Response:
    """The text of token ids, in vLLM's shape; with its bytes, where these are no UTF-8."""
    asked = asked.model_copy(update={"model": _service(request).experiments.tokenizer_of(asked.model)})
    return _body(await unless_gone(request, _named(request, [asked.model]).tokens.detokenize(asked)))


health = APIRouter(tags=["health"])


@health.head("/health", include_in_schema=False)
@health.get("/health", response_model=Health)
async def get_health(request: Request) -> Response:
    """Both of the following in one."""
    service = _service(request)
    return _json({"live": True, "ready": service.ready, "waiting": service.engine.waiting})


@health.head("/health/live", include_in_schema=False)
@health.get("/health/live", response_model=Live)
async def get_live() -> Response:
    """200 as long as the process answers."""
    return _json({"live": True})


@health.head("/health/ready", include_in_schema=False)
@health.get(
    "/health/ready",
    response_model=Serving,
    responses={503: {"model": Serving, "description": "Not yet, or not any more: it is stopping."}},
)
async def get_ready(request: Request) -> Response:
    """200 while requests are taken; which variants serve, and which bundles were refused and why."""
    service = _service(request)
    body = {
        "ready": service.ready,
        "variants": list(service.library.variants),
        "refused": _refused(service.library),
    }
    return _json(body, 200 if service.ready else 503)


@health.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def get_metrics(request: Request) -> Response:
    """Requests, latencies, batches, queue and process, in Prometheus' text format."""
    return Response(await _service(request).metrics.text(), media_type=CONTENT_TYPE)


browser = APIRouter(include_in_schema=False)


@browser.api_route("/", methods=["GET", "HEAD"])
async def get_page(request: Request) -> Response:
    return await assets.page.get_response("index.html", request.scope)


@browser.get("/assets/plotly.min.js")
async def get_plotly(request: Request) -> Response:
    return (await asyncio.to_thread(assets.plotly)).answer(request, max_age_s=assets.WEEK_S)


def _refused(library: Library) -> list[dict[str, str]]:
    return [{"name": bundle.name, "reason": bundle.reason} for bundle in library.refused]


def _model(variant: Variant) -> dict[str, Any]:
    manifest = variant.manifest
    facts = manifest.model_dump(
        mode="json", exclude={"schema_version", "name", "activation_info", "created", "versions"}
    )
    return {
        "id": variant.name,
        "object": "model",
        "created": int(manifest.created.timestamp()),
        "owned_by": "actuary",
        "root": variant.name,
        "provider": variant.provider,
        "unfused": variant.unfused,
        "audit": variant.audit.summary,
        **facts,
    }


def _activations(library: Library, runtime: Runtime) -> bytes:
    """The body of /v1/activations, which never changes while we run."""
    data = []
    variants = library.variants.values()
    for info in library.activations:
        record = info.model_dump(mode="json")
        record["units"] = record["curve"].pop("units")
        record["unfused"] = runtime.unfused(
            info
        )  # why a model in float32 would not run it fused here; "" where it would
        record["served_by"] = [v.name for v in variants if v.manifest.activation == info.name]
        data.append(record)
    return json.dumps({"object": "list", "data": data}, ensure_ascii=False).encode()
