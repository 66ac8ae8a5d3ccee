"""The frame of the studies: names, records, drawings, pages, and `actuary study` from bad input to Ctrl-C."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import types
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from actuary import ActuaryError, BadInput
from models.activations import get
from studies import catalogue, document, drawing, store
from studies.cli import study
from studies.study import Chart, Claim, Field, Figure, Finding, Line, Table, of_few, verdict_of


def claim_of(name: str) -> Claim:
    return Claim(catalogue.NAMES.index(name) + 1, name, f"The title of {name}", "It is so.", "000", "it not being so.")


def finding_of(seeds: int | None = None, verdict: str = "holds") -> Finding:
    chart = Chart("all", "A chart", "x", "y", [Line("one", [1, 2, 3], [1, None, 2], [0, None, 1], [2, None, 3])])
    bars = Chart("bars", "Bars", "name", "y", [Line("one", ["a", "b"], [1.5, 2.5])], kind="bars")
    field = Field("plane", "A field", [0, 1], [0, 1, 2], [[0, 1], [0.5, 0.5], [1, 0]], {"points": ([0.5], [1.5])})
    return Finding(
        verdict=verdict,
        sentence="1 of 1.",
        figures=[Figure("what", "1.5", "2", False), Figure("other", "a|b")],
        settings={"seeds": seeds, "nested": {"a": [1, 2]}},
        tables=[Table("A table", ["name", "value"], [["a", 1.25], ["b", None]], "A note.")],
        charts=[chart, bars, field],
        data={"digests": {}},
    )


@pytest.fixture
def record() -> store.Record:
    return store.record(claim_of("zigzag"), finding_of(), quick=True, seeds=3, seconds=1.23)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> dict[str, list]:
    """Every study is a stand-in that notes its options; `made_up[name][:] = [error]` makes one raise."""
    calls: dict[str, list] = {"options": []} | {name: [] for name in catalogue.NAMES}

    def stand_in(name: str):
        def run(options):
            options.report("halfway", 0.5)
            calls["options"].append((name, options))
            if calls[name]:
                raise calls[name][0]
            charts = finding_of().charts if name == "zigzag" else ()  # the others are not worth a second of drawing
            return dataclasses.replace(finding_of(options.seeds), charts=charts)

        return types.SimpleNamespace(CLAIM=claim_of(name), run=run)

    modules = {name: stand_in(name) for name in catalogue.NAMES}
    monkeypatch.setattr(catalogue, "study", modules.__getitem__)
    return calls


def called(tmp_path: Path, *arguments: str):
    return CliRunner().invoke(study, [*arguments, "--out", str(tmp_path / "out"), "--kept", str(tmp_path / "kept")])


def ran(calls: dict[str, list]) -> list[str]:
    return [name for name, _ in calls["options"]]


# Names


def test_studies_come_once_and_in_the_claims_order():
    assert catalogue.chosen(["cost", "slope", "cost"]) == ["slope", "cost"]
    assert catalogue.chosen(["all"]) == catalogue.chosen(["cost", "all"]) == list(catalogue.NAMES)
    assert len(catalogue.NAMES) == 11


def test_an_unknown_study_lists_all_and_the_nearest():
    with pytest.raises(BadInput) as refused:
        catalogue.chosen(["slope", "zig-zag"])
    assert all(name in str(refused.value) for name in catalogue.NAMES)
    assert "did you mean 'zigzag'?" in str(refused.value)
    assert refused.value.exit_code == 2


def test_verdicts():
    assert verdict_of([True, True]) == "holds"
    assert verdict_of([True, False]) == "holds in part"
    assert verdict_of([False]) == "did not reproduce"


def test_few_seeds_say_so():
    assert of_few(1) == " One seed says nothing of the spread."
    assert of_few(3) == " 3 seeds say little of the spread."
    assert of_few(5) == ""


# Records


def test_a_record_comes_back_as_it_was(record, tmp_path):
    store.write(tmp_path, record)
    read = store.read(tmp_path / "zigzag.json")
    assert store.to_json(read) == store.to_json(record)
    assert read.claim == record.claim
    assert [type(chart) for chart in read.finding.charts] == [Chart, Chart, Field]
    assert read.finding.charts[0].lines[0].y == [1, None, 2]
    assert read.finding.charts[1].lines[0].x == ["a", "b"]
    assert read.finding.tables[0].rows == [["a", 1.25], ["b", None]]


def test_the_file_has_the_promised_shape(record):
    fields = json.loads(store.to_json(record))
    assert list(fields) == [
        "schema", "claim", "verdict", "sentence", "figures", "settings", "tables", "charts", "data", "quick", "seeds",
        "machine", "date", "versions", "seconds", "steps",
    ]  # fmt: skip
    assert [chart["type"] for chart in fields["charts"]] == ["chart", "chart", "field"]
    assert fields["claim"]["number"] == 3


def test_numbers_of_numpy_and_torch_are_kept_to_six_figures():
    import torch

    values = {"a": np.float32(1 / 3), "b": np.arange(2), "c": torch.tensor([2 / 3], dtype=torch.float64), "d": True}
    assert store.rounded(values) == {"a": 0.333333, "b": [0, 1], "c": [0.666667], "d": True}
    assert store.rounded((1234567.0, 1234567, 2.0, "1.23456789")) == [1234570.0, 1234567, 2, "1.23456789"]


def test_a_number_that_is_none_is_refused(record):
    broken = dataclasses.replace(record.finding, data={"x": float("nan")})
    with pytest.raises(ValueError, match="JSON compliant"):
        store.to_json(dataclasses.replace(record, finding=broken))


@pytest.mark.parametrize(
    "damage",
    ["", "[]", "{}", '{"schema": 2}', "\x00", "nonsense"],
)
def test_a_damaged_record_is_named_with_what_to_do(damage, tmp_path):
    path = tmp_path / "slope.json"
    path.write_text(damage)
    with pytest.raises(BadInput, match=r"slope\.json is not a study's record: .*; delete it, and run the study again"):
        store.read(path)


@pytest.mark.parametrize("field", ["verdict", "claim", "figures", "charts", "machine", "quick"])
def test_a_record_without_one_of_its_fields_is_refused(field, record, tmp_path):
    fields = json.loads(store.to_json(record))
    fields[field] = {"verdict": "maybe"}.get(field)
    path = tmp_path / "zigzag.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(BadInput, match=field):
        store.read(path)


# Drawings and pages


@pytest.mark.parametrize("form", ["svg", "png"])
def test_the_same_chart_gives_the_same_bytes(form):
    for chart in finding_of().charts:
        assert drawing.draw(chart, form) == drawing.draw(chart, form)


def test_a_drawing_has_its_words_and_a_white_ground_and_no_date():
    svg = drawing.draw(finding_of().charts[0], "svg").decode()
    ET.fromstring(svg)
    for word in ("A chart", ">one<", ">x<", ">y<", "#ffffff"):
        assert word in svg, word
    assert "<dc:date>" not in svg


def test_charts_of_every_kind_are_drawn():
    many = [Line(f"name_{n}", [1, 2, 4], [n, n + 1, None]) for n in range(25)]
    for chart in (
        Chart("a", "t", "x", "y", many),
        Chart("b", "t", "x", "y", many, kind="points", log_x=True),
        Chart("c", "t", "x", "y", [Line("", [1, 2], [0.1, 10], [0.05, 5], [0.2, 20])], log_x=True, log_y=True),
        Chart("d", "t", "x", "y", [Line(str(n), list("abcdefgh"), range(1, 9)) for n in range(3)], kind="bars"),
        Chart("e", "t", "x", "y", [Line("", ["a"], [1], [0.5], [2])], kind="bars", log_y=True),
        Chart("f", "t", "x", "y", [Line("nothing", [1, 2], [None, None])]),
    ):
        ET.fromstring(drawing.draw(chart, "svg"))


def test_a_point_s_own_name_stands_once_where_its_points_are():
    """b twice at one x, and once far away, where another a is too; a point without a figure has no name."""
    lines = [
        Line("ours", [1.0, 1.0, 1.1], [1, 2, None], names=["a", "b", "c"]),
        Line("theirs", [1.0, 100.0, 100.0], [3, 4, 5], names=["b", "b", "a"]),
        Line("bound", [1.0, 100.0], [5, 5], dashed=True),
    ]
    svg = drawing.draw(Chart("n", "t", "over", "up", lines, kind="points", log_x=True), "svg").decode()
    assert [svg.count(f">{name}<") for name in ("a", "b", "c", "ours", "theirs", "bound")] == [2, 2, 0, 1, 1, 1]


@given(st.lists(st.floats(0, 100), max_size=9))
def test_names_stand_apart_and_in_order(wanted):
    places = drawing.spread(sorted(wanted), 10, 300)
    assert all(later - earlier >= 10 - 1e-9 for earlier, later in itertools.pairwise(places))


def test_names_that_do_not_touch_stay_where_they_are():
    assert drawing.spread([10, 50, 90], 10, 100) == [10, 50, 90]
    assert drawing.spread([50, 50], 10, 100) == [45, 55]  # about their mean


@pytest.mark.parametrize("verdict", ["holds", "holds in part", "did not reproduce"])
def test_a_page_says_all_of_its_record(record, verdict):
    record = dataclasses.replace(record, finding=finding_of(3, verdict))
    page = document.page(record)
    title = page.splitlines()[0]
    assert title == "# The title of zigzag" + ("" if verdict == "holds" else f" ({verdict})")
    for part in ("It is so.", "it not being so.", f"**Verdict: {verdict}.** 1 of 1.", "A quick run", "A note.", "a\\|b",
                 "| what | 1.5 | 2 | no: did not reproduce |", "`actuary study zigzag --quick --seeds 3`",
                 "(zigzag-all.svg)", "(zigzag-plane.svg)", "| b |  |", "- nested:\n  - a: 1, 2\n",
                 record.machine):  # fmt: skip
        assert part in page, part


def test_the_index_lists_what_is_there_by_number(record, tmp_path):
    other = dataclasses.replace(record, claim=claim_of("slope"), quick=False)
    for each in (record, other):
        store.write(tmp_path, each)
    rows = document.index(document.records(tmp_path)).splitlines()[-2:]
    assert rows[0].startswith("| 1 | [The title of slope](slope.md) | **holds** |")
    assert rows[0].endswith("full |")
    assert rows[1].startswith("| 3 | [The title of zigzag](zigzag.md)")
    assert rows[1].endswith("quick |")


# The command


def test_a_study_writes_its_record_page_drawings_and_index(made_up, tmp_path):
    done = called(tmp_path, "zigzag", "--seeds", "7", "--steps", "5", "--quick", "--workers", "3", "--json")
    assert done.exit_code == 0, done.output
    out = tmp_path / "out"
    drawn = {f"zigzag-{name}.svg" for name in ("all", "bars", "plane")}
    assert {path.name for path in out.iterdir()} == {"README.md", "zigzag.json", "zigzag.md", *drawn}
    kept = tmp_path / "kept" / "zigzag"
    assert {path.name for path in kept.iterdir()} == {name.replace("svg", "png") for name in drawn}
    ((_, options),) = made_up["options"]
    assert (options.quick, options.seeds, options.steps, options.workers, options.kept) == (True, 7, 5, 3, kept)
    (printed,) = json.loads(done.stdout)
    assert printed == json.loads((out / "zigzag.json").read_text())
    assert "did not reproduce" in done.stderr  # of its first figure
    assert "holds: 1 of 1." in done.stderr


def test_what_is_done_with_the_same_settings_is_not_run_again(made_up, tmp_path):
    assert called(tmp_path, "slope").exit_code == 0
    (tmp_path / "out" / "slope.md").unlink()
    again = called(tmp_path, "slope", "cost")
    assert ran(made_up) == ["slope", "cost"]
    assert "slope: done on " in again.stderr
    assert "--again runs it anew" in again.stderr
    assert (tmp_path / "out" / "slope.md").is_file()  # what shows it is written all the same
    called(tmp_path, "slope", "--again")
    assert ran(made_up) == ["slope", "cost", "slope"]


@pytest.mark.parametrize("changed", [["--quick"], ["--seeds", "9"], ["--steps", "9"]])
def test_other_settings_run_it_again(made_up, tmp_path, changed):
    called(tmp_path, "slope")
    again = called(tmp_path, "slope", *changed)
    assert ran(made_up) == ["slope", "slope"]
    assert ("is replaced by a quick one" in again.stderr) == (changed == ["--quick"])


def test_what_was_measured_of_another_formula_is_run_again(made_up, tmp_path):
    called(tmp_path, "slope")
    path = tmp_path / "out" / "slope.json"
    fields = json.loads(path.read_text())
    for digests, times in (({"gelu": get("gelu").digest}, 1), ({"gelu": "0" * 12}, 2), ({"no_more": "0" * 12}, 3)):
        path.write_text(json.dumps({**fields, "data": {"digests": digests}}))
        called(tmp_path, "slope")
        assert ran(made_up) == ["slope"] * times


@pytest.mark.parametrize("field", ["machine", "claim"])
def test_another_machine_s_record_or_another_claim_is_run_again(made_up, tmp_path, field):
    called(tmp_path, "slope")
    path = tmp_path / "out" / "slope.json"
    fields = json.loads(path.read_text())
    fields[field] = "another" if field == "machine" else {**fields["claim"], "statement": "It was otherwise."}
    path.write_text(json.dumps(fields))
    called(tmp_path, "slope")
    assert ran(made_up) == ["slope", "slope"]


def test_all_goes_on_past_one_that_fails_and_names_it_at_the_end(made_up, tmp_path):
    made_up["zigzag"][:] = [ActuaryError("it would not")]
    made_up["head"][:] = [RuntimeError("a bug")]
    done = called(tmp_path, "all")
    assert ran(made_up) == list(catalogue.NAMES)
    assert isinstance(done.exception, ActuaryError)
    assert done.exception.exit_code == 1
    assert str(done.exception) == "2 of 11 studies failed: zigzag: it would not; head: a bug"
    assert "raise calls[name][0]" in done.stderr  # the bug's traceback
    there = {path.stem for path in (tmp_path / "out").glob("*.json")}
    assert there == set(catalogue.NAMES) - {"zigzag", "head"}
    for name in ("zigzag", "head"):
        made_up[name].clear()
    made_up["options"].clear()
    assert called(tmp_path, "all").exit_code == 0
    assert ran(made_up) == ["zigzag", "head"]


def test_a_number_that_cannot_be_kept_stops_no_other_study(made_up, tmp_path, monkeypatch):
    broken = dataclasses.replace(finding_of(), data={"x": float("nan")})
    whole = catalogue.study
    module = types.SimpleNamespace(CLAIM=claim_of("zigzag"), run=lambda options: broken)
    monkeypatch.setattr(catalogue, "study", lambda name: module if name == "zigzag" else whole(name))
    done = called(tmp_path, "vanishing", "zigzag", "moons")
    assert ran(made_up) == ["vanishing", "moons"]
    assert str(done.exception).startswith("1 of 3 studies failed: zigzag: ")
    assert not (tmp_path / "out" / "zigzag.json").exists()


def test_a_package_that_one_study_lacks_is_named_with_the_remedy(made_up, tmp_path):
    made_up["moons"][:] = [ModuleNotFoundError("No module named 'sklearn'", name="sklearn")]
    done = called(tmp_path, "moons", "slope")
    assert "needs the package 'sklearn'" in str(done.exception)
    assert "pip install -e '.[train,study]'" in str(done.exception)
    assert ran(made_up) == ["slope", "moons"]


def test_one_alone_fails_as_it_does(made_up, tmp_path):
    made_up["cost"][:] = [BadInput("no room")]
    done = called(tmp_path, "cost")
    assert done.exception is made_up["cost"][0]


def test_ctrl_c_keeps_what_is_done(made_up, tmp_path):
    made_up["zigzag"][:] = [KeyboardInterrupt()]
    done = called(tmp_path, "all")
    assert isinstance(done.exception, ActuaryError)
    assert "stopped in zigzag; 2 of 11 done are kept" in str(done.exception)
    made_up["zigzag"].clear()
    made_up["options"].clear()
    called(tmp_path, "slope", "vanishing", "zigzag")
    assert ran(made_up) == ["zigzag"]


def test_drawings_that_a_new_run_has_not_are_taken_away(made_up, tmp_path, monkeypatch):
    called(tmp_path, "zigzag")
    (tmp_path / "out" / "zigzag-of-mine.svg").write_text("not ours")
    fewer = dataclasses.replace(finding_of(), charts=finding_of().charts[:1])
    module = types.SimpleNamespace(CLAIM=claim_of("zigzag"), run=lambda options: fewer)
    monkeypatch.setattr(catalogue, "study", lambda name: module)
    called(tmp_path, "zigzag", "--again")
    assert {path.name for path in (tmp_path / "out").glob("*.svg")} == {"zigzag-all.svg", "zigzag-of-mine.svg"}


def test_a_damaged_record_in_the_folder_is_refused_before_anything_runs(made_up, tmp_path):
    called(tmp_path, "slope")
    (tmp_path / "out" / "slope.json").write_text("{")
    made_up["options"].clear()
    done = called(tmp_path, "cost")
    assert isinstance(done.exception, BadInput)
    assert "slope.json is not a study's record" in str(done.exception)
    assert not ran(made_up)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Missing argument"),
        (["slope", "--seeds", "0"], "0 is not in the range"),
        (["slope", "--seeds", "1001"], "1001 is not in the range"),
        (["slope", "--steps", "0"], "0 is not in the range"),
        (["slope", "--workers", "0"], "0 is not in the range"),
        (["slope", "--seeds", "many"], "not a valid integer"),
    ],
)
def test_bad_arguments_are_refused(arguments, said, made_up, tmp_path):
    done = called(tmp_path, *arguments)
    assert done.exit_code == 2
    assert said in done.stderr
    assert not ran(made_up)


def test_a_folder_that_cannot_be_written_is_refused(made_up, tmp_path):
    (tmp_path / "out").write_text("a file")
    done = called(tmp_path, "slope")
    assert isinstance(done.exception, BadInput) or done.exit_code == 2
    assert not ran(made_up)


def test_help_and_an_unknown_name_need_no_torch(tmp_path):
    import subprocess

    code = (
        "import sys\n"
        "from actuary import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as end:\n    print(end.code, 'torch' in sys.modules, 'matplotlib' in sys.modules)\n"
    )
    for arguments, exit_code in ((["study", "--help"], 0), (["study", "slopp"], 2)):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == f"{exit_code} False False", done.stderr
    assert "did you mean 'slope'?" in done.stderr
