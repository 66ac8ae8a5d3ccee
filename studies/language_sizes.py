"""What came out of the trainings at one size, part by part of the claim, and the verdict over all sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean

from studies.language_runs import Run
from studies.ranking import Noise, differences, noise
from studies.study import Figure, Verdict

REFERENCE = "gelu"
# (behind, ahead), as the claim has it.
ORDER = (
    ("sigmoid", "relu"),
    ("relu", "gelu"),
    ("relu", "silu"),
    ("relu", "reglu"),
    ("gelu", "geglu"),
    ("silu", "swiglu"),
)
# Held-out log-perplexity at 65,536 and 524,288 steps: Shazeer 2020, table 1. Their Swish has beta = 1.
SHAZEER = {
    "relu": (1.997, 1.677), "gelu": (1.983, 1.679), "silu": (1.994, 1.683), "glu": (1.982, 1.663),
    "bilinear": (1.960, 1.648), "geglu": (1.942, 1.633), "swiglu": (1.944, 1.636), "reglu": (1.953, 1.645),
}  # fmt: skip
# Early and final loss of 223M parameters: Narang et al. 2021. Their LiGLU is bilinear.
NARANG = {
    "relu": (2.182, 1.838), "gelu": (2.179, 1.838), "silu": (2.186, 1.847), "elu": (2.270, 1.932),
    "selu": (2.315, 1.948), "glu": (2.174, 1.814), "geglu": (2.130, 1.792), "reglu": (2.145, 1.803),
    "swiglu": (2.127, 1.789), "bilinear": (2.149, 1.798), "sigmoid": (2.291, 1.867), "softplus": (2.207, 1.850),
}  # fmt: skip
PUBLISHED = {
    "Shazeer 2020": (("65,536 steps", "524,288 steps"), SHAZEER),
    "Narang et al. 2021": (("early loss", "final loss"), NARANG),
}


class Size:
    """What came out at one size: the activations that ended, each with a figure a seed."""

    def __init__(self, name: str, runs: Mapping[str, Sequence[Run]]) -> None:
        self.name, self.runs = name, runs
        self.diverged = {each: [run.diverged for run in of if run.diverged] for each, of in runs.items()}
        self.values = {
            each: [run.bits_per_byte for run in of if run.bits_per_byte is not None]
            for each, of in runs.items()
            if not self.diverged[each]
        }
        self.noise = noise(self.values) if self.values else Noise({}, math.nan, 0, 1)
        self.means = {each: mean(of) for each, of in self.values.items()}
        others = [each for each in self.values if each != REFERENCE and REFERENCE in self.values]
        found = differences(self.values, [(each, REFERENCE) for each in others], self.noise)
        self.over = dict(zip(others, found, strict=True))  # above the reference
        pairs = [pair for pair in ORDER if set(pair) <= set(self.values)]
        self.pairs = dict(zip(pairs, differences(self.values, pairs, self.noise), strict=True))

    def state(self, pair: tuple[str, str]) -> str:
        """shown, against, within noise: of one part of the claim. One that diverged is behind one that did not."""
        behind, ahead = pair
        if self.diverged[behind] or self.diverged[ahead]:
            return "shown" if self.diverged[behind] and not self.diverged[ahead] else "against"
        difference = self.pairs[pair]
        if not difference.real:
            return "within noise"
        return "shown" if difference.value > 0 else "against"

    def figures(self) -> list[Figure]:
        return [self._figure(pair) for pair in ORDER if set(pair) <= set(self.runs)]

    def _figure(self, pair: tuple[str, str]) -> Figure:
        behind, ahead = pair
        state = self.state(pair)
        published = "behind"
        if behind in NARANG and ahead in NARANG:
            published += f"; {NARANG[behind][1] - NARANG[ahead][1]:+.3f} nats per token in Narang et al."
        if pair in self.pairs:
            measured = self.pairs[pair].text
            if state != "shown":
                measured += ": within noise" if state == "within noise" else ": ahead"
        else:
            measured = f"{' and '.join(each for each in pair if self.diverged[each])} diverged"
        agrees = {"shown": True, "against": False}.get(state)  # within noise is evidence neither way
        return Figure(f"{behind} over {ahead} at {self.name}, bits per byte", measured, published, agrees)


def judge(sizes: Sequence[Size]) -> tuple[Verdict, str]:
    """holds: every part is shown at every size. did not reproduce: sigmoid is not behind relu at some size."""
    parts = [pair for pair in ORDER if all(set(pair) <= set(size.runs) for size in sizes)]
    states = {pair: [size.state(pair) for size in sizes] for pair in parts}
    said = {
        "shown at every size": [pair for pair, each in states.items() if set(each) == {"shown"}],
        "not at every size": [p for p, each in states.items() if "shown" in each and set(each) != {"shown"}],
        "within noise": [pair for pair, each in states.items() if set(each) == {"within noise"}],
    }
    said["the other way round"] = [p for p, each in states.items() if "shown" not in each and "against" in each]
    words = [
        f"{what}: {', '.join(f'{behind} behind {ahead}' for behind, ahead in pairs)}"
        for what, pairs in said.items()
        if pairs
    ]
    sentence = "; ".join(words)
    sentence = sentence[:1].upper() + sentence[1:] + "."
    if any(not size.noise.known for size in sizes):
        sentence = "The spread is not known, and nothing can be told apart. " + sentence
    if set(states[ORDER[0]]) != {"shown"}:
        return "did not reproduce", sentence
    return ("holds" if len(said["shown at every size"]) == len(parts) else "holds in part"), sentence
