"""The page in headless Chromium: what it shows is what the API answers, and nothing comes from outside."""

from __future__ import annotations

import json
import re
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import NEEDED, chromium

pytest.importorskip("selenium.webdriver")
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

pytestmark = [pytest.mark.browser, NEEDED]

PATIENCE_S = 90  # a hang, not a busy machine: Plotly's 4.8 MB take about one second, Locust's start and a verdict ten
SHOWN_DIGITS = 5e-5  # four decimals are shown, the exact value stands in <data value>
MASS_RTOL = 1e-3  # four significant digits are shown
ENTROPY_ATOL = 0.0051  # two decimals are shown
OUTSIDE = re.compile(r"""["'`(]\s*((?:https?:)?//[^\s"'`)$]+)""")  # in quotes or in url(); with http or without
BAR_ATOL = 0.02  # of the bar's width: one of its 50 pixels


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture
def page(browser: WebDriver, server_url: str) -> Iterator[WebDriver]:
    """The page at `/`, answered once. Afterwards: no error in the log, nothing fetched from elsewhere."""
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get(f"{server_url}/")
    until(browser, lambda: panels(browser))
    yield browser
    log = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    # A browser logs each answer of 4xx; the 422 that a test provokes is not an error of the page.
    assert [each["message"] for each in log if "/v1/next-token" not in each["message"]] == []
    assert all("status of 422" in each["message"] for each in log)
    urls = fetched(browser)
    assert len(urls) > 5
    assert [url for url in urls if not url.startswith((f"{server_url}/", "data:", "blob:"))] == []


def until(browser: WebDriver, condition):
    """A part that is drawn anew between two looks at it is looked at again."""
    wait = WebDriverWait(browser, PATIENCE_S, 0.05, (NoSuchElementException, StaleElementReferenceException))
    return wait.until(lambda _: condition())


def all_of(inside: WebDriver | WebElement, css: str) -> list[WebElement]:
    return inside.find_elements(By.CSS_SELECTOR, css)


def panels(browser: WebDriver) -> dict[str, WebElement]:
    """The panels by variant, once the page waits for no answer."""
    if browser.find_element(By.ID, "answer").get_attribute("aria-busy") == "true":
        return {}
    return {panel.get_attribute("data-model"): panel for panel in all_of(browser, ".panel")}


def type_prompt(browser: WebDriver, text: str) -> None:
    box = browser.find_element(By.ID, "prompt")
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(text)
    # The address is written when the request leaves, so the answer that follows is to this prompt.
    until(browser, lambda: hash_fields(browser)["prompt"] == [text] and panels(browser))


def hash_fields(browser: WebDriver) -> dict[str, list[str]]:
    query = urllib.parse.urlsplit(browser.current_url).fragment.partition("?")[2]
    return urllib.parse.parse_qs(query, keep_blank_values=True)


def fetched(browser: WebDriver) -> list[str]:
    return browser.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)")


def shown_error(browser: WebDriver) -> str:
    return browser.find_element(By.ID, "ask-error").text


def get(url: str) -> dict:
    with urllib.request.urlopen(url) as answer:
        return json.load(answer)


