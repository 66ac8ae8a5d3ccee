"""The README cannot go stale: its table, its commands, its curl line and its file map against the code."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import shlex
from pathlib import Path

import click
import httpx2 as httpx
import pytest
import torch

import actuary
from export.ops.trace import trace
from models.activations import Activation

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.partition("  #")[0].strip() for line in re.findall(r"^actuary .*$", README, re.MULTILINE)]


def test_generated_parts_are_fresh():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert generate.readme() == README, "README.md is stale; run: make docs"


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_of_the_readme_is_one(line: str):
    """Its verb, options and values parse; what it names on disk need not be there."""
    _, verb, *arguments = shlex.split(line)
    with click.Context(actuary.cli) as ctx:
        command = actuary.cli.get_command(ctx, verb)
        assert command is not None, f"no verb {verb}"
        command = copy.deepcopy(command)
        for parameter in command.params:
            if isinstance(parameter.type, click.Path):
                parameter.type.exists = False
        command.make_context(verb, list(arguments))


def test_the_readme_has_commands_at_all():
    assert {shlex.split(line)[1] for line in COMMANDS} == set(actuary.VERBS)


def test_the_curl_line_answers(server_url):
    body = json.loads(re.search(r"-d '(\{.*?\})'", README)[1])
    answer = httpx.post(f"{server_url}/v1/next-token", json=body)
    assert answer.status_code == 200, answer.text
    assert [result["model"] for result in answer.json()["results"]] == body["model"]


def test_the_python_lines_run_with_and_without_the_library(bundles, fused, monkeypatch, tmp_path):
    (code,) = re.findall(r"```python\n(import numpy.*?)```", README, re.DOTALL)
    bundle = tmp_path / "artifacts" / "bundles"
    bundle.mkdir(parents=True)
    (bundle / "gelu").symlink_to(bundles / "gelu")
    (tmp_path / "artifacts" / "ops").symlink_to(fused.path.parent)
    monkeypatch.chdir(tmp_path)
    plain = "\n".join(line for line in code.splitlines() if "register" not in line)
    answers = []
    for text in (code, plain):
        names: dict = {}
        exec(text, names)
        answers.append(names["softmax"])
    assert answers[0].shape[0] == 2
    assert answers[0].sum(axis=-1) == pytest.approx(1)
    assert answers[0] == pytest.approx(answers[1], rel=1e-3)


def test_the_record_of_the_readme_is_one_row_of_the_table():
    row = re.search(r"^    (Activation\(.*\)),$", README, re.MULTILINE)[1]
    record = eval(row, {"Activation": Activation, "torch": torch})
    assert trace(record).elementwise


def test_torch_is_pinned_to_one_version():
    places = ("Makefile", "pyproject.toml", "deploy/Dockerfile.train")
    pins = {name: set(re.findall(r"torch==([0-9.]+)", (ROOT / name).read_text())) for name in places}
    assert len(set.union(*pins.values())) == 1, pins
    assert all(pins.values()), pins


def test_every_file_that_the_readme_names_is_there():
    rooms = "models|export|service|loadtest|studies|deploy|docs|tests"
    named = set(re.findall(rf"`((?:{rooms})/[\w./]*)`", README))
    for name in named | {"docs/page.png", "LICENSE"}:
        assert (ROOT / name).exists(), name


def test_every_make_target_of_the_readme_is_one():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z-]+)", README)) - {"a"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
