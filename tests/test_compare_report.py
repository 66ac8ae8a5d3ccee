"""`actuary report` over stored runs of known truth: what is said, what is drawn, and what is refused."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from chromium import NEEDED, chromium
from compare_runs import PER_BLOCK, TRUTH, write_run

from actuary import main
from loadtest import page
from loadtest.compare import charts, frontier, report, store, verdict, words
from loadtest.samples import Sample, summarise, write_header, write_samples

WITHOUT_QUALITY = {model: (latency, None, *sizes) for model, (latency, _, *sizes) in TRUTH.items()}
PATIENCE_S = 15  # two busy cores
Report = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven arms and thirty rounds, of which one is void; judged."""
    return judged(write_run(tmp_path_factory.mktemp("runs") / "new"))


def judged(folder: Path, **more: Any) -> Path:
    kept = store.read(folder)
    result = verdict.judge(kept.run, kept.blocks, kept.samples, margin=kept.run["design"]["equivalence"])
    document = {"schema": 1, "kind": "compare", **result, "ended": "minutes", "said": [], **more}
    (folder / "result.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


def copy(stored: Path, tmp_path: Path, **change: Any) -> Path:
    """The run, and in its result what `change` says."""
    folder = tmp_path / "run"
    shutil.copytree(stored, folder)
    edit(folder / "result.json", lambda result: result.update(change))
    return folder


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads(path.read_text(encoding="utf-8"))
    change(record)
    path.write_text(json.dumps(record), encoding="utf-8")


@pytest.fixture
def report_of(capsys: pytest.CaptureFixture[str]) -> Report:
    """(exit code, standard output, standard error) of `actuary report`."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["report", *map(str, arguments)])
        said = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, said.out, said.err

    return run


# --- what is said ---------------------------------------------------------------------------------


def test_page_markdown_and_json_say_the_same(stored: Path, report_of: Report) -> None:
    code, output, errors = report_of(stored, "--json", "-")
    assert code == 0, errors
    result = json.loads(output)
    assert result == json.loads((stored / "result.json").read_text())
    html, markdown = (stored / "report.html").read_text(), (stored / "report.md").read_text()
    for arm in result["arms"]:
        assert arm["sentence"] in html
        assert arm["sentence"].replace("_", "\\_") in markdown
        assert f'<b class="{arm["outcome"]}">' in html
        assert words.interval(arm["p99"]) in html
        assert words.interval(arm["p99"]) in markdown
    swiglu = next(arm for arm in result["arms"] if arm["model"] == "swiglu")
    assert (swiglu["outcome"], words.interval(swiglu["p50"]) in swiglu["sentence"]) == ("slower", True)
    for text in (html, markdown):
        assert "actuary compare --variants gelu,gelu_tanh,relu,silu,swiglu,mish --baseline gelu" in text
        assert "A CPU at 2.5 GHz" in text
        assert "seed 0" in text
        assert "matched width" in text
        assert "14,155,776" in text
        assert words.digests(words.facts_of(store.read(stored).run)["swiglu"])["model.onnx"][: words.DIGEST] in text
    assert not list(stored.glob("*.part"))


def test_the_pages_script_and_style_are_inside(stored: Path, report_of: Report) -> None:
    assert report_of(stored)[0] == 0
    html = (stored / "report.html").read_text()
    body = html.split("<body>")[1]
    assert "src=" not in body
    assert not re.findall(r"https?://(?!127\.0\.0\.1)", body), "an address outside"
    assert "$" not in html.split("</style>")[0]


def test_an_unfit_machine_is_said_before_all_else(stored: Path, tmp_path: Path, report_of: Report) -> None:
    unfit = judged(write_run(tmp_path / "unfit", again=1.08))
    for folder, said in ((stored, False), (unfit, True)):
        assert report_of(folder)[0] == 0
        first = re.search(r"<main>\s*(<\w+[^>]*>)", (folder / "report.html").read_text())
        assert first
        assert ('class="alarm"' in first[1]) is said
        assert (folder / "report.md").read_text().startswith("> **Do not trust") is said
    assert "gelu against itself (A/A) came out at" in (unfit / "report.md").read_text()


def test_too_few_rounds_claim_nothing(tmp_path: Path, report_of: Report) -> None:
    short = judged(write_run(tmp_path / "short", rounds=3, void=()))
    code, _, errors = report_of(short)
    assert code == 0, errors
    assert (short / "report.md").read_text().startswith("> **Too few rounds for any claim: 3 count")


def test_a_void_round_is_named_and_in_no_figure(stored: Path) -> None:
    kept = store.read(stored)
    found = charts.latencies(kept.samples, kept.blocks, words.arms_of(kept.run))
    assert {arm: len(values) for arm, values in found.items()} == dict.fromkeys(words.arms_of(kept.run), 29 * PER_BLOCK)
    part = next(part for part in parts_of(stored) if part.title == "Block by block")
    assert part.table == words.Table(("round", "arm", "why it is void"), (("11", "mish", "client too slow"),))


def test_a_run_that_was_killed_is_judged_on_what_there_is(stored: Path, tmp_path: Path, report_of: Report) -> None:
    folder = copy(stored, tmp_path)
    (folder / "result.json").unlink()
    (folder / "rounds" / "00029.json").unlink()  # the last round is torn
    code, output, errors = report_of(folder, "--json", "-")
    assert code == 0, errors
    result = json.loads(output)
    assert (result["rounds"], result["void_rounds"]) == (29, 1)
    assert "cut short: 29 rounds of at most 35" in (folder / "report.md").read_text()
    assert not (folder / "result.json").exists(), "what was not finished must not look finished"


def test_what_the_variants_do_not_share_is_noted(stored: Path) -> None:
    run = store.read(stored).run
    run["arms"][3]["facts"]["layers"] = 12
    run["arms"][2]["facts"]["unfused"] = ["relu"]
    said = words.notes(run, {"said": ["s"], "baseline": "gelu"})
    assert said[0] == "s"
    assert [note for note in said if "not the baseline's number of layers, 6: silu 12;" in note]
    assert [note for note in said if "without a fused operator: relu" in note]
    assert len(said) == 3


def test_text_of_a_run_is_not_markup(stored: Path, tmp_path: Path, report_of: Report) -> None:
    folder = copy(stored, tmp_path, said=["<b>a|b_c</b>"])
    edit(folder / "run.json", lambda run: run["workload"].update(source="<script>alert(1)</script>"))
    assert report_of(folder)[0] == 0
    html = (folder / "report.html").read_text()
    assert "<script>alert" not in html
    assert "&lt;b&gt;a|b_c&lt;/b&gt;" in html
    assert r"\<b>a\|b\_c\</b>" in (folder / "report.md").read_text()


def parts_of(folder: Path) -> list[report.Section]:
    return report.sections(store.read(folder), json.loads((folder / "result.json").read_text()))


# --- what is drawn --------------------------------------------------------------------------------


def test_an_arm_has_one_colour_in_all_pictures(stored: Path) -> None:
    figures = {part.title: part.figure for part in parts_of(stored) if part.figure}
    for index, arm in enumerate(("gelu", "gelu_tanh", "relu", "silu", "swiglu", "mish")):
        (line,) = [trace for trace in figures["How long answers take"].data if trace.name == arm]
        (dots,) = [trace for trace in figures["Block by block"].data if trace.name == arm]
        (point,) = [t for t in figures["What quality costs"].data if t.text and t.text[0].strip("</b>") == arm]
        assert {line.line.color, dots.marker.color, point.marker.color} == {page.colour(index)}


def test_the_forest_draws_the_verdict(stored: Path) -> None:
    result = json.loads((stored / "result.json").read_text())
    drawn = charts.forest(result, "x")
    (slower,) = [trace for trace in drawn.data if trace.name == "slower"]
    swiglu = next(arm["p50"] for arm in result["arms"] if arm["model"] == "swiglu")
    at = list(slower.y).index("swiglu")
    assert slower.x[at] == pytest.approx(100 * (swiglu["ratio"] - 1))
    assert slower.x[at] + slower.error_x.array[at] == pytest.approx(100 * (swiglu["high"] - 1))
    assert slower.x[at] - slower.error_x.arrayminus[at] == pytest.approx(100 * (swiglu["low"] - 1))
    (band,) = [shape for shape in drawn.layout.shapes if shape.type == "rect"]
    assert (band.x0, band.x1) == pytest.approx((100 * (1 / 1.02 - 1), 2.0))


def test_the_frontier_by_hand(stored: Path) -> None:
    """relu is fastest, swiglu predicts best, silu lies between; gelu, its tanh form and mish are beaten by silu."""
    result = json.loads((stored / "result.json").read_text())
    found, why_not = frontier.points(store.read(stored).run, result)
    assert why_not == ""
    assert [point.model for point in found if point.best] == ["relu", "silu", "swiglu"]
    part = next(part for part in parts_of(stored) if part.title == "What quality costs")
    assert "in both at once: relu, silu, swiglu." in part.said
    stairs = part.figure.data[0]
    assert (stairs.line.shape, list(stairs.y)) == ("hv", [2.334, 2.306, 2.271])
    assert {row[0] for row in part.table.rows if row[-1] == "yes"} == {"relu", "silu", "swiglu"}


def test_quality_over_seeds_has_its_interval(tmp_path: Path) -> None:
    bits = {"gelu": 2.31, "gelu-seed1": 2.33, "swiglu": 2.27, "swiglu-seed1": 2.28}
    truth = {name: (1.0 if name[:4] == "gelu" else 1.05, value, 1536, 1000) for name, value in bits.items()}
    kept = store.read(judged(write_run(tmp_path / "seeds", truth=truth, rounds=8, void=())))
    result = json.loads((tmp_path / "seeds" / "result.json").read_text())
    found, _ = frontier.points(kept.run, result)
    (swiglu,) = [point for point in found if point.model == "swiglu"]
    assert swiglu.bits == pytest.approx(math.sqrt(2.27 * 2.28))
    assert swiglu.bits_low < swiglu.bits < swiglu.bits_high
    assert "over seeds" in frontier.said(found, [])


def test_no_names_cover_one_another(stored: Path) -> None:
    run, result = store.read(stored).run, json.loads((stored / "result.json").read_text())
    found, _ = frontier.points(run, result)
    x_range, y_range = charts._room(found)
    names = []
    for point, side in zip(found, charts._places(found, x_range, y_range), strict=True):
        x = (charts.in_percent(point.ratio) - x_range[0]) / (x_range[1] - x_range[0])
        y = (point.bits - y_range[0]) / (y_range[1] - y_range[0])
        box = charts._box(side, (x, y), len(point.model))
        assert charts._covers(box, names) == 0, point
        names.append(box)


@pytest.mark.parametrize(
    ("truth", "texts", "said"),
    [
        (WITHOUT_QUALITY, 1, "the weights are random or their quality was not measured"),
        (WITHOUT_QUALITY | {"relu": TRUTH["relu"]}, 1, "known of relu alone"),
        (TRUTH, 2, "of different held-out texts"),
    ],
)
def test_no_frontier_without_quality(truth: Any, texts: int, said: str, tmp_path: Path, report_of: Report) -> None:
    def change(run: dict[str, Any]) -> None:
        if texts == 2:
            run["arms"][2]["facts"]["quality"]["corpus_sha256"] = "d" * 64

    folder = judged(write_run(tmp_path / "run", change, truth=truth, rounds=8, void=()))
    code, _, errors = report_of(folder)
    assert code == 0, errors
    part = next(part for part in parts_of(folder) if part.title == "What quality costs")
    assert (part.figure, part.table) == (None, None)
    assert said in part.said
    assert said in (folder / "report.md").read_text()


def test_quality_of_trained_models_for_random_weights(tmp_path: Path, report_of: Report) -> None:
    folder = judged(write_run(tmp_path / "run", truth=WITHOUT_QUALITY, rounds=8, void=()))
    small = tmp_path / "small"
    for name, (_, bits, _, _) in TRUTH.items():
        for bundle_name, value in ((f"a-{name}", 9.9), (name, bits), (f"{name}-seed1", 9.9)):
            (small / bundle_name).mkdir(parents=True)
            quality = {"bits_per_byte": value, "ece": 0.1, "corpus_sha256": "c" * 64}
            manifest = {"name": bundle_name, "activation": name, "head": "softmax", "layers": 4, "dim": 128}
            (small / bundle_name / "manifest.json").write_text(json.dumps({**manifest, "quality": quality}))
    code, output, errors = report_of(folder, "--quality-from", small, "--json", "-")
    assert code == 0, errors
    swiglu = next(arm for arm in json.loads(output)["arms"] if arm["model"] == "swiglu")
    assert swiglu["bits_per_byte"]["value"] == 2.271
    assert "-1.7 % bits per byte" in swiglu["sentence"]
    markdown = (folder / "report.md").read_text()
    assert "not of these weights, which say nothing, but of trained models" in markdown
    assert "4 layers of C = 128" in markdown
    assert "| swiglu | " in markdown.split("## What quality costs")[1]
    assert json.loads((folder / "result.json").read_text())["arms"][0]["bits_per_byte"]["value"] is None
    for where, said in ((tmp_path / "none", "holds no bundle"), (folder, "holds no bundle")):
        code, _, errors = report_of(folder, "--quality-from", where)
        assert (code, said in errors) == (2, True), errors


def test_sweep_and_profile_are_drawn_where_they_are(stored: Path, tmp_path: Path, report_of: Report) -> None:
    titles = {part.title for part in parts_of(stored)}
    assert not titles & {"Latency against rate", "The feed-forward blocks' share"}
    share = {"ffn": 0.6, "activation": 0.1, "attention": 0.3, "head": 0.06, "other": 0.04}
    rows = [
        {"arm": arm, "rate": rate, "p50_ms": 5.0, "p99_ms": p99, "goodput_per_s": rate * 0.9, "requests_per_s": rate,
         "kept_plan": rate < 300, "blocks": 4}
        for arm, rate, p99 in (("gelu", 50, 6.0), ("gelu", 300, 80.0), ("swiglu", 50, 6.3), ("swiglu", 300, None))
    ]  # fmt: skip
    beyond = {"rate": None, "low": 90.0, "high": None, "few": False}
    few = {"rate": 120.0, "low": None, "high": None, "few": True}
    sweep = {
        "sweep": rows, "objective_ms": 25.0, "objective_given": True,
        "knee": {"gelu": {"rate": 210.0, "low": 190.0, "high": 230.0}, "swiglu": beyond, "relu": few},
        "goodput": {"gelu": {"rate": 300, "per_s": 270.0}, "swiglu": {"rate": 50, "per_s": 45.0},
                    "relu": {"rate": 50, "per_s": 45.0}},
    }  # fmt: skip
    folder = copy(stored, tmp_path, **sweep, ffn_share={"gelu": share, "swiglu": share})
    code, _, errors = report_of(folder)
    assert code == 0, errors
    markdown = (folder / "report.md").read_text()
    assert "| gelu | 210 | 190 to 230 | 270 at 300/s |" in markdown
    assert "| swiglu | not reached | 90 to not reached | 45 at 50/s |" in markdown
    assert "| relu | 120 | too few blocks | 45 at 50/s |" in markdown
    assert "| gelu | 60.0% | 10.0% | 30.0% | 6.0% | 4.0% |" in markdown
    drawn = {part.title: part.figure for part in parts_of(folder) if part.figure}
    p99 = {trace.name: trace for trace in drawn["Latency against rate"].data if trace.showlegend and trace.x}
    assert {name: list(trace.x) for name, trace in p99.items()} == {"gelu": [50, 300], "swiglu": [50]}
    assert list(p99["gelu"].marker.symbol) == ["circle", "x"]
    for bar in zip(*(trace.x for trace in drawn["The feed-forward blocks' share"].data), strict=True):
        assert sum(bar) == pytest.approx(1)


def test_the_parts_of_an_answer_add_up_to_its_p50(stored: Path) -> None:
    kept = store.read(stored)
    drawn = charts.server_beside_client(kept.blocks, words.arms_of(kept.run))
    assert drawn
    for arm, (*parts, p50) in drawn[1]:
        assert sum(parts) == pytest.approx(p50), arm
    assert [arm for arm, _ in drawn[1]][-1] == "gelu:again"


def test_a_server_without_times_has_no_such_chart(stored: Path) -> None:
    kept = store.read(stored)
    silent = kept.blocks.with_columns(pl.lit(None, pl.Float64).alias("infer_ms"))
    assert charts.server_beside_client(silent, words.arms_of(kept.run)) is None


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    pytest.importorskip("selenium.webdriver")
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


# Of each chart: its traces, how far its legend reaches into the plot, and the colour of its words.
SEEN = """return [...document.querySelectorAll('.plotly-graph-div')].map(chart => {
  const legend = chart.querySelector('.legend'), plot = chart.querySelector('.nsewdrag');
  return {traces: chart.querySelectorAll('.trace').length,
          over: legend ? legend.getBoundingClientRect().bottom - plot.getBoundingClientRect().top : 0,
          wide: chart.querySelector('.main-svg').getBoundingClientRect().width - chart.parentElement.clientWidth,
          ink: getComputedStyle(chart.querySelector('.xtick text')).fill};
})"""


@pytest.mark.browser
@NEEDED
def test_in_a_browser(stored: Path, report_of: Report, browser: Any) -> None:
    """Every chart is drawn, in both schemes and widths, also after the window changed; nothing is fetched."""
    assert report_of(stored)[0] == 0
    charts_drawn = (stored / "report.html").read_text().count('class="plotly-graph-div"')
    assert charts_drawn == 5
    inks = {}
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        size(browser, 1440)
        browser.get((stored / "report.html").as_uri())
        for width in (1440, 390, 900):
            size(browser, width)
            until(browser, lambda: fits(browser))
            seen = browser.execute_script(SEEN)
            assert len(seen) == charts_drawn
            assert all(chart["traces"] > 0 for chart in seen), seen
        inks[scheme] = {chart["ink"] for chart in seen}
    assert len(inks["light"]) == len(inks["dark"]) == 1
    assert inks["light"] != inks["dark"]
    assert browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def fits(browser: Any) -> bool:
    """No legend covers its plot, no chart is wider than its card, nothing scrolls sideways."""
    over = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    return browser.execute_script(over) <= 0 and all(
        chart["over"] < 1 and chart["wide"] < 1 for chart in browser.execute_script(SEEN)
    )


def size(browser: Any, width: int) -> None:
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)


def until(browser: Any, condition: Callable[[], bool]) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, PATIENCE_S, poll_frequency=0.1).until(lambda _: condition())


# --- against an old run ---------------------------------------------------------------------------


def test_against_finds_what_changed_and_only_that(stored: Path, tmp_path: Path, report_of: Report) -> None:
    before = {**TRUTH, "swiglu": (0.98, *TRUTH["swiglu"][1:])}  # 7 % less infer than now
    old = write_run(tmp_path / "old", truth=before, seed=7)
    code, output, errors = report_of(stored, "--against", old, "--json", "-")
    assert code == 0, errors
    found = json.loads(output)["against"]
    outcomes = {arm["model"]: arm["outcome"] for arm in found["arms"]}
    assert outcomes.pop("swiglu") == "slower"
    assert set(outcomes.values()) <= {"equivalent", "inconclusive"}
    swiglu = next(arm for arm in found["arms"] if arm["model"] == "swiglu")
    assert swiglu["p50"]["ratio"] == pytest.approx(swiglu["now"]["ratio"] / swiglu["then"]["ratio"])
    assert swiglu["p50"]["low"] < 1.05 / 0.98 * 0.985 < swiglu["p50"]["high"] * 1.01  # HTTP's part does not grow
    assert found["fit"] is True
    assert words.interval(swiglu["p50"]) in (stored / "against-old.md").read_text()
    assert "Against old" in (stored / "against-old.html").read_text()


def machine(run: dict[str, Any]) -> None:
    run["machine"]["cores"] = 64


def lengths(run: dict[str, Any]) -> None:
    run["workload"]["prompt_tokens"]["max"] = 128


def load(run: dict[str, Any]) -> None:
    run["design"]["users"] = 8


def server(run: dict[str, Any]) -> None:
    run["own_server"] = False


def provider(run: dict[str, Any]) -> None:
    run["arms"][4]["facts"]["provider"] = "CUDAExecutionProvider"


def bundle(run: dict[str, Any]) -> None:
    run["arms"][4]["facts"]["files"]["model.onnx"] = "f" * 64


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (machine, "other machine: cores 64 then, 2 now"),
        (lengths, "other workload: prompt_tokens"),
        (load, "other load: users 8 then, 2 now"),
        (server, "other server"),
        (provider, "other provider of swiglu"),
        (bundle, "other bundles under the same name: swiglu; say --other-bundles"),
    ],
)
def test_what_is_not_comparable_is_refused_with_the_reason(
    change: Any, said: str, stored: Path, tmp_path: Path, report_of: Report
) -> None:
    old = write_run(tmp_path / "old", change, rounds=8, void=())
    code, _, errors = report_of(stored, "--against", old)
    assert (code, errors.count("\n")) == (2, 1), errors
    assert said in errors


def test_other_baseline_other_arms_too_few_rounds(stored: Path, tmp_path: Path, report_of: Report) -> None:
    turned = dict(reversed(TRUTH.items()))
    others = {"gelu": TRUTH["gelu"], "elu": TRUTH["relu"]}
    for name, truth, rounds, said in (
        ("baseline", turned, 8, "other baseline: mish then, gelu now"),
        ("arms", others, 8, "no arm in common but the baseline gelu"),
        ("rounds", TRUTH, 4, "4 rounds without a void block then"),
    ):
        old = write_run(tmp_path / name, truth=truth, rounds=rounds, void=())
        code, _, errors = report_of(stored, "--against", old)
        assert (code, said in errors) == (2, True), errors


def test_other_bundles_on_purpose(stored: Path, tmp_path: Path, report_of: Report) -> None:
    old = write_run(tmp_path / "bundle", bundle, rounds=10, void=())
    code, output, errors = report_of(stored, "--against", old, "--other-bundles", "--json", "-")
    assert code == 0, errors
    assert "other bundles than then: swiglu" in json.loads(output)["against"]["notes"]


# --- refused at the door --------------------------------------------------------------------------


def test_folders_that_hold_no_run(stored: Path, tmp_path: Path, report_of: Report) -> None:
    (tmp_path / "empty").mkdir()
    alien = copy(stored, tmp_path / "alien")
    edit(alien / "run.json", lambda run: run.update(schema=2))
    torn = copy(stored, tmp_path / "torn")
    (torn / "run.json").write_text("{")
    fresh = write_run(tmp_path / "fresh", rounds=0)
    broken = copy(stored, tmp_path / "broken")
    (broken / "result.json").write_text("[]")
    other = tmp_path / "other"
    other.mkdir()
    (other / "result.json").write_text('{"kind": "bench", "schema": 1}')
    for arguments, said in (
        ((tmp_path / "none",), "is no folder"),
        ((tmp_path / "empty",), "holds no run"),
        ((other,), "of kind 'bench'"),
        ((alien,), "its schema is 2, this version reads 1"),
        ((torn,), "run.json cannot be read"),
        ((fresh,), "no finished round"),
        ((broken,), "result.json cannot be read"),
        ((stored, "--against", stored), "is the run itself"),
        ((stored, "--against", tmp_path / "none"), "holds no run"),
        ((stored, "--against", alien), "its schema is 2"),
        ((stored, "--json", tmp_path), "is a folder"),
        ((other, "--against", stored), "--against is for runs of `actuary compare`"),
    ):
        code, _, errors = report_of(*arguments)
        assert (code, errors.count("\n")) == (2, 1), errors
        assert said in errors


# --- a run of load --------------------------------------------------------------------------------


def test_a_run_of_load_is_drawn_again(tmp_path: Path, report_of: Report) -> None:
    times = np.random.default_rng(0).lognormal(1.5, 0.2, 300)
    samples = [
        Sample("w0", i / 100, i / 100, "ab"[i % 2], 0, float(ms), 0.0, 0, 0.1, 0.1, float(ms) / 2, float(ms), "")
        for i, ms in enumerate(times)
    ]
    with (tmp_path / "samples.csv").open("w", newline="") as file:
        write_header(file)
        write_samples(file, samples)
    kept = [sample for sample in samples if sample.planned_s >= 1]
    rows = [summarise(model, [s for s in kept if s.model == model], 2.0) for model in "ab"]
    plan = {"users": 2, "rate": None, "duration_s": 2.0, "warmup_s": 1.0, "prompts": "8", "top_k": 1, "seed": 0}
    late = {"p50": 0.0, "p99": 0.0}
    result = {
        "schema": 1, "kind": "load", "url": "http://h", "started": "2026-11-21T22:00:00+00:00",
        "command": "actuary load",
        "plan": {**plan, "timeout_s": 30.0}, "window_s": 2.0, "interrupted": False, "percentile_method": "numpy linear",
        "rows": rows, "total": summarise("all", kept, 2.0), "versions": {"python": "3"},
        "client": {"mode": "closed loop", "late_ms": late, "cpu_share": None, "said": []},
        "machine": {"cpu": "c", "cores": 2, "system": "s"},
    }  # fmt: skip
    (tmp_path / "result.json").write_text(json.dumps(result))
    code, output, errors = report_of(tmp_path, "--json", "-")
    assert code == 0, errors
    assert json.loads(output) == result
    html = (tmp_path / "report.html").read_text()
    assert f"<td>{rows[0]['latency_ms']['p90']:.2f}</td>" in html
    assert html.count('class="plotly-graph-div"') == 4
    (tmp_path / "samples.csv").unlink()
    code, _, errors = report_of(tmp_path)
    assert (code, "has lost its samples.csv" in errors) == (2, True)
