"""docs/studies cannot go stale: each page, drawing and the index against its record, each record against the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from models.activations import BUILT_IN, registry
from studies import document, slope, store
from studies.catalogue import NAMES, claim
from studies.study import Chart

FOLDER = Path(__file__).parent.parent / "docs" / "studies"
KEPT = [name for name in NAMES if store.path_of(FOLDER, name).is_file()]
REMEDY = "is stale; run: make docs"
# Coordinates are written to 6 digits; another processor's sums may differ in the last of them.
COORDINATE = 0.02  # points of 1/72 inch
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


@pytest.fixture(scope="module", params=KEPT)
def record(request):
    return store.read(store.path_of(FOLDER, request.param))


def same_drawing(one: str, other: str) -> bool:
    """Whether two SVGs draw the same: their text is the same, and their numbers to COORDINATE.

    matplotlib names clip paths and markers by a hash of their coordinates, which is left out.
    """
    one, other = (re.sub(r'(?<=["#])[mp][0-9a-f]{10}', "", text) for text in (one, other))
    if NUMBER.sub("", one) != NUMBER.sub("", other):
        return False
    numbers = (map(float, NUMBER.findall(text)) for text in (one, other))
    return all(abs(a - b) <= COORDINATE for a, b in zip(*numbers, strict=True))


def test_every_study_has_its_claim_and_number():
    for number, name in enumerate(NAMES, start=1):
        found = claim(name)
        assert (found.number, found.name) == (number, name)
        assert found.title
        assert found.source
        assert found.refuted_by


def test_every_claim_has_a_page():
    assert list(NAMES) == KEPT, f"run: actuary study {' '.join(name for name in NAMES if name not in KEPT)}"


def test_a_record_is_of_the_claim_as_the_code_has_it(record):
    again = f"run: actuary study {record.claim.name} --again"
    assert record.claim == claim(record.claim.name), f"the claim has changed; {again}"


def test_a_page_is_its_record_s(record):
    path = FOLDER / f"{record.claim.name}.md"
    assert path.read_text(encoding="utf-8") == document.page(record), f"{path} {REMEDY}"


def test_drawings_are_their_record_s(record):
    for name, content in document.drawings(record).items():
        assert same_drawing((FOLDER / name).read_text(), content.decode()), f"{FOLDER / name} {REMEDY}"


def test_the_index_is_the_records():
    records = document.records(FOLDER)
    assert (FOLDER / document.INDEX).read_text(encoding="utf-8") == document.index(records), f"the index {REMEDY}"


def test_nothing_else_is_there():
    expected = {document.INDEX}
    for each in document.records(FOLDER):
        name = each.claim.name
        expected |= {f"{name}.json", f"{name}.md"} | {document.file_of(each, chart) for chart in each.finding.charts}
    assert {path.name for path in FOLDER.iterdir()} == expected


def test_a_record_says_nothing_of_activations_that_the_registry_has_not(record):
    for name, digest in record.finding.data.get("digests", {}).items():
        again = f"run: actuary study {record.claim.name} --again"
        assert name in registry(), f"there is no activation {name!r} any more; {again}"
        assert registry()[name].digest == digest, f"{name!r} has another formula; {again}"


def test_a_claim_that_did_not_reproduce_says_so_in_its_title_line(record):
    title = document.page(record).splitlines()[0]
    verdict = record.finding.verdict
    assert title.endswith(f"({verdict})") == (verdict != "holds")


def test_records_are_small(record):
    assert store.path_of(FOLDER, record.claim.name).stat().st_size < 150_000


def test_slope_s_table_and_curves_are_what_the_registry_computes():
    """Every figure, cell and point, to the digits that are kept."""
    kept, fresh = store.read(store.path_of(FOLDER, "slope")).finding, slope.finding()
    assert set(kept.data["digests"]) == {each.name for each in BUILT_IN}, REMEDY
    for ours, theirs in zip(kept.tables, fresh.tables, strict=True):
        for row, other in zip(ours.rows, theirs.rows, strict=True):
            assert row[0] == other[0]
            assert row[1:] == pytest.approx(other[1:], rel=1e-5, abs=1e-9), f"{row[0]} {REMEDY}"
    for ours, theirs in zip(kept.charts, fresh.charts, strict=True):
        assert isinstance(ours, Chart)
        assert ours.name == theirs.name
        for line, other in zip(ours.lines, theirs.lines, strict=True):
            assert line.name == other.name
            assert list(line.x) == pytest.approx(list(other.x))
            assert list(line.y) == pytest.approx(list(other.y), rel=1e-4, abs=1e-9), f"{line.name} {REMEDY}"


def test_a_drawing_of_other_numbers_is_another():
    drawn = document.drawings(store.read(store.path_of(FOLDER, "slope")))
    one, other = (drawn[name].decode() for name in ("slope-squashing.svg", "slope-squashing-slope.svg"))
    assert same_drawing(one, one)
    assert not same_drawing(one, other)
    moved = re.sub(r"(?<=L )(\d+\.\d+)", lambda found: f"{float(found[1]) + 1:.6f}", one, count=1)
    assert moved != one
    assert not same_drawing(one, moved)
