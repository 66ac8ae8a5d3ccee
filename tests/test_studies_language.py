"""Claim 6: its statistics by hand, its verdict on made figures, its trainings resumed, its direction on other seeds."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import HANG_S

from actuary import BadInput
from models import activations, train
from models.corpus import Corpus
from models.train import Progress, Recipe, Stopped, Variant
from studies import cli, document, language, language_runs, store
from studies.language_runs import Plan, Run, Trained, Trainings, at_rate, read_run, run_file, train_run
from studies.language_shown import at_edge, edge_sentence, order_table, smoothed, tuning_table
from studies.language_sizes import NARANG, ORDER, SHAZEER, Size, judge
from studies.ranking import Noise, differences, groups, holm, noise, rank_correlation
from studies.study import Cell, Finding, Options

RECIPE = Recipe(steps=24, batch=2, layers=1, dim=16, heads=1, context=16, vocab=300)
OTHER_SEED = 7001  # of none that the study trains


@pytest.fixture(autouse=True)
def _one_thread():
    """Two threads of products this small wait for one another, longer than they run on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def runs(*bits: float | None) -> list[Run]:
    return [Run(each, 1.0, ((1, 3.0), (2, 2.0)), "" if each is not None else "it diverged") for each in bits]


def even(values: dict, sd: float, degrees: float) -> Noise:
    """The same noise for all; two that are compared bring twice these degrees of freedom."""
    return Noise(dict.fromkeys(values, sd**2), sd**2, degrees, len(next(iter(values.values()))))


# --- statistics ------------------------------------------------------------------------------------------------------


def test_noise_by_hand():
    """Means 1.5 and 3.6, seeds 2 and 3.1: every residual is 0.05, so each variance is 2 * 0.05^2 * 2 / 1 / 1, and the
    differences 2.0 and 2.2 vary by twice that: 0.02."""
    found = noise({"a": [1.0, 2.0], "b": [3.0, 4.2]})
    assert found.own == pytest.approx({"a": 0.01, "b": 0.01})
    assert found.common == pytest.approx(0.01 / 0.4549, rel=1e-3)  # the median of chi-squared of one degree
    assert found.error("a") == pytest.approx(found.sd / math.sqrt(2))
    error, degrees = found.of_difference("a", "b")
    assert error == pytest.approx(found.sd)  # sqrt(2 / 2)
    assert degrees == pytest.approx(2 * found.degrees)


def test_a_noisy_candidate_answers_for_its_own_noise_alone():
    """Of five, one varies by ten times: it widens its own intervals, and not the others'."""
    rng = np.random.default_rng(5)
    quiet = {name: list(1 + at / 10 + rng.normal(scale=0.01, size=6)) for at, name in enumerate("abcde")}
    loud = quiet | {"e": list(2 + rng.normal(scale=0.1, size=6))}
    (before,), (after,) = (differences(each, [("b", "a")], noise(each)) for each in (quiet, loud))
    assert after.real
    assert after.value - after.low < 2.5 * (before.value - before.low)
    (own,) = differences(loud, [("e", "a")], noise(loud))
    assert own.value - own.low > 3 * (after.value - after.low)
    assert noise(loud).of_difference("a", "e")[1] < 6  # its few seeds are all there is to tell


def test_the_noise_of_normal_figures_is_found():
    rng = np.random.default_rng(11)
    found = [noise({str(n): rng.normal(scale=0.02, size=3) for n in range(25)}).common for _ in range(200)]
    assert np.mean(found) == pytest.approx(0.02**2, rel=0.1)


def test_a_seed_that_is_harder_for_all_is_no_noise():
    assert noise({"a": [1.0, 5.0, 3.0], "b": [2.0, 6.0, 4.0], "c": [0.5, 4.5, 2.5]}).sd == pytest.approx(0, abs=1e-12)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_an_interval_leaves_zero_out_where_the_difference_is_real_and_there_alone():
    values = {"g": [1.0, 1.01, 0.99]} | {f"x{n}": [1 + n / 200, 1.004 + n / 200, 0.995 + n / 200] for n in range(8)}
    known = even(values, 0.012, 16)
    found = differences(values, [(name, "g") for name in values if name != "g"], known)
    assert {each.real for each in found} == {True, False}
    for each in found:
        assert each.real == (each.low > 0 or each.high < 0), each


