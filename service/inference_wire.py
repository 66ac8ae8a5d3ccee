"""The wire format of the Open Inference Protocol: bytes to jobs, and what was computed to bytes, in JSON and in binary.

    body -> decompress -> JSON object, tensors after it -> check -> Asked: jobs [B], outputs
    Asked, answers [B] -> JSON object, tensors after it -> response

B prompts of up to T ids, right-padded, V the vocabulary. With the binary tensor extension the body goes on after its
JSON object: the header Inference-Header-Content-Length says where the object ends, `binary_data_size` how many bytes
of what follows are a tensor's, row-major and little-endian. Called by inference_protocol.py, whose routes are.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import zlib
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import Response
from fastapi.responses import StreamingResponse
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, model_validator

from service.engine import Done, Job
from service.errors import ApiError, nearest, shown
from service.settings import Settings
from service.variant import Variant

VERSION = "1"  # of every model: another training is another name
HEADER_LENGTH = "inference-header-content-length"
INPUTS = {"input_ids": [-1, -1], "lengths": [-1]}  # INT64; -1 is any size
OUTPUTS = ("logits", "softmax", "sigmoid")  # FP32 [B, V]
INT64_BYTES, FP32_BYTES = 8, 4
WBITS = {"gzip": 31, "deflate": 15}  # zlib's words for the two formats
# Work up to these sizes takes about 3 ms at most and is done on the event loop; more goes to a thread.
INLINE_BYTES = 32_000  # 90 ns each, where each is a bracket
INLINE_NUMBERS = 2_000  # 0.9 us each, as JSON
MORE_LISTS = 1_000  # in long JSON, beside one for each row of ids
NUMBERS_PER_DUMP = 1_000  # json.dumps holds the GIL until it is done
AT_ONCE_BYTES = 1 << 20  # an answer up to this is one write; a longer one is sent row by row


class Invalid(ApiError):
    """A request for what cannot be inferred: 400, as the protocol has it."""

    def __init__(self, message: str) -> None:
        super().__init__("invalid_inference", message)


class _Part(BaseModel):
    """Fields and parameters that are not ours are let pass, as the protocol's extensions ask; a null is not given."""

    model_config = ConfigDict(frozen=True, strict=True)

    parameters: dict[Any, Any] = {}  # Any as a key: pydantic's refusal would quote it whole

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class _Input(_Part):
    name: str
    datatype: str
    shape: Annotated[list[int], FailFast(), Field(max_length=8)]
    data: Any = None


class _Output(_Part):
    name: str


class _Inference(_Part):
    id: str | None = None
    inputs: Annotated[list[_Input], FailFast()]
    outputs: Annotated[list[_Output], FailFast()] = []


Part = TypeVar("Part", _Input, _Output)


@dataclass(frozen=True)
class Asked:
    """A request that can be computed."""

    id: str | None
    jobs: list[Job]  # B
    binary: dict[str, bool]  # the outputs to give, in order, and whether in binary


def parse(body: bytes, headers: Mapping[str, str], variant: Variant, settings: Settings) -> Asked:
    """All that can be wrong with a request is found here, before anything is computed."""
    body = _decompressed(body, headers.get("content-encoding", ""), settings.max_body_bytes)
    json_bytes = _json_bytes(headers.get(HEADER_LENGTH), len(body))
    asked = _inference(body[:json_bytes], settings.max_prompts)
    inputs = _by_name(asked.inputs, INPUTS, "input")
    rows, columns = _check_inputs(inputs, variant, settings)
    outputs = _by_name(asked.outputs or [_Output(name=name) for name in OUTPUTS], OUTPUTS, "output")
    binary = {name: _binary(output, asked) for name, output in outputs.items()}
    _check_answer(rows, binary, variant, settings)
    prompts = _prompts(_values(inputs, memoryview(body)[json_bytes:]), rows, columns, variant)
    return Asked(asked.id, [Job(variant, ids, 0) for ids in prompts], binary)


