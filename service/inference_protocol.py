"""The Open Inference Protocol v2 of KServe and Triton, in JSON and in binary: each variant as a model of tensors.

    POST /v2/models/gelu/infer
    {"inputs": [{"name": "input_ids", "datatype": "INT64", "shape": [2, 3], "data": [5, 6, 7, 8, 9, 0]},
                {"name": "lengths", "datatype": "INT64", "shape": [2], "data": [3, 2]}],
     "outputs": [{"name": "softmax"}]}

    wire.parse -> engine.run -> wire.packed

Here are the routes; what their bodies hold is read and written by inference_wire.py.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from service import inference_wire as wire
from service.errors import ApiError, shown
from service.frame import unless_gone
from service.inference_wire import INPUTS, OUTPUTS, VERSION
from service.openapi import InferenceError, Inferred, Live, ModelReady, Named, Ready, Server, Tensors, refused
from service.variant import Variant

if TYPE_CHECKING:
    from service.app import Service

EXTENSIONS = ["binary_tensor_data"]


_NOT_INFERRED = {
    400: "It asks for what cannot be inferred.",
    404: "No such model or version; the message lists the known.",
}
_NO_MODEL = refused(404, shape=InferenceError, means=_NOT_INFERRED)

v2 = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])


@v2.get("", response_model=Server)
async def get_server(request: Request) -> Response:
    """The server's name, version and extensions."""
    return JSONResponse({"name": "actuary", "version": request.app.version, "extensions": EXTENSIONS})


@v2.get("/health/live", response_model=Live)
async def get_server_live() -> Response:
    """200 as long as the process answers."""
    return JSONResponse({"live": True})


@v2.get(
    "/health/ready",
    response_model=Ready,
    responses={503: {"model": Ready, "description": "Not yet, or not any more: it is stopping."}},
)
async def get_server_ready(request: Request) -> Response:
    """200 while requests are taken."""
    ready = _service(request).ready
    return JSONResponse({"ready": ready}, 200 if ready else 503)


@v2.get("/models/{name}/versions/{version}", include_in_schema=False)
@v2.get("/models/{name}", response_model=Tensors, responses=_NO_MODEL)
async def get_tensors(name: Named, request: Request) -> Response:
    """The model's tensors. `lengths` may be left out: all prompts are T long then."""
    variant = _variant(name, request)
    inputs = [{"name": tensor, "datatype": "INT64", "shape": shape} for tensor, shape in INPUTS.items()]
    shape = [-1, variant.manifest.vocab_size]
    outputs = [{"name": tensor, "datatype": "FP32", "shape": shape} for tensor in OUTPUTS]
    model = {"name": variant.name, "versions": [VERSION], "platform": "onnxruntime_onnx"}
    return JSONResponse({**model, "inputs": inputs, "outputs": outputs})


@v2.get("/models/{name}/versions/{version}/ready", include_in_schema=False)
@v2.get(
    "/models/{name}/ready",
    response_model=ModelReady,
    responses={**_NO_MODEL, 503: {"model": ModelReady, "description": "As for the server."}},
)
async def get_model_ready(name: Named, request: Request) -> Response:
    """200 while requests for the model are taken."""
    variant, ready = _variant(name, request), _service(request).ready
    return JSONResponse({"name": variant.name, "ready": ready}, 200 if ready else 503)


_EXAMPLE = {
    "inputs": [
        {"name": "input_ids", "datatype": "INT64", "shape": [2, 3], "data": [5, 6, 7, 8, 9, 0]},
        {"name": "lengths", "datatype": "INT64", "shape": [2], "data": [3, 2]},
    ],
    "outputs": [{"name": "softmax"}],
}
_BODY = {"required": True, "content": {"application/json": {"schema": {"type": "object"}, "example": _EXAMPLE}}}


@v2.post("/models/{name}/versions/{version}/infer", include_in_schema=False)
@v2.post(
    "/models/{name}/infer",
    response_model=Inferred,
    openapi_extra={"requestBody": _BODY},
    responses={
        200: {"content": {"application/octet-stream": {}}, "description": "With outputs in binary, bytes after JSON."},
        **refused(400, 404, 408, 413, 429, 503, shape=InferenceError, means=_NOT_INFERRED),
    },
)
async def post_infer(name: Named, request: Request) -> Response:
    """The next token's logits, softmax and sigmoid for each row of `input_ids`; those named in `outputs`, or all."""
    variant, service = _variant(name, request), _service(request)
    body = await request.body()

    def parse() -> wire.Asked:
        return wire.parse(body, request.headers, variant, service.settings)

    in_thread = len(body) > wire.INLINE_BYTES or "content-encoding" in request.headers
    asked = await asyncio.to_thread(parse) if in_thread else parse()
    done = await unless_gone(request, service.engine.run(asked.jobs))
    return await wire.packed(asked, variant, done, request.state.request_id if asked.id is None else asked.id)


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _variant(name: str, request: Request) -> Variant:
    """The variant called `name`, where the path names no version or the one that there is; else 404."""
    library = _service(request).library
    variant = library.variants[name] if name in library.variants else library.unknown(name)
    request.state.model = variant.name  # it is counted under it (metrics.py)
    version = request.path_params.get("version", VERSION)
    if version != VERSION:
        raise ApiError("model_not_found", f"unknown version {shown(version)} of {name!r}; known: {VERSION}")
    return variant
