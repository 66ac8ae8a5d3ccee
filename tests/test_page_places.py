"""The page's four places in headless Chromium: by keyboard alone, to axe-core, as files, by their links; how soon."""

from __future__ import annotations

import base64
import csv
import importlib.util
import io
import json
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import serving
from kept_comparisons import SWEPT
from kept_comparisons import keep as keep_comparison
from kept_studies import CHARTS, COLUMNS, EPOCHS, ROWS, keep
from test_page import By, Keys, WebDriver, all_of, browser, fetched, get, hash_fields, pytestmark, until  # noqa: F401

PLACES = {
    "next-token": "next-token?prompt=if x&models=gelu,swiglu&top_k=5&tokens=17&steps=20,21",
    "activations": "activations?show=tanh",
    "studies": "studies",
    "study": "studies?study=vanishing",
    "moons": "studies?study=moons&epoch=400",
    "compare": "compare?run=fit",
}
FIRST_VIEW_BYTES, FIRST_VIEW_MS = 500_000, 1000
TABS = 400  # more than any place has


@pytest.fixture(scope="module")
def url(bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One service for the file, with studies and a comparison that were kept."""
    folder = tmp_path_factory.mktemp("places")
    keep_comparison(folder / "compare" / "fit", swept=SWEPT)
    activations = json.loads((bundles / "activations.json").read_text())["activations"]
    keep(folder / "studies", {each["name"]: each["record_digest"] for each in activations})
    with serving(bundles, "--compare", str(folder / "compare"), "--studies", str(folder / "studies")) as (address, _):
        yield address


@pytest.fixture
def page(browser: WebDriver, url: str) -> Iterator[WebDriver]:  # noqa: F811
    """A browser that has shown nothing. Afterwards: no error in its log, nothing fetched from elsewhere."""
    browser.get("about:blank")
    browser.get_log("browser")
    yield browser
    assert [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert [each for each in fetched(browser) if not each.startswith((f"{url}/", "data:", "blob:"))] == []


def open_place(page: WebDriver, url: str, place: str) -> None:
    """The place as its link has it, drawn to the end."""
    page.get("about:blank")
    page.get(f"{url}/#{PLACES.get(place, place)}")
    ready = {
        "next-token": "document.querySelector('#answer[aria-busy=false] .panel')",
        "activations": "document.getElementById('cards').dataset.drawn",
        "studies": "document.querySelector('#studies-list a')",
        "study": "document.getElementById('chart-boundary')?.data",
        "moons": "document.getElementById('moons-relu')?.data",
        "compare": "document.getElementById('rounds-plot')?.data && document.getElementById('sweep-plot')?.data",
    }
    condition = ready[place if place in ready else place.partition("?")[0]]
    until(page, lambda: page.execute_script(f"return Boolean({condition})"))


def focused(page: WebDriver, css: str) -> bool:
    return page.execute_script("return document.activeElement.matches(arguments[0])", css)


def press(page: WebDriver, *keys: str) -> None:
    """To whatever has the focus, as a person without a mouse."""
    page.switch_to.active_element.send_keys(*keys)


def tab_to(page: WebDriver, css: str, back: bool = False) -> None:
    """Tab until the focus is on what `css` names; its place must be seen."""
    for _ in range(TABS):
        press(page, *((Keys.SHIFT, Keys.TAB) if back else (Keys.TAB,)))
        if focused(page, css):
            outline = "const of = (e, p) => getComputedStyle(e, p).outlineStyle; let e = document.activeElement;"
            outline += "return [of(e), of(e, '::after'), of(e.parentElement)].some((style) => style !== 'none')"
            assert page.execute_script(outline), f"the focus on {css} cannot be seen"
            return
    raise AssertionError(f"{css} cannot be reached by Tab")


def saved(page: WebDriver, click: Callable[[], None]) -> tuple[str, bytes]:
    """Name and content of the file that `click` saves."""
    page.execute_script(
        """window.kept = new Promise((resolve) => {
          const real = URL.createObjectURL;
          let blob = null;
          URL.createObjectURL = (it) => real.call(URL, (blob = it));
          HTMLAnchorElement.prototype.click = function () {
            URL.createObjectURL = real;
            delete HTMLAnchorElement.prototype.click;
            const reader = new FileReader();
            reader.onload = () => resolve([this.download, reader.result.split(',')[1]]);
            reader.readAsDataURL(blob);
          };
        });"""
    )
    click()
    name, content = page.execute_async_script("window.kept.then(arguments[0])")
    return name, base64.b64decode(content)


def save(page: WebDriver, readout: str, kind: str) -> tuple[str, bytes]:
    button = page.find_element(By.XPATH, f"//*[@data-readout='{readout}']//button[text()='{kind}']")
    return saved(page, lambda: button.send_keys(Keys.ENTER))


def table_of(content: bytes) -> list[list[str]]:
    return list(csv.reader(io.StringIO(content.decode())))


def post(url: str, path: str, asked: dict[str, Any]) -> dict[str, Any]:
    import urllib.request

    request = urllib.request.Request(url + path, json.dumps(asked).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


# How soon


def first_view(page: WebDriver, url: str) -> tuple[int, float]:
    """Bytes that came over the wire, and ms until the last of them was there and something was painted."""
    page.get("about:blank")
    page.get(f"{url}/")
    until(page, lambda: all_of(page, "#answer[aria-busy=false] .panel"))
    entries = page.execute_script(
        """return ['navigation', 'resource', 'paint'].flatMap((type) => performance.getEntriesByType(type))
             .map((e) => [e.name, e.transferSize ?? 0, e.responseEnd ?? e.startTime]);"""
    )
    assert not any("plotly" in name for name, _, _ in entries)
    assert any(name.endswith("/v1/next-token") for name, _, _ in entries)
    return sum(size for _, size, _ in entries), max(ms for _, _, ms in entries)


@pytest.fixture
def no_cache(page: WebDriver) -> Iterator[None]:
    page.execute_cdp_cmd("Network.enable", {})
    page.execute_cdp_cmd("Network.setCacheDisabled", {"cacheDisabled": True})
    yield
    page.execute_cdp_cmd("Network.setCacheDisabled", {"cacheDisabled": False})


def test_the_first_view_is_small(page: WebDriver, url: str, no_cache: None) -> None:
    size, _ = first_view(page, url)
    assert 20_000 < size < FIRST_VIEW_BYTES


@pytest.mark.speed
def test_the_first_view_is_there_within_a_second(page: WebDriver, url: str, no_cache: None) -> None:
    """In one of ten: a busy machine can only be slower."""
    assert any(first_view(page, url)[1] < FIRST_VIEW_MS for _ in range(10))


# By keyboard alone


def test_next_token_by_keyboard(page: WebDriver, url: str) -> None:
    open_place(page, url, "next-token?prompt=if x&models=gelu,swiglu&top_k=5")
    tab_to(page, "#prompt")
    tab_to(page, "#variants input[value=swiglu]")
    press(page, Keys.SPACE)
    until(page, lambda: hash_fields(page)["models"] == ["gelu"] and len(all_of(page, ".panel")) == 1)
    tab_to(page, "#tokens")
    press(page, "17, 18")
    until(page, lambda: [row.get_attribute("data-id") for row in all_of(page, ".chosen tr[data-id]")] == ["17", "18"])
    tab_to(page, ".panel .top .step")
    first = int(page.switch_to.active_element.get_attribute("value"))

    def stepped(count: int) -> bool:
        return len(all_of(page, "#trail li")) == count and focused(page, ".panel .top .step")

    press(page, Keys.ENTER)
    until(page, lambda: stepped(1))
    assert hash_fields(page)["steps"] == [str(first)]
    press(page, Keys.SPACE)
    until(page, lambda: stepped(2))
    tab_to(page, "#trail button", back=True)
    tab_to(page, "#trail button[value='1']", back=True)
    press(page, Keys.ENTER)
    until(page, lambda: len(all_of(page, "#trail li")) == 1 and focused(page, "#trail button"))
    assert hash_fields(page)["steps"] == [str(first)]
    press(page, Keys.ENTER)
    until(page, lambda: "steps" not in hash_fields(page) and focused(page, "#prompt"))
    assert page.find_element(By.ID, "prompt").get_attribute("value") == "if x"
    tab_to(page, "#answer-readout summary")
    press(page, Keys.ENTER)
    until(page, lambda: len(all_of(page, "#answer-readout tbody tr")) == 7)
    tab_to(page, "#top-k", back=True)
    press(page, Keys.ARROW_UP)
    until(page, lambda: len(all_of(page, "#answer-readout tbody tr")) == 8)  # the open table follows


def test_activations_by_keyboard(page: WebDriver, url: str) -> None:
    open_place(page, url, "next-token")
    tab_to(page, "nav [data-view=activations]")
    press(page, Keys.ENTER)
    until(page, lambda: page.find_element(By.ID, "cards").get_attribute("data-drawn"))
    tab_to(page, "#sort")
    press(page, "by cost")
    until(page, lambda: hash_fields(page).get("sort") == ["cost"])
    assert [card.get_attribute("data-name") for card in all_of(page, ".card")][:3] == ["relu", "swiglu", "gelu"]
    shown = hash_fields(page)["show"][0].split(",")
    tab_to(page, ".card[data-name=relu] input")
    press(page, Keys.SPACE)
    until(page, lambda: hash_fields(page)["show"] == [",".join([*shown, "relu"])])
    tab_to(page, "#legend button[value=relu]", back=True)
    press(page, Keys.ENTER)
    until(page, lambda: hash_fields(page)["show"] == [",".join(shown)] and focused(page, "#legend button"))
    tab_to(page, "[data-readout=activations] summary")
    press(page, Keys.ENTER)
    until(page, lambda: len(all_of(page, "[data-readout=activations] tbody tr")) == 241)


def test_studies_by_keyboard(page: WebDriver, url: str) -> None:
    open_place(page, url, "studies")
    tab_to(page, "#studies-list a[data-study=moons]")
    press(page, Keys.ENTER)
    until(page, lambda: focused(page, "#study-title"))
    until(page, lambda: page.execute_script("return Boolean(document.getElementById('moons-relu')?.data)"))
    assert hash_fields(page) == {"study": ["moons"], "epoch": ["800"]}
    tab_to(page, "#epoch")
    press(page, Keys.ARROW_LEFT)
    until(page, lambda: hash_fields(page)["epoch"] == ["400"])
    tab_to(page, "#play")
    press(page, Keys.SPACE)
    until(page, lambda: hash_fields(page)["epoch"] == ["800"])
    until(page, lambda: page.find_element(By.ID, "play").text == "Play")
    tab_to(page, "#studies-list a[data-study=vanishing]", back=True)
    press(page, Keys.ENTER)
    until(page, lambda: focused(page, "#study-title") and all_of(page, "#chart-by-depth"))
    until(page, lambda: page.execute_script("return document.getElementById('chart-by-depth').data?.length") == 3)
    tab_to(page, ".switches button")
    press(page, Keys.SPACE)
    until(page, lambda: page.execute_script("return document.getElementById('chart-by-depth').data.length") == 1)
    assert page.switch_to.active_element.get_attribute("aria-pressed") == "false"


def test_compare_by_keyboard(page: WebDriver, url: str) -> None:
    open_place(page, url, "studies")
    tab_to(page, "nav [data-view=compare]")
    press(page, Keys.ENTER)
    until(page, lambda: all_of(page, "#past a"))
    tab_to(page, "#minutes")
    tab_to(page, "#past a")
    press(page, Keys.ENTER)
    until(page, lambda: page.execute_script("return Boolean(document.getElementById('frontier-plot')?.data)"))
    assert hash_fields(page)["run"] == ["fit"]
    tab_to(page, "#forest-table", back=True)
    name, content = saved_by_key(page, "comparison-forest")
    assert name == "comparison-forest.csv"
    assert [row[0] for row in table_of(content)] == [
        "variant", *(row.text for row in all_of(page, "#forest-table tbody th"))
    ]  # fmt: skip


def saved_by_key(page: WebDriver, readout: str) -> tuple[str, bytes]:
    def click() -> None:
        tab_to(page, f"[data-readout={readout}] .save:last-child")
        press(page, Keys.ENTER)

    return saved(page, click)


# To those who cannot see it, or not well


@pytest.fixture(scope="module")
def axe() -> str:
    spec = importlib.util.find_spec("axe_playwright_python")  # not imported: that would want a browser of its own
    if spec is None or spec.origin is None:
        pytest.skip("needs axe-core: pip install -e '.[dev]'")
    return (Path(spec.origin).parent / "axe.min.js").read_text()


@pytest.mark.parametrize("place", PLACES)
def test_axe_finds_no_serious_fault(page: WebDriver, url: str, axe: str, place: str) -> None:
    """Light and dark, with what is folded opened; but for the two tables of 241 rows, which take it seconds."""
    open_place(page, url, place)
    page.execute_script(
        """for (const each of document.querySelectorAll('main details')) {
          each.open = !each.closest('[data-readout=activations], [data-readout=slope]');
        }"""
    )
    page.execute_script(axe)
    try:
        for scheme in ("light", "dark"):
            media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            page.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
            found = page.execute_async_script("axe.run({ resultTypes: ['violations'] }).then(arguments[0])")
            assert len(found["passes"]) > 15
            faults = [
                f"{each['id']} ({each['impact']}): {each['help']}: {[node['html'][:160] for node in each['nodes'][:3]]}"
                for each in found["violations"]
                if each["impact"] in ("serious", "critical")
            ]
            assert faults == [], scheme
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_axe_finds_a_fault_where_there_is_one(page: WebDriver, url: str, axe: str) -> None:
    open_place(page, url, "studies")
    page.execute_script("document.querySelector('main').append(document.createElement('input'))")
    page.execute_script(axe)
    found = page.execute_async_script("axe.run().then(arguments[0])")
    assert "label" in {each["id"] for each in found["violations"]}


@pytest.mark.parametrize("place", PLACES)
def test_nothing_scrolls_sideways_on_a_phone(page: WebDriver, url: str, place: str) -> None:
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        open_place(page, url, place)
        page.execute_script("for (const each of document.querySelectorAll('main details')) each.open = true")
        assert page.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_who_wants_no_motion_gets_no_play_button(page: WebDriver, url: str) -> None:
    calm = {"features": [{"name": "prefers-reduced-motion", "value": "reduce"}]}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", calm)
    try:
        open_place(page, url, "moons")
        assert not page.find_element(By.ID, "play").is_displayed()
        assert page.find_element(By.ID, "epoch").is_displayed()
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


# Step by step


def test_a_step_asks_with_the_ids_of_the_prompt_and_the_token(page: WebDriver, url: str) -> None:
    """Ids, so that what is asked is what was chosen, also where the text would be cut into other tokens."""
    open_place(page, url, "next-token?prompt=if x&models=gelu&top_k=300")
    ids = post(url, "/v1/tokenize", {"prompt": "if x"})["tokens"]
    half = next(row for row in all_of(page, ".top tr") if "F" in row.find_element(By.TAG_NAME, "code").text[:1])
    chosen = int(half.get_attribute("data-id"))
    half.find_element(By.CLASS_NAME, "step").send_keys(Keys.ENTER)
    until(page, lambda: hash_fields(page).get("steps") == [str(chosen)] and all_of(page, "#trail li"))
    expected = post(url, "/v1/next-token", {"model": "gelu", "prompt": [*ids, chosen], "top_k": 300})["results"][0]
    until(page, lambda: f"{len(ids) + 1} tokens in" in page.find_element(By.CSS_SELECTOR, ".panel .facts").text)
    assert [int(row.get_attribute("data-id")) for row in all_of(page, ".top tr")] == [e["id"] for e in expected["top"]]
    shown = post(url, "/v1/detokenize", {"tokens": [*ids, chosen]})
    assert page.find_element(By.ID, "prompt").get_attribute("value") == shown["prompt"]
    page.back()
    until(page, lambda: "steps" not in hash_fields(page) and not page.find_element(By.ID, "trail").is_displayed())
    assert page.find_element(By.ID, "prompt").get_attribute("value") == "if x"


def test_what_is_typed_after_steps_is_text_again(page: WebDriver, url: str) -> None:
    open_place(page, url, "next-token")
    whole = page.find_element(By.ID, "prompt").get_attribute("value")
    assert (
        whole
        == post(url, "/v1/detokenize", {"tokens": [*post(url, "/v1/tokenize", {"prompt": "if x"})["tokens"], 20, 21]})[
            "prompt"
        ]
    )
    page.find_element(By.ID, "prompt").send_keys(Keys.END, "!")
    until(page, lambda: hash_fields(page) and hash_fields(page)["prompt"] == [f"{whole}!"])
    until(page, lambda: not page.find_element(By.ID, "trail").is_displayed())
    assert "steps" not in hash_fields(page)


def test_variants_of_different_tokenizers_take_no_step_together(page: WebDriver, url: str) -> None:
    other = """const real = window.fetch;
        window.fetch = async (path, options) => {
          const answer = await real(path, options);
          if (path !== '/v1/models') return answer;
          const body = await answer.json();
          body.data.find(({ id }) => id === 'swiglu').files['tokenizer.json'] = 'another';
          return new Response(JSON.stringify(body));
        };"""
    script = page.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": other})
    try:
        open_place(page, url, "next-token?prompt=if x&models=gelu,swiglu")
        all_of(page, ".step")[0].send_keys(Keys.ENTER)
        until(page, lambda: "share a tokenizer" in page.find_element(By.ID, "ask-error").text)
        page.find_element(By.CSS_SELECTOR, "#variants input[value=swiglu]").send_keys(Keys.SPACE)
        until(page, lambda: all_of(page, "#trail li") and not page.find_element(By.ID, "ask-error").is_displayed())
    finally:
        page.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


def test_what_is_typed_while_a_step_is_under_way_stays(page: WebDriver, url: str) -> None:
    open_place(page, url, "next-token?prompt=if x&models=gelu")
    page.execute_script(
        """const real = window.fetch;
        window.free = () => {};
        const held = new Promise((resolve) => (window.free = resolve));
        window.fetch = async (path, options) => {
          if (path === '/v1/detokenize') await held;
          return real(path, options);
        };"""
    )
    all_of(page, ".step")[0].send_keys(Keys.ENTER)
    until(page, lambda: "steps" in hash_fields(page))
    # In one task: the answer is there before the pause after the key is over.
    page.execute_script(
        """const box = document.getElementById('prompt');
        box.value = 'if xy';
        box.dispatchEvent(new Event('input', { bubbles: true }));
        window.free();"""
    )
    until(page, lambda: hash_fields(page)["prompt"] == ["if xy"] and page.find_element(By.ID, "prompt").is_displayed())
    until(page, lambda: page.find_element(By.ID, "answer").get_attribute("aria-busy") == "false")
    assert page.find_element(By.ID, "prompt").get_attribute("value") == "if xy"
    assert "steps" not in hash_fields(page)


def test_a_step_that_is_no_token_is_no_fault_of_the_tokens_asked_for(page: WebDriver, url: str) -> None:
    page.get(f"{url}/#next-token?prompt=if x&models=gelu&steps=999999")
    until(page, lambda: "The steps behind the prompt: " in page.find_element(By.ID, "ask-error").text)
    for box in ("tokens", "prompt", "top-k"):
        assert page.find_element(By.ID, box).get_attribute("aria-invalid") == "false"
    page.get_log("browser")  # of the 422 a browser says so


def test_a_token_that_looks_like_markup_is_drawn_letter_by_letter(page: WebDriver, url: str) -> None:
    open_place(page, url, "study")
    names = ["<b>x</b>", "<br>", "&lt;", "a & b"]
    drawn = page.execute_async_script(
        """const [names, done] = arguments;
        const chart = { type: 'chart', name: 'n', title: 't', x_label: '<i>', y_label: 'p', kind: 'points', lines: [
          { name: '<u>', x: names, y: [1, 2, 3, 4] }] };
        const plot = document.getElementById('study').appendChild(document.createElement('div'));
        import('/page/study-charts.js').then(async ({ draw, tableOf }) => {
          await draw(plot, chart);
          const text = (css) => [...plot.querySelectorAll(css)].map((each) => each.textContent);
          done([text('.xtick text'), text('.xtitle'), tableOf(chart).rows.map(([name]) => name)]);
        });""",
        names,
    )
    assert drawn == [names, ["<i>"], names]


def test_tokens_asked_for_have_the_api_s_ranks_and_a_wrong_one_is_said(page: WebDriver, url: str) -> None:
    open_place(page, url, "next-token?prompt=if x&models=gelu&top_k=3&tokens=" + urllib.parse.quote('17, x, " "'))
    [result] = post(url, "/v1/next-token", {"model": "gelu", "prompt": "if x", "top_k": 3, "tokens": [17, "x", " "]})[
        "results"
    ]
    shown = [
        (int(row.get_attribute("data-id")), int(row.find_element(By.CLASS_NAME, "rank").text))
        for row in all_of(page, ".chosen tr[data-id]")
    ]
    assert shown == [(entry["id"], entry["rank"]) for entry in result["chosen"]]
    box = page.find_element(By.ID, "tokens")
    for typed, said in ((', " ab', "no text in quotes"), ('"', "exactly one token")):
        box.send_keys(typed)
        until(page, lambda said=said: said in page.find_element(By.ID, "ask-error").text)
        assert box.get_attribute("aria-invalid") == "true"
    page.get_log("browser")  # of the 422 a browser says so


# Activations


def test_a_card_says_what_was_measured_and_whether_it_runs_fused(page: WebDriver, url: str) -> None:
    open_place(page, url, "activations")
    cards = {card.get_attribute("data-name"): card.text for card in all_of(page, ".card")}
    assert "0.9000 ns fused" in cards["gelu"]
    assert "1.980 ± 0.004" in cards["gelu"]
    assert cards["tanh"].count("not measured") == 2
    served = {model["id"]: model["audit"]["activation"] for model in get(f"{url}/v1/models")["data"]}
    said = {"fused": "fused", "inlined": "not fused"}
    assert f"Served as gelu ({said[served['gelu']]}), gelu-sigmoid-head" in cards["gelu"]
    unfused = {each["name"]: each["unfused"] for each in get(f"{url}/v1/activations")["data"]}
    for name in ("tanh", "softmax"):
        assert ("would not run fused" if unfused[name] else "can be fused") in cards[name]


def test_they_are_ordered_by_quality_and_the_link_says_so(page: WebDriver, url: str) -> None:
    open_place(page, url, "activations?sort=quality&show=relu")
    names = [card.get_attribute("data-name") for card in all_of(page, ".card")]
    assert names[:3] == ["gelu", "relu", "sigmoid"]
    assert page.find_element(By.ID, "unmeasured").text == f"{len(names) - 3} not measured, last"
    _, content = save(page, "activations-measured", "CSV")
    rows = table_of(content)
    assert [row[0] for row in rows[1:]] == names
    assert rows[1][rows[0].index("bits per byte")] == "1.98"


def test_where_a_single_one_saturates_is_shaded(page: WebDriver, url: str) -> None:
    open_place(page, url, "activations?show=sigmoid")
    curve = next(each["curve"] for each in get(f"{url}/v1/activations")["data"] if each["name"] == "sigmoid")
    flat = [x for x, slope in zip(curve["x"], curve["slope"], strict=True) if abs(slope) <= 0.05 * 0.25]
    shades = "return document.getElementById('plot-y').layout.shapes.map(({ x0, x1 }) => [x0, x1])"
    left, right = page.execute_script(shades)
    assert left == [-6, max(x for x in flat if x < 0)]
    assert right == [min(x for x in flat if x > 0), 6]
    page.find_element(By.CSS_SELECTOR, ".card[data-name=tanh] input").send_keys(Keys.SPACE)
    until(page, lambda: page.execute_script(shades) == [])


def test_a_slope_that_only_crosses_zero_is_not_shaded(page: WebDriver, url: str) -> None:
    open_place(page, url, "studies")
    found = page.execute_async_script(
        """import('/page/saturation.js').then(({ saturated }) => {
          const x = Array.from({ length: 41 }, (_, i) => (i - 20) / 10);
          arguments[0]([x.map((at) => at), x.map((at) => Math.max(0, at)), x.map(() => 0), x.map(() => null)]
            .map((slope) => saturated({ x, slope })));
        });"""
    )
    assert found == [[], [[-2, 0.1]], [[-2, 2]], []]


def test_a_link_to_quality_leads_to_what_is_served(page: WebDriver, url: str) -> None:
    page.get(f"{url}/#quality")
    until(page, lambda: focused(page, "#served-title"))
    assert page.find_element(By.ID, "view-activations").is_displayed()
    assert len(all_of(page, "table.quality tbody tr")) == 3


# Studies


def test_a_study_is_shown_whole(page: WebDriver, url: str) -> None:
    open_place(page, url, "study")
    found = get(f"{url}/v1/studies/vanishing")
    text = page.find_element(By.ID, "study").text
    for said in (*(found["claim"][name] for name in ("title", "statement", "source", "refuted_by")), found["sentence"]):
        assert said in text
    assert page.find_element(By.CSS_SELECTOR, "#study .verdict-badge").text == found["verdict"]
    rows = [[cell.text for cell in all_of(row, "th, td")] for row in all_of(page, ".beside tbody tr")]
    assert rows == [
        ["ratio of the gradients", "27", "20", "agrees"],
        ["accuracy", "87 %", "79 %", "does not agree"],
        ["seeds", "20", "–", ""],
    ]
    traces = page.execute_script(
        "return document.getElementById('chart-by-depth').data.map(({ name, x, y }) => [name, x, y])"
    )
    (_, x, y), (_, *line), (_, *dashed) = traces
    sigmoid, relu = CHARTS[0]["lines"]
    assert (x, y) == ([2, 4, 8, 8, 4, 2], [*sigmoid["high"], *reversed(sigmoid["low"])])
    assert [line, dashed] == [[each["x"], each["y"]] for each in (sigmoid, relu)]


def test_every_chart_is_read_as_a_table_and_saved(page: WebDriver, url: str) -> None:
    open_place(page, url, "study")
    for chart in CHARTS:
        name, content = save(page, f"vanishing-{chart['name']}", "CSV")
        assert name == f"vanishing-{chart['name']}.csv"
        [heading, *rows] = table_of(content)
        folded = page.find_element(By.CSS_SELECTOR, f"[data-readout=vanishing-{chart['name']}] details")
        folded.find_element(By.TAG_NAME, "summary").send_keys(Keys.ENTER)
        listed = until(page, lambda folded=folded: all_of(folded, "tbody tr"))
        assert [cell.get_attribute("textContent") for cell in all_of(folded, "thead th")] == heading
        assert len(listed) == len(rows)
        if chart["type"] == "field":
            assert [[float(value) for value in row[1:]] for row in rows] == chart["z"]
        else:
            first = chart["lines"][0]
            assert [float(row[1]) for row in rows] == first["y"]
            assert [row[0] for row in rows] == [str(x) for x in first["x"]]
    _, svg = save(page, "vanishing-by-depth", "SVG")
    assert svg.startswith(b"<svg")
    assert "First layer’s gradient by depth" in svg.decode()
    assert svg.count(b"legendtext") >= 2
    _, png = save(page, "vanishing-by-depth", "PNG")
    assert png.startswith(b"\x89PNG")


def test_a_point_s_own_name_is_in_the_table_and_under_the_pointer(page: WebDriver, url: str) -> None:
    open_place(page, url, "study")
    table, said, hover = page.execute_async_script(
        """const done = arguments[0];
        const chart = { type: 'chart', name: 'n', title: 't', x_label: 'x', y_label: 'y', kind: 'points', lines: [
          { name: 'fused', x: [1, 2], y: [3, 4], names: ['relu', 'silu'] },
          { name: 'roof', x: [1], y: [5], names: null, dashed: true }] };
        const plot = document.getElementById('study').appendChild(document.createElement('div'));
        import('/page/study-charts.js').then(async ({ draw, tableOf }) => {
          await draw(plot, chart);
          done([tableOf(chart), plot.data[0].customdata, plot.data[0].hovertemplate]);
        });"""
    )
    assert table["columns"] == ["line", "point", "x", "y"]
    assert table["rows"] == [["fused", "relu", 1, 3], ["fused", "silu", 2, 4], ["roof", None, 1, 5]]
    assert said == ["relu", "silu"]
    assert "%{customdata}" in hover


def test_points_at_one_place_are_all_in_the_table(page: WebDriver, url: str) -> None:
    open_place(page, url, "studies")
    table = page.execute_async_script(
        """import('/page/readout.js').then(({ tableOf }) => arguments[0](tableOf('intensity', [
          { name: 'fused', x: [2.5, 2.5, 0.25], y: [7, 5, 3], low: [6, 4, 2] },
          { name: 'bound', x: [2.5], y: [9] }], 'GFLOP/s')));"""
    )
    assert table == {
        "columns": ["line", "intensity", "GFLOP/s", "low"],
        "rows": [["fused", 2.5, 7, 6], ["fused", 2.5, 5, 4], ["fused", 0.25, 3, 2], ["bound", 2.5, 9, None]],
    }


def text_of_vanishing(page: WebDriver) -> list[str]:
    assert page.find_element(By.CSS_SELECTOR, "#study .verdict-badge").is_displayed()
    return [row.find_element(By.TAG_NAME, "th").text for row in all_of(page, ".beside tbody tr")]


def test_without_plotly_a_study_is_read_all_the_same(page: WebDriver, url: str) -> None:
    page.execute_cdp_cmd("Network.enable", {})
    page.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*plotly.min.js*"]})
    try:
        page.get(f"{url}/#studies?study=vanishing")
        until(page, lambda: "Plotly's script" in page.find_element(By.ID, "studies-error").text)
        assert text_of_vanishing(page) == ["ratio of the gradients", "accuracy", "seeds"]
        until(page, lambda: hash_fields(page) == {"study": ["vanishing"]})
    finally:
        page.execute_cdp_cmd("Network.setBlockedURLs", {"urls": []})
        page.get_log("browser")  # of the script that was not given a browser says so


def test_a_damaged_chart_leaves_the_rest_of_its_study(page: WebDriver, url: str) -> None:
    damage = """const real = window.fetch;
        window.fetch = async (path, options) => {
          const answer = await real(path, options);
          if (path !== '/v1/studies/vanishing') return answer;
          const body = await answer.json();
          delete body.charts[0].lines;
          body.charts[1].lines[0].y = null;
          return new Response(JSON.stringify(body));
        };"""
    script = page.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": damage})
    try:
        open_place(page, url, "study")
        assert text_of_vanishing(page) == ["ratio of the gradients", "accuracy", "seeds"]
        assert "First layer’s gradient by depth” is damaged" in page.find_element(By.ID, "study").text
        assert page.find_element(By.ID, "studies-error").text
    finally:
        page.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


@pytest.mark.parametrize(
    ("place", "readout"),
    [
        ("activations", "activations"),
        ("activations", "slope"),
        ("moons", "moons-relu"),
        ("compare", "comparison-rounds"),
        ("compare", "comparison-sweep"),
    ],
)
def test_charts_of_the_other_places_are_saved_too(page: WebDriver, url: str, place: str, readout: str) -> None:
    open_place(page, url, place)
    name, png = save(page, readout, "PNG")
    assert name == f"{readout}.png"
    assert png.startswith(b"\x89PNG")


def test_an_answer_is_saved_as_the_api_gave_it(page: WebDriver, url: str) -> None:
    open_place(page, url, "next-token?prompt=if x&models=gelu,swiglu&top_k=4&tokens=17")
    results = post(url, "/v1/next-token", {"model": ["gelu", "swiglu"], "prompt": "if x", "top_k": 4, "tokens": [17]})[
        "results"
    ]
    [heading, *rows] = table_of(save(page, "next-token", "CSV")[1])
    listed = [
        (result["model"], why, entry)
        for result in results
        for key, why in (("top", ""), ("chosen", "yes"))
        for entry in result[key]
    ]
    assert len(rows) == len(listed) == 10
    for row, (model, why, entry) in zip(rows, listed, strict=True):
        cells = dict(zip(heading, row, strict=True))
        assert (cells["variant"], cells["asked for"], cells["id"]) == (model, why, str(entry["id"]))
        assert json.loads(cells["text"]) == entry["text"]
        assert float(cells["sigmoid"]) == pytest.approx(entry["sigmoid"], rel=1e-4)


def test_the_boundary_is_that_of_the_epoch_in_the_link(page: WebDriver, url: str) -> None:
    open_place(page, url, "moons")

    def corners() -> list[float]:
        read = "(id) => { const { z } = document.getElementById(id).data[0];"
        read += " return [z.length, z[0].length, z[0][0] * 255] }"
        return page.execute_script(f"return ['moons-sigmoid', 'moons-relu'].map({read})")

    at = EPOCHS.index(400)
    assert corners() == [[ROWS, COLUMNS, pytest.approx(at)], [ROWS, COLUMNS, pytest.approx(10 + at)]]
    captions = [each.text for each in all_of(page, ".moons figcaption")]
    assert captions == ["sigmoid loss 0.280, accuracy 87.0 %", "relu loss 0.080, accuracy 96.0 %"]
    page.find_element(By.ID, "epoch").send_keys(Keys.HOME)
    until(page, lambda: corners()[1] == [ROWS, COLUMNS, pytest.approx(10)])
    assert page.find_element(By.ID, "epoch").get_attribute("aria-valuetext") == "epoch 0"
    assert hash_fields(page) == {"study": ["moons"], "epoch": ["0"]}


def test_the_list_has_every_verdict(page: WebDriver, url: str) -> None:
    open_place(page, url, "studies")
    shown = [(each.find_element(By.TAG_NAME, "a").text, each.find_element(By.CLASS_NAME, "verdict-badge").text)
             for each in all_of(page, "#studies-list li")]  # fmt: skip
    data = get(f"{url}/v1/studies")["data"]
    assert shown == [(f"{each['claim']['number']}. {each['claim']['title']}", each["verdict"]) for each in data]
    assert len(data) == 4


def test_a_link_to_no_study_says_which_there_are(page: WebDriver, url: str) -> None:
    page.get(f"{url}/#studies?study=monos")
    until(page, lambda: "did you mean 'moons'?" in page.find_element(By.ID, "studies-error").text)
    page.get_log("browser")  # of an answer of 404 a browser says so


def test_without_studies_the_page_says_how_to_have_them(page: WebDriver, url: str) -> None:
    open_place(page, url, "studies")
    page.execute_script(
        """const real = window.fetch;
        window.fetch = (path, options) => path === '/v1/studies'
          ? Promise.resolve(new Response('{"data": [], "damaged": [{"name": "cost", "reason": "cost.json is none"}]}'))
          : real(path, options);
        location.hash = '#activations';"""
    )
    page.execute_script("location.hash = '#studies'")
    until(page, lambda: "actuary study all" in page.find_element(By.ID, "studies-none").text)
    assert "cost.json is none" in page.find_element(By.ID, "studies-none").text
