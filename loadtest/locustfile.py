"""Locust's side: users that send POST /v1/next-token, one named row per variant, and keep raw samples.

Run by `actuary load`, or by hand, with Locust's web UI or on many machines:

    locust -f loadtest/locustfile.py --host http://127.0.0.1:8000
    locust -f loadtest/locustfile.py --host http://127.0.0.1:8000 --models gelu,swiglu --master
    locust -f loadtest/locustfile.py --worker --master-host 192.0.2.1

A worker attaches its samples to the reports that Locust sends to the master anyway; the master,
or a process that is alone, writes them to --samples: the first test to that file, a later one (from the
web UI, or of a later process) to the next free name, samples-2.csv and so on.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from argparse import ArgumentTypeError
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import gevent  # type: ignore[import-untyped]
from locust import FastHttpUser, events, task
from locust.env import Environment
from locust.exception import StopTest, StopUser
from locust.runners import MasterRunner, WorkerRunner

from actuary import BadInput
from loadtest import plan
from loadtest.answers import HEADERS, NO_ANSWER_PAUSE_S, TIMER_STEP_S, fail_if_wrong, reason, server_times
from loadtest.samples import Sample, write_header, write_samples

log = logging.getLogger(__name__)

FLUSH_S = 0.5


class Load:
    """What one test shares between its users in this process; made anew when a test starts."""

    def __init__(self, environment: Environment) -> None:
        options = environment.parsed_options
        assert options is not None
        self.environment = environment
        self.worker = f"w{getattr(environment.runner, 'worker_index', 0)}"
        self.prompts = plan.read_prompts(Path(options.prompts)) if options.prompts else plan.PROMPTS
        served = plan.served_models(plan.check_url(environment.host or ""))
        self.models = plan.choose_models(options.models or None, served)
        self.rate: float | None = options.rate
        self.total_users: int | None = getattr(options, "total_users", None)
        self.timeout_s: float = options.request_timeout
        self.seed = options.seed + 7919 * getattr(environment.runner, "worker_index", 0)
        self.bodies = {
            (model, i): json.dumps({"model": model, "prompt": prompt, "top_k": options.top_k})
            for model in self.models
            for i, prompt in enumerate(self.prompts)
        }
        self.users = 0
        self.arrivals = plan.turns(self.models, self.prompts, self.seed)
        self.began = time.perf_counter()
        # Workers take turns rather than send together.
        self.next_arrival_s = getattr(environment.runner, "worker_index", 0) / self.rate if self.rate else 0.0
        self.cpu_began = time.process_time()
        self.stopping = False
        self.pending: list[Sample] = []
        self.sent = 0

    def spent(self) -> dict[str, float]:
        """What this process did for the load so far, beside the samples."""
        return {"cpu_s": time.process_time() - self.cpu_began, "sent": self.sent}

    def now_s(self) -> float:
        return time.perf_counter() - self.began

    def take_arrival(self) -> float:
        """The next planned time. A worker's share of the rate is its share of the users."""
        assert self.rate is not None
        runner = self.environment.runner
        mine = max(1, runner.target_user_count if runner else 1)
        arrival_s = self.next_arrival_s
        self.next_arrival_s += max(1, self.total_users or mine) / (self.rate * mine)
        return arrival_s


