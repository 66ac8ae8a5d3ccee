"""`actuary bench ops`: what it measures, what it writes, what it refuses. Its figures are not judged here."""

from __future__ import annotations

import json
import subprocess

import pytest
from conftest import ACTUARY


def bench(*arguments: str, cwd) -> subprocess.CompletedProcess:
    return subprocess.run([*ACTUARY, "bench", "ops", *arguments], capture_output=True, text=True, timeout=300, cwd=cwd)


def test_every_place_and_way_is_measured(tmp_path):
    done = bench(
        "--activations", "swiglu,solu", "--rows", "1,16", "--hidden", "64", "--rounds", "3", "--json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {(row["activation"], row["place"], row["rows"]) for row in result["rows"]} == {
        (name, place, rows)
        for name in ("swiglu", "solu")
        for place, rows in (("alone", 1), ("alone", 16), ("ffn", 1), ("ffn", 16), ("model", 128))
    }
    for row in result["rows"]:
        ways = {"unfused", "torch"} | ({"copy"} if row["place"] == "alone" else set())
        assert ways <= set(row)
        for way in ways:
            low, high = row[way]["quartiles"]
            assert 0 < low <= row[way]["ns_per_element"] <= high
        assert row["unfused"]["of_unfused"] == 1
    assert "no fused library in artifacts/ops" in done.stderr
    assert json.loads((tmp_path / "artifacts/bench/ops.json").read_text()) == result
    page = (tmp_path / "artifacts/bench/ops.html").read_text()
    assert "ns per hidden element" in page
    assert page.count("<tr><td>") == len(result["rows"])
    assert "https://cdn" not in page.split("<script", 1)[0]


def test_a_library_is_measured_and_named(tmp_path, fused):
    done = bench(
        "--activations", "gelu", "--rows", "16", "--hidden", "64", "--rounds", "3", "--ops", str(fused.path.parent),
        "--json", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert all(row["fused"]["ns_per_element"] > 0 for row in result["rows"])
    assert result["machine"]["library"] == {
        "compiler": fused.compiler,
        "vector_math": fused.vector_math,
        "inputs": fused.inputs,
        "isa": result["machine"]["library"]["isa"],
    }
    assert result["machine"]["library"]["isa"] in fused.isas


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--activations", "swigul"], "did you mean 'swiglu'"),
        (["--rows", "1,x"], "must be whole numbers of at least 1"),
        (["--rows", "0"], "must be whole numbers of at least 1"),
        (["--activations", "gelu", "--hidden", "64,33"], "hidden 33 must be a multiple of 4"),
        (["--threads", "999"], "is more than the"),
        (["--rounds", "1"], "is not in the range"),
    ],
)
def test_bad_arguments_exit_with_2(actuary_here, arguments, message):
    done = actuary_here("bench", "ops", *arguments)
    assert done.returncode == 2, done.stderr
    assert message in " ".join(done.stderr.split())
