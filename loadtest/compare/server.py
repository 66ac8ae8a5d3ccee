"""The server of a comparison: one of its own, started and stopped; what a local one's process spends.

CPU time is read from the process' own clock, in nanoseconds: /proc counts it in steps of 10 ms, which is a tenth of
what a block of 1 s on a lightly loaded server spends.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from actuary import ActuaryError, BadInput

LOG = "server.log"
START_S = 300.0  # bundles of a gigabyte are read and optimised
POLL_S = 0.05
END_S = 40.0  # what is queued is finished first; the service's own limit is 35 s
PR_SET_PDEATHSIG = 1
# Found here: between fork and exec a lock of the loader may be held by a thread that is no longer there.
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def die_with_parent() -> None:
    """In a new process: SIGTERM when the one that started it is killed. Elsewhere than on Linux it stays."""
    if _PRCTL is not None:
        _PRCTL(PR_SET_PDEATHSIG, signal.SIGTERM)


class ServerDied(ActuaryError):
    """The server of the comparison no longer answers."""


class OwnServer:
    """`actuary serve` on a free port of this machine."""

    def __init__(self, bundles: Path, ops: Path | None, folder: Path) -> None:
        self.log = folder / LOG
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "actuary", "serve", "--bundles", str(bundles), "--port", str(port)]
        # Experiments that run elsewhere are not to have this load in their records.
        command += ["--database", str(folder / "experiments.db"), *(["--ops", str(ops)] if ops else [])]
        # Its settings are the defaults and what stands in this comparison's command, not those of another server.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ACTUARY_")}
        root = str(Path(__file__).parents[2])
        environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def wait(self, look: Callable[[], None]) -> None:
        """Returns when it is ready. `look` is called meanwhile, and may raise."""
        until = time.monotonic() + START_S
        while not ready(self.url):
            look()
            if self.process.poll() is not None or time.monotonic() > until:
                tail = self.tail()
                kind = BadInput if self.process.poll() == BadInput.exit_code else ActuaryError
                raise kind(f"`actuary serve` did not start; {self.log} ends with:\n{tail}")
            time.sleep(POLL_S)

    def check(self) -> None:
        """ServerDied where its process has ended."""
        if self.process.poll() is not None:
            raise ServerDied(
                f"the server ended with exit code {self.process.returncode}; {self.log} ends with:\n{self.tail()}"
            )

    def tail(self) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:])

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(END_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()


def ready(url: str, timeout_s: float = 5.0) -> bool:
    """Whether the server takes requests. No proxy: Locust's client uses none either."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/health/ready", timeout=timeout_s) as answer:
            return bool(json.load(answer)["ready"])
    except (OSError, ValueError, KeyError, TypeError):  # not listening yet, or not ready: HTTPError is an OSError
        return False


def pid_at(url: str) -> int | None:
    """The process of `actuary serve` that listens at `url`, where it is of this machine and may be seen."""
    parts = urllib.parse.urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        addresses = {entry[4][0] for entry in socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)}
        ours = {address.address for each in psutil.net_if_addrs().values() for address in each}
        if not addresses & ours:
            return None
        sockets = psutil.net_connections(kind="tcp")
    except (OSError, psutil.AccessDenied):
        return None
    pids = {each.pid for each in sockets if each.status == psutil.CONN_LISTEN and each.laddr.port == port and each.pid}
    # Where a container's port is forwarded, what listens is the forwarder.
    servers = [pid for pid in pids if _is_ours(pid)]
    return servers[0] if len(servers) == 1 else None


def _is_ours(pid: int) -> bool:
    try:
        words = psutil.Process(pid).cmdline()
    except psutil.Error:
        return False
    return "serve" in words and any("actuary" in word for word in words)


class Meter:
    """What a server's process spends; says None where there is none to look at."""

    def __init__(self, pid: int | None) -> None:
        self._process = psutil.Process(pid) if pid else None

    def cpu_s(self) -> float | None:
        if self._process is None:
            return None
        if sys.platform == "linux":
            try:
                return time.clock_gettime(~self._process.pid << 3 | 2)  # CPUCLOCK_SCHED of another process: <time.h>
            except OSError:  # it has ended
                return None
        try:
            times = self._process.cpu_times()
        except psutil.Error:
            return None
        return float(times.user + times.system)

    def rss_mb(self) -> float | None:
        try:
            return None if self._process is None else float(self._process.memory_info().rss / 1e6)
        except psutil.Error:
            return None
