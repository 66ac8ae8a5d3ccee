"""What the OpenAPI document says beside the routes' own words: the errors that each may answer, and shapes of answers
that a route writes by hand. tests/test_openapi.py holds both to what is answered."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from fastapi import FastAPI, Path
from pydantic import BaseModel, ConfigDict

from service.schema import ErrorAnswer

Responses = dict[int | str, dict[str, Any]]

_MEANS: Final = {
    400: "The body is not JSON.",
    404: "No such variant; the message lists the known.",
    408: "It waited too long.",
    409: "It cannot be as things are; the message says why.",
    410: "What it is about is gone; the message says since when.",
    413: "The body is over the limit.",
    422: "JSON that asks for what cannot be.",
    429: "The queue is full; try again after Retry-After seconds.",
    503: "The service is stopping.",
}
# Names in paths.
Named = Annotated[str, Path(description="A variant's name.", examples=["gelu"])]
Experimenting = Annotated[str, Path(description="An experiment's name.", examples=["gelu-or-swiglu"])]
READ = (400, 408, 413, 422)  # what reading a body may come to
ALL = (*READ, 404, 429, 503)


def refused(*statuses: int, shape: type[BaseModel] = ErrorAnswer, means: dict[int, str] | None = None) -> Responses:
    """The errors that a route answers with; `means`, in other words than all routes'."""
    said = _MEANS | (means or {})
    return {status: {"model": shape, "description": said[status]} for status in sorted(statuses)}


def without_the_frameworks(app: FastAPI) -> None:
    """Leave the framework's own shape of a 422 out of the document: errors.py answers with ours."""
    written = app.openapi

    def openapi() -> dict[str, Any]:
        document = written()
        for operation in (each for path in document["paths"].values() for each in path.values()):
            answered = operation["responses"].get("422", {}).get("content", {}).get("application/json", {})
            if answered.get("schema", {}).get("$ref", "").endswith("/HTTPValidationError"):
                del operation["responses"]["422"]
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's documentation extends it


class Live(BaseModel):
    live: bool


class Ready(BaseModel):
    ready: bool


class Health(Live, Ready):
    waiting: int


class RefusedBundle(BaseModel):
    name: str
    reason: str


class Serving(Ready):
    variants: list[str]
    refused: list[RefusedBundle]


class Model(BaseModel):
    """A variant: OpenAI's fields, then those of its manifest."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    provider: str
    activation: str
    formula: str
    head: Literal["softmax", "sigmoid"]
    precision: str
    vocab_size: int
    context: int
    parameters: int
    files: dict[str, str]


class Experiment(BaseModel):
    """An experiment that runs, without its figures."""

    id: str
    object: Literal["experiment"]
    created: int
    owned_by: str
    baseline: str
    arms: dict[str, float]
    shadows: list[str]
    context: int
    vocab_size: int
    files: dict[str, str]


class EndedExperiment(Experiment):
    deleted: Literal[True]


class Models(BaseModel):
    object: Literal["list"]
    data: list[Model]
    refused: list[RefusedBundle]
    experiments: list[Experiment]


class Outcome(BaseModel):
    object: Literal["outcome"]
    id: str
    model: str
    token: int
    log_loss: float


class Listed(BaseModel):
    """A list whose entries say of themselves what they are."""

    model_config = ConfigDict(extra="allow")

    object: Literal["list"]
    data: list[dict[str, Any]]


class Verdict(BaseModel):
    """What an experiment has found so far."""

    model_config = ConfigDict(extra="allow")

    object: Literal["experiment"]
    name: str
    began: int
    baseline: str
    fit: bool
    arms: list[dict[str, Any]]
    shadows: list[dict[str, Any]]


class Verdicts(BaseModel):
    object: Literal["list"]
    data: list[Verdict]


class ComparisonLine(BaseModel):
    """A comparison as the list has it."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["comparison"]
    started: str
    state: Literal["running", "done", "stopped", "failed"]
    said: list[Any]


class Comparison(ComparisonLine):
    """All of a comparison."""

    mine: bool
    progress: dict[str, Any] | None
    result: dict[str, Any] | None
    report: bool


class ComparisonList(BaseModel):
    object: Literal["list"]
    data: list[ComparisonLine]
    enabled: bool
    why: str


# --- the Open Inference Protocol's


class InferenceError(BaseModel):
    error: str


class Server(BaseModel):
    name: str
    version: str
    extensions: list[str]


class Tensor(BaseModel):
    name: str
    datatype: Literal["INT64", "FP32"]
    shape: list[int]


class Tensors(BaseModel):
    name: str
    versions: list[str]
    platform: str
    inputs: list[Tensor]
    outputs: list[Tensor]


class ModelReady(Ready):
    name: str


class InferredTensor(Tensor):
    """With `data`, or in an answer with bytes after it `parameters`, which say how many of them are its."""

    data: list[float] | None = None
    parameters: dict[str, Any] | None = None


class Inferred(BaseModel):
    model_name: str
    model_version: str
    id: str
    outputs: list[InferredTensor]