def next_token(server_url: str, models: list[str], prompt: str, top_k: int = 10) -> list[dict]:
    body = json.dumps({"model": models, "prompt": prompt, "top_k": top_k}).encode()
    request = urllib.request.Request(f"{server_url}/v1/next-token", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["results"]


def assert_shows(panel: WebElement, result: dict) -> None:
    """Every number of the panel is the API's, and each bar is as long as its number says."""
    for name, field, tolerance in (
        ("mass", "mass", {"rel": MASS_RTOL}),
        ("entropy", "entropy_bits", {"abs": ENTROPY_ATOL}),
    ):
        cells = all_of(panel, f"[data-sum={name}] td")
        for cell, kind in zip(cells, ("softmax", "sigmoid"), strict=True):
            assert float(cell.text) == pytest.approx(result[kind][field], **tolerance)
    rows = all_of(panel, ".top tr")
    assert [int(row.get_attribute("data-id")) for row in rows] == [entry["id"] for entry in result["top"]]
    for row, entry in zip(rows, result["top"], strict=True):
        for kind in ("softmax", "sigmoid"):
            number = row.find_element(By.CSS_SELECTOR, f".bar.{kind} data")
            assert float(number.get_attribute("value")) == pytest.approx(entry[kind], rel=1e-5)
            assert float(number.text) == pytest.approx(entry[kind], abs=SHOWN_DIGITS, rel=0.05)
            bar = row.find_element(By.CSS_SELECTOR, f".bar.{kind} .track")
            percent = re.search(r"([\d.e-]+)%", bar.value_of_css_property("background-size"))
            assert percent
            assert float(percent[1]) / 100 == pytest.approx(entry[kind], abs=BAR_ATOL)


def test_a_typed_prompt_shows_what_the_api_answers(page: WebDriver, server_url: str) -> None:
    assert page.find_element(By.ID, "prompt").get_attribute("value") == "if x is not"
    assert set(panels(page)) == {"gelu", "swiglu", "gelu-sigmoid-head"}
    type_prompt(page, "return self")
    results = next_token(server_url, list(panels(page)), "return self")
    assert len(results) == 3
    for result in results:
        assert_shows(panels(page)[result["model"]], result)
    assert float(page.find_element(By.ID, "round-trip").text) > 0


def test_another_variant_is_chosen_by_keyboard_and_the_address_restores_it(page: WebDriver, server_url: str) -> None:
    for box in all_of(page, "#variants input"):
        if (box.get_attribute("value") == "swiglu") != box.is_selected():
            box.send_keys(Keys.SPACE)
    until(page, lambda: list(panels(page)) == ["swiglu"])
    type_prompt(page, "import")
    address = page.current_url
    page.get("about:blank")
    page.get(address)
    until(page, lambda: list(panels(page)) == ["swiglu"])
    assert page.find_element(By.ID, "prompt").get_attribute("value") == "import"
    (result,) = next_token(server_url, ["swiglu"], "import")
    assert_shows(panels(page)["swiglu"], result)


def test_what_cannot_be_answered_is_said_beside_the_prompt(page: WebDriver) -> None:
    box = page.find_element(By.ID, "prompt")
    box.send_keys(" word" * 20)  # the context is 32 tokens
    until(page, lambda: "context" in shown_error(page))
    assert box.get_attribute("aria-invalid") == "true"
    assert box.get_attribute("aria-describedby") == "ask-error"
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(Keys.BACKSPACE)
    until(page, lambda: "Type a prompt" in shown_error(page))
    type_prompt(page, "x")
    until(page, lambda: shown_error(page) == "")
    assert box.get_attribute("aria-invalid") == "false"


def test_only_the_control_that_is_wrong_is_marked(page: WebDriver) -> None:
    """A number out of range is no fault of the prompt, an emptied one is not 0, and a dead service is nobody's."""
    prompt, top_k = (page.find_element(By.ID, name) for name in ("prompt", "top-k"))

    def marked() -> list[bool]:
        return [each.get_attribute("aria-invalid") == "true" for each in (prompt, top_k)]

    assert top_k.get_attribute("aria-describedby") == "ask-error"
    top_k.send_keys(Keys.CONTROL, "a")
    top_k.send_keys("5000")
    until(page, lambda: "top_k 5000" in shown_error(page))
    assert marked() == [False, True]
    top_k.send_keys(Keys.CONTROL, "a")
    top_k.send_keys(Keys.BACKSPACE)
    until(page, lambda: "give a number from 1 to 100" in shown_error(page))
    assert marked() == [False, True]
    top_k.send_keys("5")
    until(page, lambda: not shown_error(page) and panels(page))
    assert marked() == [False, False]
    page.execute_script("window.fetch = () => Promise.reject(new TypeError('no network'))")
    prompt.send_keys("x")
    until(page, lambda: "still running" in shown_error(page))
    assert marked() == [False, False]


def test_a_link_to_what_is_not_served_says_so(page: WebDriver, server_url: str) -> None:
    page.get("about:blank")
    page.get(f"{server_url}/#next-token?prompt=a&models=swiglu,nothing")
    until(page, lambda: list(panels(page)) == ["swiglu"])
    assert "not served here: nothing" in page.find_element(By.ID, "answer-status").text
    page.find_element(By.ID, "prompt").send_keys("b")
    until(page, lambda: not all_of(page, "#notice") and panels(page))
    page.get("about:blank")
    page.get(f"{server_url}/#activations?show=gelu,nothing")
    until(
        page, lambda: page.find_element(By.ID, "activations-error").text == "The address names no activation: nothing."
    )


def test_a_panel_says_what_its_own_variant_took(page: WebDriver) -> None:
    """Not the queue, nor the total: the first variant's inference is in the second's of both."""
    assert len(panels(page)) == 3
    for panel in panels(page).values():
        assert re.fullmatch(r"inference [\d.]+ ms", panel.find_element(By.CSS_SELECTOR, ".timing").text)


def test_a_request_that_is_superseded_is_aborted(page: WebDriver) -> None:
    page.execute_script(
        """const real = window.fetch;
        window.signals = [];
        window.fetch = (url, options) => new Promise((resolve, reject) => {
          signals.push(options.signal);
          options.signal.addEventListener('abort', () => reject(options.signal.reason));
          if (signals.length > 1) real(url, options).then(resolve, reject);  // the first one is never answered
        });"""
    )
    box = page.find_element(By.ID, "prompt")
    box.send_keys("a")
    until(page, lambda: page.execute_script("return signals.length") == 1)
    assert page.find_element(By.ID, "answer").get_attribute("aria-busy") == "true"
    assert all_of(page, ".panel"), "the last answer stays until the next is there"
    box.send_keys("b")
    until(page, lambda: page.execute_script("return signals.length") == 2 and panels(page))
    assert page.execute_script("return signals.map((signal) => signal.aborted)") == [True, False]
    assert shown_error(page) == ""


def test_blanks_in_tokens_are_visible(page: WebDriver) -> None:
    tokens = [{"text": text} for text in (" None", "\n        ", "\t\t", "a b")]
    tokens.append({"text": "\ufffd", "bytes": [0xF9, 7]})
    shown = page.execute_async_script(
        """const [tokens, done] = arguments;
        const pieces = (token, visible) => visible(token).map((piece) => piece.textContent ?? piece);
        import('/page/text.js').then(({ visible }) =>
          done(tokens.map((token) => pieces(token, visible).join('|'))));""",
        tokens,
    )
    assert shown == ["␣|None", "↵|␣×8", "⇥⇥", "a|␣|b", "F9 07"]


def test_every_activation_is_drawn(page: WebDriver, server_url: str) -> None:
    known = get(f"{server_url}/v1/activations")["data"]
    assert not any("plotly" in url for url in fetched(page)), "Plotly is fetched before it is needed"
    page.find_element(By.LINK_TEXT, "Activations").click()
    until(page, lambda: page.find_element(By.ID, "cards").get_attribute("data-drawn"))
    assert f"{server_url}/assets/plotly.min.js" in fetched(page)
    drawn = page.execute_script(
        """const lines = (card) => [...card.querySelectorAll('.scatterlayer path.js-line')];
        return [...document.querySelectorAll('.card')].map((card) => [
          card.dataset.name, card.querySelector('.formula').textContent,
          lines(card).filter((line) => line.getTotalLength() > 20).length]);"""
    )
    assert drawn == [[each["name"], each["formula"], 2] for each in known]

    legend = [button.get_attribute("value") for button in all_of(page, "#legend button")]
    other = next(each["name"] for each in known if each["name"] not in legend)
    page.find_element(By.CSS_SELECTOR, f'.card input[value="{other}"]').send_keys(Keys.SPACE)
    for plot in ("plot-y", "plot-slope"):
        names = f"return document.getElementById('{plot}').data.map(({{ name }}) => name)"
        until(page, lambda names=names: page.execute_script(names) == [*legend, other])
    assert hash_fields(page)["show"] == [",".join([*legend, other])]


def test_quality_lists_every_variant(page: WebDriver, server_url: str) -> None:
    page.find_element(By.LINK_TEXT, "Activations").click()
    rows = until(page, lambda: all_of(page, "table.quality tbody tr"))
    models = get(f"{server_url}/v1/models")["data"]
    assert {row.get_attribute("data-model") for row in rows} == {model["id"] for model in models}
    for row in rows:
        (model,) = (model for model in models if model["id"] == row.get_attribute("data-model"))
        assert model["formula"] in row.text
        assert f"{model['parameters']:,}" in row.text


@pytest.mark.parametrize("view", ["next-token", "activations", "studies", "compare"])
def test_nothing_scrolls_sideways_on_a_phone(page: WebDriver, view: str) -> None:
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True},
    )
    try:
        page.find_element(By.CSS_SELECTOR, f'nav [data-view="{view}"]').click()
        if view == "activations":
            until(page, lambda: page.find_element(By.ID, "cards").get_attribute("data-drawn"))
        assert page.find_element(By.ID, f"view-{view}").is_displayed()
        assert page.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_page_names_no_address_outside() -> None:
    """Only links to read on lead out; nothing that a browser would fetch by itself."""
    page = Path(__file__).parent.parent / "service" / "page"
    found = {address for file in page.iterdir() for address in OUTSIDE.findall(file.read_text())}
    assert found <= {"https://arxiv.org/abs/", "http://www.w3.org/2000/svg"}


@pytest.mark.parametrize(
    "text", ['src="//cdn.net/a.js"', "from 'https://a.b'", "url(//a.b/c)", "url( http://a.b )", "`//a`"]
)
def test_an_address_outside_is_recognized(text: str) -> None:
    assert OUTSIDE.search(text)
