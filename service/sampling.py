"""A row of logits [V] to the next token's id, as a completion asks for it: `Sampler.choose`, once per token.

    repetition, frequency and presence penalty -> logit_bias -> no end before min_tokens
    -> temperature -> min_p -> top_k -> top_p -> draw

The order is vLLM's. Temperature 0 takes the highest logit, of equal ones the smallest id. At V = 50257 a draw takes
0.1 ms, with top_k and top_p 0.4 ms, since nothing is sorted but the few weights at the edge (numpy 2.4.6).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]  # [V]

# Beyond these a temperature changes nothing in float32, and 1 / temperature would not be finite.
COLDEST, HOTTEST = 1e-30, 1e30
BLOCK = 256  # weights that are summed at once, to find the drawn one: a running sum over all takes five times as long


@dataclass(frozen=True)
class Sampling:
    """How to choose; the defaults are the model's own distribution."""

    temperature: float = 1.0
    min_p: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    repetition_penalty: float = 1.0  # Keskar et al. 2019, CTRL: divides positive logits, multiplies negative ones
    frequency_penalty: float = 0.0  # times how often the token was generated
    presence_penalty: float = 0.0  # once where it was generated at all
    logit_bias: Mapping[int, float] = field(default_factory=dict)


class Sampler:
    """The choices of one completion, one after the other.

    Args:
        prompt: its ids, which count for the repetition penalty.
        ends: ids that may not be chosen before `min_tokens` others were.
        random: draws; the same generator on the same logits chooses the same tokens.
    """

    def __init__(
        self,
        sampling: Sampling,
        vocab_size: int,
        prompt: Sequence[int],
        ends: Collection[int],
        min_tokens: int,
        random: np.random.Generator,
    ) -> None:
        self._sampling = sampling
        self._random = random
        self._ends = np.array(sorted(ends), np.int64)
        self._min_tokens = min_tokens
        self._bias_ids = np.fromiter(sampling.logit_bias, np.int64, len(sampling.logit_bias))
        self._bias = np.fromiter(sampling.logit_bias.values(), np.float32, len(sampling.logit_bias))
        self._repeats = sampling.repetition_penalty != 1
        self._counts = sampling.frequency_penalty != 0 or sampling.presence_penalty != 0
        self._chosen = 0
        if self._repeats:
            self._seen = np.zeros(vocab_size, np.bool_)
            self._seen[list(prompt)] = True
        if self._counts:
            self._times = np.zeros(vocab_size, np.float32)

    def choose(self, logits: Floats) -> int:
        """The next token's id. `logits` [V] stay as they are."""
        logits = self._adjusted(logits)
        id_ = int(logits.argmax()) if self._sampling.temperature == 0 else self._drawn(logits)
        self._chosen += 1
        if self._repeats:
            self._seen[id_] = True
        if self._counts:
            self._times[id_] += 1
        return id_

    def _adjusted(self, logits: Floats) -> Floats:
        asked, too_early = self._sampling, self._chosen < self._min_tokens and len(self._ends) > 0
        if not (self._repeats or self._counts or len(self._bias) or too_early):
            return logits
        logits = logits.copy()
        if self._repeats:
            seen = logits[self._seen]
            self._clip(seen, np.where(seen > 0, seen / asked.repetition_penalty, seen * asked.repetition_penalty))
            logits[self._seen] = seen
        if self._counts:
            logits -= asked.frequency_penalty * self._times + asked.presence_penalty * (self._times > 0)
        logits[self._bias_ids] += self._bias
        if too_early:
            logits[self._ends] = -np.inf
        return logits

    @staticmethod
    def _clip(out: Floats, values: NDArray[np.floating]) -> None:
        """Finite, whatever the penalty."""
        np.clip(values, -1e30, 1e30, out=out)

    def _drawn(self, logits: Floats) -> int:
        asked = self._sampling
        weights = np.exp((logits - logits.max()) / np.float32(min(max(asked.temperature, COLDEST), HOTTEST)))
        if asked.min_p:
            weights[weights < asked.min_p] = 0  # the highest is 1
        if 0 < asked.top_k < len(weights):
            weights = highest(weights, asked.top_k, None)
        if asked.top_p < 1:
            weights = highest(weights, asked.top_p * float(weights.sum(dtype=np.float64)), weights)
        return _draw(weights, self._random.random())


def highest(weights: Floats, goal: float, amounts: Floats | None) -> Floats:
    """`weights` [V] with 0 for all but the fewest of the highest that amount to `goal`; of equal ones, the first.

    Args:
        weights: 0 to 1.
        amounts: [V], what each amounts to; None: 1 each.
    """
    # The bits of floats that are not negative are ordered as they are: their upper half is a bin of a histogram.
    bins = (weights.view(np.uint32) >> 16).astype(np.intp)
    falling = np.cumsum(np.bincount(bins, amounts)[::-1])
    at = min(int(np.searchsorted(falling, goal)), len(falling) - 1)
    edge = len(falling) - 1 - at
    inside = np.flatnonzero(bins == edge)
    inside = inside[np.argsort(-weights[inside], kind="stable")]
    ones = np.ones(len(inside)) if amounts is None else amounts[inside]
    reached = np.cumsum(ones, dtype=np.float64) + (falling[at - 1] if at else 0)
    inside = inside[: int(np.searchsorted(reached, goal)) + 1]
    kept = np.where(bins > edge, weights, np.float32(0))
    kept[inside] = weights[inside]
    return kept


def _draw(weights: Floats, uniform: float) -> int:
    """The index at `uniform`, 0 to 1, of the running sum of `weights`; never one whose weight is 0."""
    blocks = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), BLOCK), dtype=np.float64))
    at = uniform * blocks[-1]
    block = int(np.searchsorted(blocks, at, side="right"))
    inside = np.cumsum(weights[block * BLOCK : (block + 1) * BLOCK], dtype=np.float64)
    index = block * BLOCK + int(np.searchsorted(inside, at - (blocks[block - 1] if block else 0), side="right"))
    if index < len(weights) and weights[index] > 0:
        return index
    return int(np.flatnonzero(weights[: index + 1])[-1])  # the last digit of a sum, rounded up
