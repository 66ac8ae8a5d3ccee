"""Generation by the engine against torch: the same tokens, however prompts meet, are cut and are found in the cache."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from export.exporter import export_bundle
from service.engine import Done, Engine, Job, Rows
from service.prefix_cache import PrefixCache
from service.runtime import Runtime
from service.variant import Variant, open_variant
from service.vocabulary import Vocabulary

LIMIT_S = 60  # a hang fails instead
V, CONTEXT = 300, 32
TOLERANCE = 1e-4  # 2 layers in float32 against float32, in other orders of summing
INT8_TOLERANCE = 0.02  # the last digit of a float32 may move a value to the next of 255 steps


@dataclass
class Greedy:
    """Takes the likeliest token, up to `most` of them; keeps the log-probabilities of all that it read.

    Args:
        tokens: of the prompt.
    """

    tokens: int
    most: int = 0
    first: int = 0
    top_k: int = 1
    generated: list[int] = field(default_factory=list)
    log_probabilities: list[np.ndarray] = field(default_factory=list)

    def read(self, rows: Rows) -> int | None:
        assert rows.top_ids.shape == (len(rows.logits), self.top_k)
        self.log_probabilities += list(np.log(rows.softmax.astype(np.float64)))
        if self.first + len(self.log_probabilities) < self.tokens:
            return 0  # not the prompt's last row: it does not count
        if len(self.generated) == self.most:
            return None
        self.generated.append(int(rows.top_ids[-1, 0]))
        return self.generated[-1]


@dataclass
class Model:
    """A variant, and the torch model that it was made from; of int8 none, and each prompt alone is what to expect."""

    variant: Variant
    torch: Any
    pool: bool

    @property
    def tolerance(self) -> float:
        """Of a log-probability."""
        return TOLERANCE if self.torch else INT8_TOLERANCE

    def log_probabilities(self, ids: list[int]) -> np.ndarray:
        """[T, V] after each token."""
        if self.torch is None:
            prompts = [ids[: end + 1] for end in range(len(ids))]
            return np.log([self.variant.run([prompt], 0)[0].softmax for prompt in prompts])
        with torch.no_grad():
            return self.torch(torch.tensor([ids])).logits[0].double().log_softmax(-1).numpy()

    def greedy(self, prompt: list[int], most: int) -> list[int]:
        """The tokens that follow."""
        ids = list(prompt)
        for _ in range(most):
            ids.append(int(self.log_probabilities(ids)[-1].argmax()))
        return ids[len(prompt) :]


KINDS = {
    "with cache": ("gelu", "ort", "fp32", True),
    "packed": ("gelu", "ort", "fp32", False),
    "padded": ("swiglu", "portable", "fp32", False),
    "int8": ("swiglu", "ort", "int8", True),
}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable) -> Model:
    activation, flavor, precision, pool = request.param
    torch.set_num_threads(1)  # such small models are slower on several
    checkpoint = tiny_checkpoint(activation)
    out = tmp_path_factory.mktemp("bundles")
    export_bundle(checkpoint, out, flavor=flavor, precision=precision)
    variant = open_variant(next(out.glob("*/model.onnx")).parent, Runtime("cpu", 1), lambda path, _: Vocabulary(path))
    assert variant.cached == (flavor == "ort")
    return Model(variant, checkpoint.model.float().eval() if precision == "fp32" else None, pool)


@pytest.fixture(scope="module")
def cached(model: Model) -> Model:
    if not model.pool:
        pytest.skip("it has no cache")
    return model


@contextlib.asynccontextmanager
async def serving(model: Model, slots: int = 500, lanes: int = 1, tokens: int = 50) -> AsyncIterator[Engine]:
    """An engine, that lets go of all it held in the cache."""
    shape = model.variant.pool_shape if model.pool else None
    caches = {model.variant: PrefixCache(shape[0], slots, shape[1])} if shape else {}
    async with Engine(1000, tokens, LIMIT_S, lanes, caches=caches) as engine:
        yield engine
    for cache in caches.values():
        assert cache._held == 0, "somebody left without letting go"
        assert cache.used == cache._stored, "slots were lost"


def play(model: Model, requests: Sequence[Sequence[Job]], **options: int) -> tuple[list[list[Done]], Engine]:
    """The requests one after another, each one's jobs at once."""

    async def scene() -> tuple[list[list[Done]], Engine]:
        async with serving(model, **options) as engine:
            return [await engine.run(jobs) for jobs in requests], engine

    return asyncio.run(asyncio.wait_for(scene(), LIMIT_S))


