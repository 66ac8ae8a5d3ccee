"""Claim 9: a formula's operations and the roof by hand, shares, the verdict on made figures, and a tiny measurement."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping

import pytest
import torch

from actuary import BadInput
from export import bench
from export.bench import Case
from export.ops.device import ON_CPU
from models.activations import Activation, get, registry
from studies import cost, cost_samples, document, roofline, store
from studies.cost_samples import Cost, Spread, cases, measure, measure_device, served, share
from studies.roofline import EXP, Rates, intensity, measure_rates, moved, operations, special

NAMES = ("relu", "sigmoid", "silu", "gelu", "softmax", "swiglu")
TINY = 64


def records(*names: str) -> dict[str, Activation]:
    return {name: get(name) for name in names or NAMES}


def made(alone: float, ffn: float = 10.0, wide: float = 30.0, model: float = 8.0, way: str = "fused") -> Cost:
    """Medians of one way, in nanoseconds; the activation costs the same at both widths."""
    return {
        place: {way: Spread(0.9 * value, value, 1.1 * value)}
        for place, value in
        {"alone": alone, "alone wide": alone, "ffn": ffn, "ffn wide": wide, "model": model}.items()
    }  # fmt: skip


def test_operations_by_hand():
    """relu: max. sigmoid: exp, a sign, a sum, a quotient. silu one product more, swiglu two. bilinear: a product."""
    found = {name: operations(get(name)) for name in ("relu", "sigmoid", "silu", "swiglu", "bilinear", "threshold")}
    assert found == {"relu": 1, "sigmoid": EXP + 3, "silu": EXP + 4, "swiglu": EXP + 5, "bilinear": 1, "threshold": 2}
    assert operations(get("gelu")) == EXP + 4 + 4  # erf, three products, a sum
    assert (moved(get("relu")), moved(get("swiglu"))) == (8, 12)
    assert intensity(get("silu")) == pytest.approx(20 / 8)
    assert intensity(get("swiglu")) == pytest.approx(21 / 12)


def test_what_has_an_exp():
    without = {"threshold", "relu", "leaky_relu", "prelu", "relu2", "relu6", "bilinear", "reglu"}
    assert {name for name, record in registry().items() if not special(record)} >= without
    assert all(special(get(name)) for name in set(registry()) - without if name in cost.registry())


def test_the_roof_by_hand():
    """At 0.125 operations a byte 40 GB/s allow 5 GFLOP/s; from 100 / 40 = 2.5 on, the products' rate does."""
    rates = Rates(gflop_per_s=100, memory_gb_per_s=10, cache_gb_per_s=40)
    assert rates.roof(0.125, cached=True) == 5
    assert rates.roof(0.125, cached=False) == 1.25
    assert rates.roof(2.5, cached=True) == rates.roof(300, cached=True) == 100
    assert rates.best(Rates(90, 20, 30)) == Rates(100, 20, 40)


def test_the_h100s_rates_by_hand():
    """One of 3.9 T/s is 0.256 ps; 4 * 768 operations at 989 T/s are 3.106 ps: 7.6 %. At C = 128, 33 %."""
    assert cost.by_the_rates(768, *cost.H100) == pytest.approx(0.0763, abs=1e-4)
    assert cost.by_the_rates(128, *cost.H100) == pytest.approx(0.331, abs=1e-3)


def test_a_share_is_of_the_same_way_and_size():
    both = made(0.5)
    for place, of in made(2.0, ffn=40.0, wide=50.0, model=16.0, way="unfused").items():
        both[place] |= of
    both["alone wide"]["fused"] = Spread(0.2, 0.3, 0.4)
    assert served(both["alone"]) == "fused"
    assert share(both, "ffn", "fused") == pytest.approx(0.05)
    assert share(both, "ffn", "unfused") == pytest.approx(0.05)
    assert share(both, "ffn wide", "fused") == pytest.approx(0.01)
    assert share(both, "model", "unfused") == pytest.approx(0.125)
    assert served(made(1.0, way="unfused")["alone"]) == "unfused"


def judged(**alone: float) -> tuple[str, str]:
    return cost.judge(records(*alone), {name: made(value) for name, value in alone.items()})


def test_the_verdict_follows_the_figures():
    verdict, sentence = judged(relu=0.1, sigmoid=0.3, silu=0.35, gelu=0.4)
    assert verdict == "holds"
    assert "costs 3.5 times relu in the middle, 3.0 to 4.0" in sentence
    verdict, sentence = judged(relu=0.1, sigmoid=0.3, silu=0.35, gelu=1.6)
    assert verdict == "holds in part"
    assert sentence.endswith("a tenth or more: gelu 20 %.")
    assert judged(relu=0.1, sigmoid=0.11, silu=0.12, gelu=0.13)[0] == "did not reproduce"  # not dear
    assert judged(relu=0.1, sigmoid=1.3, silu=1.2, gelu=0.13)[0] == "did not reproduce"  # not small


def test_cases_are_of_the_default_model_and_of_a_wide_block():
    found = cases(get("swiglu"))
    assert found["alone"] == Case("alone", "swiglu", 128, 344)
    assert {(case.place, case.hidden) for case in found.values()} == {
        ("alone", 344), ("ffn", 344), ("model", 344), ("alone", 3072), ("ffn", 3072)
    }  # fmt: skip


