"""Trains what the study of language compares: every activation, at each size, from each seed.

    tuning      activation x rate, one seed, shorter, at the first size       -> each activation's rate;
                where the best rate is the outermost, the next one outward too
    measuring   activation x size x seed, at that rate                        -> Runs

A run is a file that is named by the digest of all that decides it (recipe, seed, corpus, formula), so nothing is
trained twice, under whatever plan, and a formula that changed is trained anew. The rate is chosen by the loss on
training text, from a seed that is not measured: held-out text chooses nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actuary import BadInput
from models.corpus import Corpus
from models.files import check_writable, write_atomically
from models.train import Diverged, Progress, Recipe, Stopped, Variant, fingerprint, finished, train_variant
from models.trainer import run_jobs

TUNING_SEED = 1000  # none of those measured, which count from 0
TUNING_SHARE = 0.5  # of the steps at the first size
LAST = 0.2  # share of a tuning's reports whose mean chooses the rate: single batches jump by 10 %
CURVE = "curve.jsonl"


@dataclass(frozen=True)
class Plan:
    """What is trained.

    Args:
        sizes: recipe by name; the first is the one at which rates are chosen.
        rates: peak rates of the matrices that every activation is tried at, rising; of one alone nothing is chosen.
        seeds: how many, from `first_seed`.
        further: rates past either end of them, at most, where an activation is best at that end.
        train_every, held_out_every: one document in this many is used.
    """

    sizes: Mapping[str, Recipe]
    rates: Sequence[float]
    seeds: int
    train_every: int = 1
    held_out_every: int = 1
    first_seed: int = 0
    further: int = 3

    def corpus(self, whole: Corpus) -> Corpus:
        if self.train_every == self.held_out_every == 1:
            return whole
        share = f"{whole.sha256} {self.train_every} {self.held_out_every}"
        return dataclasses.replace(
            whole,
            train=whole.train[:: self.train_every],
            held_out=whole.held_out[:: self.held_out_every],
            sha256=hashlib.sha256(share.encode()).hexdigest(),
        )


@dataclass(frozen=True)
class Run:
    """One training as it came out.

    Args:
        bits_per_byte: on held-out text; None where it diverged.
        curve: (step, bits per byte of that step's batch).
        diverged: what happened, else empty.
    """

    bits_per_byte: float | None
    seconds: float
    curve: tuple[tuple[int, float], ...]
    diverged: str = ""

    @property
    def last(self) -> float:
        """Mean bits per byte of the last batches of training text; infinite where it diverged."""
        if self.diverged:
            return math.inf
        values = [bits for _, bits in self.curve]
        return sum(values[-max(1, round(LAST * len(values))) :]) / max(1, round(LAST * len(values)))


def run_file(variant: Variant, recipe: Recipe, corpus: Corpus, kept: Path) -> Path:
    mark = json.dumps(fingerprint(variant, recipe, corpus.sha256), sort_keys=True)
    return kept / "runs" / f"{variant.name}-{hashlib.sha256(mark.encode()).hexdigest()[:12]}.json"


def read_run(path: Path) -> Run | None:
    """The run in a file; None where there is none; BadInput where it is damaged."""
    if not path.is_file():
        return None
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        curve = tuple((int(step), float(bits)) for step, bits in read["curve"])
        bits = read["bits_per_byte"]
        return Run(bits if bits is None else float(bits), float(read["seconds"]), curve, str(read["diverged"]))
    except (ValueError, TypeError, KeyError) as error:
        raise BadInput(f"{path} cannot be read ({error!r}); delete it, and it is trained again") from error


def train_run(
    variant: Variant,
    recipe: Recipe,
    corpus: Corpus,
    kept: Path,
    report: Callable[[Progress], None],
    should_stop: Callable[[], bool],
) -> None:
    """Trains one run from where it stands and leaves its file; the weights go, since only the figures are asked for."""
    path = run_file(variant, recipe, corpus, kept)
    work = kept / "unfinished" / path.stem
    check_writable(path.parent)
    check_writable(work)
    name = _shown(variant, recipe)

    with (work / CURVE).open("a", encoding="utf-8") as file:

        def keep(progress: Progress) -> None:
            print(json.dumps([progress.step, progress.bits_per_byte]), file=file, flush=True)
            report(dataclasses.replace(progress, name=name))

        outcome: dict[str, Any]
        try:
            # Ended after its last step and before its file was there: measured already.
            quality = finished(work / variant.name) or train_variant(variant, recipe, corpus, work, keep, should_stop)
            outcome = {"bits_per_byte": quality["bits_per_byte"], "seconds": quality["seconds"], "diverged": ""}
        except Diverged as error:
            outcome = {"bits_per_byte": None, "seconds": 0.0, "diverged": str(error)}
    mark = fingerprint(variant, recipe, corpus.sha256)
    write_atomically(path, json.dumps({**outcome, "curve": sorted(_curve(work / CURVE).items()), "recipe": mark}))
    shutil.rmtree(work)


def _shown(variant: Variant, recipe: Recipe) -> str:
    """What progress calls a training: no two of a plan alike."""
    return f"{variant.name}, {recipe.layers} x {recipe.dim}, rate {recipe.matrix_lr:g}, {recipe.steps} steps"


def _curve(path: Path) -> dict[int, float]:
    """Bits per byte by step. A run that was killed did some steps twice, to the same figures, and may have left half
    a line."""
    points: dict[int, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            step, bits = json.loads(line)
        except ValueError:
            continue
        if math.isfinite(bits):
            points[step] = round(bits, 5)
    return points


class Trainings:
    """The runs of one corpus, kept in one folder; those that are asked for and not there are trained."""

    def __init__(self, corpus: Corpus, kept: Path, workers: int, report: Callable[[str, float], None]) -> None:
        self.corpus, self.kept, self.workers, self.report = corpus, kept, workers, report
        self.expected_steps = 0
        self._done: dict[str, int] = {}

    def get(self, asked: Iterable[tuple[Variant, Recipe]]) -> list[Run]:
        """The runs in the order they are asked for. KeyboardInterrupt: stopped; the same call goes on from there."""
        asked = list(dict.fromkeys(asked))
        self.corpus.ids(asked[0][1].vocab)  # made once, before several processes ask for it
        paths = [run_file(variant, recipe, self.corpus, self.kept) for variant, recipe in asked]
        missing = []
        for (variant, recipe), path in zip(asked, paths, strict=True):
            if read_run(path) is None:
                missing.append((variant, recipe, self.corpus, self.kept))
            else:
                self._done[_shown(variant, recipe)] = recipe.steps
        if missing:
            failures = run_jobs(missing, self.workers, self._show, train_run)
            if any(isinstance(failure, Stopped) for failure in failures):
                raise KeyboardInterrupt
        self._done |= {_shown(variant, recipe): recipe.steps for variant, recipe in asked}  # one that diverged too
        return [run for path in paths if (run := read_run(path))]

    def _show(self, progress: Progress) -> None:
        self._done[progress.name] = progress.step
        share = sum(self._done.values()) / max(1, self.expected_steps, sum(self._done.values()))
        self.report(f"{progress.name}: {progress.bits_per_byte:.2f} bits per byte", share)


def tuning_recipe(plan: Plan, rate: float) -> Recipe:
    recipe = next(iter(plan.sizes.values()))
    return dataclasses.replace(recipe, matrix_lr=rate, steps=max(1, round(TUNING_SHARE * recipe.steps)))


def at_rate(plan: Plan, recipe: Recipe, rate: float) -> Recipe:
    """A size at a rate of the first size: the matrices' rate falls as 1 / width (Yang et al. 2022, arXiv:2203.03466).

    Kept as it is, the rate that was best at 1 x 64 took relu from 2.78 to 3.03 bits per byte between two seeds of
    2 x 96, 150 steps; so divided, both came to 2.61.
    """
    first = next(iter(plan.sizes.values()))
    return dataclasses.replace(recipe, matrix_lr=rate * first.dim / recipe.dim)


@dataclass(frozen=True)
class Trained:
    """All that a plan asks for.

    Args:
        tuned: activation -> rate, rising -> what its tuning ended with, bits per byte of training text; infinite:
            diverged. Activations may have been tried at different rates.
        rate: activation -> the rate that was chosen.
        runs: size -> activation -> one Run a seed.
    """

    tuned: dict[str, dict[float, float]]
    rate: dict[str, float]
    runs: dict[str, dict[str, list[Run]]]


def best_rate(tuned: Mapping[float, float]) -> float:
    """The rate of the least loss; of equals the lowest: what diverges everywhere is tried lower."""
    return min(sorted(tuned), key=tuned.__getitem__)


def outermost(tuned: Mapping[float, float]) -> bool:
    """Whether the best rate has no worse one beyond it, so that a better one may lie there."""
    return len(tuned) > 1 and best_rate(tuned) in (min(tuned), max(tuned))


def next_rate(tuned: Mapping[float, float], plan: Plan) -> float | None:
    """The rate to try now: past the best where that is outermost, by the grid's own factor; None: no more are tried."""
    if not outermost(tuned):
        return None
    rates, best = sorted(plan.rates), best_rate(tuned)
    end, inner = (rates[-1], rates[-2]) if best == max(tuned) else (rates[0], rates[1])
    # To 6 digits, as rates are written: where another plan's grid names that rate, it is the same run.
    past = [float(f"{end * (end / inner) ** k:.6g}") for k in range(1, plan.further + 1)]
    return next((rate for rate in past if rate not in tuned), None)


def tune(names: Sequence[str], plan: Plan, trainings: Trainings) -> dict[str, dict[float, float]]:
    """Each activation at the plan's rates, and at the next one outward for as long as the best is the outermost."""
    tuned: dict[str, dict[float, float]] = {name: {} for name in names}
    if len(plan.rates) < 2:
        return tuned
    steps = tuning_recipe(plan, plan.rates[0]).steps
    measured_steps = trainings.expected_steps
    asked = [(name, rate) for name in names for rate in plan.rates]
    all_asked, left = 0, plan.further * len(names)
    while asked:
        all_asked += len(asked)
        # With as many as may still come: fewer later, never more, so that the share that is done only grows.
        trainings.expected_steps = measured_steps + steps * (all_asked + left)
        runs = trainings.get([(Variant(name, seed=TUNING_SEED), tuning_recipe(plan, rate)) for name, rate in asked])
        for (name, rate), run in zip(asked, runs, strict=True):
            tuned[name][rate] = run.last
        asked = [(name, past) for name in names if (past := next_rate(tuned[name], plan)) is not None]
        left = sum(plan.further + len(plan.rates) - len(tuned[name]) - 1 for name, _ in asked)
    trainings.expected_steps = measured_steps + steps * all_asked
    return {name: dict(sorted(of.items())) for name, of in tuned.items()}


def train_plan(names: Sequence[str], plan: Plan, trainings: Trainings) -> Trained:
    """Chooses each activation's rate, then trains it at each size from each seed."""
    trainings.expected_steps = sum(recipe.steps for recipe in plan.sizes.values()) * plan.seeds * len(names)
    tuned = tune(names, plan, trainings)
    rate = {name: best_rate(tuned[name]) if tuned[name] else plan.rates[0] for name in names}
    asked = [
        (Variant(name, seed=seed), at_rate(plan, recipe, rate[name]), size)
        for seed in range(
            plan.first_seed, plan.first_seed + plan.seeds
        )  # the first seed of everything first: what is stopped has something of all
        for size, recipe in plan.sizes.items()
        for name in names
    ]
    runs: dict[str, dict[str, list[Run]]] = {size: {name: [] for name in names} for size in plan.sizes}
    done = trainings.get([(variant, recipe) for variant, recipe, _ in asked])
    for (variant, _, size), run in zip(asked, done, strict=True):
        runs[size][variant.activation].append(run)
    return Trained(tuned, rate, runs)
