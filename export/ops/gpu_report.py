"""The result of `make gpu-check` as a section for docs/log.md."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
FIGURES = {
    "gb_per_s": ".0f",
    "share_of_copy": ".2f",
    "of_unfused": ".2f",
}  # of the fused kernel, and how each is printed


def in_a_line(error: BaseException) -> str:
    """What failed, short enough for a table's cell."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"


def markdown(result: Row) -> str:
    """What was found, what failed, and the figures as tables; whatever part is not there is left out."""
    about = result["found"]
    machine = "; ".join(f"{key} {_cell(str(value))}" for key, value in about.items() if key != "date" and value)
    lines = [f"## {about.get('date', '')}: on a CUDA device", "", f"`make gpu-check`. {machine}.", ""]
    if result["failures"]:
        lines += ["Failed:", "", *(f"- {_cell(failure)}" for failure in result["failures"]), ""]
    for note in result["notes"]:
        lines += [f"{note}.", ""]
    if result["build"]:
        lines += [f"Library: {result['build']}.", ""]
    lines += _kernels(result["kernels"]) if result["kernels"] else []
    lines += _speed(result["speed"]) if result["speed"] else []
    lines += _models(result["models"]) if result["models"] else []
    if result["tests"]:
        lines += [f"`pytest -m gpu`: {_cell(' '.join(result['tests']['said'][-1:]))}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def _kernels(rows: list[Row]) -> list[str]:
    types = list(dict.fromkeys(row["type"] for row in rows))
    cells = {(row["activation"], row["type"]): "missed" if row["failed"] else f"{row['ratio']:.2f}" for row in rows}
    names = dict.fromkeys(row["activation"] for row in rows)
    within = sum(not row["failed"] for row in rows)
    return [
        f"**Kernels against float64**: the worst error over its bound; {within} of {len(rows)} within it.",
        "",
        *_table(["activation", *types], [[name, *(cells.get((name, type), "-") for type in types)] for name in names]),
    ]


def _speed(rows: list[Row]) -> list[str]:
    ways = ("fused", "unfused", "eager", "compiled", "copy")
    header = ["activation", "type", "M", "H", *ways, "fused GB/s", "of the copy's bandwidth", "fused / unfused"]
    body = []
    for row in rows:
        fused = row.get("fused", {})
        body.append([
            row["activation"], row["type"], str(row["rows"]), str(row["hidden"]),
            *(_spread(row.get(way), "us") for way in ways),
            *(f"{fused[key]:{f}}" if key in fused else "-" for key, f in FIGURES.items()),
        ])  # fmt: skip
    reasons = dict.fromkeys(f"{row['type']}, {way}: {why}" for row in rows for way, why in row["failed"].items())
    return [
        f"**One activation**: us, medians of {rows[0]['rounds']} interleaved samples (quartiles), launches included.",
        "",
        *_table(header, body),
        *(f"- does not run: {_cell(reason)}" for reason in reasons),
        *([""] if reasons else []),
    ]


def _models(rows: list[Row]) -> list[str]:
    ways = ("fused", "unfused", "eager", "compiled")
    body = []
    for row in rows:
        name = [row["model"], f"{row['precision']}, {row['flavor']}"]
        if not row.get("latency"):
            why = row.get("skipped") or next(iter(row["failed"].values()), "")
            body.append([*name, "-", _cell(why), *("-" for _ in ways)])
        error = f"{row['max_rel_fused']:.1e} ({row['bound']:.1e})" if "max_rel_fused" in row else "-"
        for latency in row.get("latency", []):
            size = f"{latency['batch']} x {latency['tokens']}"
            body.append([*name, size, error, *(_spread(latency.get(way), "ms") for way in ways)])
    return [
        "**Whole models**, random weights: error of the logits over their row's largest, against torch in float64 "
        "(allowed), and ms an answer (quartiles).",
        "",
        *_table(["model", "export", "batch x tokens", "error", *ways], body),
    ]


def _spread(measured: Row | None, unit: str) -> str:
    if measured is None:
        return "-"
    low, high = measured[f"quartiles_{unit}"]
    return f"{_figure(measured[unit])} ({_figure(low)} to {_figure(high)})"


def _figure(value: float) -> str:
    """To three figures, and in full where it has more."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _table(header: list[str], body: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *body)]
    return [lines[0], "|" + "---|" * len(header), *lines[1:], ""]


def _cell(text: str) -> str:
    """On one line, and without what would end a table's cell."""
    return " ".join(text.split()).replace("|", "/")
