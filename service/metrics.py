"""`GET /metrics`: what the service counts, in Prometheus' text format.

Nothing that a caller wrote becomes a label: routes are named by their templates, models by the variants that serve,
so that there are only so many series. A request costs 6 us: its end (service/frame.py), its three stages (app.py) and
its batch (engine.py), prometheus_client 0.26.0 on a shared 2-core machine; tests/test_metrics.py holds it to 50.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from service.prefix_cache import PrefixCache

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_PLAIN_0_0_4
SEVERAL = "*"  # the model of a request that names more than one; no bundle can be called so
NONE = ""  # of one that names none, or none that serves
OTHER = "other"  # the route of a path that is none

SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
PROMPTS = (1, 2, 4, 8, 16, 32, 64)

prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # a time of creation beside each series would be a third of the text


def model_label(names: Sequence[str], served: Collection[str]) -> str:
    """The label of a request for the variants called `names`."""
    if len(names) == 1 and names[0] in served:
        return names[0]
    return SEVERAL if names and (list(names) == [SEVERAL] or all(name in served for name in names)) else NONE


class EngineMetrics:
    """What the engine counts; one call at each place."""

    def __init__(self) -> None:
        self._prompts = Histogram(
            "actuary_batch_prompts",
            "Sequences that were computed together; its count is that of batches.",
            ["model"],
            buckets=PROMPTS,
            registry=None,
        )
        self._tokens = Counter(
            "actuary_tokens",
            "Tokens that were computed: of prompts, generated ones, and padding; and those cached, which were not. The "
            "share of hits is that of cached in cached and prompt.",
            ["model", "kind"],
            registry=None,
        )
        self._evicted = Counter(
            "actuary_cache_evicted_tokens", "Tokens that left the cache for others.", ["model"], registry=None
        )
        self._dropped = Counter(
            "actuary_dropped_prompts",
            "Prompts that were not computed to the end: client_gone, timeout, or failed with others of their request.",
            ["reason"],
            registry=None,
        )
        self._refused = Counter(
            "actuary_refused_prompts", "Prompts that were answered 429, since the queue was full.", registry=None
        )
        self._waiting = Gauge("actuary_queue_prompts", "Prompts that wait.", registry=None)
        self._running = Gauge(
            "actuary_running_sequences", "Prompts that are computed or generated from.", registry=None
        )
        self._slots = Gauge(
            "actuary_cache_slots",
            "Of the cache, a token each: used, by sequences or to be found again; and all.",
            ["model", "kind"],
            registry=None,
        )
        counted = (self._prompts, self._tokens, self._evicted, self._dropped, self._refused)
        self.all = (*counted, self._waiting, self._running, self._slots)
        self._batch = functools.cache(
            lambda model: (
                self._prompts.labels(model),
                [self._tokens.labels(model, kind) for kind in ("prompt", "generated", "padding", "cached")],
            )
        )
        self._evicted_before: dict[str, int] = {}
        for reason in ("client_gone", "timeout", "failed"):
            self._dropped.labels(reason)  # 0 until it happens

    def computed(self, model: str, sequences: int, prompt: int, generated: int, padding: int) -> None:
        """A batch of so many sequences, and its tokens."""
        size, kinds = self._batch(model)
        size.observe(sequences)
        for kind, tokens in zip(kinds, (prompt, generated, padding), strict=False):
            kind.inc(tokens)

    def began(self, model: str, cached: int) -> None:
        """A prompt, of which so many tokens were found computed."""
        self._batch(model)[1][-1].inc(cached)

    def dropped(self, reason: str, prompts: int) -> None:
        if prompts:
            self._dropped.labels(reason).inc(prompts)

    def refused(self, prompts: int) -> None:
        self._refused.inc(prompts)

    def now(self, waiting: int, running: int, caches: Mapping[str, PrefixCache]) -> None:
        """How things are at a scrape; with each model's cache."""
        self._waiting.set(waiting)
        self._running.set(running)
        for model, cache in caches.items():
            self._slots.labels(model, "used").set(cache.used)
            self._slots.labels(model, "all").set(cache.slots)
            self._evicted.labels(model).inc(cache.evicted - self._evicted_before.get(model, 0))
            self._evicted_before[model] = cache.evicted


class Metrics:
    """Everything at /metrics: requests, the engine's counters, the process."""

    def __init__(self, engine: EngineMetrics, tell: Callable[[], None], others: Iterable[Counter | Gauge] = ()) -> None:
        """`tell` brings the engine's up to date; `others` count besides."""
        self._registry = CollectorRegistry()
        requests = Counter(
            "actuary_requests",
            'Requests by status; model is "*" for several, empty for none.',
            ["route", "model", "status"],
            registry=self._registry,
        )
        total = Histogram(
            "actuary_request_seconds",
            "From a request's arrival to the end of its answer.",
            ["route", "model"],
            buckets=SECONDS,
            registry=self._registry,
        )
        stages = Histogram(
            "actuary_stage_seconds",
            "Of answered requests: tokenize, queue and infer, as in the answer's headers.",
            ["stage", "model"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._answered = functools.cache(
            lambda route, model, status: (requests.labels(route, model, status), total.labels(route, model))
        )
        self._stages = functools.cache(
            lambda model: tuple(stages.labels(stage, model) for stage in ("tokenize", "queue", "infer"))
        )
        self._tell = tell
        for collector in (*engine.all, *others):
            self._registry.register(collector)
        ProcessCollector(registry=self._registry)  # memory, processor time and open files; on Linux

    def answered(self, route: str, model: str, status: int, seconds: float) -> None:
        """A request, at its end."""
        requests, total = self._answered(route, model, status)
        requests.inc()
        total.observe(seconds)

    def stages(self, model: str, tokenize_s: float, queue_s: float, infer_s: float) -> None:
        """A request's way through the engine."""
        tokenize, queue, infer = self._stages(model)
        tokenize.observe(tokenize_s)
        queue.observe(queue_s)
        infer.observe(infer_s)

    async def text(self) -> bytes:
        """What a scrape answers; in a thread, since six variants on five routes took 11 ms."""
        self._tell()  # here, where nothing changes the queue meanwhile
        return await asyncio.to_thread(prometheus_client.generate_latest, self._registry)
