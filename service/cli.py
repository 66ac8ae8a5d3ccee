"""`actuary serve`: options derived from the settings, a free port, the application, uvicorn around it."""

from __future__ import annotations

import signal
import socket
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click
from pydantic import ValidationError

from actuary import BadInput
from service.settings import Settings


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    """One option and one ACTUARY_* variable per field of Settings."""
    for name, field in reversed(Settings.model_fields.items()):
        kind: Any = field.annotation
        if typing.get_origin(kind) is Literal:
            kind = click.Choice(typing.get_args(kind))
        elif kind in (Path, Path | None):
            kind = click.Path(path_type=Path)
        command = click.option(
            f"--{name.replace('_', '-')}",
            name,
            envvar=f"ACTUARY_{name.upper()}",
            type=None if kind is bool else kind,
            is_flag=kind is bool,
            default=field.get_default(call_default_factory=True),
            help=field.description,
            show_default=True,
            show_envvar=True,
        )(command)
    return command


@click.command
@_options
def serve(**given: Any) -> None:
    """Serve every bundle of a folder over HTTP, and the page at /.

    \b
    Example:
      actuary serve --bundles artifacts/bundles --port 8000
      curl -s localhost:8000/v1/next-token -H 'content-type: application/json' \\
           -d '{"model": "*", "prompt": "if x is not", "top_k": 3}'

    Needs bundles from `actuary export`. A bundle that is damaged is refused by name and reason, and
    the others serve. SIGTERM or Ctrl-C finishes what is queued, then ends with exit code 0.
    """
    try:
        settings = Settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        option = f"--{str(first['loc'][0]).replace('_', '-')} {first['input']}: " if first["loc"] else ""
        raise BadInput(f"{option}{first['msg'].removeprefix('Value error, ')}") from error
    # Until the service listens there is nothing to finish, and a container's first process has no default for these.
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, lambda *_: sys.exit(0))
    listener = _listen(settings.host, settings.port)  # before the bundles: a taken port is known at once

    from service.server import serve_until_stopped  # half a second of imports, which --help does not need

    with listener:
        serve_until_stopped(settings, listener)


def _listen(host: str, port: int) -> socket.socket:
    """A socket bound to host and port; uvicorn listens on it once the bundles are open."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:  # the latter where no name in the DNS could be written so
        raise BadInput(
            f"cannot listen on {host} port {port}: {getattr(error, 'strerror', error)}; "
            "choose another with --port (0 takes a free one) or --host"
        ) from error
    return bound