def _decompressed(body: bytes, encoding: str, most: int) -> bytes:
    """`body` without its Content-Encoding; refused where that gives more than `most` bytes."""
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in WBITS:
        raise Invalid(f"the content-encoding {shown(encoding)} is not read; allowed: identity, {', '.join(WBITS)}")
    stream = zlib.decompressobj(WBITS[encoding])
    try:
        plain = stream.decompress(body, most + 1)
    except zlib.error as error:
        raise Invalid(f"the body is not {encoding}: {error}") from None
    if len(plain) > most:
        raise ApiError("too_large", f"the body decompresses to more than {most} bytes; send smaller requests")
    if not stream.eof or stream.unused_data:
        what = "goes on after its end" if stream.eof else "is cut off"
        raise Invalid(f"the body's {encoding} stream {what}; send all of it and nothing else")
    return plain


def _json_bytes(header_length: str | None, size: int) -> int:
    """How many bytes of a body of `size` are its JSON object."""
    if header_length is None:
        return size
    if not re.fullmatch("[0-9]{1,18}", header_length) or int(header_length) > size:
        raise Invalid(
            f"Inference-Header-Content-Length is {shown(header_length)}; it must be the length of the JSON object in "
            f"bytes, and the body has {size}"
        )
    return int(header_length)


def _int(digits: str) -> int:
    """`int`, as a function of Python: with it, json lets other threads run between two numbers."""
    return int(digits)


def _float(digits: str) -> float:
    return float(digits)


def _loaded(text: bytes, max_prompts: int) -> Any:
    """`text`, parsed; where it is long, without holding the GIL for long."""
    if len(text) <= INLINE_BYTES:
        return json.loads(text)
    lists = text.count(b"[") + text.count(b"{")
    if lists > (allowed := max_prompts + MORE_LISTS):  # 340,000 held it for 0.3 s
        raise Invalid(
            f"the JSON object has {lists} lists and objects; allowed: {allowed}, for {max_prompts} rows of ids"
        )
    return json.loads(text, parse_int=_int, parse_float=_float)


def _inference(text: bytes, max_prompts: int) -> _Inference:
    """The JSON object of a request."""
    try:
        content = _loaded(text, max_prompts)
    except (ValueError, RecursionError) as error:
        raise Invalid(
            f"the body is not JSON: {error}; where tensors follow it, Inference-Header-Content-Length says its length"
        ) from None
    try:
        return _Inference.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "".join(f"[{at}]" if isinstance(at, int) else f".{at}" for at in first["loc"]).removeprefix(".")
        got = "" if first["type"] == "missing" else f"; got {shown(first['input'])}"
        what = f"{where}: {first['msg']}" if where else "the body must be a JSON object"
        raise Invalid(f"{what}{got}") from None


def _by_name(parts: Sequence[Part], known: Collection[str], what: str) -> dict[str, Part]:
    """The inputs or outputs of a request, by name; refused where one is unknown, twice there, or elsewhere."""
    found: dict[str, Part] = {}
    for part in parts:
        name = part.name
        if name not in known:
            raise Invalid(f"unknown {what} {shown(name)}; known: {', '.join(known)}{nearest(name, known)}")
        if name in found:
            raise Invalid(f"the {what} {name!r} is given twice; give it once")
        if part.parameters.get("shared_memory_region") is not None:
            raise Invalid(f"the {what} {name!r} is in shared memory, which is not read; send it in the body")
        found[name] = part
    return found


