"""A row of logits [V] to the next token's id, as a completion asks for it: `Sampler.choose`, once per token.

    repetition, frequency and presence penalty -> logit_bias -> no end before min_tokens
    -> temperature -> min_p -> top_k -> top_p -> draw

The order is vLLM's. Temperature 0 takes the highest logit, of equal ones the smallest id. At V = 50257 a draw takes
0.07 ms, with top_k and top_p 0.25 ms and 1 ms at most, since nothing is sorted but the few weights at the edge (numpy
2.4.6, one core).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]  # [V]

# Beyond these a temperature changes nothing in float32, and 1 / temperature would not be finite.
COLDEST, HOTTEST = 1e-30, 1e30
SMALL_BLOCK = 64  # weights whose highest is looked for at once, to find the highest of all
MAX_BIN_BITS = 14
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
    ends: Collection[int] = ()  # ids that may not be chosen before `min_tokens` others were
    min_tokens: int = 0

    @functools.cached_property
    def bias(self) -> tuple[NDArray[np.int64], Floats]:
        """Ids and what to add; once for all choices, since 1000 ids take 0.1 ms."""
        count = len(self.logit_bias)
        return np.fromiter(self.logit_bias, np.int64, count), np.fromiter(self.logit_bias.values(), np.float32, count)

    @functools.cached_property
    def end_ids(self) -> NDArray[np.int64]:
        return np.fromiter(self.ends, np.int64, len(self.ends))


class Sampler:
    """The choices of one completion, one after the other.

    Args:
        prompt: its ids, which count for the repetition penalty.
        random: draws; the same generator on the same logits chooses the same tokens.
    """

    def __init__(
        self,
        sampling: Sampling,
        vocab_size: int,
        prompt: Sequence[int],
        random: np.random.Generator,
    ) -> None:
        self._sampling = sampling
        self._random = random
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
        asked = self._sampling
        bias_ids, bias = asked.bias
        too_early = self._chosen < asked.min_tokens and len(asked.ends) > 0
        if not (self._repeats or self._counts or len(bias) or too_early):
            return logits
        logits = logits.copy()
        if self._repeats:
            seen = logits[self._seen]
            self._clip(seen, np.where(seen > 0, seen / asked.repetition_penalty, seen * asked.repetition_penalty))
            logits[self._seen] = seen
        if self._counts:
            logits -= asked.frequency_penalty * self._times + asked.presence_penalty * (self._times > 0)
        logits[bias_ids] += bias
        if too_early:
            logits[asked.end_ids] = -np.inf
        return logits

    @staticmethod
    def _clip(out: Floats, values: NDArray[np.floating]) -> None:
        """Finite, whatever the penalty."""
        np.clip(values, -1e30, 1e30, out=out)

    def _drawn(self, logits: Floats) -> int:
        asked = self._sampling
        with np.errstate(over="ignore"):  # exp(-inf) is 0
            weights = np.exp((logits - logits.max()) / np.float32(min(max(asked.temperature, COLDEST), HOTTEST)))
        ids: NDArray[np.intp] | None = None  # of `weights`; None: all
        for keep in self._keeps(len(weights)):
            kept = keep(weights)
            ids, weights = kept if ids is None else ids[kept], weights[kept]
        index = _draw(weights, self._random.random())
        return index if ids is None else int(ids[index])

    def _keeps(self, vocab_size: int) -> Iterator[Callable[[Floats], NDArray[np.intp]]]:
        """What is to be kept of weights whose highest is 1, one after the other."""
        asked = self._sampling
        if asked.min_p:
            yield lambda weights: np.flatnonzero(weights >= asked.min_p)
        if 0 < asked.top_k < vocab_size:
            yield lambda weights: most(weights, asked.top_k)
        if asked.top_p < 1:
            yield lambda weights: nucleus(weights, asked.top_p)


def most(weights: Floats, count: int) -> NDArray[np.intp]:
    """The indices of the `count` highest weights, rising; of equal ones, the first."""
    # So many blocks hold a weight as high as the count-th of the blocks' highest; what is lower is not among the most.
    tops = np.maximum.reduceat(weights, np.arange(0, len(weights), SMALL_BLOCK))
    if count <= len(tops):
        near = np.flatnonzero(weights >= np.partition(tops, len(tops) - count)[len(tops) - count])
        return near[_highest(weights[near], count, None)]
    return _highest(weights, count, None)


def nucleus(weights: Floats, share: float) -> NDArray[np.intp]:
    """The indices of the fewest highest weights that have this share of the sum, rising; of equal ones, the first."""
    goal = share * float(weights.sum(dtype=np.float64))
    # All that are lower than this amount together to less than the rest of the sum; but for rounding.
    near = np.flatnonzero(weights >= 0.999 * (1 - share) * float(weights.mean()))
    if 2 * len(near) > len(weights):
        return _highest(weights, goal, weights)
    return near[_highest(weights[near], goal, weights[near])]


def _highest(weights: Floats, goal: float, amounts: Floats | None) -> NDArray[np.intp]:
    """The indices of the fewest of the highest weights that amount to `goal`, rising; of equal ones, the first.

    Args:
        weights: 0 to 1.
        amounts: what each amounts to; None: 1 each.
    """
    # The bits of floats that are not negative are ordered as they are: the upper ones of those that differ number the
    # bins of a histogram, about as many as there are weights.
    bits = weights.view(np.uint32)
    bits = bits - bits.min()
    bins = (bits >> max(0, int(bits.max()).bit_length() - min(MAX_BIN_BITS, len(weights).bit_length()))).astype(np.intp)
    falling = np.cumsum(np.bincount(bins, amounts)[::-1])
    at = min(int(np.searchsorted(falling, goal)), len(falling) - 1)
    edge = len(falling) - 1 - at
    inside = np.flatnonzero(bins == edge)
    inside = inside[np.argsort(-weights[inside], kind="stable")]
    ones = np.ones(len(inside)) if amounts is None else amounts[inside]
    reached = np.cumsum(ones, dtype=np.float64) + (falling[at - 1] if at else 0)
    kept = bins > edge
    kept[inside[: int(np.searchsorted(reached, goal)) + 1]] = True
    return np.flatnonzero(kept)


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
