"""Two stored comparisons, arm by arm: what an arm cost over its baseline then, and what it costs now.

A ratio of p50 is taken within each round of each run, so that what slows a machine for minutes cancels. The two runs
have no round in common: their log ratios are compared by Welch's test for unequal spreads (B. L. Welch, "The
generalization of 'Student's' problem", 1947). What would make that meaningless is refused, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
from scipy import stats

from actuary import BadInput
from loadtest.compare.store import Run
from loadtest.compare.words import AGAIN, digests, facts_of, interval, medians, ms, name_of, whole

MACHINE = ("cpu", "cores")  # the host's name changes with every container, and a kernel's number is a note
LOAD = ("rate", "users", "arrivals")
FEW = 3  # rounds; of two, a spread is a guess


def compare(new: Run, old: Run, *, margin: float, alpha: float, other_bundles: bool = False) -> dict[str, Any]:
    """{"baseline", "fit", "aa", "arms": [{"model", "outcome", "then", "now", "p50"}], ...}; p50 is now over then."""
    common = [arm for arm in _arms(new) if arm in _arms(old)]
    reasons = _refusals(new, old, common, other_bundles)
    if reasons:
        raise BadInput("these two runs cannot be compared: " + "; ".join(reasons))
    baseline = new.run["design"]["baseline"]
    arms = [arm for arm in common if arm != baseline]
    level = 1 - alpha / max(1, len(arms) - 1)  # Bonferroni's, over the arms that are not the check
    rows = {arm: _change(new, old, arm, baseline, 1 - alpha if arm.endswith(AGAIN) else level) for arm in arms}
    aa = rows.pop(baseline + AGAIN)["p50"]
    p50 = {"then": _p50(old, baseline), "now": _p50(new, baseline)}
    return {
        "baseline": baseline,
        "fit": aa["low"] <= 1 <= aa["high"],
        "aa": aa,
        "arms": [{"model": arm, "outcome": outcome(row["p50"], margin), **row} for arm, row in rows.items()],
        "baseline_p50_ms": p50,
        "margin": margin,
        "alpha": alpha,
        "started": {"then": old.run["started"], "now": new.run["started"]},
        "not_in_both": [arm for arm in {**_arms(new), **_arms(old)} if arm not in common],
        "notes": _notes(new, old, common),
    }


def outcome(change: Mapping[str, float], margin: float) -> str:
    """By where the interval lies: beyond 1, within the margin, or neither."""
    if 1 / (1 + margin) < change["low"] and change["high"] < 1 + margin:
        return "equivalent"
    if change["low"] > 1:
        return "slower"
    return "faster" if change["high"] < 1 else "inconclusive"


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
        rounds = whole(run.blocks)["round"].n_unique()
        if rounds < FEW:
            said.append(f"{rounds} rounds without a void block {when}; at least {FEW} are needed for a spread")
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


def _change(new: Run, old: Run, arm: str, baseline: str, level: float) -> dict[str, Any]:
    now, then = _log_ratios(new, arm, baseline), _log_ratios(old, arm, baseline)
    interval_of = stats.ttest_ind(now, then, equal_var=False).confidence_interval(level)
    return {
        "then": _ratio(then, level),
        "now": _ratio(now, level),
        "p50": {
            "ratio": math.exp(now.mean() - then.mean()),
            "low": math.exp(interval_of.low),
            "high": math.exp(interval_of.high),
        },
    }


def _log_ratios(run: Run, arm: str, baseline: str) -> np.ndarray:
    """[rounds]: log of the arm's p50 over the baseline's, of rounds without a void block."""
    blocks = whole(run.blocks).pivot("arm", index="round", values="p50_ms").sort("round")
    return np.asarray(blocks.select((pl.col(arm) / pl.col(baseline)).log()).to_series().drop_nulls().to_numpy())


def _ratio(logs: np.ndarray, level: float) -> dict[str, float]:
    around = stats.ttest_1samp(logs, 0.0).confidence_interval(level)
    return {"ratio": math.exp(logs.mean()), "low": math.exp(around.low), "high": math.exp(around.high)}


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