def test_one_difference_is_students_t():
    """df = 4, 95 %: t = 2.776."""
    values = {"a": [2.0] * 3, "b": [1.0] * 3}
    (found,) = differences(values, [("a", "b")], even(values, 0.3, 2))
    assert found.value - found.low == pytest.approx(2.776 * 0.3 * math.sqrt(2 / 3), rel=1e-3)


def test_groups_are_of_the_first_and_what_does_not_differ_from_it():
    """a and c differ, b from neither: b stands with a, and c begins a group."""
    values = {"c": [1.06, 1.06], "a": [1.0, 1.0], "b": [1.03, 1.03], "d": [2.0, 2.0]}
    assert groups(values, even(values, 0.015, 15)) == [["a", "b"], ["c"], ["d"]]
    assert groups(values, even(values, 10.0, 15)) == [["a", "b", "c", "d"]]


def test_one_seed_tells_nothing_apart():
    known = noise({"a": [1.0], "b": [2.0]})
    assert not known.known
    (found,) = differences({"a": [1.0], "b": [2.0]}, [("b", "a")], known)
    assert not found.real
    assert found.text == "+1.0000"


def test_rank_correlation_by_hand():
    """One neighbouring pair changed of four: 1 - 6 * 2 / (4 * 15); of 24 orders 4 agree as well."""
    ours = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0, "not in theirs": 0.0}
    found = rank_correlation(ours, {"a": 10, "b": 20, "c": 40, "d": 30, "not in ours": 5}, dict.fromkeys(ours, 1e-9))
    assert found.value == pytest.approx(0.8)
    assert (found.low, found.high) == pytest.approx((0.8, 0.8))
    assert found.p == pytest.approx(4 / 24, abs=0.015)
    assert set(found.names) == {"a", "b", "c", "d"}
    wide = rank_correlation(ours, {"a": 10, "b": 20, "c": 40, "d": 30}, dict.fromkeys(ours, 2.0))
    assert wide.low < 0.5 < wide.high


def test_published_tables_know_our_names_alone():
    assert {*SHAZEER, *NARANG} <= set(activations.registry())
    assert NARANG["sigmoid"][1] > NARANG["relu"][1]  # as the claim says


# --- the verdict -----------------------------------------------------------------------------------------------------

CLAIMED = {"sigmoid": 3.0, "relu": 2.5, "gelu": 2.4, "silu": 2.4, "reglu": 2.3, "geglu": 2.2, "swiglu": 2.2}


def made(figures: dict[str, float], name: str = "made", jitter: float = 0.001) -> Size:
    """Three seeds about these figures."""
    return Size(
        name,
        {
            each: runs(*(bits + jitter * ((at + n) % 3) for n in range(3)))
            for at, (each, bits) in enumerate(figures.items())
        },
    )


def test_the_verdict_follows_the_figures():
    verdict, sentence = judge([made(CLAIMED), made(CLAIMED)])
    assert verdict == "holds"
    assert sentence.startswith("Shown at every size: sigmoid behind relu, relu behind gelu")
    verdict, sentence = judge([made(CLAIMED), made(CLAIMED | {"geglu": 2.4, "swiglu": 2.6})])
    assert verdict == "holds in part"
    assert "not at every size: gelu behind geglu, silu behind swiglu" in sentence
    level = CLAIMED | {"geglu": 2.4, "relu": 2.4, "silu": 2.6}
    verdict, sentence = judge([made(level)])
    assert "within noise: relu behind gelu, gelu behind geglu" in sentence
    assert "the other way round: relu behind silu" in sentence
    verdict, _ = judge([made(CLAIMED), made(CLAIMED | {"sigmoid": 2.5})])
    assert verdict == "did not reproduce"


