"""Experiments over HTTP in this process: arms, headers, outcomes, verdicts, shadows, refusals; on both databases."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from conftest import HANG_S
from fastapi.testclient import TestClient
from scipy import special
from test_metrics import Scrape

from actuary import BadInput
from service.app import create_app
from service.experiments.database import Down
from service.experiments.definition import Assignment, Definition, read_file
from service.experiments.tables import exposures
from service.settings import Settings

TWO = {"arms": {"gelu": 1, "swiglu": 1}, "baseline": "gelu"}


def open_client(bundles: Path, database: str, **settings: Any) -> TestClient:
    app = create_app(Settings(bundles=bundles, provider="cpu", threads=1, database=database, **settings))
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture
def client(bundles: Path, database: str) -> Iterator[TestClient]:
    with open_client(bundles, database) as client:
        yield client


@pytest.fixture
def sqlite_client(bundles: Path, tmp_path: Path) -> Iterator[TestClient]:
    with open_client(bundles, str(tmp_path / "experiments.db")) as client:
        yield client


def put(client: TestClient, name: str = "act", **fields: Any) -> None:
    response = client.put(f"/v1/experiments/{name}", json={**TWO, **fields})
    assert response.status_code == 201, response.text


def ask(client: TestClient, key: str | None = None, **body: Any) -> Any:
    headers = {} if key is None else {"x-actuary-key": key}
    return client.post("/v1/next-token", json={"model": "act", "prompt": "if x", **body}, headers=headers)


def verdict(client: TestClient, name: str = "act") -> dict[str, Any]:
    response = client.get(f"/v1/experiments/{name}")
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def error(response: Any, status: int) -> str:
    assert response.status_code == status, response.text
    assert response.json()["error"]["code"] == status
    message: str = response.json()["error"]["message"]
    return message


# --- which arm ------------------------------------------------------------------------------------


def test_an_arm_answers_as_the_variant_does_and_says_which_it_is(client: TestClient) -> None:
    put(client)
    response = ask(client, "someone", top_k=3)
    arm = response.headers["x-arm"]
    assert response.headers["x-experiment"] == "act"
    assert len(response.headers["x-exposure-id"]) == 24
    [result] = response.json()["results"]
    [direct] = ask(client, model=arm, top_k=3).json()["results"]
    assert result.keys() == direct.keys()
    assert result["model"] == direct["model"] == arm
    for one, other in zip(result["top"], direct["top"], strict=True):  # the second time from the cache
        assert one["id"] == other["id"]
        assert one["logit"] == pytest.approx(other["logit"], abs=1e-5)
    for _ in range(5):
        assert ask(client, "someone").headers["x-arm"] == arm
    arms = {ask(client, f"key {n}").headers["x-arm"] for n in range(20)}
    assert arms == {"gelu", "swiglu"}
    assert "x-arm" not in ask(client, model="gelu").headers


def test_completions_are_split_by_header_or_user_streamed_or_not(client: TestClient) -> None:
    put(client)
    body = {"model": "act", "prompt": "if x", "max_tokens": 3, "temperature": 0, "user": "someone"}
    whole = client.post("/v1/completions", json=body)
    arm = whole.headers["x-arm"]
    assert whole.json()["model"] == arm
    streamed = client.post("/v1/completions", json={**body, "stream": True})
    assert streamed.headers["x-arm"] == arm
    events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    assert {event["model"] for event in events} == {arm}
    assert "".join(event["choices"][0]["text"] for event in events) == whole.json()["choices"][0]["text"]
    assert ask(client, "someone").headers["x-arm"] == arm, "the header and `user` are the same key"
    headers = {"x-actuary-key": next(k for k in map(str, range(99)) if ask(client, k).headers["x-arm"] != arm)}
    assert client.post("/v1/completions", json=body, headers=headers).headers["x-arm"] != arm, "the header goes first"
    assert {client.post("/v1/completions", json={**body, "user": None}).headers["x-arm"] for _ in range(20)} == {
        "gelu",
        "swiglu",
    }


def definition(name: str = "act", salt: str | None = None, **arms: float) -> Definition:
    return Definition(name, arms, next(iter(arms)), name if salt is None else salt)


def split(assignment: Assignment, keys: int = 20_000) -> list[str]:
    return [assignment.arm(b"%d" % key) for key in range(keys)]


@pytest.mark.parametrize("weights", [{"a": 1, "b": 1}, {"a": 1, "b": 3}, {"a": 5, "b": 3, "c": 2}, {"a": 1, "b": 99}])
def test_the_split_is_by_weight(weights: dict[str, float]) -> None:
    """Each count within 4 standard deviations of its binomial: one of the ten would leave them once in 1600."""
    found, keys = Counter(split(Assignment(definition(**weights)))), 20_000
    for variant, share in definition(**weights).shares.items():
        assert abs(found[variant] - keys * share) < 4 * math.sqrt(keys * share * (1 - share)), found


def test_a_key_has_the_arm_that_anybody_can_compute() -> None:
    """By hand, from what definition.py says; and so it will be in the next version."""
    import hashlib

    salt = hashlib.blake2b(b"act").digest()

    def score(variant: bytes, weight: float, key: bytes) -> float:
        digest = hashlib.blake2b(variant + b"\0" + key, key=salt, digest_size=8).digest()
        return -math.log((int.from_bytes(digest, "big") + 0.5) / 2**64) / weight

    assignment = Assignment(definition(gelu=1, swiglu=2))
    for n in range(200):
        key = b"user-%d" % n
        expected = min((score(b"gelu", 1, key), "gelu"), (score(b"swiglu", 2, key), "swiglu"))[1]
        assert assignment.arm(key) == expected
    assert [Assignment(definition(gelu=1, swiglu=1)).arm(b"user-%d" % n) for n in range(6)] == PINNED


PINNED = ["gelu", "swiglu", "swiglu", "swiglu", "swiglu", "gelu"]


def test_no_more_keys_move_than_must() -> None:
    """A weight that grows takes keys from the others and from nobody else; so does an arm that comes."""
    before = split(Assignment(definition(a=2, b=1, c=1)))
    for changed, gains in ((definition(a=2, b=3, c=1), "b"), (definition(d=1, c=1, b=1, a=2), "d")):
        after = split(Assignment(changed))
        moved = [new for old, new in zip(before, after, strict=True) if old != new]
        assert set(moved) == {gains}
        more = changed.shares[gains] - {"a": 0.5, "b": 0.25, "c": 0.25}.get(gains, 0)
        assert len(moved) == pytest.approx(len(before) * more, rel=0.05)


def test_another_salt_is_another_split() -> None:
    one, other = (split(Assignment(definition(salt=salt, a=1, b=1))) for salt in ("x", "y"))
    same = sum(a == b for a, b in zip(one, other, strict=True)) / len(one)
    assert abs(same - 0.5) < 4 * math.sqrt(0.25 / len(one))


# --- what is stored -------------------------------------------------------------------------------


def test_exposures_and_failures_are_counted_by_arm(client: TestClient) -> None:
    put(client)
    arms = Counter(ask(client, f"key {n % 7}").headers["x-arm"] for n in range(20))
    refused = ask(client, "key 1", prompt=[400])
    arms[refused.headers["x-arm"]] += 1
    assert "400" in error(refused, 422)
    found = verdict(client)
    by_name = {arm["model"]: arm for arm in found["arms"]}
    assert {name: arm["exposures"] for name, arm in by_name.items()} == arms
    assert sum(arm["keys"] for arm in by_name.values()) == 7
    assert sum(arm["failed"] for arm in by_name.values()) == 1
    assert found["fit"] is True
    assert by_name["swiglu"]["outcome"] == "inconclusive"
    assert "50 keys" in by_name["swiglu"]["sentence"]
    assert 0.1 < by_name["gelu"]["geometric_mean_ms"] < 1000
    assert client.get("/v1/experiments").json()["data"] == [found]


def test_a_stream_is_an_exposure_and_takes_outcomes(client: TestClient) -> None:
    put(client)
    body = {"model": "act", "prompt": [5, 6], "max_tokens": 4, "temperature": 0, "stream": True, "ignore_eos": True}
    response = client.post("/v1/completions", json=body, headers={"x-actuary-key": "k"})
    assert sum(arm["exposures"] for arm in verdict(client)["arms"]) == 1
    [direct] = ask(client, model=response.headers["x-arm"], prompt=[5, 6], top_k=300).json()["results"]
    reported = client.post(
        "/v1/experiments/act/outcomes", json={"id": response.headers["x-exposure-id"], "token": 17}
    ).json()
    logits = np.array([entry["logit"] for entry in direct["top"]])
    token = next(entry["logit"] for entry in direct["top"] if entry["id"] == 17)
    assert reported["log_loss"] == pytest.approx(float(special.logsumexp(logits)) - token, abs=1e-4)


def test_an_outcome_counts_once_with_its_exact_log_loss(client: TestClient) -> None:
    put(client)
    response = ask(client, "k", prompt=["if x", "return"], tokens=["a"])
    arm, id_ = response.headers["x-arm"], response.headers["x-exposure-id"]
    losses = []
    for at, result in enumerate(response.json()["results"]):
        [chosen] = result["chosen"]
        outcome = {"id": id_, "token": "a", "prompt_index": at}
        reported = client.post("/v1/experiments/act/outcomes", json=outcome)
        assert reported.status_code == 200, reported.text
        losses.append(reported.json()["log_loss"])
        assert losses[-1] == pytest.approx(-math.log(chosen["softmax"]), rel=1e-5)
        assert "counts once" in error(client.post("/v1/experiments/act/outcomes", json=outcome), 409)
    by_name = {each["model"]: each for each in verdict(client)["arms"]}
    assert by_name[arm]["outcomes"] == 2
    assert by_name[arm]["mean_log_loss"] == pytest.approx(np.mean(losses))


def test_outcomes_that_cannot_be(bundles: Path, tmp_path: Path) -> None:
    with open_client(bundles, str(tmp_path / "x.db"), outcome_mb=1) as client:
        put(client)
        put(client, "other")
        first = ask(client).headers["x-exposure-id"]

        def report(name: str = "act", **body: Any) -> Any:
            return client.post(f"/v1/experiments/{name}/outcomes", json={"id": first, "token": 1, **body})

        assert "other" in error(report("nothing"), 404)
        assert "'act', not 'other'" in error(report("other"), 422)
        assert "x-exposure-id" in error(report(id="0" * 24), 404)
        assert "1 prompts" in error(report(prompt_index=1), 422)
        assert "299" in error(report(token=300), 422)
        assert "exactly one token" in error(report(token="if x is not None"), 422)
        assert error(report(token="\ud800".encode("utf-16", "surrogatepass").decode("utf-16", "replace")), 422)
        assert error(report(token=True), 422)
        assert error(report(token=""), 422)
        assert error(report(more=1), 422)
        assert error(client.post("/v1/experiments/act/outcomes", json={"id": first}), 422)
        assert report().status_code == 200
        ids = [ask(client).headers["x-exposure-id"] for _ in range((1 << 20) // (300 * 4) + 1)]
        assert "--outcome-mb" in error(report(id=ids[0]), 410)
        assert report(id=ids[-1]).status_code == 200


def test_changing_an_experiment_begins_it_from_nothing(client: TestClient) -> None:
    put(client)
    ask(client, "k")
    assert client.put("/v1/experiments/act", json=TWO).status_code == 200, "as it runs"
    assert sum(arm["exposures"] for arm in verdict(client)["arms"]) == 1
    put(client, arms={"gelu": 1, "swiglu": 2})
    assert sum(arm["exposures"] for arm in verdict(client)["arms"]) == 0
    assert client.delete("/v1/experiments/act").json()["deleted"] is True
    assert "none runs" in error(client.get("/v1/experiments/act"), 404)
    assert "'act'" in error(ask(client), 404)
    assert client.get("/v1/experiments").json()["data"] == []
    error(client.delete("/v1/experiments/act"), 404)


def test_it_is_the_same_after_a_restart(bundles: Path, database: str) -> None:
    with open_client(bundles, database) as client:
        put(client, salt="fixed")
        arms = [ask(client, f"key {n}").headers["x-arm"] for n in range(20)]
    with open_client(bundles, database) as client:
        assert sum(arm["exposures"] for arm in verdict(client)["arms"]) == 20
        assert [ask(client, f"key {n}").headers["x-arm"] for n in range(20)] == arms
        assert verdict(client)["arms"][0]["keys"] + verdict(client)["arms"][1]["keys"] == 20


def test_two_processes_share_a_database(bundles: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.experiments.live.REFRESH_S", 0.0)
    with open_client(bundles, database) as one, open_client(bundles, database) as other:
        put(one)
        put(other, "second")  # it has no database open until then
        for n in range(30):
            assert ask(one, f"key {n}").headers["x-arm"] == ask(other, f"key {n}").headers["x-arm"]
        verdict(one)
        assert [arm["exposures"] for arm in verdict(other)["arms"]] == [
            arm["exposures"] for arm in verdict(one)["arms"]
        ]
        found = verdict(one)["arms"]
        assert sum(arm["exposures"] for arm in found) == 60
        assert sum(arm["keys"] for arm in found) == 30
        one.delete("/v1/experiments/act")
        soon = time.monotonic() + HANG_S
        while other.get("/v1/experiments/act").status_code != 404:
            assert time.monotonic() < soon
            time.sleep(0.05)


def test_one_finds_the_database_that_another_makes(
    bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.experiments.live.LOOK_S", 0.05)
    database = str(tmp_path / "later.db")
    with open_client(bundles, database) as one, open_client(bundles, database) as other:
        assert ask(one).status_code == 404
        put(other)
        soon = time.monotonic() + HANG_S
        while (found := ask(one, "key")).status_code == 404:
            assert time.monotonic() < soon
            time.sleep(0.05)
        assert found.headers["x-arm"] == ask(other, "key").headers["x-arm"]
        assert sum(arm["exposures"] for arm in verdict(one)["arms"]) >= 1


def test_exposures_leave_by_the_setting_and_the_verdict_counts_them(
    bundles: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.experiments.retention.EVERY_S", 0.0)
    with open_client(bundles, database, max_exposures=5) as client:
        put(client)
        for n in range(12):
            ask(client, f"key {n % 4}")
        store = client.app.state.service.experiments._store  # type: ignore[attr-defined]
        soon = time.monotonic() + 20

        def kept() -> int:
            with store.database.reading() as connection:
                found: int = connection.execute(sa.select(sa.func.count()).select_from(exposures)).scalar_one()
            return found

        while verdict(client) and kept() != 5:
            assert time.monotonic() < soon, kept()
            time.sleep(0.05)
        for n in range(4):
            ask(client, f"key {n}")
        arms = verdict(client)["arms"]
        assert sum(arm["exposures"] for arm in arms) == 16
        assert sum(arm["keys"] for arm in arms) == 4


def test_an_answer_that_was_lost_on_the_way_is_not_counted_twice(
    sqlite_client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database has taken the batch, and is away when it should say so; more has come when it is asked again."""
    put(sqlite_client)
    monkeypatch.setattr("service.experiments.recorder.RETRY_S", 0.1)
    store = sqlite_client.app.state.service.experiments._store  # type: ignore[attr-defined]
    write, lost = store.write, []

    def loses_its_answer(batch: list[Any], number: int) -> Any:
        answer = write(batch, number)
        if len(lost) < 3:
            lost.append(number)
            ask(sqlite_client)
            raise Down("it hung up")
        return answer

    monkeypatch.setattr(store, "write", loses_its_answer)
    ask(sqlite_client)
    soon = time.monotonic() + 10
    while len(lost) < 3 or sqlite_client.get("/v1/experiments/act").status_code != 200:
        assert time.monotonic() < soon
        time.sleep(0.05)
    assert sum(arm["exposures"] for arm in verdict(sqlite_client)["arms"]) == 4
    assert lost == [lost[0]] * 3, "the same batch under the same number"


