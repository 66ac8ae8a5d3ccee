"""What is compared, in which order, and what each visit sends: seeds in, orders and planned times out.

    Design    arms, blocks, load           -> the order of the arms in each round
    Visit     one block of load on one arm -> planned times and which requests, the same for every arm of a round

A visit is `settle_s` discarded seconds and then a block of `block_s`. A round visits each arm once. Over a cycle of
rounds every arm stands at every position equally often, and follows every other arm equally often (Williams,
"Experimental designs balanced for the estimation of residual effects of treatments", 1949), so that neither a drift of
the machine nor what one arm leaves behind for the next is taken for the cost of an arm.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from actuary import BadInput
from loadtest.compare.workloads import Workload

Arrivals = Literal["constant", "poisson", "recorded"]
AGAIN = ":again"  # behind the baseline's name: the A/A arm


def williams(count: int) -> list[tuple[int, ...]]:
    """Rows over 0..count-1 in which each stands in each place equally often, and follows each other one equally often.

    An even count needs `count` rows; an odd one as many again, each the other way round.
    """
    zigzag = [0] + [step for i in range(1, count // 2 + 1) for step in (i, count - i)]
    first = list(dict.fromkeys(zigzag))  # of an even count, its middle comes twice
    rows = [tuple((place + shift) % count for place in first) for shift in range(count)]
    return rows if count % 2 == 0 else rows + [row[::-1] for row in rows]


@dataclass(frozen=True)
class Design:
    """One comparison, with every number already checked."""

    models: tuple[str, ...]  # the baseline first
    minutes: float  # of load at most, settling included
    block_s: float
    settle_s: float
    users: int
    rate: float | None  # planned arrivals per second of the arm that is visited; None is a closed loop
    arrivals: Arrivals
    seed: int
    timeout_s: float
    equivalence: float  # a ratio closer to 1 than this is no difference in practice
    fixed: bool  # all of the minutes, whatever is seen on the way

    @property
    def baseline(self) -> str:
        return self.models[0]

    @property
    def arms(self) -> tuple[str, ...]:
        """The models, and the baseline a second time."""
        return (*self.models, self.baseline + AGAIN)

    def model_of(self, arm: str) -> str:
        return self.baseline if arm == self.baseline + AGAIN else arm

    @property
    def cycle(self) -> int:
        """Rounds until the order is balanced."""
        return len(williams(len(self.arms)))

    @property
    def round_s(self) -> float:
        """Of load; the last answers and what stands between two visits come on top."""
        return len(self.arms) * (self.settle_s + self.block_s)

    @property
    def rounds(self) -> int:
        """As many as fit into the minutes, at least one."""
        return max(1, int(self.minutes * 60 / self.round_s))

    def order(self, number: int) -> tuple[str, ...]:
        """The arms of one round, in the order of their visits. Each cycle deals its labels and rows anew."""
        cycle, row = divmod(number, self.cycle)
        deal = random.Random(f"{self.seed}/{cycle}")
        arms = deal.sample(self.arms, len(self.arms))
        rows = deal.sample(williams(len(arms)), self.cycle)
        return tuple(arms[label] for label in rows[row])

    def next_window(self, number: int, workload: Workload) -> int:
        """The number of the visits of the next round, where `number` comes after that of the last one's.

        Of recorded traffic, a window in whose block nothing is due is left out: there is nothing to measure in it.
        """
        if self.arrivals != "recorded":
            return number
        load_s = self.settle_s + self.block_s
        coming = workload.due(number * load_s, math.inf)
        for when_s, _ in itertools.islice(coming, 2 * len(workload.requests)):  # that is two replays
            window = int(when_s / load_s)
            if when_s - window * load_s >= self.settle_s:
                return max(number, window)
        raise BadInput(
            f"nothing of the recorded traffic is due in a block of {self.block_s:g} s, only in the {self.settle_s:g} s "
            "before it, which are discarded; lower --settle, or raise --block"
        )

    def visit(self, number: int, arm: str) -> Visit:
        """The visit of `arm` in one round; of recorded traffic, in one window."""
        return Visit(
            self.model_of(arm),
            number,
            self.settle_s,
            self.block_s,
            self.users,
            self.rate,
            self.arrivals,
            self.seed,
        )

    def as_json(self) -> dict[str, Any]:
        derived = {"baseline": self.baseline, "arms": list(self.arms), "cycle": self.cycle, "rounds": self.rounds}
        return {**asdict(self), "models": list(self.models), **derived}

    @classmethod
    def of_json(cls, fields: dict[str, Any]) -> Design:
        kept = {name: fields[name] for name in cls.__dataclass_fields__}
        return cls(**{**kept, "models": tuple(kept["models"])})


@dataclass(frozen=True)
class Visit:
    """What every Locust process is told of one block of load."""

    model: str
    round: int  # seeds what is sent, so that all arms of a round get the same; of recorded traffic, the window's
    settle_s: float
    block_s: float
    users: int  # of all processes together
    rate: float | None
    arrivals: Arrivals
    seed: int

    @property
    def load_s(self) -> float:
        return self.settle_s + self.block_s

    @property
    def open(self) -> bool:
        """Whether requests leave at planned times, whether or not others were answered."""
        return self.rate is not None or self.arrivals == "recorded"

    def requests(self, count: int, user: int) -> Iterator[int]:
        """Endless numbers of requests for one user of a closed loop, each of `count` once before any again."""
        order = random.Random(f"{self.seed}/{self.round}/{user}")
        return itertools.chain.from_iterable(order.sample(range(count), count) for _ in itertools.repeat(None))

    def planned(self, workload: Workload) -> Iterator[tuple[float, int]]:
        """(when, number of the request) of each planned arrival, of all processes together."""
        if self.arrivals == "recorded":
            begin_s = self.round * self.load_s
            return ((when_s - begin_s, number) for when_s, number in workload.due(begin_s, begin_s + self.load_s))
        times = itertools.takewhile(lambda when_s: when_s < self.load_s, self._times())
        return zip(times, self.requests(len(workload.requests), -1), strict=False)

    def _times(self) -> Iterator[float]:
        assert self.rate is not None
        if self.arrivals == "constant":  # not added up: twenty times 0.05 by addition is more than 1
            return (number / self.rate for number in itertools.count())
        gaps = random.Random(f"{self.seed}/{self.round}")
        return itertools.accumulate(gaps.expovariate(self.rate) for _ in itertools.repeat(None))