def test_figures_say_which_way():
    figures = made(CLAIMED | {"silu": 2.8, "reglu": 2.5}).figures()
    assert [figure.agrees for figure in figures] == [True, True, False, None, True, True]
    assert figures[2].measured.endswith(": ahead")
    assert figures[3].measured.endswith(": within noise")
    assert len(figures) == len(ORDER)


def test_one_that_diverged_is_a_row_and_behind():
    size = Size("made", {**made(CLAIMED).runs, "sigmoid": runs(3.0, None, 3.1)})
    assert size.state(("sigmoid", "relu")) == "shown"
    assert "sigmoid" not in size.values
    assert order_table(size).rows[-1][:3] == [None, "sigmoid", "diverged"]
    against = Size("made", {**made(CLAIMED).runs, "relu": runs(None, None, None)})
    assert against.state(("sigmoid", "relu")) == "against"
    assert judge([size, against])[0] == "did not reproduce"


def test_one_seed_is_refused(tmp_path):
    """Nothing could be told apart, so no verdict could be given."""
    with pytest.raises(BadInput, match=r"--seeds 1: .* at least 2"):
        language.run(Options(True, 1, tmp_path, 1, lambda what, share: None))
    assert not list(tmp_path.iterdir())


def test_rates_that_are_not_bracketed_are_said():
    """Each by the rates it was tried at itself; tanh's best is where another's lies inside."""
    tuned = {
        "relu": {3e-3: 2.0, 6e-3: 1.9, 1.2e-2: 1.8},
        "gelu": {3e-3: 2.0, 6e-3: 1.9, 1.2e-2: 1.8, 2.4e-2: math.inf},
        "tanh": {1.5e-3: 1.7, 3e-3: 1.8, 6e-3: 1.9},
    }
    trained = Trained(tuned, {"relu": 1.2e-2, "gelu": 1.2e-2, "tanh": 1.5e-3}, {})
    assert at_edge(trained) == {"relu": 1.2e-2, "tanh": 1.5e-3}
    assert edge_sentence(trained).startswith(
        " The rates of 2 of 3 activations lie at the edge of those tried, of relu too:"
    )
    table = tuning_table(trained)
    assert table.columns == ("activation", "0.0015", "0.003", "0.006", "0.012", "0.024", "chosen", "")
    assert table.rows == [
        ["relu", None, "2.000", "1.900", "1.800", None, "0.012", "at the edge"],
        ["gelu", None, "2.000", "1.900", "1.800", "diverged", "0.012", ""],
        ["tanh", "1.700", "1.800", "1.900", None, None, "0.0015", "at the edge"],
    ]
    inside = Trained({"gelu": tuned["gelu"]}, {"gelu": 1.2e-2}, {})
    assert edge_sentence(inside) == ""


def test_a_curve_is_a_mean_over_seeds_and_stretches():
    of = [Run(1.0, 1.0, tuple((step, step + shift) for step in range(4))) for shift in (0.0, 2.0)]
    assert smoothed(of, points=2) == [(0.5, 1.5), (2.5, 3.5)]
    assert smoothed(runs(None)) == []


# --- rates -----------------------------------------------------------------------------------------------------------

GRID = (3e-3, 6e-3, 1.2e-2)


class Made:
    """In the place of Trainings: what is asked for ended at once, with the bits per byte of a formula of its rate."""

    def __init__(self, bits: dict[str, Callable[[float], float]]) -> None:
        self.bits, self.expected_steps = bits, 0
        self.asked: list[tuple[Variant, Recipe]] = []
        self.shares: list[float] = []

    def get(self, asked: list[tuple[Variant, Recipe]]) -> list[Run]:
        found = []
        for variant, recipe in asked:
            bits = self.bits[variant.activation](recipe.matrix_lr)
            self.asked.append((variant, recipe))
            self.shares.append(sum(recipe.steps for _, recipe in self.asked) / self.expected_steps)
            diverged = "" if math.isfinite(bits) else "it diverged"
            found.append(Run(None if diverged else bits, 1.0, ((1, bits),), diverged))
        return found