# --- models and metrics ---------------------------------------------------------------------------


def test_the_list_of_models_has_experiments_beside(sqlite_client: TestClient) -> None:
    put(sqlite_client)
    models = sqlite_client.get("/v1/models").json()
    assert "act" not in [model["id"] for model in models["data"]]
    assert [(each["id"], each["object"]) for each in models["experiments"]] == [("act", "experiment")]
    assert sqlite_client.get("/v1/models/act").json() == models["experiments"][0]


def test_an_experiment_has_a_tokenizer(sqlite_client: TestClient) -> None:
    put(sqlite_client)
    for model in ("act", "gelu"):
        tokens = sqlite_client.post("/v1/tokenize", json={"model": model, "prompt": "if x"}).json()["tokens"]
        text = sqlite_client.post("/v1/detokenize", json={"model": model, "tokens": tokens}).json()
        assert text == {"prompt": "if x"}
        assert sqlite_client.get("/tokenizer_info", params={"model": model}).json()["model_max_length"] == 32
    [listed] = sqlite_client.get("/v1/models").json()["experiments"]
    assert (listed["context"], listed["vocab_size"]) == (32, 300)


def test_metrics_count_them_without_new_labels(sqlite_client: TestClient) -> None:
    put(sqlite_client)
    arm = ask(sqlite_client, "k").headers["x-arm"]
    verdict(sqlite_client)
    scrape = Scrape(sqlite_client)
    assert scrape("actuary_requests_total", route="/v1/next-token", model=arm, status="200") == 1
    assert scrape("actuary_experiment_records_total", fate="stored") == 1
    assert scrape("actuary_experiment_records_total", fate="lost") == 0
    assert scrape("actuary_experiment_waiting_records") == 0


