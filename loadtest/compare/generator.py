"""Locust as processes of the driver's: started once, told one visit at a time, watched, stopped.

    with Generator(...) as locust:
        locust.visit(visit, on)  -> rows of samples, when every request of the visit is answered

Locust patches the standard library's sockets for gevent when it is imported, so it never runs in this process. One end
of a pair of sockets goes to it; when either side is killed, the other reads the end of it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actuary import ActuaryError
from loadtest.compare.design import Visit
from loadtest.compare.server import die_with_parent
from loadtest.compare.wire import ROW, workload_told
from loadtest.compare.workloads import Workload

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
ROOT = LOCUSTFILE.parents[2]
LOG = "locust.log"
START_S = 60.0  # two busy cores; alone it takes two seconds
POLL_S = 0.1  # between two looks at the processes
SLACK_S = 15.0  # past a visit's load and its last request's timeout
END_S = 5.0


class GeneratorDied(ActuaryError):
    """Locust, or one of its workers, ended before it was told to."""


@dataclass(frozen=True)
class Seen:
    """One visit."""

    rows: list[dict[str, Any]]
    cpu_share: float  # of a core, of the busiest process


@dataclass(frozen=True)
class Place:
    """Where Locust runs: alone; with `workers` more processes here; or, with `master`, with that many elsewhere."""

    workers: int = 0
    master: tuple[str, int] | None = None


class Generator:
    """Locust, running. `look` is called between looks at its processes, and may raise."""

    def __init__(
        self,
        url: str,
        workload: Workload,
        models: Sequence[str],
        users: int,
        timeout_s: float,
        place: Place,
        folder: Path,
        look: Callable[[], None],
    ) -> None:
        self.timeout_s, self.look, self.log = timeout_s, look, folder / LOG
        self._plan = {"workload": workload_told(workload), "models": list(models)}
        self._processes: list[tuple[str, subprocess.Popen[bytes]]] = []
        self._read = b""
        # Workers of other machines come when somebody starts them.
        self._start_s = math.inf if place.master else START_S
        self._start(url, users, place, folder)

    @property
    def pids(self) -> dict[str, int]:
        return {name: process.pid for name, process in self._processes}

    def _start(self, url: str, users: int, place: Place, folder: Path) -> None:
        # Our own arguments are the whole configuration: no LOCUST_* variables, no locust.conf of the folder.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LOCUST_")}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
        common = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary"]
        self._socket, theirs = socket.socketpair()
        leading = [*common, "--host", url, "--users", str(users), "--spawn-rate", str(users)]
        leading += ["--request-timeout", str(self.timeout_s), "--driver", str(theirs.fileno())]
        leading += ["--exit-code-on-error", "0"]
        host, port = place.master or ("127.0.0.1", _free_port())
        if place.workers:
            leading += ["--master", "--master-bind-host", host, "--master-bind-port", str(port)]
            leading += ["--expect-workers", str(place.workers)]
        started: list[tuple[str, list[str], tuple[int, ...]]] = [("Locust", leading, (theirs.fileno(),))]
        for number in range(0 if place.master else place.workers):
            joining = [*common, "--worker", "--master-host", host, "--master-port", str(port)]
            started.append((f"Locust's worker {number}", joining, ()))
        with self.log.open("ab") as log, theirs:
            for name, command, descriptors in started:
                process = subprocess.Popen(
                    command,
                    cwd=folder,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=descriptors,
                    start_new_session=True,  # Ctrl-C reaches the driver only, which then stops these
                    preexec_fn=die_with_parent,
                )
                self._processes.append((name, process))

    def __enter__(self) -> Generator:
        try:
            self._await("ready", time.monotonic() + self._start_s)
            self._tell({"tell": "plan", "plan": self._plan})
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def visit(self, visit: Visit, on: Callable[[str, float], None]) -> Seen:
        """Runs one visit to its last answer.

        Args:
            on: called with "began", "block", "ended" and "drained" as they happen, and when that was by time.monotonic.
        """
        self._tell({"tell": "visit", "visit": asdict(visit)})
        until = time.monotonic() + visit.load_s + self.timeout_s + SLACK_S
        for name in ("began", "block", "ended", "drained"):
            said = self._await(name, until)
            on(name, said["at"])
        rows = [dict(zip(ROW, cells, strict=True)) for cells in said["rows"]]
        return Seen(rows, said["cpu_share"])

    def _tell(self, what: dict[str, Any]) -> None:
        try:
            self._socket.sendall(json.dumps(what).encode() + b"\n")
        except OSError as error:
            raise self._hung_up() from error

    def _await(self, name: str, until: float) -> dict[str, Any]:
        while b"\n" not in self._read:
            self.look()
            for who, process in self._processes:
                if process.poll() is not None:
                    raise self._died(f"{who} ended with exit code {process.returncode}")
            if time.monotonic() > until:
                raise self._died(f"Locust does not say {name!r}")
            if select.select([self._socket], [], [], POLL_S)[0]:
                try:
                    piece = self._socket.recv(1 << 20)
                except ConnectionError:  # it was killed before it had read all that it was told
                    piece = b""
                if not piece:
                    raise self._hung_up()
                self._read += piece
        line, _, self._read = self._read.partition(b"\n")
        said: dict[str, Any] = json.loads(line)
        if said["said"] == "lost":
            raise self._died(f"Locust lost its worker {', '.join(said['workers'])}")
        assert said["said"] == name, said
        return said

    def _hung_up(self) -> GeneratorDied:
        """A process that is killed hangs up before it can be waited for; on a busy machine long before."""
        until = time.monotonic() + END_S
        while not (ended := [each for each in self._processes if each[1].poll() is not None]):
            if time.monotonic() > until:
                return self._died("Locust hung up")
            time.sleep(POLL_S)
        return self._died("; ".join(f"{who} ended with exit code {process.returncode}" for who, process in ended))

    def _died(self, why: str) -> GeneratorDied:
        tail = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:]
        return GeneratorDied("\n".join([f"{why}; {self.log} ends with:", *tail]))

    def close(self) -> None:
        """Locust ends when the driver hangs up, and its workers with it."""
        self._socket.close()
        for number in (0, signal.SIGTERM, signal.SIGKILL):
            for _, process in self._processes:
                if number and process.poll() is None:
                    process.send_signal(number)
            until = time.monotonic() + END_S
            for _, process in self._processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, until - time.monotonic()))
            if all(process.poll() is not None for _, process in self._processes):
                return


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
