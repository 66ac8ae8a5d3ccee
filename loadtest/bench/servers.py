"""The contenders' processes: started one by one, stopped in their tracks (SIGSTOP) while another is measured.

A stopped process takes no processor time, whatever its threads were spinning on. Each server is the leader of a group
of its own, so that its workers stop with it. Who is started is written down at once: after a run that was killed, the
next one ends those that were left.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from actuary import ActuaryError, BadInput
from loadtest.bench.contenders import Contender

READY_TIMEOUT_S = 120.0
POLL_S = 0.01
END_S = 10.0
RECORD = "servers.jsonl"  # [id, when it was made] of each that was started, which together no other process has


class Server:
    """One contender's process group."""

    def __init__(self, contender: Contender, folder: Path, ops: Path) -> None:
        self.contender, self._folder, self._ops = contender, folder, ops
        self.log = folder / "logs" / f"{contender.name}.log"
        self.start_s: list[float] = []  # each start's seconds until it was ready
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Returns when it is ready; ActuaryError with the end of its log where it does not become so."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                self.contender.command(self._folder, self.port, self._ops),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        with (self._folder / RECORD).open("a", encoding="utf-8") as record:
            record.write(json.dumps([self._process.pid, psutil.Process(self._process.pid).create_time()]) + "\n")
        path = "/health/ready" if self.contender.ours else "/health"
        while not self._answers(path):
            if not self.alive or time.perf_counter() - began > READY_TIMEOUT_S:
                tail = "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:])
                self.stop()
                raise ActuaryError(f"{self.contender.name} did not start; {self.log} ends with:\n{tail}")
            time.sleep(POLL_S)
        self.start_s.append(round(time.perf_counter() - began, 3))

    def _answers(self, path: str) -> bool:
        try:
            with urllib.request.urlopen(self.url + path, timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:  # not listening yet, or not ready (HTTPError is one too)
            return False

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """Ends the whole group."""
        if self._process is None:
            return
        for number in (signal.SIGCONT, signal.SIGTERM):
            self._signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        self._signal(signal.SIGKILL)  # workers that outlived their leader
        self._process.wait()
        self._process = None

    def _signal(self, number: int) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def cpu_s(self) -> float:
        return sum(times.user + times.system for times in self._each("cpu_times"))

    def resident_mb(self) -> float:
        """Of all its processes together; what they share counts for each."""
        return sum(memory.rss for memory in self._each("memory_info")) / 1e6

    def _each(self, what: str) -> Iterator[psutil._common.pmem]:
        if not self.alive or self._process is None:
            return
        leader = psutil.Process(self._process.pid)
        for process in [leader, *leader.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                yield getattr(process, what)()


@contextlib.contextmanager
def fleet(folder: Path, contenders: Sequence[Contender], ops: Path) -> Iterator[dict[str, Server]]:
    """Servers that are not started yet, by name; ended with the block, and those of a killed run before it.

    BadInput where another run has servers of that folder up.
    """
    record = folder / RECORD
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadInput(
                f"another run measures in {folder}; wait for it, or name another folder with --out"
            ) from None
        _end_left_over(record)
        servers = {contender.name: Server(contender, folder, ops) for contender in contenders}
        try:
            yield servers
        finally:
            for server in servers.values():
                server.stop()
            record.unlink(missing_ok=True)


def _end_left_over(record: Path) -> None:
    for line in record.read_text(encoding="utf-8").splitlines() if record.is_file() else []:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, ValueError):  # the last: a torn line
            pid, created = json.loads(line)
            if psutil.Process(pid).create_time() == created:
                os.killpg(pid, signal.SIGKILL)