# --- shadows --------------------------------------------------------------------------------------


def test_a_shadow_is_compared_and_never_answers(client: TestClient) -> None:
    put(client, arms={"gelu": 1}, shadows=["swiglu", "gelu-sigmoid-head"])
    real = ask(client, top_k=300)
    assert real.headers["x-arm"] == "gelu"

    def shadows() -> list[dict[str, Any]]:
        return [shadow for shadow in verdict(client)["shadows"] if shadow["model"] == "swiglu"]

    soon = time.monotonic() + HANG_S
    while not shadows():
        time.sleep(0.05)
        assert time.monotonic() < soon, Scrape(client).all
    [found] = shadows()
    direct = ask(client, model="swiglu", top_k=300)
    p, q = (
        np.array([e["softmax"] for e in sorted(answer.json()["results"][0]["top"], key=lambda e: e["id"])])
        for answer in (real, direct)
    )
    assert found["against"] == "gelu"
    assert found["kl"]["mean"] == pytest.approx(special.rel_entr(p, q).sum(), rel=1e-3, abs=1e-6)
    assert found["sum_abs_dp"]["mean"] == pytest.approx(np.abs(p - q).sum(), rel=1e-3, abs=1e-6)
    assert found["same_top"]["mean"] == float(p.argmax() == q.argmax())
    assert found["infer"]["ratio"] > 0
    assert sum(arm["exposures"] for arm in verdict(client)["arms"]) == 1, "a shadow is none"


