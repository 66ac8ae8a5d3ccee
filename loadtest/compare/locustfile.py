"""Locust's side of `actuary compare`: visits one arm after another, each begun only when the last is all answered.

    driver  -- a line of JSON per visit, on a socket -->  this process, alone or the master  -- messages -->  workers
    driver  <--      ready, began, block, ended, drained      --                             <--  samples  --

One Locust runs the whole comparison. Its users stay, and wait between visits; so a visit begins within a millisecond of
the end of the one before, on connections that are open. When the driver goes, so does Locust.

`actuary compare` starts it. Workers of other machines, which need this project and nothing else, join by

    locust -f loadtest/compare/locustfile.py --worker --master-host 192.0.2.1
"""

from __future__ import annotations

import json
import logging
import math
import socket
import time
from collections.abc import Callable
from typing import Any

import gevent  # type: ignore[import-untyped]
from gevent.event import AsyncResult, Event  # type: ignore[import-untyped]
from locust import FastHttpUser, events, task
from locust.contrib.fasthttp import FAILURE_EXCEPTIONS
from locust.env import Environment
from locust.runners import LocalRunner, MasterRunner, WorkerRunner

from loadtest.answers import HEADERS, NO_ANSWER_PAUSE_S, TIMER_STEP_S, fail_if_wrong, reason, server_times
from loadtest.compare.design import Visit
from loadtest.compare.stream import lines, read_stream
from loadtest.compare.wire import ROW, Row, workload_heard
from loadtest.compare.workloads import NEXT_TOKEN, Bodies, Workload
from loadtest.samples import DIGITS

log = logging.getLogger(__name__)

PLAN, VISIT, DRAINED = "actuary-plan", "actuary-visit", "actuary-drained"
LOOK_S = 0.5  # between two looks whether a worker is still there


class _Running:
    """A visit in this process, shared between its users."""

    def __init__(self, visit: Visit, workload: Workload, share: tuple[int, int], users: int) -> None:
        self.visit, self.workload = visit, workload
        self.worker, self.workers = share
        self.rows: list[Row] = []
        self.left = users  # that have not finished it
        self.drained = Event()
        self.cpu_began = time.process_time()
        self.began = time.perf_counter()
        planned = visit.planned(workload) if visit.open else iter(())
        self.arrivals = (each for i, each in enumerate(planned) if i % self.workers == self.worker)
        if not users:
            self.drained.set()

    def now_s(self) -> float:
        return time.perf_counter() - self.began

    def finish(self) -> None:
        self.left -= 1
        if not self.left:
            self.drained.set()

    def send(self, send: Callable[..., None], user: int) -> None:
        """Everything that one user has to send; `user` counts in all processes together."""
        if self.visit.open:
            for planned_s, number in self.arrivals:
                starved = self.now_s() > planned_s
                gevent.sleep(max(0.0, planned_s - TIMER_STEP_S - self.now_s()))
                while self.now_s() < planned_s:
                    gevent.sleep(0)
                send(self, number, planned_s, starved)
            return
        for number in self.visit.requests(len(self.workload.requests), user):
            if self.now_s() >= self.visit.load_s:
                return
            send(self, number, None, False)