def about(best: float) -> Callable[[float], float]:
    """Least at `best`, and more by as much for each doubling away from it."""
    return lambda rate: 2 + abs(math.log2(rate / best))


def tried(bits: dict[str, Callable[[float], float]], **plan: Any) -> tuple[Trained, Made]:
    made = Made(bits)
    return language_runs.train_plan(list(bits), Plan({"a": RECIPE}, GRID, 2, **plan), made), made


def test_the_rate_is_followed_until_it_is_bracketed():
    """Past either end, each activation by itself: the first worse rate ends it."""
    found, made = tried({"relu": about(2.4e-2), "gelu": about(1.5e-3), "silu": about(6e-3)})
    assert {name: list(of) for name, of in found.tuned.items()} == {
        "relu": [3e-3, 6e-3, 1.2e-2, 2.4e-2, 4.8e-2],
        "gelu": [7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2],
        "silu": [3e-3, 6e-3, 1.2e-2],
    }
    assert found.rate == {"relu": 2.4e-2, "gelu": 1.5e-3, "silu": 6e-3}
    assert at_edge(found) == {}
    assert len(set(made.asked)) == len(made.asked) == 5 + 5 + 3 + 3 * 2
    measured = {(variant.name, recipe.matrix_lr) for variant, recipe in made.asked if recipe.steps == RECIPE.steps}
    assert {rate for name, rate in measured if name.startswith("relu")} == {2.4e-2}


def test_rates_end_at_the_bound_and_that_is_said():
    found, _ = tried({"relu": lambda rate: 3 - rate, "gelu": lambda rate: 3 + rate}, further=2)
    assert list(found.tuned["relu"]) == [*GRID, 2.4e-2, 4.8e-2]
    assert list(found.tuned["gelu"]) == [7.5e-4, 1.5e-3, *GRID]
    assert at_edge(found) == {"relu": 4.8e-2, "gelu": 7.5e-4}
    assert "2 of 2 activations lie at the edge of those tried, of relu, gelu too" in edge_sentence(found)
    none_further, _ = tried({"relu": lambda rate: 3 - rate}, further=0)
    assert list(none_further.tuned["relu"]) == list(GRID)
    assert at_edge(none_further) == {"relu": 1.2e-2}


def test_the_best_at_the_bound_is_not_bracketed_and_one_before_it_is():
    found, _ = tried({"relu": about(9.6e-2), "gelu": about(4.8e-2)}, further=3)
    assert list(found.tuned["relu"]) == list(found.tuned["gelu"]) == [*GRID, 2.4e-2, 4.8e-2, 9.6e-2]
    assert at_edge(found) == {"relu": 9.6e-2}


def test_one_that_diverges_at_the_next_rate_is_bracketed():
    found, _ = tried({"relu": lambda rate: 3 - rate if rate < 2e-2 else math.inf})
    assert found.tuned["relu"] == {3e-3: 2.997, 6e-3: 2.994, 1.2e-2: 2.988, 2.4e-2: math.inf}
    assert found.rate == {"relu": 1.2e-2}
    assert at_edge(found) == {}


def test_one_that_diverges_on_the_whole_grid_is_tried_lower():
    found, _ = tried({"relu": lambda rate: 3 - rate if rate < 1e-3 else math.inf})
    assert list(found.tuned["relu"]) == [3.75e-4, 7.5e-4, 1.5e-3, *GRID]
    assert found.rate == {"relu": 7.5e-4}
    assert at_edge(found) == {}
    nowhere, _ = tried({"relu": lambda rate: math.inf})
    assert at_edge(nowhere) == {"relu": 3.75e-4}


def test_further_rates_are_those_of_a_wider_grid():
    """To the last bit, since a run is named by its rate: what one plan trained is not trained again by another."""
    found, _ = tried({"relu": lambda rate: 3 - rate, "gelu": lambda rate: 3 + rate})
    assert {2.4e-2, 1.5e-3} < {rate for tuned in found.tuned.values() for rate in tuned}
    thirds = Plan({}, (0.001, 0.003), 2)
    assert language_runs.next_rate({0.001: 2.0, 0.003: 1.0}, thirds) == 0.009
    assert language_runs.next_rate({0.001: 1.0, 0.003: 2.0}, thirds) == 0.000333333


