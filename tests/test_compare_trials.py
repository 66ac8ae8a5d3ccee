"""How comparisons are repeated and counted, and how long a block is where nobody says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from stand_in import standing_in

from actuary import ActuaryError
from export.bundle import read_manifest
from loadtest.compare import trials
from loadtest.compare.arms import Arms
from loadtest.compare.options import ANSWERS, BLOCK_S, SETTLE_S, block_of
from loadtest.compare.workloads import Bodies, Request, Workload


def _said(outcome: str, low: float | None, high: float | None, fit: bool = True) -> dict[str, Any]:
    return {"outcome": outcome, "fit": fit, "p50": {"ratio": 1.05, "low": low, "high": high}}


def test_what_comparisons_say_is_counted() -> None:
    results = [
        _said("slower", 1.03, 1.07),
        _said("faster", 0.90, 0.97),
        _said("equivalent", 0.99, 1.01),
        _said("inconclusive", 0.98, 1.09),
        _said("inconclusive", None, None),
        _said("inconclusive", 1.06, 1.30, fit=False),
    ]
    told = trials.counted(results, 1.05)
    assert told == {
        **{"runs": 6, "flagged": 3, "unfit": 1},
        **{"slower": 1, "faster": 1, "equivalent": 1, "inconclusive": 3},
        **{"truth": 1.05, "holding": 3},
    }
    assert trials.counted([{**results[0], "p50": None}], 1.05)["holding"] == 0
    assert "holding" not in trials.counted(results, None)


def test_a_killed_series_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, deadly = [], 2

    def compare(folder: Path, arguments: tuple[str, ...]) -> None:
        if len(made) == deadly:
            raise ActuaryError("killed")
        made.append((folder.name, arguments))
        folder.mkdir(parents=True, exist_ok=True)
        arm = {"differs": False, "smallest_seen": 0.01, "sentence": "b", **_said("equivalent", 0.99, 1.01)}
        whole = {"arms": [arm], "fit": True, "aa": {}, "rounds": 9, "void_rounds": 0, "looks": 1, "ended": "settled"}
        (folder / "result.json").write_text(json.dumps(whole))
        (folder / "busy.json").write_text('{"took_s": 1}')

    monkeypatch.setattr(trials, "_compare", compare)
    arguments = [str(tmp_path), "--runs", "3", "--", "--variants", "a,b"]
    with pytest.raises(ActuaryError, match="killed"):
        trials.run.main(arguments, standalone_mode=False)
    # The second was stopped: it has a result of what it had, and is to go on.
    stopped = tmp_path / "01" / "result.json"
    stopped.write_text(stopped.read_text().replace("settled", "interrupted"))
    made.clear()
    deadly = -1
    (tmp_path / "00" / "busy.json").unlink()  # killed between the two files
    trials.run.main(arguments, standalone_mode=False)
    seeded = [(name, ("--variants", "a,b", "--seed", str(int(name)))) for name in ("00", "01", "02")]
    assert made == seeded
    figures = json.loads((tmp_path / "trials.json").read_text())
    assert (figures["runs"], figures["equivalent"], len(figures["trials"])) == (3, 3, 3)


def test_a_twin_is_the_same_bundle_under_another_name(bundles: Path, tmp_path: Path) -> None:
    trials.twin.main([str(bundles / "gelu"), str(tmp_path)], standalone_mode=False)
    one, other = (read_manifest(tmp_path / name) for name in ("gelu", "gelu-twin"))
    assert (one.name, other.name) == ("gelu", "gelu-twin")
    assert one.files == other.files
    assert (tmp_path / "gelu" / "model.onnx").read_bytes() == (tmp_path / "gelu-twin" / "model.onnx").read_bytes()


def test_turns_ask_a_b_b_a_and_their_ratio_is_of_medians() -> None:
    with standing_in(["fast", "slow"]) as server:
        workload = Workload("test", tuple(Request((9,) * size) for size in range(20, 30)), vocab_size=1000)
        turns = trials.in_turns(server.url, Bodies(workload, ["fast", "slow"]), ["fast", "slow"], 0.2)
        models = [model for model, _ in server.seen]
    legs = [models[at : at + trials.LEG] for at in range(0, len(models), trials.LEG)]
    assert [set(leg) for leg in legs] == [{"fast"}, {"slow"}, {"slow"}, {"fast"}] * len(turns)
    assert len({str(prompt) for _, prompt in server.seen}) > 0.95 * len(models), "prompts begin anew"
    assert all(len(a) == len(b) == 2 * (trials.LEG - trials.SETTLING) for a, b in turns)

    # Both slow down alike as time goes on, and one answer in four hangs.
    steady = [([10.0 + at, 10.0 + at], [10.5 + 1.05 * at, 900.0 if at % 2 else 10.5 + 1.05 * at]) for at in range(300)]
    found = trials.ratio_of(steady)
    assert math.isclose(found["ratio"], 1.05, rel_tol=0.05)
    assert found["standard_error"] < 0.02
    with pytest.raises(ActuaryError, match="too few"):
        trials.ratio_of(steady[:29])


@pytest.mark.parametrize(
    ("asked", "answer_s", "gap_s", "block_s", "settle_s"),
    [
        ({}, 0.002, 0.0, BLOCK_S, SETTLE_S),
        ({}, 0.3, 0.0, ANSWERS * 0.3, 0.6),
        ({}, 0.002, 0.1, ANSWERS * 0.1, SETTLE_S),
        ({"block": 2.0}, 0.3, 0.0, 2.0, 0.6),
        ({"settle": 0.0}, 0.3, 0.0, ANSWERS * 0.3, 0.0),
    ],
)
def test_a_block_is_long_enough_for_some_answers(
    asked: dict[str, float], answer_s: float, gap_s: float, block_s: float, settle_s: float
) -> None:
    assert block_of({"block": None, "settle": None, **asked}, answer_s, gap_s) == pytest.approx((block_s, settle_s))


def test_how_long_an_answer_takes_is_asked_of_the_slowest_variant() -> None:
    facts = {"context": 64, "vocab_size": 1000}
    with standing_in(["fast", "slow"]) as server:
        arms = Arms(server.url, {"fast": facts, "slow": facts})
        answer_s = arms.answer_s(Workload("test", (Request((1, 2)),), vocab_size=10))
        asked = [model for model, _ in server.seen]
    assert answer_s > 0.0097, "the stand-in's slow variant sleeps 9.7 ms"
    assert asked.count("fast") == asked.count("slow") > 2