class _Node:
    """This process."""

    def __init__(self) -> None:
        self.coming = AsyncResult()  # the next visit; made anew by each
        self.users = 0  # made so far
        self.waiting = 0  # of them, for the next visit
        self.timeout_s = 0.0
        self.running: _Running | None = None
        self.workload: Workload | None = None
        self.bodies: Bodies | None = None

    def plan(self, environment: Environment, msg: Any, **_: Any) -> None:
        self.workload = workload_heard(msg.data["workload"])
        self.bodies = Bodies(self.workload, msg.data["models"])

    def visit(self, environment: Environment, msg: Any, **_: Any) -> None:
        """Wakes the users; when the last has finished, sends what they saw."""
        runner = environment.runner
        assert isinstance(runner, LocalRunner | WorkerRunner)
        if runner.client_id not in msg.data["workers"]:
            return  # it joined a moment ago, and has no users yet
        assert self.workload is not None
        while self.waiting < runner.user_count:  # those that were made a moment ago
            gevent.sleep(TIMER_STEP_S)
        share = (msg.data["workers"].index(runner.client_id), len(msg.data["workers"]))
        running = self.running = _Running(Visit(**msg.data["visit"]), self.workload, share, self.waiting)
        came, self.coming, self.waiting = self.coming, AsyncResult(), 0
        came.set(running)
        running.drained.wait()
        spent_s = time.process_time() - running.cpu_began
        done = {"number": msg.data["number"], "rows": running.rows, "cpu_share": spent_s / max(1e-9, running.now_s())}
        runner.send_message(DRAINED, done)


node = _Node()


class ArmUser(FastHttpUser):
    """Takes part in one visit after another."""

    def __init__(self, environment: Environment) -> None:
        assert environment.parsed_options is not None
        node.timeout_s = self.network_timeout = self.connection_timeout = environment.parsed_options.request_timeout
        super().__init__(environment)
        self.number = node.users
        node.users += 1

    @task
    def visit(self) -> None:
        node.waiting += 1
        running: _Running = node.coming.get()
        try:
            # Counted in all processes, so that no two users of a closed loop send the same one after another.
            running.send(self.send, self.number * running.workers + running.worker)
        finally:
            running.finish()

    def send(self, running: _Running, number: int, planned_s: float | None, starved: bool) -> None:
        assert node.bodies is not None
        model = running.visit.model
        path, body = node.bodies.of(model, number)
        at_s = running.now_s()
        planned_s = at_s if planned_s is None else planned_s
        row: dict[str, Any] = {"worker": f"w{running.worker}", "prompt": number, "planned_s": planned_s, "at_s": at_s}
        row |= {"late_ms": (at_s - planned_s) * 1000, "starved": int(starved)}
        row |= {"ttft_ms": math.nan, "itl_ms": math.nan, "tokens": 0}
        asked: dict[str, Any] = {
            "data": body,
            "headers": HEADERS,
            "name": model,
            "catch_response": True,
            "context": {"row": row},
        }
        if path == NEXT_TOKEN:
            with self.client.post(path, **asked) as response:
                if response.status_code == 200:
                    fail_if_wrong(response, model)
        else:
            began = time.perf_counter()
            with self.client.post(path, stream=True, **asked) as response:
                if response.status_code == 200:
                    try:
                        streamed = read_stream(lines(response._response.readline), began)
                        response.request_meta["response_time"] = streamed.latency_ms
                        row |= {"ttft_ms": streamed.ttft_ms, "itl_ms": streamed.itl_ms, "tokens": streamed.tokens}
                        if streamed.failure:
                            response.failure(streamed.failure)
                    except FAILURE_EXCEPTIONS as error:
                        response.request_meta["response_time"] = (time.perf_counter() - began) * 1000
                        response.failure(error)
        if not response.status_code:
            gevent.sleep(NO_ANSWER_PAUSE_S)


@events.request.add_listener  # type: ignore[untyped-decorator]
def _record(response_time: float, response: Any, context: dict[str, Any], exception: Any, **_: Any) -> None:
    running = node.running
    assert running is not None
    row = context["row"] | server_times(response) | {"latency_ms": response_time}
    row["settling"] = round(row["planned_s"], DIGITS) < running.visit.settle_s
    row["failure"] = reason(response, exception, node.timeout_s) if exception else ""
    running.rows.append([round(cell, DIGITS) if isinstance(cell := row[name], float) else cell for name in ROW])


