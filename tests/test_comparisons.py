"""/v1/comparisons against real services and real runs of some seconds, and against folders of every kind."""

from __future__ import annotations

import fcntl
import http.client
import json
import signal
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest
from annotated_types import Le
from compare_runs import TRUTH, write_run
from conftest import serving
from kept_comparisons import Silent, keep
from starlette.testclient import TestClient

from loadtest.compare import store
from loadtest.compare.cli import compare
from loadtest.compare.design import Design
from loadtest.compare.progress import Written
from service.app import create_app
from service.comparisons import live
from service.comparisons.request import ComparisonRequest
from service.settings import Settings

PATIENCE_S = 300  # a hang, not a busy machine: Locust's start takes 3 s alone, judging and drawing as long
# At 5/s a block is of 2 s. On a machine with other work one of 0.15 s, as of a closed loop, may send nothing, and its
# round does not count.
SHORT = {"variants": ["gelu", "swiglu"], "baseline": "swiglu", "minutes": 0.1, "rate": 5}
LONG = {**SHORT, "minutes": 30}
PAIR = {name: TRUTH[name] for name in ("gelu", "swiglu")}


def until(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


def measured(url: str, name: str) -> dict[str, Any] | None:
    """All of a comparison, once a round of it is known; a short one may have ended by then."""
    found = httpx.get(f"{url}/v1/comparisons/{name}").json()
    rounds = (found["progress"] or {}).get("rounds")
    assert rounds or found["state"] == "running", found
    return found if rounds else None


def ended(url: str, name: str) -> dict[str, Any] | None:
    found = httpx.get(f"{url}/v1/comparisons/{name}").json()
    return None if found["state"] == "running" else found


def begin(url: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = httpx.post(f"{url}/v1/comparisons", json=body)
    assert answer.status_code == 201, answer.text
    return answer.json()


def children(process: Any) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


@pytest.fixture(scope="module")
def service(comparable: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any, Path]]:
    """A running service, its process, its folder of comparisons, which is not there yet."""
    folder = tmp_path_factory.mktemp("kept") / "compare"
    with serving(comparable, "--compare", str(folder)) as (url, process):
        yield url, process, folder


@pytest.fixture
def here(comparable: Path, tmp_path: Path) -> Iterator[tuple[TestClient, Path]]:
    """A service within this process, at an address where nobody listens, and its folder."""
    with TestClient(create_app(Settings(bundles=comparable, compare=tmp_path))) as client:
        yield client, tmp_path


def error_of(answer: Any) -> dict[str, Any]:
    body = answer.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert body["code"] == answer.status_code
    return body


def test_one_is_started_watched_and_read(service: tuple[str, Any, Path]) -> None:
    url, process, folder = service
    assert httpx.get(f"{url}/v1/comparisons").json() == {"object": "list", "data": [], "enabled": True, "why": ""}
    begun = begin(url, SHORT)
    assert (begun["state"], begun["mine"], begun["result"]) == ("running", True, None)
    assert (begun["baseline"], begun["models"]) == ("swiglu", ["gelu", "swiglu"])
    second = httpx.post(f"{url}/v1/comparisons", json=SHORT)
    assert second.status_code == 409
    assert begun["id"] in error_of(second)["message"]
    assert httpx.get(f"{url}/v1/comparisons/{begun['id']}/report").status_code == 404

    watched = until(lambda: measured(url, begun["id"]))
    p50 = watched["progress"]["p50_ms"]
    assert list(p50) == watched["progress"]["arms"] == ["swiglu", "gelu", "swiglu:again"]
    assert all(len(values) == watched["progress"]["rounds"] for values in p50.values())

    done = until(lambda: ended(url, begun["id"]))
    assert done["state"] == "done", done["said"]
    assert done["result"]["rounds"] == done["progress"]["rounds"] == len(done["progress"]["p50_ms"]["gelu"])
    assert [arm["model"] for arm in done["result"]["arms"]] == ["gelu"]
    assert done["design"]["rate"] == 5
    blocks = store.read(folder / done["id"]).blocks
    first = blocks.filter((blocks["arm"] == "gelu") & (blocks["round"] == 0))["p50_ms"][0]
    assert done["progress"]["p50_ms"]["gelu"][0] == pytest.approx(first, abs=5e-4)
    report = httpx.get(f"{url}/v1/comparisons/{begun['id']}/report")
    assert report.content == (folder / done["id"] / "report.html").read_bytes()
    assert report.headers["content-type"].startswith("text/html")
    ranged = httpx.get(f"{url}/v1/comparisons/{begun['id']}/report", headers={"range": "bytes=none"})
    assert (ranged.status_code, ranged.content) == (200, report.content)
    assert "sandbox" in report.headers["content-security-policy"]
    (listed,) = httpx.get(f"{url}/v1/comparisons").json()["data"]
    assert listed == {name: done[name] for name in listed}
    assert listed["sentences"] == [arm["sentence"] for arm in done["result"]["arms"]]
    assert children(process) == []


def test_one_that_is_stopped_is_judged_and_a_next_one_may_begin(service: tuple[str, Any, Path]) -> None:
    url, process, _ = service
    begun = begin(url, LONG)
    until(lambda: measured(url, begun["id"]))
    assert children(process)
    stopped = httpx.delete(f"{url}/v1/comparisons/{begun['id']}", timeout=PATIENCE_S).json()
    assert stopped["state"] == "stopped"
    assert stopped["result"]["ended"] == "interrupted"
    assert stopped["result"]["rounds"] >= 1
    assert stopped["report"]
    assert children(process) == []
    again = httpx.delete(f"{url}/v1/comparisons/{begun['id']}")
    assert again.json() == stopped
    newest = begin(url, {**LONG, "rate": None, "users": 3})
    assert [each["id"] for each in httpx.get(f"{url}/v1/comparisons").json()["data"]][:2] == [newest["id"], begun["id"]]
    at_once = httpx.delete(f"{url}/v1/comparisons/{newest['id']}", timeout=PATIENCE_S).json()
    assert (at_once["state"], at_once["result"]) == ("stopped", None)


def test_it_ends_before_the_service_that_is_told_to(comparable: Path, tmp_path: Path) -> None:
    with serving(comparable, "--compare", str(tmp_path)) as (url, process):
        begun = begin(url, LONG)
        until(lambda: measured(url, begun["id"]))
        left = children(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
        assert [child for child in left if child.is_running() and child.status() != psutil.STATUS_ZOMBIE] == []
    result = json.loads((tmp_path / begun["id"] / "result.json").read_text())
    assert result["ended"] == "interrupted"
    # That the client was too slow is said of a busy machine.
    said = [each for each in result["said"] if "client too slow" not in each]
    assert said == [], "the service refused requests before the comparison was told to stop"


def test_one_whose_service_was_killed_ends_and_shows_as_stopped(comparable: Path, tmp_path: Path) -> None:
    with serving(comparable, "--compare", str(tmp_path)) as (url, process):
        begun = begin(url, LONG)
        until(lambda: measured(url, begun["id"]))
        left = children(process)
        process.kill()
        psutil.wait_procs(left, timeout=PATIENCE_S)
        assert [child for child in left if child.is_running() and child.status() != psutil.STATUS_ZOMBIE] == []
    with TestClient(create_app(Settings(bundles=comparable, compare=tmp_path))) as client:
        found = client.get(f"/v1/comparisons/{begun['id']}").json()
        assert (found["state"], found["mine"]) == ("stopped", False)
        assert found["progress"]["rounds"] >= 1
        assert client.delete(f"/v1/comparisons/{begun['id']}").json() == found


def test_one_that_fails_says_why(here: tuple[TestClient, Path]) -> None:
    client, _ = here
    begun = client.post("/v1/comparisons", json=SHORT).json()

    def failed() -> dict[str, Any] | None:
        found = client.get(f"/v1/comparisons/{begun['id']}").json()
        return None if found["state"] == "running" else found

    found = until(failed)
    assert found["state"] == "failed"
    assert found["said"][0].startswith("no server answers at http://testserver:80")
    assert client.get("/v1/comparisons").json()["data"][0]["said"] == found["said"]


@pytest.mark.parametrize(
    ("change", "status", "param", "said"),
    [
        ({"variants": ["gelu"]}, 422, "variants", "two variants or more"),
        ({"variants": ["gelu", "gelu"]}, 422, "variants", "names 'gelu' twice"),
        ({"variants": "gelu,swiglu"}, 422, "variants", "a list of names"),
        ({"variants": None}, 422, "variants", "required"),
        ({"variants": ["gelu", "swigul"]}, 404, "model", "did you mean 'swiglu'?"),
        ({"baseline": "mish"}, 422, "baseline", "not among the variants gelu, swiglu"),
        ({"minutes": 0}, 422, "minutes", "greater than 0"),
        ({"minutes": "5"}, 422, "minutes", "valid number"),
        ({"users": 0}, 422, "users", "greater than or equal to 1"),
        ({"users": 10_001}, 422, "users", "less than or equal to 10000"),
        ({"users": 1.5}, 422, "users", "valid integer"),
        ({"rate": 0}, 422, "rate", "greater than 0"),
        ({"rate": 1e308}, 422, "rate", "less than or equal to 1000000"),
        ({"rate": 0.001, "minutes": 5}, 422, "rate", "rate 0.001 plans 0.3 requests in 5"),
        ({"equivalence": 1}, 422, "equivalence", "less than 1"),
        ({"url": "http://elsewhere"}, 422, None, "unknown field 'url'"),
    ],
)
def test_what_cannot_be_is_refused(
    here: tuple[TestClient, Path], change: dict[str, Any], status: int, param: str | None, said: str
) -> None:
    client, folder = here
    answer = client.post("/v1/comparisons", json={**SHORT, "baseline": None, **change})
    error = error_of(answer)
    assert (answer.status_code, error["param"]) == (status, param)
    assert said in error["message"]
    assert list(folder.iterdir()) == []


def test_its_limits_are_those_of_the_command() -> None:
    options = {option.name: option for option in compare.params}
    fields = ComparisonRequest.model_fields
    assert (options["users"].type.min, options["users"].type.max) == (1, 10_000)
    for name in ("minutes", "equivalence"):
        assert fields[name].default == options[name].default
    for name in ("minutes", "rate", "equivalence"):
        assert (options[name].type.min, options[name].type.min_open) == (0, True)
    for name in ("minutes", "rate"):
        [most] = [limit.le for limit in fields[name].metadata if isinstance(limit, Le)]
        assert most == options[name].type.max


def test_an_experiment_is_no_arm_and_its_record_stays_its_users(comparable: Path, tmp_path: Path) -> None:
    """It is said why, with what to name instead; its arms are compared as ever, and one that has ended is unknown."""
    settings = Settings(bundles=comparable, compare=tmp_path / "kept", database=str(tmp_path / "x.db"))
    with TestClient(create_app(settings)) as client:
        assert client.put("/v1/experiments/act", json={"arms": {"gelu": 1, "swiglu": 2}}).status_code == 201
        answer = client.post("/v1/comparisons", json={**SHORT, "variants": ["gelu", "act"], "baseline": "gelu"})
        assert (answer.status_code, error_of(answer)["param"]) == (422, "variants")
        for words in ("'act' is an experiment", "as its arms gelu, swiglu", "actuary compare --url"):
            assert words in error_of(answer)["message"]
        assert not (tmp_path / "kept").exists()
        assert sum(arm["exposures"] for arm in client.get("/v1/experiments/act").json()["arms"]) == 0
        assert client.delete("/v1/experiments/act").status_code == 200
        answer = client.post("/v1/comparisons", json={**SHORT, "variants": ["gelu", "act"], "baseline": "gelu"})
        assert answer.status_code == 404


@pytest.mark.parametrize("number", ["1e999", "NaN", "Infinity", "1e308"])
def test_numbers_that_are_none_are_refused(here: tuple[TestClient, Path], number: str) -> None:
    client, folder = here
    body = f'{{"variants": ["gelu", "swiglu"], "minutes": {number}}}'
    assert client.post("/v1/comparisons", content=body, headers={"content-type": "application/json"}).status_code in (
        400,
        422,
    )
    assert list(folder.iterdir()) == []


def test_a_form_of_another_site_starts_nothing(here: tuple[TestClient, Path]) -> None:
    """What a browser sends across sites without asking first: no JSON by its type."""
    client, folder = here
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        answer = client.post("/v1/comparisons", content=json.dumps(SHORT), headers={"content-type": kind})
        assert answer.status_code == 422
    assert list(folder.iterdir()) == []


def test_without_the_folder_it_is_off_and_says_how_to_have_it(server_url: str) -> None:
    listed = httpx.get(f"{server_url}/v1/comparisons").json()
    assert (listed["data"], listed["enabled"]) == ([], False)
    assert "--compare DIR" in listed["why"]
    for answer in (
        httpx.post(f"{server_url}/v1/comparisons", json=SHORT),
        httpx.get(f"{server_url}/v1/comparisons/x"),
        httpx.get(f"{server_url}/v1/comparisons/x/report"),
        httpx.delete(f"{server_url}/v1/comparisons/x"),
    ):
        assert answer.status_code == 503
        assert "--compare DIR" in error_of(answer)["message"]


def test_without_the_extra_old_ones_are_read_and_none_is_started(
    here: tuple[TestClient, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, folder = here
    keep(folder / "old", truth=PAIR, void=(), rounds=8)
    monkeypatch.setattr(live, "find_spec", lambda name: None if name == "polars" else name)
    listed = client.get("/v1/comparisons").json()
    assert [each["id"] for each in listed["data"]] == ["old"]
    assert "'polars'" in listed["why"]
    answer = client.post("/v1/comparisons", json=SHORT)
    assert answer.status_code == 503
    assert "pip install -e '.[load]'" in error_of(answer)["message"]


def test_what_others_left_is_listed_newest_first(here: tuple[TestClient, Path]) -> None:
    client, folder = here

    def started(at: str) -> Callable[[dict[str, Any]], None]:
        return lambda run: run.update(started=at)

    result = keep(folder / "b", truth=PAIR, void=(), rounds=8, change=started("2026-11-20T10:00:00+00:00"))
    keep(folder / "a", "interrupted", truth=PAIR, void=(), rounds=8, change=started("2026-11-21T10:00:00+00:00"))
    write_run(folder / "c", truth=PAIR, void=(), rounds=2, change=started("2026-11-22T10:00:00+00:00"))
    (folder / "no-run").mkdir()
    (folder / "file").touch()
    listed = client.get("/v1/comparisons").json()["data"]
    assert [(each["id"], each["state"]) for each in listed] == [("c", "stopped"), ("a", "stopped"), ("b", "done")]
    assert listed[2]["sentences"] == [arm["sentence"] for arm in result["arms"]]
    assert listed[2]["models"] == ["gelu", "swiglu"]
    assert client.get("/v1/comparisons/no-run").status_code == 404


def test_one_that_runs_on_a_terminal_is_seen_and_left_alone(here: tuple[TestClient, Path]) -> None:
    client, folder = here
    write_run(folder / "theirs", truth=PAIR, void=(), rounds=2)
    with store.locked(folder / "theirs"):
        assert client.get("/v1/comparisons/theirs").json()["state"] == "running"
        for answer in (client.delete("/v1/comparisons/theirs"), client.post("/v1/comparisons", json=SHORT)):
            assert answer.status_code == 409
            assert "theirs" in error_of(answer)["message"]
    assert client.get("/v1/comparisons/theirs").json()["state"] == "stopped"
    with (folder / "theirs" / "lock").open("w") as lock:  # looking did not take it
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_no_name_and_no_link_leads_out(here: tuple[TestClient, Path], tmp_path_factory: pytest.TempPathFactory) -> None:
    client, folder = here
    outside = tmp_path_factory.mktemp("outside")
    keep(outside / "run", truth=PAIR, void=(), rounds=8, drawn=True)
    (folder / "link").symlink_to(outside / "run")
    (folder / "loop").symlink_to(folder / "loop")
    keep(folder / "ours", truth=PAIR, void=(), rounds=8)
    for file in ("result.json", "report.html"):
        (folder / "ours" / file).unlink(missing_ok=True)
        (folder / "ours" / file).symlink_to(outside / "run" / file)
    (listed,) = client.get("/v1/comparisons").json()["data"]
    assert (listed["id"], listed["state"], listed["sentences"]) == ("ours", "failed", [])
    assert "link" in listed["said"][0]
    assert client.get("/v1/comparisons/ours/report").status_code == 404
    for name in ("link", "loop", "%2e%2e", "..%2foutside", "%2fetc", "a%00b", "a%0ab", "x" * 500, "%ff"):
        for path in (f"/v1/comparisons/{name}", f"/v1/comparisons/{name}/report"):
            assert client.get(path).status_code in (404, 405), path
            assert client.delete(path).status_code in (404, 405), path
    assert (outside / "run" / "report.html").exists()


def test_no_name_leads_out_over_a_socket(service: tuple[str, Any, Path]) -> None:
    """A client that mends no path."""
    url, _, folder = service
    folder.mkdir(exist_ok=True)
    (folder.parent / "run.json").write_text("{}")
    for name in ("..", "../compare", "%2e%2e", "%2e%2e%2f", "..%2f..%2f..%2fetc%2fpasswd", "....//"):
        connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc)
        connection.request("GET", f"/v1/comparisons/{name}")
        # 307: with a slash at its end, to the same without it.
        assert connection.getresponse().status in (404, 307), name
        connection.close()


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("result.json", "{", "result.json cannot be read"),
        ("result.json", "[1]", "holds no JSON object"),
        ("run.json", "\udcff", "run.json cannot be read"),
        ("run.json", '{"schema": 2, "kind": "compare"}', "another version: its schema is 2"),
        ("progress.json", "[" * 100_000, "progress.json cannot be read"),
        ("run.json", '{"schema": 1, "design": "x"}', "its design is 'x'"),
        ("run.json", '{"schema": 1, "started": 5}', "its started is 5"),
        ("result.json", '{"arms": 5}', "its arms is 5"),
    ],
)
def test_a_damaged_one_says_so_and_the_others_are_read(
    here: tuple[TestClient, Path], file: str, text: str, said: str
) -> None:
    client, folder = here
    keep(folder / "whole", truth=PAIR, void=(), rounds=8)
    keep(folder / "damaged", truth=PAIR, void=(), rounds=8)
    (folder / "damaged" / file).write_bytes(text.encode("utf-8", "surrogateescape"))
    states = {each["id"]: each["state"] for each in client.get("/v1/comparisons").json()["data"]}
    assert states == {"whole": "done", "damaged": "failed"}
    assert said in client.get("/v1/comparisons/damaged").json()["said"][0]


def test_a_number_that_json_lacks_is_null(here: tuple[TestClient, Path]) -> None:
    client, folder = here
    result = keep(folder / "old", truth=PAIR, void=(), rounds=8)
    result["aa"] |= {"low": float("nan"), "high": 123456.5}
    text = json.dumps(result).replace("123456.5", "1e999")
    (folder / "old" / "result.json").write_text(text)
    answer = client.get("/v1/comparisons/old")
    found = json.loads(answer.text, parse_constant=pytest.fail)["result"]["aa"]
    assert (found["low"], found["high"]) == (None, None)


def test_progress_tells_each_round_as_it_was_measured(tmp_path: Path) -> None:
    write_run(tmp_path, truth=PAIR, void=((1, "swiglu"),), rounds=3)
    run = store.read(tmp_path)
    progress = Written(tmp_path, Design.of_json(run.run["design"]), Silent())
    for number in (1, 2, 3):
        progress.finished(number, run.blocks.filter(run.blocks["round"] < number))
    progress.say("Locust hung up; started again in round 2")
    told = json.loads((tmp_path / "progress.json").read_text())
    assert (told["rounds"], told["arms"]) == (3, ["gelu", "swiglu", "gelu:again"])
    for arm, values in told["p50_ms"].items():
        expected = run.blocks.filter(run.blocks["arm"] == arm).sort("round")["p50_ms"]
        assert values == pytest.approx(expected.to_list(), abs=5e-4)
    assert told["void"] == [{"round": 1, "arm": "swiglu", "why": "client too slow"}]
    assert told["said"] == ["Locust hung up; started again in round 2"]
    assert not list(tmp_path.glob("*.part"))


def test_a_resumed_one_tells_the_rounds_of_before_too(tmp_path: Path) -> None:
    write_run(tmp_path, truth=PAIR, void=(), rounds=3)
    run = store.read(tmp_path)
    Written(tmp_path, Design.of_json(run.run["design"]), Silent()).finished(3, run.blocks)
    assert len(json.loads((tmp_path / "progress.json").read_text())["p50_ms"]["gelu"]) == 3
