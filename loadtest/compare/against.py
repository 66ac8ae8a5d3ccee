"""Two stored comparisons, arm by arm: what an arm cost over its baseline then, and what it costs now.

A ratio of p50 is taken within each round of each run, so that what slows a machine for minutes cancels, and estimated
as the verdict does. The two runs have no round in common: their estimates differ by what Welch's test allows for ("The
generalization of 'Student's' problem", 1947), corrected over the arms. What would make that meaningless is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from actuary import BadInput
from loadtest.compare import statistics
from loadtest.compare.design import AGAIN
from loadtest.compare.sequential import Look
from loadtest.compare.statistics import LEAST_ROUNDS, Estimate, Judged
from loadtest.compare.store import Run
from loadtest.compare.words import digests, facts_of, interval, medians, name_of
from loadtest.page import ms

MACHINE = ("cpu", "cores")  # the host's name changes with every container, and a kernel's number is a note
LOAD = ("rate", "users", "arrivals")


def compare(new: Run, old: Run, *, margin: float, alpha: float, other_bundles: bool = False) -> dict[str, Any]:
    """{"baseline", "fit", "aa", "arms": [{"model", "outcome", "then", "now", "p50"}], ...}; p50 is now over then."""
    common = [arm for arm in _arms(new) if arm in _arms(old)]
    reasons = _refusals(new, old, common, other_bundles)
    if reasons:
        raise BadInput("these two runs cannot be compared: " + "; ".join(reasons))
    baseline = new.run["design"]["baseline"]
    now, then = _estimates(new, common), _estimates(old, common)
    changes = {arm: _change(now[arm], then[arm]) for arm in now}
    judged = statistics.step_down(changes, [Look(min(each.rounds for each in changes.values()), 1.0)], alpha)
    again = judged[baseline + AGAIN]
    return {
        "baseline": baseline,
        "fit": statistics.fit(again.interval, margin),
        "aa": _ratio(again),
        "arms": [
            {
                "model": arm,
                "outcome": statistics.outcome(judged[arm].interval, margin),
                "then": _ratio(Judged(then[arm], alpha, alpha)),
                "now": _ratio(Judged(now[arm], alpha, alpha)),
                "p50": _ratio(judged[arm]),
            }
            for arm in now
            if arm != baseline + AGAIN
        ],
        "baseline_p50_ms": {"then": _p50(old, baseline), "now": _p50(new, baseline)},
        "margin": margin,
        "alpha": alpha,
        "started": {"then": old.run["started"], "now": new.run["started"]},
        "not_in_both": [arm for arm in {**_arms(new), **_arms(old)} if arm not in common],
        "notes": [
            *_unfit({"then": then[baseline + AGAIN], "now": now[baseline + AGAIN]}, margin, alpha),
            *_notes(new, old, common),
        ],
    }


def _unfit(again: Mapping[str, Estimate], margin: float, alpha: float) -> list[str]:
    """Of each run by itself, the A/A arm over the baseline."""
    return [
        f"the machine was not fit {when}: the baseline against itself came out at {interval(_ratio(judged))}"
        for when, estimate in again.items()
        if not statistics.fit((judged := Judged(estimate, alpha, alpha)).interval, margin)
    ]


def _estimates(run: Run, arms: Sequence[str]) -> dict[str, Estimate]:
    """Of each arm but the baseline, over it."""
    baseline, counted = run.run["design"]["baseline"], statistics.whole_rounds(run.blocks)
    found = {
        arm: statistics.estimate(
            statistics.pairs(counted, statistics.PRIMARY, baseline, arm), run.run["design"]["seed"]
        )
        for arm in arms
        if arm != baseline
    }
    return {arm: estimate for arm, estimate in found.items() if estimate}


def _change(now: Estimate, then: Estimate) -> Estimate:
    """Of two runs that share no round. `rounds` less 1 are Welch and Satterthwaite's degrees of freedom."""
    error = math.hypot(now.error, then.error)
    parts = sum(each.error**4 / (each.rounds - 1) for each in (now, then))
    rounds = 1 + int(error**4 / parts) if parts else now.rounds
    return Estimate(now.log_ratio - then.log_ratio, error, rounds)


def _ratio(judged: Judged) -> dict[str, float]:
    low, high = judged.interval
    return {"ratio": math.exp(judged.estimate.log_ratio), "low": math.exp(low), "high": math.exp(high)}


def _arms(run: Run) -> dict[str, Mapping[str, Any]]:
    return {arm["arm"]: arm["facts"] or {} for arm in run.run["arms"]}