class _Conductor:
    """In the master, or the process that is alone: does what the driver says, a line each."""

    def __init__(self, environment: Environment, driver: socket.socket) -> None:
        self.environment, self.driver = environment, driver
        self.begun = False
        self.number = 0  # of visits
        self.plan: dict[str, Any] = {}
        self.planned: set[str] = set()  # workers that have it
        self.waiting: set[str] = set()
        self.drained = Event()
        self.rows: list[Row] = []
        self.cpu_share = 0.0

    def tell(self, said: str, **facts: Any) -> None:
        self.driver.sendall(json.dumps({"said": said, **facts}).encode() + b"\n")

    def workers(self) -> list[str]:
        runner = self.environment.runner
        if isinstance(runner, MasterRunner):
            return sorted(client.id for client in runner.clients.spawning + runner.clients.running)
        assert isinstance(runner, LocalRunner)
        return [runner.client_id]

    def receive(self, environment: Environment, msg: Any, **_: Any) -> None:
        if msg.data["number"] != self.number:
            return
        who = self.workers()[0] if msg.node_id == "local" else msg.node_id
        self.rows += msg.data["rows"]
        self.cpu_share = max(self.cpu_share, msg.data["cpu_share"])
        self.waiting.discard(who)
        if not self.waiting:
            self.drained.set()

    def begin(self, **_: Any) -> None:
        """Once: when a worker comes or goes, Locust shares its users anew, and says that they are complete again."""
        if not self.begun:
            self.begun = True
            gevent.spawn(self.conduct)

    def conduct(self) -> None:
        runner = self.environment.runner
        assert runner is not None
        try:
            self.tell("ready", workers=len(self.workers()))
            for line in self.driver.makefile("rb"):
                told: dict[str, Any] = json.loads(line)
                if told["tell"] == "plan":
                    self.plan, self.planned = told["plan"], set()
                else:
                    self.visit(told["visit"])
        except OSError as error:  # the driver was killed
            log.info("the driver is gone: %s", error)
        runner.quit()

    def visit(self, asked: dict[str, Any]) -> None:
        visit = Visit(**asked)
        runner, workers = self.environment.runner, self.workers()
        assert runner is not None
        for worker in set(workers) - self.planned:  # one may have joined since the last visit
            runner.send_message(PLAN, self.plan, worker)
            self.planned.add(worker)
        self.number += 1
        self.waiting, self.rows, self.cpu_share, self.drained = set(workers), [], 0.0, Event()
        began = time.monotonic()
        self.tell("began", at=began)
        gevent.spawn(runner.send_message, VISIT, {"number": self.number, "workers": workers, "visit": asked})
        for name, when_s in (("block", visit.settle_s), ("ended", visit.load_s)):
            gevent.sleep(max(0.0, began + when_s - time.monotonic()))
            self.tell(name, at=time.monotonic())
        while not self.drained.wait(LOOK_S):
            if lost := self.waiting - set(self.workers()):
                self.tell("lost", workers=sorted(lost))
                return
        self.tell("drained", at=time.monotonic(), rows=self.rows, cpu_share=self.cpu_share)


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def _options(parser: Any) -> None:
    group = parser.add_argument_group("Actuary options")
    group.add_argument("--driver", type=int, default=-1, help="File descriptor of the socket to `actuary compare`.")
    group.add_argument("--request-timeout", type=float, default=30.0, help="Seconds until a request failed.")


@events.init.add_listener  # type: ignore[untyped-decorator]
def _init(environment: Environment, **_: Any) -> None:
    runner, options = environment.runner, environment.parsed_options
    assert runner is not None
    assert options is not None
    if not isinstance(runner, MasterRunner):
        runner.register_message(PLAN, node.plan)
        runner.register_message(VISIT, node.visit, concurrent=True)
    if not isinstance(runner, WorkerRunner):
        if options.driver < 0:
            raise SystemExit("this locustfile is conducted by `actuary compare`; alone there is loadtest/locustfile.py")
        conductor = _Conductor(environment, socket.socket(fileno=options.driver))
        runner.register_message(DRAINED, conductor.receive)
        environment.events.spawning_complete.add_listener(conductor.begin)  # type: ignore[no-untyped-call]