def generate(model: Model, ids: list[int], most: int, first: int = 0) -> Job:
    return Job(model.variant, ids, 1, Greedy(len(ids), most, first), max_tokens=most)


def check(model: Model, job: Job, done: Done) -> None:
    """Its rows are torch's, and each token is one of the likeliest."""
    reader = job.reader
    if not isinstance(reader, Greedy):
        expected = model.log_probabilities(job.ids)
        np.testing.assert_allclose(np.log(done.only.softmax), expected[-1], atol=model.tolerance, rtol=0)
        return
    assert done.row is None
    most = min(job.max_tokens, CONTEXT - len(job.ids) + 1)
    assert len(reader.generated) == most
    computed = (job.ids + reader.generated)[:CONTEXT]
    expected = model.log_probabilities(computed)
    found = np.array(reader.log_probabilities)
    # After the last of max_tokens nothing is wanted; where the context ended, the last token cannot be computed.
    np.testing.assert_allclose(found, expected[reader.first :][: len(found)], atol=model.tolerance, rtol=0)
    assert len(found) >= len(job.ids) - reader.first + most - 1
    for at, token in enumerate(reader.generated):
        after = expected[len(job.ids) - 1 + at]
        assert after[token] > after.max() - 2 * model.tolerance


PROMPTS = [[7, 8, 9], [1], [5] * 20, list(range(40, 57)), [7, 8, 9, 10]]


def test_greedy_generation_is_torchs(model: Model) -> None:
    for prompt in PROMPTS:
        job = generate(model, prompt, 6)
        ((done,),), _ = play(model, [[job]])
        check(model, job, done)
        assert job.reader.generated == model.greedy(prompt, 6)


