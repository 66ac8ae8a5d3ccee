"""`/v1/studies`: a folder of studies, NAME.json as `actuary study` leaves them -> their list, and each as it is.

Files alone: nothing is measured here, and nothing of studies/ is imported.
"""

from __future__ import annotations

import asyncio
import json
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NoReturn

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.errors import ApiError, nearest, shown
from service.openapi import Listed, refused

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}")
LARGEST: Final = 4 << 20  # bytes; ours have under 150 KB


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class Claim(_Record):
    number: int
    name: str
    title: str
    statement: str
    source: str
    refuted_by: str


Rows = list[dict[str, Any]]


class Study(_Record):
    """What the list says of a file, and that it has the parts which the page draws."""

    schema_version: Annotated[Literal[1], Field(alias="schema", exclude=True)]
    claim: Claim
    verdict: Literal["holds", "holds in part", "did not reproduce"]
    sentence: str
    quick: bool
    date: str
    figures: Annotated[Rows, Field(exclude=True)]
    tables: Annotated[Rows, Field(exclude=True)]
    charts: Annotated[Rows, Field(exclude=True)]
    settings: Annotated[dict[str, Any], Field(exclude=True)]
    data: Annotated[dict[str, Any], Field(exclude=True)]
    machine: Annotated[str, Field(exclude=True)]
    versions: Annotated[dict[str, str], Field(exclude=True)]
    seconds: Annotated[float, Field(exclude=True)]


class Damaged(Exception):
    """A file is there and cannot be used."""


@dataclass(frozen=True)
class Studies:
    """The studies in `root`, which need not be there."""

    root: Path

    def all(self) -> dict[str, Any]:
        """The body of the list: by number, and beside it what is damaged."""
        found, damaged = [], []
        for name in self._names():
            try:
                found.append(self._read(name)[1])
            except FileNotFoundError:  # removed meanwhile
                continue
            except Damaged as error:
                damaged.append({"name": name, "reason": str(error)})
        found.sort(key=lambda study: (study.claim.number, study.claim.name))
        return {"object": "list", "data": [study.model_dump() for study in found], "damaged": damaged}

    def one(self, name: str) -> bytes:
        """The file as it is; 404 where there is none, or none that could be used."""
        if not NAME.fullmatch(name):
            self._unknown(name)
        try:
            return self._read(name)[0]
        except FileNotFoundError:
            self._unknown(name)
        except Damaged as error:
            raise ApiError("not_found", f"{error}; write it anew with `actuary study {name}`", "name") from error

    def _names(self) -> list[str]:
        try:
            files = sorted(self.root.glob("*.json"))
        except OSError:
            return []
        return [path.stem for path in files if NAME.fullmatch(path.stem)]

    def _unknown(self, name: str) -> NoReturn:
        known = self._names()
        what = f"known: {', '.join(known)}{nearest(name, known)}" if known else "`actuary study all` writes them"
        raise ApiError("not_found", f"there is no study {shown(name)} here; {what}", "name")

    def _read(self, name: str) -> tuple[bytes, Study]:
        """FileNotFoundError, or Damaged with what is wrong."""
        path = self.root.resolve() / f"{name}.json"
        try:
            if path.resolve() != path:
                raise Damaged(f"{path.name} is a link that leads elsewhere")
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
                raise Damaged(f"{path.name} is no file")
            if status.st_size > LARGEST:
                raise Damaged(f"{path.name} has {status.st_size} bytes; at most {LARGEST} are read")
            body = path.read_bytes()
            record = json.loads(body, parse_constant=_refuse)
            json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair is JSON, and no text to be sent on
            study = Study.model_validate(record)
        except FileNotFoundError:
            raise
        except ValidationError as error:
            first = error.errors()[0]
            raise Damaged(f"{path.name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        except (OSError, ValueError, RecursionError) as error:
            raise Damaged(f"{path.name} cannot be read: {error}") from error
        if study.claim.name != name:
            raise Damaged(f"{path.name} holds the study {shown(study.claim.name)}")
        return body, study


def _refuse(number: str) -> NoReturn:
    raise ValueError(f"it holds {number}, which is no JSON")


router = APIRouter(prefix="/v1/studies", tags=["studies"])


def _studies(request: Request) -> Studies:
    studies: Studies = request.app.state.service.studies
    return studies


@router.get("", response_model=Listed)
async def get_studies(request: Request) -> Response:
    """Those in the folder of --studies, by number: claim, verdict, sentence; and beside them the damaged files."""
    found = await asyncio.to_thread(_studies(request).all)
    return Response(json.dumps(found, ensure_ascii=False).encode(), media_type="application/json")


@router.get("/{name}", responses=refused(404, means={404: "No such study; the message lists them."}))
async def get_study(name: str, request: Request) -> Response:
    """One whole: figures beside the article's, tables, charts, settings, and what only the page draws."""
    body = await asyncio.to_thread(_studies(request).one, name)
    return Response(body, media_type="application/json")
