"""`actuary bench serve`: what it asks, refuses, keeps and makes of it; and ours against bare ONNX Runtime, in short."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from conftest import ACTUARY

from actuary import BadInput, GateFailed, cores
from loadtest.bench import agreement, report, servers, visits, workloads
from loadtest.bench.client import Seen
from loadtest.bench.contenders import ENVIRONMENTS, Contender, contenders
from loadtest.bench.visits import Pace, Visits
from loadtest.bench.workloads import Door, bodies

ROOT = Path(__file__).parent.parent
V = 100
RIVAL, OURS = Door(ours=False), Door(ours=True, models=("a", "b"))
ROUNDS = 5
# Of bare ONNX Runtime's requests/s, median of the rounds' own ratios. On two cores that eight busy processes wanted, a
# server against itself came to 0.66 to 1.13 in 12 tries of 5 rounds; so what looks behind after 5 is measured on to 15.
NOT_BEHIND = 0.8
MORE_ROUNDS = 15
SHORT = {"n_layer": 4, "n_embd": 256, "n_head": 4, "n_positions": 128, "vocab_size": 2048}


def first(workload, door, count, caller=0, seed="s"):
    stream = bodies(workload, door, caller, V, seed)
    return [(path, json.loads(body)) for path, body in (next(stream) for _ in range(count))]


def test_each_workload_asks_what_its_name_says():
    for workload in workloads.CLOSED:
        lengths = {len(body["ids"]) for _, body in first(workload, RIVAL, 300)}
        assert min(lengths) >= workload.shortest
        assert max(lengths) <= workload.longest
        assert str(min(workload.shortest, 8)) in workload.name or str(workload.shortest) in workload.name


def test_ours_and_a_rival_are_asked_the_same_and_other_rounds_something_else():
    for workload in (*workloads.CLOSED, *workloads.REUSE, *workloads.OPEN):
        ours = [body["prompt"] for _, body in first(workload, OURS, 20)]
        rival = [body["ids"] for _, body in first(workload, RIVAL, 20)]
        assert ours == rival
        assert all(0 <= id_ < V for ids in rival for id_ in ids)
        others = [body["ids"] for _, body in first(workload, RIVAL, 20, seed="t")]
        assert not any(ids in others for ids in rival)
        assert first(workload, RIVAL, 1, caller=1)[0][1]["ids"] not in rival


def test_a_typist_s_text_grows_by_one_or_two_tokens_until_the_next_begins():
    texts = [body["ids"] for _, body in first(workloads.REUSE[0], RIVAL, 400)]
    begun = 0
    for before, after in itertools.pairwise(texts):
        if len(after) < len(before):
            begun += 1
            assert len(after) == workloads.TEXT[0]
        else:
            assert after[: len(before)] == before
            assert len(after) - len(before) in (1, 2)
    assert begun == 2


def test_a_preamble_is_common_to_callers_and_ends_where_the_rest_begins():
    prompts = [body["ids"] for caller in (0, 1) for _, body in first(workloads.REUSE[1], RIVAL, 10, caller)]
    common = {tuple(ids[: workloads.PREAMBLE]) for ids in prompts}
    assert len(common) == 1
    assert all(16 <= len(ids) - workloads.PREAMBLE <= 64 for ids in prompts)
    assert len({tuple(ids) for ids in prompts}) == len(prompts)


def test_variants_take_turns_and_generation_is_asked_for_as_each_takes_it():
    assert [body["model"] for _, body in first(workloads.TURNS[1], OURS, 4)] == ["a", "b", "a", "b"]
    (generate,) = workloads.GENERATE
    ((path, body),) = first(generate, OURS, 1)
    assert path == "/v1/completions"
    assert (len(body["prompt"]), body["max_tokens"], body["temperature"], body["ignore_eos"]) == (64, 64, 0, True)
    ((path, body),) = first(generate, RIVAL, 1)
    assert path == "/generate"
    assert [len(ids) for ids in body["prompts"]] == [64] * workloads.BATCH


def test_every_contender_is_pinned_and_has_a_server():
    for contender in contenders(2):
        if not contender.ours:
            packages, _ = ENVIRONMENTS[contender.engine]
            assert all("==" in package for package in packages)
            assert Path(contender.command(Path("x"), 1, Path("y"))[1]).is_file()
    names = [contender.name for contender in contenders(2)]
    assert len(set(names)) == len(names)
    assert {c.precision for c in contenders(1)} == {"fp32", "int8"}


class Fake:
    """A rival in this process: answers as `answer(path, body)` says, as (status, JSON)."""

    def __init__(self, answer, contender=None):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # an answer is one packet

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, said = answer(self.path, body)
                said = json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(said)))
                self.send_header("x-infer-ms", "1.500")
                self.end_headers()
                self.wfile.write(said)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.contender = contender or Contender("transformers", "fp32")
        self.alive, self.paused = True, True

    def resume(self):
        self.paused = False

    def pause(self):
        self.paused = True

    def cpu_s(self):
        return 0.0

    def resident_mb(self):
        return 1.0


def told(workload, **more):
    return {
        "workload": dataclasses.asdict(workload), "ours": False, "vocab_size": V, "seed": "s", "warm_s": 0.1,
        "seconds": 0.4, "rate": None, **more,
    }  # fmt: skip


def test_a_visit_counts_answers_failures_and_the_servers_own_time():
    every_other = itertools.cycle([(200, {}), (503, {"error": "odd day"})])
    fake = Fake(lambda path, body: next(every_other))
    record = visits.visit(fake, told(workloads.CLOSED[0]))
    assert record["failures"] > 0
    assert "odd day" in record["first_failure"]
    assert len(record["latency_ms"]) == len(record["infer_ms"]) > 0
    assert set(record["infer_ms"]) == {1.5}
    assert record["per_s"] == pytest.approx(len(record["latency_ms"]) / 0.4, abs=2 / 0.4), "one at either end in part"
    assert fake.paused


def test_a_request_that_lies_in_the_window_in_part_is_served_in_part():
    seen = Seen(window_s=1.0)
    for since, at in ((0.0, 2.0), (1.5, 1.75), (1.9, 2.3), (0.1, 0.9), (2.0, 2.5)):  # in a window from 1 to 2
        seen.add_share(since, (at, 200, 0.0, b""), 1.0, 2.0)
    assert seen.served == pytest.approx(0.5 + 1 + 0.25)
    assert seen.latency_ms == [250.0]


def test_an_open_loop_counts_from_the_planned_send():
    """A server that takes 50 ms, one connection, 40/s: the queue in front of it is in the latency."""

    def slow(path, body):
        time.sleep(0.05)
        return 200, {}

    one = workloads.Workload("open", "open", 1, 4, 4, share=1.0)
    record = visits.visit(Fake(slow), told(one, rate=40.0, warm_s=0.0, seconds=1.0))
    assert len(record["latency_ms"]) == 40
    assert max(record["latency_ms"]) > 500, "the 40th leaves 1 s late"


def test_what_a_server_does_not_offer_is_skipped_and_what_dies_is_told():
    (generate,) = workloads.GENERATE
    missing = visits.visit(Fake(lambda path, body: (404, {})), told(generate))
    assert missing["skipped"]
    broken = visits.visit(Fake(lambda path, body: 1 / 0), told(workloads.CLOSED[0]))
    assert not broken["skipped"]
    assert broken["failures"]
    assert "closed the connection" in broken["first_failure"]


def test_generated_tokens_are_counted_of_whole_batches():
    (generate,) = workloads.GENERATE
    record = visits.visit(Fake(lambda path, body: (200, {"tokens": []})), told(generate))
    assert len(record["latency_ms"]) == 3
    assert record["per_s"] == pytest.approx(3 * 8 * 64 / record["window_s"])


def test_a_run_that_was_stopped_goes_on_with_what_it_had_not_finished(tmp_path, monkeypatch):
    seen = []

    def visit(server, asked):
        seen.append((server.contender.name, asked["workload"]["name"], asked["seed"]))
        if len(seen) == 7:
            raise KeyboardInterrupt
        return {"skipped": "", "per_s": 1.0, "latency_ms": [1.0], "infer_ms": [], "failures": 0, "first_failure": ""}

    monkeypatch.setattr(visits, "visit", visit)
    those = [Contender("onnxruntime", "fp32"), Contender("openvino", "fp32"), Contender("litserve", "fp32")]
    stood = {contender.name: Fake(None, contender) for contender in those}
    path = tmp_path / "visits.jsonl"
    with pytest.raises(KeyboardInterrupt):
        visits.run(Visits(path), stood, 2, Pace(0, 1), V, lambda said: None)
    assert len(Visits(path).records) == 6, "two whole workloads; the third was cut and counts for nobody"
    path.write_text(path.read_text() + '{"round": 0, "torn')
    kept = Visits(path)
    visits.run(kept, stood, 2, Pace(0, 1), V, lambda said: None)
    asked = [(r["contender"], r["workload"], r["round"]) for r in kept.records]
    assert len(asked) == len(set(asked)) == 2 * 3 * (len(workloads.ALL) - 3)  # not generate, not turns
    assert len(seen) == 7 + len(asked) - 6
    orders = {tuple(name for name, workload, seed in seen if workload == w.name) for w in workloads.CLOSED}
    assert len(orders) > 1, "contenders are visited in one order only"


def test_open_loops_take_their_rates_from_the_closed_one(tmp_path):
    kept = Visits(tmp_path / "v")
    reached = {"actuary-int8": 90.0, "openvino-int8-wide": 40.0, "openvino-int8-narrow": 80.0, "litserve-int8": 50.0}
    reached |= {"ctranslate2-fp32-wide": 1.0, "ctranslate2-fp32-narrow": 20.0}
    those = [c for c in contenders(2) if c.name in reached]
    kept.add([record(name, workloads.BASIS, 0, rate) for name, rate in reached.items()])
    rates = [
        {c.name: visits._rate(kept, workload, c, those) for c in those}
        for workload in (*workloads.OPEN, workloads.BASIS)
    ]
    assert rates[0] == {name: 12.0 if rate > 12 else None for name, rate in reached.items()}, "0.6 of CTranslate2's 20"
    near = {name: 60.0 if rate > 60 else None for name, rate in reached.items() if "int8" in name}
    near |= {"ctranslate2-fp32-wide": None, "ctranslate2-fp32-narrow": 15.0}
    assert rates[1] == near, "0.75 of the precision's best rival"
    assert set(rates[2].values()) == {None}


def reference(tmp_path):
    path = tmp_path / "reference.json"
    path.write_text(json.dumps([{"ids": [1, 2], "top": [5, 6, 7], "probabilities": [0.5, 0.25, 0.1]}]))
    return path


@pytest.mark.parametrize(
    ("precision", "ids", "probabilities", "refused"),
    [
        ("fp32", [5, 6, 7], [0.5, 0.25, 0.1], ""),
        ("fp32", [5, 6, 7], [0.5, 0.2503, 0.1], "off by 0.0012"),
        ("fp32", [6, 5, 7], [0.5, 0.25, 0.1], "likeliest token is 6"),
        ("int8", [6, 5, 7], [0.3, 0.4, 0.1], ""),
        ("int8", [6, 8, 7], [0.5, 0.25, 0.1], "likeliest token is 6"),
        ("int8", [5, 6, 7], [0.01, 0.02, 0.01], "0.5 is allowed"),
    ],
)
def test_an_engine_that_says_something_else_is_not_measured(tmp_path, precision, ids, probabilities, refused):
    fake = Fake(
        lambda path, body: (200, {"ids": ids, "probabilities": probabilities}), Contender("openvino", precision, "wide")
    )
    if refused:
        with pytest.raises(GateFailed, match="is not measured") as error:
            agreement.check(fake, reference(tmp_path))
        assert refused in str(error.value)
    else:
        assert agreement.check(fake, reference(tmp_path)).mean < agreement.INT8


def record(contender, workload, round_, per_s, **more):
    return {
        "contender": contender, "workload": workload.name, "round": round_, "per_s": per_s, "rate": None, "skipped": "",
        "latency_ms": [1.0, 2.0, 3.0], "infer_ms": [], "failures": 0, "first_failure": "", **more,
    }  # fmt: skip


def test_ratios_are_of_rounds_and_the_best_rival_is_of_the_same_precision(tmp_path):
    kept, workload = Visits(tmp_path / "v"), workloads.CLOSED[0]
    ours, slow, fast = Contender("actuary", "fp32"), Contender("openvino", "fp32"), Contender("litserve", "fp32")
    other = Contender("openvino", "int8")
    # The machine is half as fast in the second round, for all.
    for name, rates in (
        (ours.name, (30, 15, 33)),
        (slow.name, (10, 5, 10)),
        (fast.name, (20, 10, 20)),
        (other.name, (99,) * 3),
    ):
        kept.add([record(name, workload, n, float(rate)) for n, rate in enumerate(rates)])
    (_, _, rows), (_, _, int8) = report.tables(kept, [ours, slow, fast, other])
    assert [row.contender for row in rows] == [ours, fast, slow]
    both = report.versus(rows)
    assert both.rival.contender == fast
    assert both.ratio == (1.5, 1.5, 1.65)
    assert report.versus(int8) is None


def test_the_document_names_what_falls_short(tmp_path):
    kept, workload = Visits(tmp_path / "v"), workloads.CLOSED[0]
    ours, rival = Contender("actuary", "fp32"), Contender("openvino", "fp32")
    kept.add([record(ours.name, workload, 0, 12.0, infer_ms=[0.5]), record(rival.name, workload, 0, 10.0)])
    kept.add([record(ours.name, workloads.CLOSED[1], 0, 20.0), record(rival.name, workloads.CLOSED[1], 0, 10.0)])
    (generate,), eager = workloads.GENERATE, Contender("transformers", "fp32", generates=True)
    ours = Contender("actuary", "fp32", generates=True)
    kept.add([record(ours.name, generate, 0, 19.0), record(eager.name, generate, 0, 10.0)])
    words = "command date machine system python version sources versions open_all open_near"
    facts = dict.fromkeys(words.split(), "?")
    facts |= {"rounds": 1, "seconds": 1.0, "warm_s": 0.1, "cores": 2, "servers": {}, "ceiling": []}  # fmt: skip
    text = report.document(kept, [ours, rival, eager], facts)
    lines = [line for line in text.splitlines() if line.startswith("| 64 tokens")]
    assert "| 1.25, short |" in next(line for line in lines if line.startswith("| 64 tokens, 1 caller, fp32"))
    assert "| 1.25 |" in next(line for line in lines if line.startswith("| 64 tokens, 8 callers, fp32"))
    assert "transformers' tokens/s (asked: 2): 1.90 (1.90 to 1.90), short." in text
    assert "1.50, more" in text, "p50 2.0 ms over 0.5 ms of its own is more than 0.8 ms"


def test_servers_of_a_killed_run_are_ended_and_others_are_not(tmp_path):
    left, stranger = (
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True) for _ in "ab"
    )
    try:
        os.kill(left.pid, signal.SIGSTOP)
        born = [(left.pid, psutil.Process(left.pid).create_time()), (stranger.pid, 1.0)]
        (tmp_path / servers.RECORD).write_text("\n".join(map(json.dumps, born)) + "\n[12")
        with servers.fleet(tmp_path, [], tmp_path):
            assert left.wait(120) == -signal.SIGKILL
            assert stranger.poll() is None
            with pytest.raises(BadInput, match="another run measures"), servers.fleet(tmp_path, [], tmp_path):
                pass
    finally:
        left.kill()
        stranger.kill()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--only", "openvin"], "no such contender; known: actuary"), (["--rounds", "0"], "is not in the range")],
)
def test_bad_arguments_exit_with_2(tmp_path, monkeypatch, arguments, message):
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    done = subprocess.run([*ACTUARY, "bench", "serve", *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in " ".join(done.stderr.split())


def behind(kept, cell, those):
    """Ours against the rival, of the precisions in which ours is behind."""
    found = {
        p: report.versus([report.row(kept, cell, c) for c in those if c.precision == p]) for p in report.PRECISIONS
    }
    return {precision: both for precision, both in found.items() if both.ratio[0] < NOT_BEHIND}


@pytest.mark.speed
def test_ours_is_not_behind_bare_onnx_runtime(tmp_path, corpus, fused):
    """The short form of `make bench`: ours and FastAPI around ONNX Runtime, same weights, in turn, fp32 and int8."""
    from export.exporter import export_bundle, read_foreign
    from models.random_gpt2 import write

    gpt2 = tmp_path / "gpt2"
    write(gpt2, corpus, **SHORT)
    (tmp_path / "onnx").mkdir()
    conversions = [
        subprocess.Popen([sys.executable, str(ROOT / "loadtest" / "rivals" / script), str(gpt2), str(tmp_path / out)])
        for script, out in (("to_onnx.py", "onnx"), ("reference.py", "reference.json"))
    ]
    for precision in ("fp32", "int8"):
        export_bundle(read_foreign(str(gpt2), None), tmp_path / "bundles" / precision, precision, precision=precision)
    assert [conversion.wait(300) for conversion in conversions] == [0, 0]
    (tmp_path / "environments").mkdir()
    (tmp_path / "environments" / "onnxruntime").symlink_to(sys.prefix)  # this one has all that it needs

    cell = workloads.BASIS
    engines = {"actuary": "", "onnxruntime": "wide"}
    those = [c for c in contenders(cores()) if engines.get(c.engine) == c.setting]
    kept = Visits(tmp_path / "visits.jsonl")
    with servers.fleet(tmp_path, those, fused.path.parent) as stood:
        for server in stood.values():
            server.start()
            agreement.check(server, tmp_path / "reference.json")
            server.pause()
        for round_ in range(MORE_ROUNDS):
            if round_ >= ROUNDS and not behind(kept, cell, those):
                break
            for server in stood.values():
                seen = visits.visit(server, told(cell, ours=server.contender.ours, vocab_size=2048, seed=f"{round_}"))
                assert not seen["failures"], seen["first_failure"]
                kept.add([seen | {"round": round_, "workload": cell.name, "contender": server.contender.name}])
    assert not behind(kept, cell, those)