def _check_inputs(inputs: Mapping[str, _Input], variant: Variant, settings: Settings) -> tuple[int, int]:
    """B and T; refused where the inputs are not what the variant takes."""
    for name, tensor in inputs.items():
        if tensor.datatype != "INT64":
            raise Invalid(f"the input {name!r} is {shown(tensor.datatype)}; it must be INT64")
    if "input_ids" not in inputs:
        raise Invalid("the input 'input_ids' is missing; it is INT64 [B, T]")
    shape = inputs["input_ids"].shape
    if len(shape) != 2 or min(shape) < 1:
        raise Invalid(f"the shape of 'input_ids' is {shown(shape)}; it must be [B, T], both at least 1")
    rows, columns = shape
    if rows > settings.max_prompts:
        raise Invalid(
            f"'input_ids' has {shown(rows)} rows; one request may have {settings.max_prompts}: send several requests"
        )
    if columns > variant.manifest.context:
        raise Invalid(
            f"'input_ids' has {shown(columns)} columns, over the context of {variant.name!r}, "
            f"{variant.manifest.context}; shorten it"
        )
    if "lengths" in inputs and inputs["lengths"].shape != [rows]:
        raise Invalid(
            f"the shape of 'lengths' is {shown(inputs['lengths'].shape)}; with 'input_ids' {shape} it must be [{rows}]"
        )
    return rows, columns


def _binary(output: _Output, asked: _Inference) -> bool:
    """Whether the output is to be given in binary: as it says itself, else as the request says."""
    if output.parameters.get("classification") is not None:
        raise Invalid(f"the output {output.name!r} is asked for as classes, which are not given; ask for the tensor")
    for part, name in ((output, "binary_data"), (asked, "binary_data_output")):
        value = part.parameters.get(name)
        if value is not None:
            if not isinstance(value, bool):
                raise Invalid(f"the parameter {name} is {shown(value)}; it must be true or false")
            return value
    return False


def _check_answer(rows: int, binary: Mapping[str, bool], variant: Variant, settings: Settings) -> None:
    """Refuse what would be too much JSON; in binary an answer is no more than the engine has in memory anyway."""
    numbers = rows * variant.manifest.vocab_size
    if rows > 1 and numbers > settings.max_entries and not all(binary.values()):
        raise Invalid(
            f"{rows} rows of {variant.manifest.vocab_size} numbers are {numbers}; an output may have "
            f"{settings.max_entries} in JSON: ask for it in binary, or send several requests"
        )


def _values(inputs: Mapping[str, _Input], binary: memoryview) -> dict[str, list[int]]:
    """Each input's numbers, row-major: from its `data`, or from the next bytes of `binary`."""
    values, at = {}, 0
    for name, tensor in inputs.items():
        size = tensor.parameters.get("binary_data_size")
        if size is None:
            values[name] = _flat(name, tensor)
            continue
        numbers = math.prod(tensor.shape)
        if tensor.data is not None:
            raise Invalid(f"the input {name!r} has both data and binary_data_size; send one of them")
        if type(size) is not int or size != INT64_BYTES * numbers:
            raise Invalid(
                f"binary_data_size of {name!r} is {shown(size)}; INT64 {tensor.shape} is {INT64_BYTES * numbers} bytes"
            )
        if at + size > len(binary):
            raise Invalid(
                f"the input {name!r} needs {size} bytes, and {len(binary) - at} are left after the JSON object, whose "
                "length Inference-Header-Content-Length says"
            )
        values[name] = np.frombuffer(binary, "<i8", numbers, at).tolist()
        at += size
    if at != len(binary):
        raise Invalid(f"{len(binary)} bytes follow the JSON object, and its tensors are {at}; send those alone")
    return values


def _flat(name: str, tensor: _Input) -> list[int]:
    """The numbers of `data`, which is a flat list or nested as the shape says."""
    data, shape = tensor.data, tensor.shape
    if data is None:
        raise Invalid(f"the input {name!r} has no data; send data, or bytes and their binary_data_size")
    nested = len(shape) == 2 and isinstance(data, list) and bool(data) and isinstance(data[0], list)
    if nested and len(data) != shape[0]:
        raise Invalid(f"the data of {name!r} has {len(data)} rows; its shape {shape} asks for {shape[0]}")
    flat: list[int] = []
    for row in data if nested else [data]:
        if not isinstance(row, list):
            raise Invalid(f"the data of {name!r} holds {shown(row)} where a list is needed")
        if len(row) != (wanted := shape[-1] if nested else math.prod(shape)):
            what = "a row" if nested else "the data"
            raise Invalid(f"{what} of {name!r} has {len(row)} numbers; its shape {shape} asks for {wanted}")
        if set(map(type, row)) != {int}:
            odd = next(value for value in row if type(value) is not int)
            raise Invalid(f"the data of {name!r} holds {shown(odd)}; it must be whole numbers")
        flat += row
    return flat


