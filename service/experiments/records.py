"""What is written of a request, as the recorder carries it; plain, so that nothing here needs a database."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Exposed(NamedTuple):
    """A request that an experiment answered. 0.6 us to make, a frozen dataclass 2."""

    id: str
    experiment_id: int
    variant: str
    key_hash: int | None
    at: float
    route: str
    status: int
    prompt_tokens: int
    generated_tokens: int
    prepare_ms: float
    queue_ms: float
    infer_ms: float
    total_ms: float


@dataclass(frozen=True)
class Outcome:
    """The token that really came."""

    exposure_id: str
    prompt_index: int
    experiment_id: int
    variant: str
    key_hash: int | None
    token: int
    log_loss: float
    at: float


@dataclass(frozen=True)
class Shadowed:
    """What a shadow would have said to the first prompt of a request that `against` answered."""

    exposure_id: str
    experiment_id: int
    variant: str
    against: str
    key_hash: int | None
    same_top: int
    kl: float
    sum_abs_dp: float
    infer_ms: float
    real_infer_ms: float
    at: float


Record = Exposed | Outcome | Shadowed
