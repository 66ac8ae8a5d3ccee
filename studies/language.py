"""Claim 6: in language models sigmoid FFNs lag ReLU, ReLU lags GELU and SiLU, and gated forms lead.

Source: 000, 003. Refuted by sigmoid level with relu or ahead of it, by relu level with gelu and silu, or by gated forms
that are not ahead of the same function ungated: in held-out bits per byte, on the same text, with as many parameters.

Every activation of the registry is trained (language_runs.py) and compared by seeds (ranking.py). A row that learns
nothing, as threshold's, or diverges is a row like the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from statistics import mean, stdev

from actuary import BadInput
from models.activations import registry
from models.corpus import Corpus
from models.gpt import ActuaryGPT
from models.train import Recipe, Variant
from studies.language_runs import TUNING_SEED, TUNING_SHARE, Plan, Trained, Trainings, train_plan
from studies.language_shown import (
    at_edge,
    curve_charts,
    difference_charts,
    edge_sentence,
    order_table,
    published_tables,
    tuning_table,
)
from studies.language_sizes import REFERENCE, Size, judge
from studies.study import Claim, Finding, Options, of_few

CLAIM = Claim(
    number=6,
    name="language",
    title="Sigmoid lags in language models, gated forms lead",
    statement="In language models sigmoid FFNs lag ReLU, ReLU lags GELU and SiLU, and gated forms lead.",
    source="000, 003",
    refuted_by="sigmoid level with relu or ahead of it, relu level with gelu and silu, or gated forms that are not "
    "ahead of the same function ungated; in held-out bits per byte, on the same text, with as many parameters.",
)
LEAST_SEEDS = 2

# 1 x 64 and 2 x 96, batches of 256 tokens: 8 and 16 ms a step on one core, 100 steps part sigmoid from relu by
# many times their noise. The sizes differ by the whole of what the budget allows.
_TINY = Recipe(steps=100, batch=4, layers=1, dim=64, heads=1, context=64, vocab=512)
QUICK = Plan(
    sizes={"1 x 64": _TINY, "2 x 96": dataclasses.replace(_TINY, layers=2, dim=96, heads=2)},
    rates=(3e-3, 6e-3, 1.2e-2),
    seeds=3,
    train_every=4,
    held_out_every=9,  # 57 kB of CPython 3.11's library
)
# The default shape of `actuary train`, and one of five times its matrices: a night on two cores, or a GPU's hour.
FULL = Plan(
    sizes={"2 x 128": Recipe(), "4 x 192": Recipe(steps=2000, layers=4, dim=192, heads=3)},
    rates=(1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2),
    seeds=3,
)


def run(options: Options) -> Finding:
    plan = QUICK if options.quick else FULL
    if options.seeds is not None:
        plan = dataclasses.replace(plan, seeds=options.seeds)
    if plan.seeds < LEAST_SEEDS:
        told = "language tells activations apart by how they vary from seed to seed"
        raise BadInput(f"--seeds {plan.seeds}: {told}; give at least {LEAST_SEEDS}")
    if options.steps is not None:
        sizes = {size: dataclasses.replace(recipe, steps=options.steps) for size, recipe in plan.sizes.items()}
        plan = dataclasses.replace(plan, sizes=sizes)
    options.report("reading the corpus", 0.0)
    corpus = plan.corpus(Corpus.read(cache=options.kept / "corpus"))
    return study(list(registry()), plan, Trainings(corpus, options.kept, options.workers, options.report))


def study(names: Sequence[str], plan: Plan, trainings: Trainings) -> Finding:
    """The finding of these activations, gelu among them, under a plan."""
    trained = train_plan(names, plan, trainings)
    sizes = {size: Size(size, runs) for size, runs in trained.runs.items()}
    corpus, recipe = trainings.corpus, next(iter(plan.sizes.values()))
    first = next(iter(sizes.values()))
    verdict, sentence = judge(list(sizes.values()))
    edge = at_edge(trained)
    steps = sorted({recipe.steps for recipe in plan.sizes.values()})
    sentence += f" Trained for {' and '.join(map(str, steps))} steps."  # early leads may not last
    return Finding(
        verdict=verdict,
        sentence=sentence + edge_sentence(trained) + of_few(plan.seeds),
        figures=[figure for size in sizes.values() for figure in size.figures()],
        settings={
            "sizes (layers x dim)": {size: _shape(recipe) for size, recipe in plan.sizes.items()},
            "seeds": plan.seeds,
            "trained for": f"{_minutes(trained):.0f} minutes in all, by each training's clock, choosing rates left out",
            "rates": f"{', '.join(f'{rate:g}' for rate in plan.rates)} for the matrices{_outward(plan)}: of each "
            f"activation the one with the least loss on training text after {TUNING_SHARE:g} of the steps at the first "
            f"size, from seed {TUNING_SEED}, which is not measured; at other sizes it falls as 1 / dim",
            "rates at the edge of those tried": f"{len(edge)} of {len(names)}: {', '.join(edge)}" if edge else "none",
            "corpus": f"Python's standard library, {corpus.train_bytes / 1e6:.2f} MB to train on and "
            f"{corpus.held_out_bytes / 1e3:.0f} kB held out, sha256 {corpus.sha256[:16]}",
            "pairing": "the batches of a seed are the same for every activation",
            "beside them, bits per byte": {
                name: round(value, 3) for name, value in corpus.yardsticks(recipe.vocab).items()
            },
        },
        tables=[*map(order_table, sizes.values()), *published_tables(sizes), tuning_table(trained)],
        charts=[*difference_charts(list(sizes.values())), *curve_charts(list(sizes.values())[-1])],
        data={
            "digests": {name: registry()[name].digest for name in names},
            "size": first.name,
            "bits_per_byte": {
                name: {"mean": mean(each), "sd": stdev(each) if len(each) > 1 else None, "seeds": len(each)}
                for name, each in first.values.items()
            },
        },
    )


def _outward(plan: Plan) -> str:
    if not plan.further or len(plan.rates) < 2:
        return ""
    return f", and while the best is the outermost the next one outward, {plan.further} at most on either side"


def _minutes(trained: Trained) -> float:
    return sum(run.seconds for size in trained.runs.values() for runs in size.values() for run in runs) / 60


def _shape(recipe: Recipe) -> str:
    parameters = ActuaryGPT(recipe.config(Variant(REFERENCE))).num_parameters()
    return (
        f"{parameters / 1e6:.2f}M parameters, context {recipe.context}, {recipe.vocab} tokens, {recipe.steps} steps of "
        f"{recipe.batch} windows"
    )
