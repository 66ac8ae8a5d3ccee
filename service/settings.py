"""Everything that a person can set about the service, one field each.

The options of `actuary serve` and the ACTUARY_* environment variables are derived from these
fields (service/cli.py); nothing here reads the environment.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from actuary import cores


class Settings(BaseModel):
    """Checked once, when the application is made; times in seconds, sizes in bytes or tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bundles: Path = Field(Path("artifacts/bundles"), description="Folder of bundles, or one bundle.")
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for every interface.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    provider: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="auto: CUDA where it loads, else CPU. cuda: refuse to start without it, and bundles that it would "
        "leave to the CPU in part.",
    )
    ops: Path = Field(
        Path("artifacts/ops"), description="Folder of `actuary ops build`; without it all runs unfused, and slower."
    )
    threads: int = Field(
        default_factory=cores, ge=1, le=1024, description="Cores that all variants together compute on."
    )
    max_queue: int = Field(1024, ge=1, description="Prompts that may wait; one more is answered 429.")
    max_prompts: int = Field(256, ge=1, description="Prompts times variants, or choices, of one request.")
    max_queue_tokens: int = Field(
        1 << 19, ge=1, description="Tokens, of prompts and to be generated, that may wait or be in work."
    )
    max_queue_mb: int = Field(1024, ge=1, description="Memory of the probabilities that may wait or be in work.")
    # At 14M parameters on one core: 330 ms for 1000 tokens by 16, 217 by 64, 193 by 256, 191 by 512, 217 by 2048.
    max_batch_tokens: int = Field(512, ge=1, description="Tokens that are computed together.")
    cache_mb: int = Field(
        256,
        ge=0,
        description="Memory for keys and values, of all variants together, at least a context of each; 0: none, so "
        "that generating computes all again for each token.",
    )
    max_entries: int = Field(
        65_536,
        ge=1,
        description="Tokens listed in an answer of several results, one may list all; log-probabilities listed in a "
        "completion; ids of /detokenize.",
    )
    max_text_bytes: int = Field(
        1 << 18, ge=1, description="Longest text of /tokenize, which takes 100 bytes of memory per byte."
    )
    max_body_bytes: int = Field(1 << 20, ge=1, description="Largest request body.")
    timeout_s: float = Field(30.0, gt=0, le=3600, description="Longest wait for a request's first rows, then 408.")
    experiments: Path | None = Field(
        None, description="JSON or TOML file of experiments, {NAME: {arms: {VARIANT: WEIGHT}, baseline, ...}}."
    )
    database: str = Field(
        "artifacts/experiments.db",
        description="Where experiments are kept: a SQLite file, or postgresql://USER:PASSWORD@HOST/NAME.",
    )
    # With an outcome for every third and one shadow each, in SQLite: 290 MB a million.
    max_exposures: int = Field(
        1_000_000,
        ge=0,
        le=1 << 40,
        description="Answers of experiments, the newest, that the database keeps one by one; those that leave it stay "
        "in the sums that verdicts are made of. Of processes that share it the least counts.",
    )
    key_header: str = Field(
        "x-actuary-key",
        pattern=r"^[A-Za-z0-9-]{1,64}$",
        description="Header whose value always gets the same arm of an experiment.",
    )
    outcome_mb: int = Field(
        64, ge=0, description="Memory of the newest answers' logits, for the log loss of what really came."
    )
    compare: Path | None = Field(
        None,
        description="Folder of comparisons, which the page then lists; and whoever reaches the port may start one, "
        "which puts load on this machine.",
    )
    studies: Path = Field(
        Path("docs/studies"), description="Folder of what `actuary study` found, which the page shows."
    )
    access_log: bool = Field(False, description="Log each request on standard error.")

    @model_validator(mode="after")
    def _a_request_fits_the_queue(self) -> Settings:
        if self.max_prompts > self.max_queue:
            raise ValueError(
                f"max_prompts {self.max_prompts} is more than max_queue {self.max_queue}: such a request "
                "could never be served; raise max_queue or lower max_prompts"
            )
        return self
