"""Writes what the documents repeat: of the code the README's table of activations, of their records the studies' pages.

Run by `make docs`; tests/test_docs.py fails when a document is stale.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from export.catalogue import describe
from models.activations import BUILT_IN
from studies import document, slope, store

README = Path(__file__).parent.parent / "README.md"
STUDIES = Path(__file__).parent / "studies"


def activation_table() -> str:
    """Our own records as Markdown; those of installed packages are theirs to document."""
    rows = ["| name | kind | formula | paper |", "|---|---|---|---|"]
    for record in BUILT_IN:
        info = describe(record)
        kind = info.kind.replace("_", " ") + "".join(f", {name} from {start:g}" for name, start in info.learned.items())
        rows.append(f"| {info.name} | {kind} | `{info.formula}` | {info.paper} |")
    return "\n".join(rows)


def readme() -> str:
    """The README with its generated block written anew."""
    text = README.read_text(encoding="utf-8")
    block = re.compile(r"(<!-- activations: [^\n]*-->\n).*?(<!-- /activations -->)", re.DOTALL)
    if not block.search(text):
        raise ValueError(f"{README} has lost its activations block; put its two comment lines back")
    return block.sub(lambda match: f"{match[1]}\n{activation_table()}\n\n{match[2]}", text)


def refresh_slope(folder: Path) -> None:
    """Claim 1 is computed from the registry alone, not measured: another activation is another line of its charts."""
    path = store.path_of(folder, slope.CLAIM.name)
    if path.is_file():
        kept = store.read(path)
        finding = slope.finding()
        fresh = dataclasses.replace(kept, claim=slope.CLAIM, finding=finding)
        if store.to_json(fresh) != store.to_json(kept):
            document.remove_drawings(folder, kept, fresh)
            store.write(folder, fresh)


if __name__ == "__main__":
    README.write_text(readme(), encoding="utf-8")
    refresh_slope(STUDIES)
    for record in document.records(STUDIES):
        document.write(STUDIES, record)
    document.write_index(STUDIES)