@pytest.fixture(scope="module")
def measured() -> tuple[dict[str, Cost], Rates]:
    """One pass over a few activations, unfused."""
    before = torch.get_num_threads()
    said: list[float] = []
    threads: set[int] = set()

    def report(what: str, share: float) -> None:
        said.append(share)
        threads.add(torch.get_num_threads())

    torch.set_num_threads(3)
    try:
        found = measure(records(), None, 1, 3, report, wide=TINY)
        assert threads == {cost_samples.THREADS}
        assert torch.get_num_threads() == 3  # what runs after has its own
    finally:
        torch.set_num_threads(before)
    assert said == sorted(said)
    return found


def test_every_place_and_way_is_measured(measured):
    costs, rates = measured
    assert set(costs) == set(NAMES)
    for found in costs.values():
        assert set(found) == {"alone", "ffn", "model", "alone wide", "ffn wide"}
        for place, ways in found.items():
            assert set(ways) == {"unfused", "torch"} | ({"copy"} if place.startswith("alone") else set())
            assert all(0 < each.low <= each.median <= each.high for each in ways.values())
    assert min(rates.gflop_per_s, rates.memory_gb_per_s, rates.cache_gb_per_s) > 0


def test_an_exp_costs_more_than_a_relu_and_a_block_more_than_its_activation(measured):
    """The direction of the claim, by a factor that no noise makes: gelu has an erf, a block two products."""
    costs, _ = measured
    assert costs["gelu"]["alone"]["unfused"].median > 2 * costs["relu"]["alone"]["unfused"].median
    for name in ("sigmoid", "silu", "gelu"):
        assert share(costs[name], "ffn", "unfused") < 0.5


def test_a_finding_can_be_written_read_and_drawn(measured):
    costs, rates = measured
    found = cost.finding(records(), costs, rates, None, {"threads": "1"})
    record = store.from_json(store.to_json(store.record(cost.CLAIM, found, True, None, 1.0)))
    assert "skipped: torch sees no CUDA device" in document.page(record)
    assert set(document.drawings(record)) == {f"cost-{name}.svg" for name in ("alone", "share", "roofline")}
    ns: Mapping = record.finding.data["ns"]
    *_, roof = record.finding.charts
    for line in roof.lines:
        if line.dashed:
            assert line.names is None
            continue
        assert sorted(line.names) == sorted(NAMES), line.name
        for name, x, y in zip(line.names, line.x, line.y, strict=True):
            if line.name != "blocks":
                assert x == pytest.approx(intensity(get(name)), rel=1e-5)
                assert y == pytest.approx(operations(get(name)) / ns[name]["alone"][line.name], rel=1e-4)
    assert ns["silu"]["alone"]["torch"] == pytest.approx(costs["silu"]["alone"]["torch"].median, rel=1e-5)
    assert set(ns["silu"]) == {"alone", "ffn", "model"}
    assert record.finding.data["digests"] == {name: get(name).digest for name in NAMES}


def test_a_devices_part_runs_where_there_is_none():
    """The code that a GPU runs, on the CPU, at sizes of nothing: shapes fit, and its figures have their places."""
    gpu = measure_device(
        records("silu", "swiglu", "prelu"), ON_CPU, 2, lambda *_: None, rows=16, hidden=TINY, dtype=torch.float32
    )
    costs, rates = gpu
    assert set(costs) == {"silu", "swiglu", "prelu"}
    assert all(each.alone.median > 0 and each.ffn.median > 0 for each in costs.values())
    assert min(rates.tflop_per_s, rates.gb_per_s, rates.exp_per_s) > 0
    both = {name: made(0.3) for name in ("relu", "sigmoid", "silu", "gelu")}
    found = cost.finding(records(*both), both, Rates(100, 10, 40), gpu, {})
    assert any(figure.what.startswith("on the GPU: products") for figure in found.figures)
    assert found.tables[-1].title == "On the GPU"


def test_time_asleep_is_not_counted():
    """What other programs take of the machine is not the activation's cost."""
    asleep = bench.seconds_per_call(lambda: time.sleep(0.05), 1, cost_samples.CLOCK)
    assert asleep < 0.02 < 0.05 <= bench.seconds_per_call(lambda: time.sleep(0.05), 1)


def test_rates_are_measured_of_any_size():
    found = measure_rates(1, 1, 2**12, cost_samples.CLOCK, products=((8, 8, 8),))
    assert found.gflop_per_s > 0


def test_the_library_is_the_one_that_is_there_or_one_built_here_or_none(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise BadInput("no C++ compiler")

    monkeypatch.setattr(cost_samples, "build", fail)
    assert cost_samples.fused_library(tmp_path, tmp_path / "none") == (
        None, "none, so all is unfused: no C++ compiler"
    )  # fmt: skip
    built: list[str] = []
    monkeypatch.setattr(cost_samples, "build", lambda out, cuda: built.append(out.name) or fail())
    cost_samples.fused_library(tmp_path, tmp_path / "none")
    assert built == ["ops"]


def test_fused_kernels_are_measured_beside(fused):
    found = bench.measure(get("silu"), Case("alone", "silu", 4, TINY), fused, 1, 2, cost_samples.CLOCK)
    assert set(found.samples) == {"fused", "unfused", "torch", "copy"}
    assert json.dumps(found.row())


def test_a_special_function_is_counted_alike_everywhere():
    assert roofline.OPERATIONS["exp"] == EXP
    assert roofline.OPERATIONS["sigmoid"] > roofline.OPERATIONS["exp"] > 10