def test_a_shadow_gives_way(sqlite_client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the engine has work it is not computed; where work comes meanwhile, it is broken off."""
    put(sqlite_client, arms={"gelu": 1}, shadows=["swiglu"])
    service = sqlite_client.app.state.service  # type: ignore[attr-defined]

    def shadows(fate: str, at_least: int) -> None:
        soon = time.monotonic() + HANG_S
        while Scrape(sqlite_client)("actuary_experiment_shadows_total", fate=fate) < at_least:
            assert time.monotonic() < soon, fate
            time.sleep(0.02)

    shadow = service.experiments._shadows
    monkeypatch.setattr(shadow, "_idle", lambda: False)
    ask(sqlite_client)
    shadows("busy", 1)

    def idle_for_a_moment() -> bool:
        shadow.give_way()  # a request comes right after
        return True

    monkeypatch.setattr(shadow, "_idle", idle_for_a_moment)
    ask(sqlite_client)
    shadows("preempted", 1)
    monkeypatch.setattr(shadow, "_idle", lambda: True)
    ask(sqlite_client)
    shadows("compared", 1)


# --- refusals -------------------------------------------------------------------------------------

WRONG: list[tuple[Any, str]] = [
    ([], "an object"),
    ({}, "arms must be"),
    ({"arms": {}}, "arms must be"),
    ({"arms": ["gelu"]}, "arms must be"),
    ({"arms": {"gelu": 1, "swigul": 1}}, "did you mean 'swiglu'"),
    ({"arms": {"gelu": 1}}, "'gelu' alone"),
    ({"arms": {"gelu": 1, "swiglu": 0}}, "above 0"),
    ({"arms": {"gelu": 0, "swiglu": 0}}, "above 0"),
    ({"arms": {"gelu": 1, "swiglu": -1}}, "above 0"),
    ({"arms": {"gelu": 1, "swiglu": "1"}}, "a number"),
    ({"arms": {"gelu": 1, "swiglu": True}}, "a number"),
    ({"arms": {"gelu": 1, "swiglu": None}}, "a number"),
    ({"arms": {"gelu": 1, "swiglu": math.nan}}, "finite"),
    ({"arms": {"gelu": 1, "swiglu": math.inf}}, "finite"),
    ({"arms": {"gelu": 1, "swiglu": 10**400}}, "finite"),
    ({"arms": {"gelu": 1e308, "swiglu": 1e308}}, "in all"),
    ({"arms": {"gelu": 1, "swiglu": 1e-300}}, "1,000,000"),
    ({**TWO, "baseline": "gelu-sigmoid-head"}, "is no arm"),
    ({**TWO, "baseline": 1}, "is no arm"),
    ({**TWO, "salt": ""}, "salt"),
    ({**TWO, "salt": "\ud800"}, "salt"),
    ({**TWO, "shadows": "gelu-sigmoid-head"}, "a list"),
    ({**TWO, "shadows": ["gelu"]}, "is an arm"),
    ({**TWO, "shadows": ["nothing"]}, "unknown variant"),
    ({**TWO, "shadows": ["gelu-sigmoid-head"] * 2}, "twice"),
    ({**TWO, "equivalence": 0}, "equivalence"),
    ({**TWO, "equivalence": True}, "equivalence"),
    ({**TWO, "wieghts": 1}, "unknown field"),
    ({**TWO, "\ud800": 1}, "unknown field '\\ud800'; known: arms"),
]


@pytest.fixture(scope="module")
def refusing(bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with open_client(bundles, str(tmp_path_factory.mktemp("db") / "experiments.db")) as client:
        yield client


@pytest.mark.parametrize(("fields", "says"), WRONG, ids=lambda value: str(value)[:50])
def test_a_wrong_definition_is_refused_over_http_and_in_a_file(
    refusing: TestClient, tmp_path: Path, fields: Any, says: str
) -> None:
    body = json.dumps(fields)
    headers = {"content-type": "application/json"}
    assert says in error(refusing.put("/v1/experiments/act", content=body, headers=headers), 422)
    assert refusing.get("/v1/experiments").json()["data"] == []
    file = tmp_path / "experiments.json"
    file.write_text(json.dumps({"act": fields}))
    library = refusing.app.state.service.library  # type: ignore[attr-defined]
    with pytest.raises(BadInput, match=r"experiments\.json: 'act': ") as refused:
        read_file(file, library)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("name", "body", "status", "says"),
    [
        ("gelu", json.dumps(TWO), 422, "is a variant"),
        ("*", json.dumps(TWO), 422, "cannot name"),
        ("a%20b", json.dumps(TWO), 422, "cannot name"),
        ("act", '{"arms": {"gelu": 1, "gelu": 2, "swiglu": 1}}', 422, "'gelu' stands twice"),
        ("act", '{"arms": ', 400, "not JSON"),
        ("act", "\xff", 400, "not JSON"),
        ("act", "[" * 100_000, 422, "nested"),
    ],
)
def test_a_wrong_name_or_body_is_refused(refusing: TestClient, name: str, body: str, status: int, says: str) -> None:
    headers = {"content-type": "application/json"}
    response = refusing.put(f"/v1/experiments/{name}", content=body.encode("latin-1"), headers=headers)
    assert says in error(response, status)
    assert error(refusing.put("/v1/experiments/act", content=json.dumps(TWO)), 422).startswith("the body was not read")
    assert "not JSON" in error(
        refusing.put("/v1/experiments/act", content=b"{", headers={"content-type": "Application/JSON"}), 400
    )


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("x.json", '{"act": {"arms": {"gelu": 1, "gelu": 1}}}', "'gelu' stands twice"),
        ("x.json", "[]", "NAME: DEFINITION"),
        ("x.json", "{", "not JSON"),
        ("x.toml", "[act", "not TOML"),
        ("x.toml", "[act.arms]\ngelu = 1\ngelu = 2", "not TOML"),
        ("x.toml", "[gelu.arms]\ngelu = 1\nswiglu = 2", "is a variant"),
        ("missing.json", None, "No such file"),
    ],
)
def test_a_wrong_file_is_refused(refusing: TestClient, tmp_path: Path, file: str, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / file).write_text(text)
    with pytest.raises(BadInput, match=f"--experiments .*{file}") as refused:
        read_file(tmp_path / file, refusing.app.state.service.library)  # type: ignore[attr-defined]
    assert says in str(refused.value)


def test_a_file_of_json_or_toml_is_read(refusing: TestClient, tmp_path: Path) -> None:
    library = refusing.app.state.service.library  # type: ignore[attr-defined]
    (tmp_path / "x.toml").write_text('[act]\nbaseline = "gelu"\narms = {gelu = 1, swiglu = 1}\n')
    (tmp_path / "x.json").write_text(json.dumps({"act": TWO}))
    assert read_file(tmp_path / "x.toml", library) == read_file(tmp_path / "x.json", library)


def test_an_experiment_is_named_alone(sqlite_client: TestClient) -> None:
    assert "act" not in error(ask(sqlite_client, model="nothing"), 404)
    put(sqlite_client)
    assert "name it alone" in error(ask(sqlite_client, model=["act", "gelu"]), 422)
    assert "did you mean 'act'" in error(ask(sqlite_client, model="ackt"), 404)
    assert ask(sqlite_client, model=["act"]).status_code == 200
    assert len(ask(sqlite_client, model="*").json()["results"]) == 3


# --- the database is away -------------------------------------------------------------------------


def test_answers_go_on_while_the_database_is_away(sqlite_client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records wait, bounded and counted, and are stored once it is back."""
    put(sqlite_client)
    service = sqlite_client.app.state.service  # type: ignore[attr-defined]
    store = service.experiments._store
    write = store.write
    monkeypatch.setattr("service.experiments.recorder.MOST_WAITING", 20)
    monkeypatch.setattr("service.experiments.recorder.RETRY_S", 0.1)
    monkeypatch.setattr("service.experiments.live.FLUSH_S", 0.2)

    def away(*_: object) -> None:
        raise Down("it is away")

    monkeypatch.setattr(store, "write", away)
    for n in range(30):
        assert ask(sqlite_client, str(n)).status_code == 200
    assert "it is away" in error(sqlite_client.get("/v1/experiments/act"), 503)
    scrape = Scrape(sqlite_client)
    assert scrape("actuary_experiment_records_total", fate="lost") == 10
    assert scrape("actuary_experiment_waiting_records") == 20
    assert scrape("actuary_experiment_database_failures_total") >= 1
    id_ = ask(sqlite_client).headers["x-exposure-id"]
    assert error(sqlite_client.post("/v1/experiments/act/outcomes", json={"id": id_, "token": 1}), 503)
    monkeypatch.setattr(store, "write", write)
    soon = time.monotonic() + HANG_S
    while (found := sqlite_client.get("/v1/experiments/act")).status_code != 200:
        assert time.monotonic() < soon
    assert sum(arm["exposures"] for arm in found.json()["arms"]) == 20


def test_a_defect_costs_its_batch_alone(sqlite_client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    put(sqlite_client)
    store = sqlite_client.app.state.service.experiments._store  # type: ignore[attr-defined]
    write, failed = store.write, []

    def fails_once(batch: list[Any], number: int) -> Any:
        if not failed:
            failed.append(len(batch))
            raise KeyError("a defect")
        return write(batch, number)

    monkeypatch.setattr(store, "write", fails_once)
    ask(sqlite_client)
    verdict(sqlite_client)
    ask(sqlite_client)
    assert sum(arm["exposures"] for arm in verdict(sqlite_client)["arms"]) == 1
    assert Scrape(sqlite_client)("actuary_experiment_records_total", fate="lost") == failed[0] == 1
