"""Rows of answered requests, kept for a while: an outcome then has its exact log loss, and nothing of a prompt is.

log loss = log(sum over V of exp(logit)) - logit of the token that came, in nats
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.errors import ApiError, Invalid, shown
from service.variant import Variant

MOST_KEPT = 1 << 17  # exposures, those of which an outcome came too; 200 bytes each without their rows


@dataclass
class Kept:
    """An exposure that an outcome may come to."""

    experiment: str
    experiment_id: int
    variant: Variant
    key_hash: int | None
    rows: list[NDArray[np.float32] | None]  # logits [V] after each prompt; None once its outcome came

    @property
    def bytes(self) -> int:
        return sum(row.nbytes for row in self.rows if row is not None)


class KeptRows:
    """By exposure id, the newest of them. On the event loop alone."""

    def __init__(self, most_bytes: int, process: str) -> None:
        """`process` is what the ids begin with that this process gives."""
        self._most_bytes = most_bytes
        self._process = process
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._bytes = 0

    def keep(self, id_: str, kept: Kept) -> None:
        self._kept[id_] = kept
        self._bytes += kept.bytes
        while self._bytes > self._most_bytes or len(self._kept) > MOST_KEPT:
            self._bytes -= self._kept.popitem(last=False)[1].bytes

    def find(self, experiment: str, id_: str, prompt_index: int) -> tuple[Kept, NDArray[np.float32]]:
        """The exposure and its row; ApiError where there is none, or its outcome came already."""
        kept = self._kept.get(id_)
        if kept is None and id_.startswith(self._process):
            raise ApiError(
                "gone",
                f"the rows of exposure {shown(id_)} are gone: the newest {self._most_bytes >> 20} MB of them are kept; "
                "report sooner, or serve with more --outcome-mb",
                "id",
            )
        if kept is None:
            raise ApiError(
                "not_found",
                f"exposure {shown(id_)} is none of this process since it started; report to the process that "
                "answered, with the x-exposure-id of its answer",
                "id",
            )
        if kept.experiment != experiment:
            raise Invalid(f"exposure {id_} is of the experiment {kept.experiment!r}, not {shown(experiment)}", "id")
        if not 0 <= prompt_index < len(kept.rows):
            raise Invalid(
                f"prompt_index {shown(prompt_index)}: exposure {id_} had {len(kept.rows)} prompts, from 0",
                "prompt_index",
            )
        row = kept.rows[prompt_index]
        if row is None:
            raise ApiError("conflict", f"an outcome of exposure {id_} came already; each counts once", "id")
        return kept, row

    def spend(self, kept: Kept, prompt_index: int) -> None:
        """Its outcome is taken."""
        row = kept.rows[prompt_index]
        assert row is not None
        self._bytes -= row.nbytes
        kept.rows[prompt_index] = None


def log_loss(logits: NDArray[np.float32], token: int) -> float:
    """logits [V] -> nats, in float64. 0.4 ms at V = 50257."""
    exact = logits.astype(np.float64)
    most = exact.max()
    return float(most + np.log(np.exp(exact - most).sum()) - exact[token])