def _refusals(new: Run, old: Run, common: list[str], other_bundles: bool) -> list[str]:
    said = [*_differ("machine", new, old, MACHINE), *_differ("design", new, old, LOAD, "load")]
    said += _differ("workload", new, old, sorted({**new.run["workload"], **old.run["workload"]}))
    if new.run["own_server"] != old.run["own_server"] or (
        not new.run["own_server"] and new.run["url"] != old.run["url"]
    ):
        said.append(f"other server: {_server(old)} then, {_server(new)} now; nothing says that they run on one machine")
    then, now = old.run["design"]["baseline"], new.run["design"]["baseline"]
    if then != now:
        said.append(f"other baseline: {then} then, {now} now; each ratio is over its own run's baseline")
    elif set(common) <= {now, now + AGAIN}:
        said.append(f"they have no arm in common but the baseline {now}")
    providers = [arm for arm in common if _arms(new)[arm].get("provider") != _arms(old)[arm].get("provider")]
    said += [f"other provider of {', '.join(providers)}"] if providers else []
    others = _other_bundles(new, old, common)
    if others and not other_bundles:
        said.append(
            f"other bundles under the same name: {', '.join(others)}; say --other-bundles if that is what you compare"
        )
    for run, when in ((old, "then"), (new, "now")):
        rounds = statistics.whole_rounds(run.blocks)["round"].n_unique()
        if rounds < LEAST_ROUNDS:
            said.append(f"{rounds} rounds without a void block {when}; it takes {LEAST_ROUNDS}")
    return said


def _differ(part: str, new: Run, old: Run, fields: tuple[str, ...] | list[str], name: str = "") -> list[str]:
    pairs = {field: (old.run[part].get(field), new.run[part].get(field)) for field in fields}
    told = [f"{field} {then} then, {now} now" for field, (then, now) in pairs.items() if then != now]
    return [f"other {name or part}: {', '.join(told)}"] if told else []


def _server(run: Run) -> str:
    return "a server of its own" if run.run["own_server"] else str(run.run["url"])


def _other_bundles(new: Run, old: Run, common: list[str]) -> list[str]:
    now, then = facts_of(new.run), facts_of(old.run)
    return [arm for arm in common if arm in now and digests(now[arm]) != digests(then[arm])]


def _notes(new: Run, old: Run, common: list[str]) -> list[str]:
    """What differs and may be the point."""
    said = []
    others = _other_bundles(new, old, common)
    if others:
        said.append(f"other bundles than then: {', '.join(others)}")
        baseline = new.run["design"]["baseline"]
        if baseline in others:
            said.append(f"the baseline {baseline} is another bundle too, so every ratio changes with it")
    if any(not digests(facts) for run in (new, old) for facts in facts_of(run.run).values()):
        said.append("a server that told no sha256 of its bundles: whether they are the same is not known")
    now, then = new.run["versions"], old.run["versions"]
    changed = [
        f"{name} {then.get(name)} → {now.get(name)}" for name in {**then, **now} if then.get(name) != now.get(name)
    ]
    said += [f"other versions: {', '.join(changed)}"] if changed else []
    for part, field in (("machine", "host"), ("machine", "system"), ("design", "block_s"), ("design", "settle_s")):
        before, after = old.run[part].get(field), new.run[part].get(field)
        said += [f"other {field}: {before} then, {after} now"] if before != after else []
    return said


def _p50(run: Run, arm: str) -> float | None:
    return medians(run.blocks, ["p50_ms"]).get(arm, {}).get("p50_ms")


def said(found: Mapping[str, Any]) -> str:
    """What the section says above its figure."""
    baseline, p50 = found["baseline"], found["baseline_p50_ms"]
    words = (
        f"What each arm's p50 over {baseline}'s was on {_day(found['started']['then'])} and is on "
        f"{_day(found['started']['now'])}, with intervals that hold together at {(1 - found['alpha']) * 100:g} %; to "
        f"the right is slower than it was. {baseline} itself went from {ms(p50['then'])} to {ms(p50['now'])} ms, which "
        "may be the machine and is in none of these. "
    )
    words += (
        ""
        if found["fit"]
        else (f"Do not trust them: {name_of(baseline + AGAIN)} differs between the runs by {interval(found['aa'])}. ")
    )
    if found["not_in_both"]:
        words += f"Only in one of the runs: {', '.join(found['not_in_both'])}. "
    return (words + " ".join(f"{note[0].upper()}{note[1:]}." for note in found["notes"])).strip()


def _day(started: str) -> str:
    return started.replace("T", " ").replace("+00:00", " UTC")