def test_progress_only_grows_and_ends_at_the_whole():
    _, made = tried({"relu": about(2.4e-2), "gelu": about(6e-3), "silu": lambda rate: math.inf})
    assert made.shares == sorted(made.shares)
    assert made.shares[-1] == 1


# --- trainings -------------------------------------------------------------------------------------------------------


@pytest.fixture
def batches(monkeypatch):
    """The steps that are trained, in order."""
    steps: list[int] = []
    whole = train.windows

    def counted(ids, recipe, seed, step):
        steps.append(step)
        return whole(ids, recipe, seed, step)

    monkeypatch.setattr(train, "windows", counted)
    return steps


def test_what_is_stopped_goes_on_and_nothing_is_trained_twice(corpus, tmp_path, batches):
    variant, asked = Variant("gelu", seed=3), []

    def stop() -> bool:
        asked.append(1)
        return len(asked) == 15

    with pytest.raises(Stopped):
        train_run(variant, RECIPE, corpus, tmp_path, lambda report: None, stop)
    trainings = Trainings(corpus, tmp_path, 1, lambda what, share: None)
    (run,) = trainings.get([(variant, RECIPE)])
    assert batches == list(range(24))
    assert [step for step, _ in run.curve] == [1, 11, 21, 24]
    assert trainings.get([(variant, RECIPE)]) == [run]
    assert len(batches) == 24
    (whole,) = Trainings(corpus, tmp_path / "whole", 1, lambda what, share: None).get([(variant, RECIPE)])
    assert (whole.bits_per_byte, whole.curve) == (run.bits_per_byte, run.curve)
    assert not list((tmp_path / "unfinished").iterdir())


def test_other_settings_are_another_run(corpus, tmp_path, monkeypatch):
    path = run_file(Variant("gelu"), RECIPE, corpus, tmp_path)
    others = [
        run_file(Variant("gelu", seed=1), RECIPE, corpus, tmp_path),
        run_file(Variant("gelu"), dataclasses.replace(RECIPE, matrix_lr=1e-3), corpus, tmp_path),
        run_file(Variant("gelu"), RECIPE, Plan({}, (), 1, train_every=2).corpus(corpus), tmp_path),
    ]
    record = dataclasses.replace(activations.get("gelu"), expression=lambda x: x)
    monkeypatch.setattr(activations, "registry", lambda: {"gelu": record})
    others.append(run_file(Variant("gelu"), RECIPE, corpus, tmp_path))
    assert len({path, *others}) == 5


def test_ctrl_c_leaves_the_state(corpus, tmp_path, batches):
    def interrupt(what: str, share: float) -> None:
        assert 0 <= share <= 1
        os.kill(os.getpid(), signal.SIGINT)

    asked = [(Variant(name), RECIPE) for name in ("gelu", "relu")]
    with pytest.raises(KeyboardInterrupt):
        Trainings(corpus, tmp_path, 1, interrupt).get(asked)
    assert len(batches) == 2  # the step that reported, and the one that asked
    done = Trainings(corpus, tmp_path, 1, lambda what, share: None).get(asked)
    assert len(done) == 2
    assert sorted(batches) == sorted([*range(24), *range(24)])


KILLED = """
import sys
from pathlib import Path
from models.corpus import Corpus
from models.train import Recipe, Variant
from studies.language_runs import Trainings
if __name__ == "__main__":
    recipe = Recipe(**{recipe})
    corpus = Corpus.read([Path(sys.argv[1])], cache=Path(sys.argv[2]))
    asked = [(Variant("gelu", seed=seed), recipe) for seed in range(40)]
    Trainings(corpus, Path(sys.argv[3]), 1, lambda what, share: None).get(asked)
"""