class _Node:
    """This process: the test that runs in it, and on a master or alone, the file of samples."""

    def __init__(self) -> None:
        self.load: Load | None = None
        self.problem = "the test has not started"
        self.file: TextIO | None = None
        self.path: Path | None = None
        self.began = 0.0
        self.stopped_after_s: float | None = None
        self.workers: dict[str, dict[str, float]] = {}  # what each has spent

    def open(self, samples: str) -> None:
        self.close()
        self.began, self.stopped_after_s, self.workers = time.perf_counter(), None, {}
        given = Path(samples)
        numbered = (given.with_stem(f"{given.stem}-{number}") for number in itertools.count(2))
        self.path = next(path for path in itertools.chain([given], numbered) if not path.exists())
        log.info("samples go to %s", self.path)
        self.file = self.path.open("x", encoding="utf-8", newline="")
        write_header(self.file)
        self.file.flush()
        gevent.spawn(self._flush_for_ever, self.file)

    def _flush_for_ever(self, file: TextIO) -> None:
        while self.file is file:
            self.flush()
            gevent.sleep(FLUSH_S)

    def flush(self) -> None:
        if self.load and self.file:
            ready, self.load.pending = self.load.pending, []
            write_samples(self.file, ready)

    def close(self) -> None:
        """Writes what is left, and beside the samples how long the load lasted and what the client spent."""
        if not (self.file and self.path):
            return
        self.flush()
        self.file.close()
        self.file = None
        workers = self.workers or ({"w0": self.load.spent()} if self.load else {})
        facts = {
            "stopped_after_s": self.stopped_after_s or time.perf_counter() - self.began,
            "lasted_s": time.perf_counter() - self.began,
            "cpu_s": {worker: spent["cpu_s"] for worker, spent in workers.items()},
            "sent": {worker: spent["sent"] for worker, spent in workers.items()},
        }
        self.path.with_suffix(".client.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


node = _Node()


def _number(text: str) -> float:
    try:
        return plan.positive(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error


@events.init_command_line_parser.add_listener
def _options(parser: Any) -> None:
    group = parser.add_argument_group("Actuary options")
    group.add_argument("--models", default="", help="Variants, comma-separated. Default: all that are served.")
    group.add_argument("--rate", type=_number, default=None, help="Constant arrivals per second; else a closed loop.")
    group.add_argument("--prompts", default="", help="A file with one prompt per line, text or .jsonl.")
    group.add_argument("--top-k", type=int, default=10, help="How many of the likeliest tokens to ask for.")
    group.add_argument("--seed", type=int, default=0, help="Of the order of variants and prompts.")
    group.add_argument(
        "--samples",
        default="",
        help="Write every raw sample to this CSV, or where it exists to one with the next free number "
        "(not on a worker).",
    )
    # Locust's own --run-time takes whole seconds, and counts them from before there are users.
    group.add_argument("--stop-after", type=_number, default=None, help="Quit so many seconds after the start.")
    group.add_argument("--request-timeout", type=_number, default=30.0, help="Seconds until a request failed.")


@events.test_start.add_listener
def _start(environment: Environment, **_: Any) -> None:
    options = environment.parsed_options
    assert options is not None
    if not isinstance(environment.runner, WorkerRunner):
        # Locust sends a master's options to its workers, but not how many users there are in all.
        options.total_users = options.num_users or 1
    node.load = None
    if not isinstance(environment.runner, MasterRunner):
        try:
            node.load = Load(environment)
        except BadInput as error:  # the users that Locust now makes stop the test
            node.problem = str(error)
            environment.process_exit_code = error.exit_code
            return
        NextTokenUser.network_timeout = NextTokenUser.connection_timeout = node.load.timeout_s
    if options.samples and not isinstance(environment.runner, WorkerRunner):
        node.open(options.samples)
    if options.stop_after and environment.runner and not isinstance(environment.runner, WorkerRunner):
        gevent.spawn_later(options.stop_after, environment.runner.quit)


@events.test_stopping.add_listener
def _stopping(**_: Any) -> None:
    node.stopped_after_s = time.perf_counter() - node.began
    if node.load:
        node.load.stopping = True


@events.test_stop.add_listener
def _stop(environment: Environment, **_: Any) -> None:
    if not isinstance(environment.runner, MasterRunner):  # a master's workers still have reports to send
        node.close()


@events.quit.add_listener
def _quit(**_: Any) -> None:
    node.close()


@events.report_to_master.add_listener
def _report(data: dict[str, Any], **_: Any) -> None:
    if node.load:
        ready, node.load.pending = node.load.pending, []
        data["actuary"] = {"samples": [list(sample) for sample in ready], **node.load.spent()}


@events.worker_report.add_listener
def _receive(client_id: str, data: dict[str, Any], **_: Any) -> None:
    report = data.get("actuary")
    if report and node.file:
        write_samples(node.file, report.pop("samples"))
        node.workers[client_id] = report


@events.request.add_listener
def _record(response_time: float, response: Any, context: dict[str, Any], exception: Any, **_: Any) -> None:
    if not (node.load and "model" in context):
        return
    failure = reason(response, exception, node.load.timeout_s) if exception else ""
    times = server_times(response)
    node.load.pending.append(
        Sample(worker=node.load.worker, latency_ms=response_time, failure=failure, **context, **times)
    )


class NextTokenUser(FastHttpUser):
    """Asks for the next token of one variant at a time, in balanced turns.

    In a closed loop each user takes turns by itself. At a constant rate the users are a pool: one that
    is free takes the next planned arrival, waits for its time, and sends.
    """

    planned_s: float = 0.0
    pause_s: float = 0.0

    def __init__(self, environment: Environment) -> None:
        if node.load is None:
            raise StopTest(node.problem)
        super().__init__(environment)
        self.load = node.load
        self.turns: Iterator[tuple[str, int]] = self.load.arrivals
        if self.load.rate is None:
            self.turns = plan.turns(self.load.models, self.load.prompts, self.load.seed + 104729 * self.load.users)
            self.load.users += 1

    def wait_time(self) -> float:
        """Zero between requests; until just before the planned time of one at a constant rate."""
        return max(0.0, self.planned_s - TIMER_STEP_S - self.load.now_s(), self.pause_s)

    @task
    def next_token(self) -> None:
        starved, self.pause_s = 0, 0.0
        if self.load.rate is not None:
            self.planned_s = self.load.take_arrival()
            starved = int(self.load.now_s() > self.planned_s)
            self.wait()  # type: ignore[no-untyped-call]  # Locust can end a user here without losing a request
            while self.load.now_s() < self.planned_s:
                gevent.sleep(0)
        if self.load.stopping:  # a user that wakes as Locust kills those that wait would send, and be cut off
            raise StopUser
        model, prompt = next(self.turns)
        at_s = self.load.now_s()
        context = {
            "model": model,
            "prompt": prompt,
            "planned_s": at_s if self.load.rate is None else self.planned_s,
            "at_s": at_s,
            "late_ms": 0.0 if self.load.rate is None else (at_s - self.planned_s) * 1000,
            "starved": starved,
        }
        self.load.sent += 1
        with self.client.post(
            "/v1/next-token",
            data=self.load.bodies[model, prompt],
            headers=HEADERS,
            name=model,
            catch_response=True,
            context=context,  # the rest of this request's Sample
        ) as response:
            self.pause_s = 0.0 if response.status_code else NO_ANSWER_PAUSE_S
            if response.status_code == 200:
                fail_if_wrong(response, model)
