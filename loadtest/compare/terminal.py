"""How a comparison goes, on standard error: rounds, the arm that is visited, and what is known of each so far."""

from __future__ import annotations

from types import TracebackType

import polars as pl
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from loadtest.compare.design import Design

# Drawing costs this machine's cores a millisecond; ten times a second, which is rich's default, is in the figures.
DRAWS_PER_S = 1


class Terminal:
    """A bar where there is a terminal, else a line for each finished cycle."""

    def __init__(self, design: Design, console: Console) -> None:
        self.design, self.console = design, console
        self.medians = ""
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            TextColumn("{task.fields[said]}", markup=False),
            console=console,
            transient=True,
            refresh_per_second=DRAWS_PER_S,
        )

    def __enter__(self) -> Terminal:
        self.progress.start()
        self.task = self.progress.add_task("starting", total=self.design.rounds, said="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def starting(self, what: str) -> None:
        self.progress.update(self.task, description=what)

    def visiting(self, number: int, position: int, arm: str) -> None:
        place = f"round {number + 1} of up to {self.design.rounds}, {position + 1}/{len(self.design.arms)}: {arm}"
        self.progress.update(self.task, description=place, completed=number, said=self.medians)

    def finished(self, number: int, blocks: pl.DataFrame) -> None:
        known = blocks.filter(pl.col("void") == "").group_by("arm").agg(pl.col("p50_ms").median())
        p50 = {arm: ms for arm, ms in known.iter_rows() if ms is not None}
        self.medians = "p50 ms " + " ".join(f"{arm} {p50[arm]:.2f}" for arm in self.design.arms if arm in p50)
        if not self.console.is_terminal and number % self.design.cycle == 0:
            self.say(f"{number} rounds: {self.medians}")

    def say(self, sentence: str) -> None:
        self.console.print(sentence, markup=False, highlight=False, soft_wrap=True)
