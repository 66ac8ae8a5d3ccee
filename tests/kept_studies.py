"""Studies as `actuary study` leaves them, small, with made-up numbers: what the service and its page read."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

EPOCHS = [0, 100, 400, 800]
ROWS, COLUMNS = 6, 8


def moons_data() -> dict[str, Any]:
    """Snapshots in which model and epoch can be told apart by the first byte: 10 x model + epoch's place."""

    def grid(model: int, epoch: int) -> str:
        across = bytes(255 * column // (COLUMNS - 1) for column in range(COLUMNS))
        return base64.b64encode(bytes([10 * model + epoch]) + (across * ROWS)[1:]).decode()

    models = {name: [grid(at, epoch) for epoch in range(len(EPOCHS))] for at, name in enumerate(("sigmoid", "relu"))}
    return {
        "snapshots": {
            "epochs": EPOCHS,
            "extent": [-2.0, 2.0, -1.5, 1.5],
            "size": [ROWS, COLUMNS],
            "models": models,
            "points": {"x": [-1.0, 0.5, 1.2], "y": [0.3, -0.8, 1.0], "label": [0, 1, 1]},
            "loss": {"sigmoid": [0.71, 0.5, 0.28, 0.27], "relu": [0.7, 0.3, 0.08, 0.025]},
            "accuracy": {"sigmoid": [0.5, 0.8, 0.87, 0.87], "relu": [0.5, 0.9, 0.96, 0.975]},
        }
    }


def line(name: str, x: list[Any], y: list[float | None], **more: Any) -> dict[str, Any]:
    return {"name": name, "x": x, "y": y, "low": None, "high": None, "dashed": False, **more}


def chart(name: str, title: str, lines: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    labels = {"x_label": "depth", "y_label": "gradient"}
    rest = {"kind": "lines", "log_x": False, "log_y": False, "note": ""}
    return {"type": "chart", "name": name, "title": title, **labels, "lines": lines, **rest, **more}


CHARTS = [
    chart(
        "by-depth",
        "First layer’s gradient by depth",
        [
            line("sigmoid", [2, 4, 8], [0.1, 0.01, 1e-4], low=[0.08, 0.007, 5e-5], high=[0.12, 0.013, 2e-4]),
            line("relu", [2, 4, 8], [0.2, 0.21, None], dashed=True),
        ],
        log_y=True,
        note="The band is the middle half of 20 seeds.",
    ),
    chart(
        "bars",
        "Bits per byte",
        [
            line(
                "held out",
                ["gelu", "relu", "sigmoid"],
                [1.98, 2.0, 2.21],
                low=[1.97, 1.99, 2.2],
                high=[1.99, 2.01, 2.22],
            )
        ],
        kind="bars",
        x_label="activation",
        y_label="bits per byte",
    ),
    chart("points", "Ours beside theirs", [line("rank", [1, 2, 3], [1, 3, 2])], kind="points"),
    {
        "type": "field",
        "name": "boundary",
        "title": "Where it decides",
        "x": [-1.0, 0.0, 1.0],
        "y": [-1.0, 1.0],
        "z": [[0.1, 0.4, 0.9], [0.2, 0.6, 0.8]],
        "points": {"upper": [[-0.5, 0.2], [0.4, 0.3]], "lower": [[0.7], [-0.2]]},
        "note": "",
    },
]


def study(number: int, name: str, verdict: str, **more: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "claim": {
            "number": number,
            "name": name,
            "title": f"The {name} study",
            "statement": f"What is claimed of {name}.",
            "source": "003, 004",
            "refuted_by": "A measurement that says otherwise.",
        },
        "verdict": verdict,
        "sentence": f"Of {name}, this was measured.",
        "figures": [
            {"what": "ratio of the gradients", "measured": "27", "published": "20", "agrees": True},
            {"what": "accuracy", "measured": "87 %", "published": "79 %", "agrees": False},
            {"what": "seeds", "measured": "20", "published": "", "agrees": None},
        ],
        "tables": [{"title": "By depth", "columns": ["depth", "norm"], "rows": [[2, 0.1], [4, None]], "note": "Mean."}],
        "charts": [],
        "settings": {"seeds": 5, "sizes": [2, 8, 8, 1], "optimizer": "Adam"},
        "data": {},
        "quick": False,
        "machine": "a machine",
        "date": "2026-11-22",
        "versions": {"torch": "2.13.0"},
        "seconds": 12.3,
        **more,
    }


def cost_data(digests: dict[str, str]) -> dict[str, Any]:
    """`ns` and `digests`, of made-up nanoseconds; relu's are the fewest, gelu's the most."""
    alone = {"relu": 0.2, "swiglu": 0.5, "gelu": 0.9}
    ns = {name: {"alone": {"fused": value, "unfused": 2 * value, "torch": 3 * value}} for name, value in alone.items()}
    return {"ns": ns, "digests": {name: digests[name] for name in alone if name in digests}}


def language_data(digests: dict[str, str]) -> dict[str, Any]:
    bits = {"gelu": (1.98, 0.004), "relu": (2.0, 0.005), "sigmoid": (2.21, 0.01)}
    found = {name: {"mean": mean, "sd": sd, "seeds": 3} for name, (mean, sd) in bits.items()}
    return {"bits_per_byte": found, "digests": {name: digests[name] for name in bits if name in digests}}


def keep(folder: Path, digests: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Writes four; gives them by name. `digests` are the formulas' of /v1/activations."""
    folder.mkdir(exist_ok=True)
    studies = [
        study(2, "vanishing", "holds", charts=CHARTS),
        study(4, "moons", "did not reproduce", data=moons_data(), quick=True),
        study(6, "language", "holds in part", data=language_data(digests)),
        study(9, "cost", "holds", data=cost_data(digests)),
    ]
    for each in studies:
        (folder / f"{each['claim']['name']}.json").write_text(json.dumps(each))
    return {each["claim"]["name"]: each for each in studies}