def test_what_was_finished_before_a_kill_is_kept(corpus, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED.replace("{recipe}", repr(dataclasses.asdict(RECIPE))))
    command = [sys.executable, str(script), str(Path(json.__file__).parent), str(corpus.cache), str(tmp_path / "kept")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + HANG_S
    while not list(tmp_path.glob("kept/runs/*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("kept/runs/*.json")}
    assert 0 < len(kept) < 40
    asked = [(Variant("gelu", seed=seed), RECIPE) for seed in range(len(kept) + 1)]
    assert len(Trainings(corpus, tmp_path / "kept", 1, lambda what, share: None).get(asked)) == len(kept) + 1
    assert all((tmp_path / "kept" / "runs" / name).stat().st_mtime_ns == then for name, then in kept.items())


def test_half_a_line_and_a_step_done_twice_do_no_harm(tmp_path):
    file = tmp_path / "curve.jsonl"
    file.write_text("[1, 3.5]\n[11, 3.0]\n[11, 3.0]\n[21, NaN]\n[24, 2.")
    assert language_runs._curve(file) == {1: 3.5, 11: 3.0}


def test_a_run_that_diverged_is_kept_as_that(corpus, tmp_path, batches):
    wild = dataclasses.replace(RECIPE, matrix_lr=1e30, vector_lr=1e30, clip_norm=1e30)
    trainings = Trainings(corpus, tmp_path, 1, lambda what, share: None)
    (run,) = trainings.get([(Variant("relu2"), wild)])
    assert run.bits_per_byte is None
    assert "diverged" in run.diverged
    assert run.last == math.inf
    done = len(batches)
    assert trainings.get([(Variant("relu2"), wild)]) == [run]
    assert len(batches) == done


def test_one_that_diverged_counts_as_done(corpus, tmp_path):
    """It ends at its first report of 24 steps; the bar comes to its end all the same."""
    wild = dataclasses.replace(RECIPE, matrix_lr=1e30, vector_lr=1e30, clip_norm=1e30)
    shares: list[float] = []
    trainings = Trainings(corpus, tmp_path, 1, lambda what, share: shares.append(share))
    trainings.expected_steps = 2 * RECIPE.steps
    trainings.get([(Variant("relu2"), wild)])
    trainings.get([(Variant("gelu"), RECIPE)])
    assert shares[-1] == 1


def test_a_damaged_run_says_what_to_do(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(language_runs.BadInput, match=r"run\.json cannot be read .* delete it"):
        read_run(tmp_path / "run.json")


def test_the_rate_falls_with_the_width():
    plan = Plan({"small": RECIPE, "wide": dataclasses.replace(RECIPE, dim=64)}, (1e-3,), 1)
    assert at_rate(plan, plan.sizes["small"], 4e-3).matrix_lr == 4e-3
    assert at_rate(plan, plan.sizes["wide"], 4e-3).matrix_lr == 1e-3


def test_the_rate_is_chosen_on_text_that_is_trained_on_and_a_seed_that_is_not_measured():
    run = Run(9.9, 1.0, tuple((step, 5.0 - step) for step in range(1, 11)))
    assert run.last == pytest.approx((5.0 - 9 + 5.0 - 10) / 2)  # the last fifth, not what is held out
    for plan in (language.QUICK, language.FULL):
        assert len(plan.sizes) >= 2
        assert plan.seeds >= 3
        assert language_runs.TUNING_SEED not in range(plan.first_seed, plan.first_seed + plan.seeds)


# --- all together ----------------------------------------------------------------------------------------------------


def test_a_finding_of_tiny_trainings(corpus, tmp_path):
    """Four activations, two sizes, two seeds: figures, tables and charts fit together, and can be written and read."""
    names = ["relu", "sigmoid", "gelu", "geglu"]
    plan = Plan({"a": RECIPE, "b": dataclasses.replace(RECIPE, layers=2)}, (3e-3, 6e-3), 2, first_seed=OTHER_SEED)
    shares: list[float] = []
    trainings = Trainings(corpus, tmp_path, 1, lambda what, share: shares.append(share))
    found = language.study(names, plan, trainings)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    tuned = found.tables[-1].rows
    assert len(list((tmp_path / "runs").iterdir())) == sum(map(tunings, tuned)) + 4 * 2 * 2
    assert max(map(tunings, tuned)) > 2  # of two rates the better one is an outermost: further ones are trained
    again = language.study(names, plan, trainings)
    assert again == found
    text = store.to_json(store.record(language.CLAIM, found, True, 2, 1.0, 24))
    record = store.from_json(text)
    assert "--quick --seeds 2 --steps 24" in document.page(record)
    assert found.sentence.endswith(" 2 seeds say little of the spread.")
    assert found.tables[0].note.endswith("a difference that is none, not 5 %.")
    assert document.drawings(record)
    chosen = dataclasses.replace(RECIPE, matrix_lr=float(tuned[names.index("relu")][-2]))
    bits = [read_run(run_file(Variant("relu", seed=OTHER_SEED + n), chosen, corpus, tmp_path)) for n in range(2)]
    mean = record.finding.data["bits_per_byte"]["relu"]
    assert mean["mean"] == pytest.approx(sum(run.bits_per_byte for run in bits) / 2, rel=1e-5)
    assert mean["seeds"] == 2
    assert record.finding.data["digests"] == {name: activations.get(name).digest for name in names}


def test_other_steps_are_another_run():
    """A record stands for what was asked: with other steps the study is run anew."""
    size = made(CLAIMED)
    found = Finding(*judge([size]), size.figures(), {})
    record = store.record(language.CLAIM, found, True, 3, 1.0, 500)
    asked = {"quick": True, "seeds": 3, "steps": 500}
    assert cli._same(record, "language", **asked)
    assert not any(cli._same(record, "language", **asked | other) for other in ({"steps": None}, {"steps": 60}))


def tunings(row: Sequence[Cell]) -> int:
    """Of a row of the tuning table, as many as were tried."""
    return sum(cell is not None for cell in row[1:-2])


def test_reports_of_two_processes_carry_their_rate(corpus, tmp_path):
    """Two workers: the bar tells trainings of one activation apart, and the runs are those of one worker."""
    seen: set[str] = set()
    asked = [(Variant("gelu"), dataclasses.replace(RECIPE, matrix_lr=rate)) for rate in (3e-3, 6e-3)]
    trainings = Trainings(corpus, tmp_path / "two", 2, lambda what, share: seen.add(what.partition(":")[0]))
    together = trainings.get(asked)
    one = Trainings(corpus, tmp_path / "one", 1, lambda what, share: None).get(asked)
    assert seen == {f"gelu, 1 x 16, rate {rate}, 24 steps" for rate in ("0.003", "0.006")}
    assert [run.bits_per_byte for run in together] == pytest.approx([run.bits_per_byte for run in one], rel=1e-4)


def test_sigmoid_is_behind_relu_and_relu_behind_what_the_claim_says_it_is(tmp_path_factory, tmp_path):
    """The claim's first part, at the quick study's smaller size, from seeds that nobody picked."""
    plan = dataclasses.replace(language.QUICK, seeds=2, rates=(6e-3,), first_seed=OTHER_SEED)
    recipe = plan.sizes["1 x 64"]
    corpus = plan.corpus(Corpus.read(cache=tmp_path_factory.getbasetemp() / "language"))
    trainings = Trainings(corpus, tmp_path, 1, lambda what, share: None)
    found = language_runs.train_plan(
        ["sigmoid", "relu", "gelu"], dataclasses.replace(plan, sizes={"1 x 64": recipe}), trainings
    )
    size = Size("1 x 64", found.runs["1 x 64"])
    assert size.means["sigmoid"] > size.means["relu"] + 0.05
    assert size.state(("sigmoid", "relu")) == "shown"


def test_progress_keeps_its_shape():
    """train_run renames reports; a new field of Progress would be lost without this."""
    assert [field.name for field in dataclasses.fields(Progress)] == ["name", "step", "loss", "bits_per_byte"]