def _prompts(values: Mapping[str, list[int]], rows: int, columns: int, variant: Variant) -> list[list[int]]:
    """B lists of 1 to T ids; what lies past a row's length is never looked at."""
    vocab_size = variant.manifest.vocab_size
    prompts = []
    for row in range(rows):
        length = values["lengths"][row] if "lengths" in values else columns
        if not 1 <= length <= columns:
            raise Invalid(
                f"lengths[{row}] is {shown(length)}; 'input_ids' has {columns} columns: allowed are 1 to that"
            )
        ids = values["input_ids"][row * columns : row * columns + length]
        if min(ids) < 0 or max(ids) >= vocab_size:
            column = next(at for at, id_ in enumerate(ids) if not 0 <= id_ < vocab_size)
            raise Invalid(
                f"input_ids[{row}, {column}] is {shown(ids[column])}; {variant.name!r} has 0 to {vocab_size - 1}"
            )
        prompts.append(ids)
    return prompts


async def packed(asked: Asked, variant: Variant, done: Sequence[Done], id_: str) -> Response:
    """The answer: its JSON object, then the tensors that were asked for in binary."""
    for each in done:
        if not np.isfinite(each.only.entropy_bits).all():
            raise ApiError("internal", f"variant {variant.name!r} gives no finite probabilities for this prompt")
    tensors = {name: [getattr(each.only, name) for each in done] for name in asked.binary}  # B rows of [V]
    head = {"model_name": variant.name, "model_version": VERSION, "id": id_}
    as_json = sum(row.size for name, rows in tensors.items() if not asked.binary[name] for row in rows)

    def dumped() -> bytes:
        outputs = ",".join(_described(name, rows, asked.binary[name]) for name, rows in tensors.items())
        return f'{_dumps(head)[:-1]},"outputs":[{outputs}]}}'.encode("ascii")

    text = dumped() if as_json <= INLINE_NUMBERS else await asyncio.to_thread(dumped)
    binary = [row for name, rows in tensors.items() if asked.binary[name] for row in rows]
    last = max(done, key=lambda each: each.at)
    headers = {"x-queue-ms": f"{1e3 * last.queue_s:.3f}", "x-infer-ms": f"{1e3 * last.infer_s:.3f}"}
    if not binary:
        return Response(text, headers=headers, media_type="application/json")
    size = len(text) + sum(FP32_BYTES * row.size for row in binary)
    headers |= {HEADER_LENGTH: str(len(text)), "content-length": str(size)}
    pieces = chain([text], (row.astype("<f4", copy=False).tobytes() for row in binary))
    if size <= AT_ONCE_BYTES:
        return Response(b"".join(pieces), headers=headers, media_type="application/octet-stream")
    return StreamingResponse(_one_by_one(pieces), headers=headers, media_type="application/octet-stream")


async def _one_by_one(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    """Each piece, and between two of them whatever else waits."""
    for piece in pieces:
        yield piece
        await asyncio.sleep(0)


def _described(name: str, rows: Sequence[NDArray[np.float32]], binary: bool) -> str:
    """An output's JSON, with its numbers in it where it is not in binary."""
    shape = [len(rows), rows[0].size]
    about: dict[str, Any] = {"name": name, "datatype": "FP32", "shape": shape}
    if binary:
        return _dumps(about | {"parameters": {"binary_data_size": FP32_BYTES * math.prod(shape)}})
    starts = range(0, shape[1], NUMBERS_PER_DUMP)
    pieces = (_dumps(row[at : at + NUMBERS_PER_DUMP].tolist())[1:-1] for row in rows for at in starts)
    return f'{_dumps(about)[:-1]},"data":[{",".join(pieces)}]}}'


# In ASCII, for an id may hold what UTF-8 cannot carry.
_dumps = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode
