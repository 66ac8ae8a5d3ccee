"""The page's place Compare in headless Chromium: one is started, watched, stopped and read; old ones are listed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import serving
from kept_comparisons import SWEPT, keep
from test_page import By, Keys, WebDriver, all_of, browser, fetched, get, hash_fields, pytestmark, until  # noqa: F401

# The A/A arm of `unfit` differs from its baseline by more than noise, and mish has a void block in all of them.
UNFIT = {"rounds": 20, "again": 1.2}
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
STATE = "return document.querySelector('#comparison .state').textContent"  # in one step: it is drawn anew meanwhile


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The folder, and the verdicts of two comparisons that were measured before, by id."""
    folder = tmp_path_factory.mktemp("compare")
    results = {
        name: keep(folder / name, drawn=name == "fit", **spec)
        for name, spec in {"fit": {"swept": SWEPT}, "unfit": UNFIT}.items()
    }
    return {"folder": folder, **results}


@pytest.fixture(scope="module")
def comparing_url(comparable: Path, kept: dict[str, Any]) -> Iterator[str]:
    with serving(comparable, "--compare", str(kept["folder"])) as (url, _):
        yield url


@pytest.fixture
def page(browser: WebDriver, comparing_url: str) -> Iterator[WebDriver]:  # noqa: F811
    """The place, listed. Afterwards: no error in the log, nothing fetched from elsewhere."""
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get(f"{comparing_url}/#compare")
    until(browser, lambda: all_of(browser, "#past li"))
    yield browser
    assert [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert [url for url in fetched(browser) if not url.startswith((f"{comparing_url}/", "data:", "blob:"))] == []


def open_run(page: WebDriver, name: str) -> None:
    page.find_element(By.CSS_SELECTOR, f'#past a[href="#compare?run={name}"]').send_keys(Keys.ENTER)
    until(page, lambda: hash_fields(page).get("run") == [name] and all_of(page, "#rounds-table tbody tr"))


def cells(page: WebDriver, table: str) -> dict[str, list[str]]:
    rows = all_of(page, f"#{table} tbody tr")
    return {row.find_element(By.TAG_NAME, "th").text: [cell.text for cell in all_of(row, "td")] for row in rows}


def drawn(page: WebDriver, plot: str) -> list[dict[str, Any]]:
    """Its traces, as far as they hold figures."""
    fields = "x, y, text, error_x, error_y, symbol: marker?.symbol"
    script = f"({{ x, y, text, marker, error_x, error_y }}) => ({{ {fields} }})"
    return page.execute_script(f"return document.getElementById('{plot}').data.map({script})")


def sentences(page: WebDriver) -> list[str]:
    return [line.text for line in all_of(page, "#comparison .verdict span")]


def sentences_of(result: dict[str, Any]) -> list[str]:
    return [arm["sentence"] for arm in result["arms"]]


def test_what_was_measured_before_is_listed(page: WebDriver, kept: dict[str, Any]) -> None:
    unfit = "Nothing is claimed: the machine was not fit, or the rounds were too few."
    expected = {"fit": [" · ".join(sentences_of(kept["fit"]))], "unfit": [unfit]}
    for entry in all_of(page, "#past li")[-2:]:
        name = entry.find_element(By.TAG_NAME, "a").get_attribute("href").rpartition("=")[2]
        said = [line.text for line in all_of(entry, "p.facts")]
        assert said == expected[name]


def test_a_verdict_is_read_and_its_link_restores_it(page: WebDriver, comparing_url: str, kept: dict[str, Any]) -> None:
    assert not any("plotly" in url for url in fetched(page)), "Plotly is fetched before it is needed"
    open_run(page, "fit")
    result = kept["fit"]
    lines = all_of(page, "#comparison .verdict li")
    assert [line.find_element(By.TAG_NAME, "b").text for line in lines] == [arm["outcome"] for arm in result["arms"]]
    assert [line.find_element(By.TAG_NAME, "span").text for line in lines] == [
        arm["sentence"] for arm in result["arms"]
    ]
    assert all_of(page, "#comparison [role=alert]") == []
    address = page.current_url
    page.get("about:blank")
    page.get(address)
    until(page, lambda: all_of(page, "#rounds-table tbody tr"))
    assert [line.text for line in all_of(page, "#comparison .verdict span")] == [
        arm["sentence"] for arm in result["arms"]
    ]
    report = page.find_element(By.LINK_TEXT, "Full report").get_attribute("href")
    assert report == f"{comparing_url}/v1/comparisons/fit/report"


def test_the_pictures_are_what_was_found_and_their_tables_say_the_same(page: WebDriver, kept: dict[str, Any]) -> None:
    open_run(page, "fit")
    result = kept["fit"]
    until(page, lambda: page.execute_script("return Boolean(document.getElementById('frontier-plot').data)"))
    marks = {mark["y"][0]: mark for mark in drawn(page, "forest-plot") if mark["symbol"] != "line-ns-open"}
    for model, ratio in {**{arm["model"]: arm["p50"] for arm in result["arms"]}, "gelu (A/A)": result["aa"]}.items():
        mark = marks[model]
        assert mark["x"][0] == pytest.approx((ratio["ratio"] - 1) * 100)
        assert mark["error_x"]["array"][0] == pytest.approx((ratio["high"] - ratio["ratio"]) * 100)
        assert mark["error_x"]["arrayminus"][0] == pytest.approx((ratio["ratio"] - ratio["low"]) * 100)
        said = f"{(ratio['ratio'] - 1) * 100:+.1f} % [{(ratio['low'] - 1) * 100:.1f}, {(ratio['high'] - 1) * 100:.1f}]"
        assert cells(page, "forest-table")[model][0] == said
    slow = [arm["model"] for arm in sorted(result["arms"], key=lambda arm: -arm["p50"]["ratio"])]
    assert list(cells(page, "forest-table")) == [*slow, "gelu (A/A)"]

    dots = {mark["text"][0]: mark for mark in drawn(page, "frontier-plot") if mark["text"]}
    for arm in result["arms"]:
        bold = f"<b>{arm['model']}</b>"
        dot = dots.get(bold) or dots[arm["model"]]
        assert (dot["x"][0], dot["y"][0]) == (
            pytest.approx((arm["p50"]["ratio"] - 1) * 100),
            arm["bits_per_byte"]["value"],
        )
        assert cells(page, "frontier-table")[arm["model"]][1:] == [
            f"{arm['bits_per_byte']['value']:.4f}",
            "yes" if bold in dots else "",
        ]
    # By TRUTH: nobody is as quick as relu, or predicts as well as swiglu; gelu and mish are beaten by silu in both.
    assert {name for name in dots if name.startswith("<b>")} == {"<b>relu</b>", "<b>silu</b>", "<b>swiglu</b>"}


def test_a_sweep_is_drawn_with_each_knee_and_what_was_answered_in_time(page: WebDriver, kept: dict[str, Any]) -> None:
    open_run(page, "fit")
    result = kept["fit"]
    until(page, lambda: page.execute_script("return Boolean(document.getElementById('sweep-plot').data)"))
    fields = "name, x, y, error: error_x?.array, symbol: marker?.symbol, shown: showlegend !== false"
    traces = page.execute_script(
        "return document.getElementById('sweep-plot').data"
        f".map(({{ name, x, y, error_x, marker, showlegend }}) => ({{ {fields} }}))"
    )
    rows = {arm: [row for row in result["sweep"] if row["arm"] == arm] for arm in SWEPT}
    p99 = {trace["name"].replace(" (A/A)", ":again"): trace for trace in traces if trace["shown"]}
    assert list(p99) == list(SWEPT)
    for arm, trace in p99.items():
        assert [*zip(trace["x"], trace["y"], strict=True)] == [(row["rate"], row["p99_ms"]) for row in rows[arm]]
        assert ["x-" in symbol for symbol in trace["symbol"]] == [not row["kept_plan"] for row in rows[arm]]
        good = next(each for each in traces if each["y"] == [row["goodput_per_s"] for row in rows[arm]])
        assert good["x"] == trace["x"]
    assert any(not row["kept_plan"] for row in result["sweep"])
    knees = {arm: knee for arm, knee in result["knee"].items() if knee["rate"] is not None}
    assert set(SWEPT) - set(knees) == {"relu"}
    marks = [trace for trace in traces if str(trace["symbol"]).startswith("diamond")]
    assert [(mark["x"], mark["y"]) for mark in marks] == [([knee["rate"]], [40.0]) for knee in knees.values()]
    assert [mark["error"][0] for mark in marks] == [
        pytest.approx(knee["high"] - knee["rate"]) for knee in knees.values()
    ]

    table = cells(page, "sweep-table")
    assert list(table) == [*list(SWEPT)[:-1], "gelu (A/A)"]
    assert float(table["mish"][0]) == pytest.approx(result["knee"]["mish"]["rate"], rel=1e-3)
    assert table["relu"][:2] == [f"above {0.7 * 310:g}", "–"]
    assert float(table["gelu"][2]) == pytest.approx(result["goodput"]["gelu"]["per_s"], rel=1e-3)
    page.find_element(By.CSS_SELECTOR, "#sweep .readout summary").send_keys(Keys.ENTER)
    until(page, lambda: len(all_of(page, "#sweep .readout tbody tr")) == len(result["sweep"]))
    first = [cell.text for cell in all_of(page, "#sweep .readout tbody tr:first-child :is(th, td)")]
    assert (first[0], float(first[1]), first[6]) == ("gelu", 90.0, "yes")
    assert len(all_of(page, "#sweep .save")) == 3
    open_run(page, "unfit")
    until(page, lambda: not all_of(page, "#sweep"))


def test_every_round_is_drawn_and_listed_and_a_void_block_says_why(page: WebDriver, comparing_url: str) -> None:
    open_run(page, "fit")
    progress = get(f"{comparing_url}/v1/comparisons/fit")["progress"]
    until(page, lambda: page.execute_script("return Boolean(document.getElementById('rounds-plot').data)"))
    lines = drawn(page, "rounds-plot")
    void = {(block["round"], block["arm"]) for block in progress["void"]}
    assert void == {(11, "mish")}
    for arm, line in zip(progress["arms"], lines, strict=True):
        assert line["x"] == [*range(1, 31)]
        assert line["y"] == [None if (i, arm) in void else value for i, value in enumerate(progress["p50_ms"][arm])]
    rows = cells(page, "rounds-table")
    assert list(rows) == ["median", *(str(number) for number in range(30, 0, -1))]
    mish = progress["arms"].index("mish")
    assert rows["12"][mish] == "void"
    assert page.find_element(By.CSS_SELECTOR, "#rounds-table abbr").get_attribute("title") == "client too slow"
    assert float(rows["30"][mish]) == pytest.approx(progress["p50_ms"]["mish"][29], abs=0.0051)


def test_that_the_machine_was_not_fit_comes_first(page: WebDriver, kept: dict[str, Any]) -> None:
    open_run(page, "unfit")
    assert kept["unfit"]["fit"] is False
    alarm = page.find_element(By.CSS_SELECTOR, "#comparison [role=alert]")
    assert alarm.text.startswith("Do not trust the differences below: this machine was not fit. gelu against itself")
    assert alarm.location["y"] < page.find_element(By.CSS_SELECTOR, "#comparison .verdict").location["y"]
    assert {badge.text for badge in all_of(page, "#comparison .outcome")} == {"inconclusive"}


def test_one_is_started_watched_reloaded_and_stopped_by_keyboard(page: WebDriver, comparing_url: str) -> None:
    for box in all_of(page, "#compare-variants input"):
        if box.is_selected() == (box.get_attribute("value") == "gelu-sigmoid-head"):
            box.send_keys(Keys.SPACE)
    page.find_element(By.ID, "baseline").send_keys("swiglu")
    amount = page.find_element(By.ID, "amount")
    amount.send_keys(Keys.CONTROL, "a")
    amount.send_keys("5")
    page.find_element(By.ID, "load").send_keys("arrivals")  # blocks of 2 s, which a busy machine does not leave empty
    amount.send_keys(Keys.ENTER)
    until(page, lambda: "run" in hash_fields(page))
    (name,) = hash_fields(page)["run"]
    begun = get(f"{comparing_url}/v1/comparisons/{name}")
    assert (begun["state"], begun["baseline"], begun["models"]) == ("running", "swiglu", begun["models"])
    assert sorted(begun["models"]) == ["gelu", "swiglu"]
    until(page, lambda: page.find_element(By.ID, "going").is_displayed())
    assert not page.find_element(By.ID, "compare-start").is_enabled()

    wait_for_rounds(page, 1)
    before = len(drawn(page, "rounds-plot")[0]["x"])
    wait_for_rounds(page, before + 1)
    page.get("about:blank")
    page.get(f"{comparing_url}/#compare")  # a new visit, which does not know its name
    wait_for_rounds(page, before + 1)
    assert hash_fields(page)["run"] == [name]
    assert page.execute_script(STATE) == "running"

    page.find_element(By.XPATH, "//button[text()='Stop']").send_keys(Keys.SPACE)
    until(page, lambda: page.execute_script(STATE) == "stopped")
    result = get(f"{comparing_url}/v1/comparisons/{name}")["result"]
    assert result["ended"] == "interrupted"
    assert [line.text for line in all_of(page, "#comparison .verdict span")] == [
        arm["sentence"] for arm in result["arms"]
    ]
    until(page, lambda: page.find_element(By.ID, "compare-start").is_enabled())
    assert all_of(page, "#past li")[0].find_element(By.CLASS_NAME, "state").text == "stopped"
    until(page, lambda: page.switch_to.active_element.get_attribute("id") == "comparison-title")


def wait_for_rounds(page: WebDriver, count: int) -> None:
    script = "return document.getElementById('rounds-plot')?.data?.[0].x.length ?? 0"
    until(page, lambda: page.execute_script(script) >= count)


def test_what_cannot_be_asked_is_said_and_the_control_marked(page: WebDriver) -> None:
    minutes = page.find_element(By.ID, "minutes")
    minutes.send_keys(Keys.CONTROL, "a")
    minutes.send_keys(Keys.BACKSPACE)
    minutes.send_keys(Keys.ENTER)
    error = page.find_element(By.ID, "compare-error")
    until(page, lambda: error.text == "Minutes: give a number.")
    assert minutes.get_attribute("aria-invalid") == "true"
    minutes.send_keys("5")
    for box in all_of(page, "#compare-variants input")[1:]:
        box.send_keys(Keys.SPACE)
    assert page.find_element(By.ID, "compare-plan").text == "Choose two variants or more."
    minutes.send_keys(Keys.ENTER)
    until(page, lambda: error.text == "Choose two variants or more.")


def test_a_link_to_none_says_so(page: WebDriver, comparing_url: str) -> None:
    page.get("about:blank")
    page.get(f"{comparing_url}/#compare?run=nothing")
    until(page, lambda: "there is no comparison 'nothing'" in page.find_element(By.ID, "compare-error").text)
    log = page.get_log("browser")  # of an answer of 404 a browser says so, which is no error of the page
    assert all("status of 404" in entry["message"] for entry in log if entry["level"] == "SEVERE")


def test_where_it_is_off_the_page_says_how_to_have_it(browser: WebDriver, server_url: str) -> None:  # noqa: F811
    browser.get("about:blank")
    browser.get(f"{server_url}/#compare")
    until(browser, lambda: "--compare DIR" in browser.find_element(By.ID, "compare-off").text)
    assert not browser.find_element(By.ID, "compare-form").is_displayed()


@pytest.mark.parametrize("name", ["fit", "unfit"])
def test_nothing_scrolls_sideways_on_a_phone(page: WebDriver, name: str) -> None:
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    try:
        open_run(page, name)
        last = "sweep-plot" if name == "fit" else "frontier-plot"
        until(page, lambda: page.execute_script(f"return Boolean(document.getElementById('{last}').data)"))
        assert page.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
