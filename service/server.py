"""Runs the application under uvicorn until SIGTERM or Ctrl-C, and finishes what is queued before it ends."""

from __future__ import annotations

import asyncio
import gc
import math
import signal
import socket
from types import FrameType

import click
import uvicorn

from service.app import Service, create_app
from service.connection import Connection
from service.settings import Settings

ARRIVED_S = 0.05  # for what had reached the machine when it was told to stop: to be taken, and then to be read
DRAIN_S = 5  # past a request's longest wait, when what still generates is given up: so long to say so


class _Server(uvicorn.Server):
    """uvicorn, saying where it listens, and telling the readiness check when it drains."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # What is there now stays: looked through by each full collection, 80,000 objects stop all threads for 34 ms.
        gc.collect()
        gc.freeze()
        if self.started and sockets:
            _announce(self._service, sockets[0].getsockname()[1])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Before uvicorn cuts off what is still answered, the engine ends it with an error that clients can read.

        uvicorn by itself closes connections that it has not taken, and those of which it has read no request yet.
        """
        asyncio.get_running_loop().call_later(self._service.settings.timeout_s, self._service.engine.give_up)
        await asyncio.sleep(ARRIVED_S)
        for server in self.servers:
            server.close()
        await asyncio.sleep(ARRIVED_S)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.draining = True
        self._service.comparisons.tell()  # before its requests are refused
        super().handle_exit(sig, frame)


def serve_until_stopped(settings: Settings, listener: socket.socket) -> None:
    """Serve on `listener`; returns once it was told to stop and the last answer is sent."""
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",  # nothing here speaks it; what asks for it is answered in HTTP
        access_log=settings.access_log,
        log_level="info" if settings.access_log else "warning",
        server_header=False,
        timeout_graceful_shutdown=math.ceil(settings.timeout_s) + DRAIN_S,
    )
    server = _Server(config, app.state.service)
    # uvicorn takes these over while it runs, and looks at what they said once it has started. When it has
    # drained it raises the signal again, to end as if it had not caught it; we end with 0.
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, server.handle_exit)
    try:
        server.run([listener])
    finally:
        app.state.service.experiments.close()  # where it was told twice to stop, nobody else did


def _announce(service: Service, port: int) -> None:
    settings, library = service.settings, service.library
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(settings.host, settings.host)
    for variant in library.variants.values():
        manifest = variant.manifest
        click.echo(
            f"  {variant.name}: {manifest.activation}, {manifest.head} head, {manifest.precision}, "
            f"{manifest.parameters / 1e6:.2f} M parameters, {variant.provider}",
            err=True,
        )
    for experiment in service.experiments.summaries():
        arms = ", ".join(f"{arm} {100 * share:.4g} %" for arm, share in experiment["arms"].items())
        click.echo(f"  experiment {experiment['id']}: {arms}", err=True)
    for bundle in library.refused:
        click.echo(f"  refused {bundle.name}: {bundle.reason}", err=True)
    if service.no_cuda:
        click.echo(f"  on the CPU, since CUDA does not run here: {service.no_cuda}", err=True)
    for reason in dict.fromkeys(v.unfused for v in library.variants.values() if v.unfused):
        names = ", ".join(v.name for v in library.variants.values() if v.unfused == reason)
        click.echo(f"  unfused {names}: {reason}", err=True)
    for variant in library.variants.values():
        for note in variant.audit.notes:
            click.echo(f"  {variant.name}: {note}", err=True)
    url, body = f"http://{host}:{port}", '{"model": "*", "prompt": "if x is not", "top_k": 3}'
    count = f"{len(library.variants)} variant" + "s" * (len(library.variants) != 1)
    click.echo(f"actuary: {count} on {url}/ (the page), {url}/docs; try it:", err=True)
    click.echo(f"  curl -s {url}/v1/next-token -H 'content-type: application/json' -d '{body}'", err=True)