@pytest.mark.parametrize("tokens", [1, 3, 7, 1000])
@pytest.mark.parametrize("lanes", [1, 2])
def test_in_a_batch_and_in_pieces_it_is_the_same(model: Model, tokens: int, lanes: int) -> None:
    jobs = [generate(model, prompt, most, len(prompt) // 2) for most, prompt in enumerate(PROMPTS, 2)]
    jobs += [Job(model.variant, prompt, 2) for prompt in PROMPTS]
    (done,), _ = play(model, [jobs], tokens=tokens, lanes=lanes)
    for job, each in zip(jobs, done, strict=True):
        check(model, job, each)


def test_the_context_ends_it(model: Model) -> None:
    job = generate(model, list(range(30)), 10)
    ((done,),), _ = play(model, [[job]])
    check(model, job, done)
    assert len(job.reader.generated) == 3, "two with a place in the context, and the one after them"


def test_max_tokens_end_it_without_asking(model: Model) -> None:
    class Endless(Greedy):
        def read(self, rows: Rows) -> int:
            token = super().read(rows)
            assert token is not None
            return token

    reader = Endless(2, 99)
    play(model, [[Job(model.variant, [1, 2], 0, reader, max_tokens=3)]])
    assert len(reader.generated) == 4
    assert len(reader.log_probabilities) == 2 + 3


def test_a_cached_prefix_changes_nothing(cached: Model) -> None:
    preamble = list(range(100, 117))
    first = generate(cached, [*preamble, 1, 2], 4, 18)
    continues = [*first.ids, *cached.greedy(first.ids, 4)]
    requests = [
        [first],
        [generate(cached, [*preamble, 3], 3, 17)],
        [Job(cached.variant, [*preamble, 1, 2])],
        [generate(cached, continues, 2, len(continues) - 1)],
        [generate(cached, [*preamble, 1, 2], 2)],
        [generate(cached, preamble[:5], 2, 4)],
    ]
    done, engine = play(cached, requests)
    for (job,), (each,) in zip(requests, done, strict=True):
        check(cached, job, each)
    # The last prompt token is always computed, as are those after which rows are wanted.
    assert [each.cached_tokens for (each,) in done] == [0, 17, 18, 22, 0, 4]
    assert tokens_of(engine, "cached") == 17 + 18 + 22 + 4
    assert tokens_of(engine, "prompt") == 19 + 1 + 1 + 1 + 19 + 1
    assert tokens_of(engine, "generated") == 4 + 3 + 2 + 2 + 2


def tokens_of(engine: Engine, kind: str) -> float:
    (model,) = {labels[0] for labels in engine.metrics._tokens._metrics}
    return engine.metrics._tokens.labels(model, kind)._value.get()


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("tokens", [8, 1000])
def test_a_preamble_of_many_is_computed_once(cached: Model, lanes: int, tokens: int) -> None:
    """All come at the same moment, into the same batch."""
    preamble = list(range(100, 125))
    jobs = [Job(cached.variant, [*preamble, n, n]) for n in range(6)]
    jobs += [generate(cached, [*preamble, n], 3, len(preamble)) for n in range(6, 12)]
    (done,), engine = play(cached, [jobs], lanes=lanes, tokens=tokens)
    for job, each in zip(jobs, done, strict=True):
        check(cached, job, each)
    assert tokens_of(engine, "prompt") == 25 + 6 * 2 + 6
    assert tokens_of(engine, "cached") == 25 * 11


def test_a_pool_of_one_context_is_enough(cached: Model) -> None:
    """Sequences wait for slots and evict what nobody holds; all finish."""
    jobs = [generate(cached, [n] * (3 + 5 * (n % 5)), n % 7, 0) for n in range(40)]
    jobs += [Job(cached.variant, [n] * (n % 32 + 1)) for n in range(40, 70)]
    (done,), engine = play(cached, [jobs], slots=CONTEXT, lanes=2)
    for job, each in zip(jobs, done, strict=True):
        check(cached, job, each)
    assert engine._caches[cached.variant].evicted > 100


def test_a_reader_that_fails_fails_its_job_alone(model: Model) -> None:
    class Broken(Greedy):
        def read(self, rows: Rows) -> int | None:
            if len(self.generated) == 2:
                raise RuntimeError("cannot read")
            return super().read(rows)

    async def scene() -> tuple[Any, Any]:
        async with serving(model) as engine:
            broken = engine.run([Job(model.variant, [1, 2, 3], 1, Broken(3, 5), max_tokens=5)])
            return await asyncio.gather(broken, engine.run([fine]), return_exceptions=True)

    fine = generate(model, [1, 2, 4], 5)
    error, (done,) = asyncio.run(scene())
    assert str(error) == "cannot read"
    check(model, fine, done)


def test_a_caller_may_leave_in_mid_generation(model: Model) -> None:
    class Told(Greedy):
        def read(self, rows: Rows) -> int | None:
            if len(self.generated) == 3:
                loop.call_soon_threadsafe(left.set)
            return super().read(rows)

    async def scene() -> float:
        nonlocal loop, left
        loop, left = asyncio.get_running_loop(), asyncio.Event()
        async with serving(model) as engine:
            leaves = asyncio.create_task(engine.run([Job(model.variant, [1, 2, 3], 1, reader, max_tokens=29)]))
            await left.wait()
            leaves.cancel()
            await asyncio.wait([leaves])
            (done,) = await engine.run([stays])
            check(model, stays, done)
        return engine.metrics._dropped.labels("client_gone")._value.get()

    loop: Any = None
    left: Any = None
    reader, stays = Told(3, 29), generate(model, [1, 2, 3], 4)
    assert asyncio.run(scene()) == 1
    assert len(reader.generated) < 29


@st.composite
def mixes(draw: st.DrawFn) -> tuple[list[list[tuple[list[int], int | None, int]]], dict[str, int]]:
    """Requests of prompts with few beginnings, what is wanted of each, and an engine."""
    beginnings = draw(st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=24), min_size=1, max_size=3))

    @st.composite
    def job(draw: st.DrawFn) -> tuple[list[int], int | None, int]:
        beginning = draw(st.sampled_from(beginnings))
        cut = draw(st.integers(1, len(beginning)))
        ids = beginning[:cut] + draw(st.lists(st.integers(0, V - 1), max_size=8))
        first = draw(st.none() | st.integers(0, len(ids) - 1))
        return ids, first, draw(st.integers(0, 6))

    requests = draw(st.lists(st.lists(job(), min_size=1, max_size=6), min_size=1, max_size=4))
    options = {
        "slots": draw(st.sampled_from([32, 40, 64, 500])),
        "lanes": draw(st.integers(1, 2)),
        "tokens": draw(st.sampled_from([1, 4, 20, 500])),
    }
    return requests, options


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(mix=mixes())
def test_any_mix_is_torchs(model: Model, mix: tuple[list[list[tuple[list[int], int | None, int]]], dict[str, int]]):
    described, options = mix
    requests = [
        [
            Job(model.variant, ids, 1) if first is None else generate(model, ids, most, first)
            for ids, first, most in each
        ]
        for each in described
    ]
    done, _ = play(model, requests, **options)
    for jobs, finished in zip(requests, done, strict=True):
        for job, each in zip(jobs, finished, strict=True):
            check(model, job, each)
