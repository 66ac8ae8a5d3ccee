"""docker-compose.yml without a Docker engine: its schema, and each service's very command.

The schema is the compose specification's own, as the package check-jsonschema carries it. A command
runs in a copy of exactly the files that its Dockerfile copies, with the paths, ports and host names
of containers mapped to folders, free ports and loopback. What this cannot show is that the images
build and that the engine wires them together.
"""

from __future__ import annotations

import copy
import importlib.resources
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from conftest import HANG_S, free_port
from ruamel.yaml import YAML

from export import onnx_file
from export.audit import foreseen_on_cuda
from export.bundle import MODEL, read_manifest
from export.ops.library import Library
from loadtest.samples import read_samples

ROOT = Path(__file__).parents[1]
COMPOSE = ROOT / "docker-compose.yml"
TINY = "--activations gelu,swiglu --layers 1 --dim 32 --context 32 --vocab 300 --batch 2 --workers 1"


def _compose(variables: dict[str, str] | None = None) -> dict[str, Any]:
    """The file as Compose reads it: YAML with its anchors merged, then ${NAME:-default} and $$ resolved."""
    document = json.loads(json.dumps(YAML(typ="safe").load(COMPOSE.read_text(encoding="utf-8"))))
    return _interpolate(document, variables or {})


def _interpolate(value: Any, variables: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _interpolate(inner, variables) for key, inner in value.items()}
    if isinstance(value, list):
        return [_interpolate(inner, variables) for inner in value]
    if not isinstance(value, str):
        return value

    def resolve(match: re.Match[str]) -> str:
        if match["escaped"]:
            return "$"
        assert match["name"], f"a form of interpolation that this test does not know: {value}"
        return variables.get(match["name"]) or match["default"]

    return re.sub(r"\$(?:(?P<escaped>\$)|\{(?P<name>\w+):-(?P<default>[^}]*)\}|)", resolve, value)


def _schema() -> dict[str, Any]:
    path = importlib.resources.files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json"
    schema: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return schema


# --- what the file says ---------------------------------------------------------------------------


def test_fits_the_compose_specification() -> None:
    jsonschema.validate(_compose(), _schema())
    # Before interpolation too: Compose reads it so.
    jsonschema.validate(json.loads(json.dumps(YAML(typ="safe").load(COMPOSE.read_text()))), _schema())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("services", "service", "comand"), ["x"]),
        (("services", "service", "healthcheck", "intervall"), "3s"),
        (("services", "service", "depends_on"), {"export": {"condition": "service_done"}}),
        (("services", "service", "ports"), {"8000": 8000}),
        (("service",), {}),
    ],
)
def test_the_schema_refuses_mistakes(path: tuple[str, ...], value: Any) -> None:
    document = copy.deepcopy(_compose())
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, _schema())


def test_every_name_leads_somewhere() -> None:
    compose = _compose()
    services = compose["services"]
    for name, service in services.items():
        for needed, how in service.get("depends_on", {}).items():
            missing = set(service["profiles"]) - set(services[needed]["profiles"])
            assert not missing or how.get("required") is False, f"{name} needs {needed}, absent in {missing}"
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in compose["volumes"]
        build = service["build"]
        assert (ROOT / build["context"] / build["dockerfile"]).is_file()
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), "published to this machine only, unless someone decides otherwise"
    waits = {
        "service": ["export", "ops"], "service-gpu": ["export-gpu"], "export": ["train"], "export-gpu": ["train"],
    }  # fmt: skip
    for name, waits_for in waits.items():
        assert services[name]["depends_on"] == {
            one: {"condition": "service_completed_successfully"} for one in waits_for
        }
    profiles = {name: service["profiles"] for name, service in services.items()}
    assert [name for name in profiles if profiles[name] == ["cpu"]] == ["ops", "export", "service"]
    assert [name for name in profiles if profiles[name] == ["gpu"]] == ["export-gpu", "service-gpu"]
    assert services["export-gpu"]["command"] == [*services["export"]["command"], "--flavor", "portable"]
    gpu, cpu = services["service-gpu"], services["service"]
    assert [word for word in cpu["command"] if word not in ("--ops", "/ops/library")][:-1] == gpu["command"][:-1]
    assert (gpu["command"][-2:], cpu["command"][-2:]) == (["--provider", "cuda"], ["--provider", "cpu"])
    assert gpu["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert "service" in gpu["networks"]["default"]["aliases"], "Locust looks for http://service:8000"


def test_the_service_reads_the_library_where_the_one_shot_writes_it() -> None:
    """One folder of one volume for both, above which the one-shot may write: it builds beside it and renames."""
    services = _compose()["services"]
    built, served = services["ops"], services["service"]
    assert built["command"] == ["actuary", "ops", "build", "--out", "/ops/library"]
    assert _option(served["command"], "--ops") == "/ops/library"
    assert "ops:/ops" in built["volumes"]
    assert "ops:/ops:ro" in served["volumes"]
    for image in ("train", "service"):
        made, owned = re.search(r"mkdir (.*?) && chown actuary (.*)", _last_stage(image)).groups()
        assert "/ops" in made.split(), f"Dockerfile.{image}: a volume takes its owner from the image's folder"
        assert "/ops" in owned.split(), f"Dockerfile.{image}: a volume takes its owner from the image's folder"
    command = json.loads(re.search(r"^CMD (\[.*\])$", _last_stage("service"), re.MULTILINE)[1])
    assert _option(command, "--ops") == "/ops/library"


def test_the_library_is_compiled_by_one_image_and_loads_in_the_other() -> None:
    """It asks for the C and C++ libraries of the release that it was compiled on, or newer ones."""
    assert re.search(r"apt-get install .*\bg\+\+", _last_stage("train"))
    assert not re.search(r"g\+\+|gcc|clang|build-essential", re.sub("#.*", "", _dockerfile("service")))
    images = {re.findall(r"^FROM (\S+)", _dockerfile(name), re.MULTILINE)[-1] for name in ("train", "service")}
    assert images == {"python:3.11-slim-bookworm"}, "one release for both; `slim` alone moves on with Debian"


def test_dockerfiles_agree_with_compose_and_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = [p.split(";")[0].strip() for extra in project["optional-dependencies"].values() for p in extra]
    for name in ("service", "train", "load"):
        text = _dockerfile(name)
        for pin in re.findall(r"\b(?:torch|onnxruntime)==\S+\b", text):
            assert pin in pins, f"Dockerfile.{name} pins {pin}, pyproject.toml does not"
        assert re.search(r"^USER (?!root)\w+$", text, re.MULTILINE), f"Dockerfile.{name} runs as root"
        for source in _copied(name):
            assert (ROOT / source).exists(), f"Dockerfile.{name} copies {source}, which is not there"
            allowed = (ROOT / ".dockerignore").read_text().splitlines()
            ways = {f"!{source.parts[0]}", f"!{source.parts[0]}/", f"!{source}/"}
            assert ways & set(allowed), f"{source} never reaches the build"
    health = re.search(r"HEALTHCHECK .*?CMD (\[.*?\])$", _dockerfile("service"), re.S | re.M)
    assert health
    assert ["CMD", *json.loads(health[1])] == _compose()["services"]["service"]["healthcheck"]["test"]


def test_the_service_image_holds_no_training_code() -> None:
    assert not {path.parts[0] for path in _copied("service")} & {"models", "loadtest", "tests"}
    assert {path for path in _copied("service") if path.parts[0] == "export"} == {
        Path("export/__init__.py"),
        Path("export/audit.py"),
        Path("export/bundle.py"),
        Path("export/onnx_file.py"),
        Path("export/ops/__init__.py"),
        Path("export/ops/library.py"),
    }
    assert "torch" not in re.sub(r"#.*", "", _dockerfile("service"))


@pytest.mark.parametrize("image", ["load", "service", "train"])
def test_an_edit_of_a_source_does_not_install_the_dependencies_again(image: str) -> None:
    """A layer is built again when what was copied above it changed; above the dependencies that is one file."""
    text = re.sub(r"#.*", "", _dockerfile(image)).split("\nFROM")[1]
    before, install, after = re.split(r"(pip install [^\n]*\.\[[^\n]*)", text)
    assert install
    assert re.findall(r"^COPY (.*) \S+$", before, re.MULTILINE) == ["pyproject.toml"]
    installs = re.findall(r"pip install .*", after.split("COPY", 1)[1])
    assert [line for line in installs if "--no-deps" not in line] == []
    assert installs, "the package itself, which was empty above"


def test_no_shell_stands_between_a_signal_and_a_program() -> None:
    services = _compose()["services"]
    for name, service in services.items():
        words = service["command"]
        words = shlex.split(words) if isinstance(words, str) else words
        assert "entrypoint" not in service, name
        assert words[0] in ("actuary", "locust"), name
        assert not {"&&", ";", "|"} & set(words), name


def _dockerfile(image: str) -> str:
    return (ROOT / "deploy" / f"Dockerfile.{image}").read_text()


def _last_stage(image: str) -> str:
    """What the image consists of, after the stage that builds for it."""
    return re.split(r"^FROM ", _dockerfile(image), flags=re.MULTILINE)[-1]


def _option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def _copied(image: str) -> list[Path]:
    """The sources of the COPY lines that take from the build's context."""
    sources = []
    for line in _dockerfile(image).splitlines():
        words = line.split()
        if words[:1] == ["COPY"] and not words[1].startswith("--"):
            sources += [Path(word) for word in words[1:-1]]
    return sources


# --- what its commands do -------------------------------------------------------------------------


class Host:
    """One machine standing for all containers: an /app for each image, the volumes, and free ports."""

    def __init__(self, folder: Path, variables: dict[str, str]) -> None:
        self.folder = folder
        self.services = _compose(variables)["services"]
        self.ports = {port: str(free_port()) for port in ("8000", "8089", "5557")}
        for volume in ("data", "bundles", "ops"):
            (folder / volume).mkdir()
        # The images' own `actuary`, `locust` and `python` are those of this environment.
        programs = folder / "bin"
        programs.mkdir()
        for name, module in (("actuary", "actuary"), ("locust", "locust"), ("python", None)):
            words = [sys.executable, *(["-m", module] if module else [])]
            (programs / name).write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
            (programs / name).chmod(0o755)

    def app(self, service: str) -> Path:
        """What the image of `service` holds in /app."""
        image = self.services[service]["build"]["dockerfile"].rpartition(".")[2]
        app = self.folder / f"app-{image}"
        if not app.exists():
            app.mkdir()
            for source in _copied(image):
                if (ROOT / source).is_dir():
                    leave = shutil.ignore_patterns("__pycache__")
                    shutil.copytree(ROOT / source, app / source, ignore=leave)
                elif (ROOT / source).exists():
                    (app / source).parent.mkdir(exist_ok=True)
                    shutil.copy(ROOT / source, app / source)
        return app

    def here(self, service: str, word: str) -> str:
        """A word of a command, with what belongs to containers replaced by what there is on this machine."""
        for inside in ("/data", "/bundles", "/ops"):
            word = re.sub(rf"(?<![\w/]){inside}\b", str(self.folder) + inside, word)
        word = re.sub(r"(?<![\w/])/app\b", str(self.app(service)), word)
        word = re.sub(r"\b0\.0\.0\.0\b|^locust-master$|(?<=http://)service(?=:)", "127.0.0.1", word)
        return re.sub(r"(?<!\d)(8000|8089|5557)(?!\d)", lambda match: self.ports[match[1]], word)

    def start(self, service: str, command: list[str] | None = None) -> subprocess.Popen[str]:
        entry = self.services[service]
        words = command or entry["command"]
        words = shlex.split(words) if isinstance(words, str) else words  # as Compose does, after interpolation
        environment = {
            **os.environ,
            **entry.get("environment", {}),
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self.app(service)),
        }
        log = (self.folder / f"{service}.log").open("a")
        return subprocess.Popen(
            [self.here(service, word) for word in words],
            cwd=self.folder / "data",
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def healthy(self, service: str) -> bool:
        kind, *words = self.services[service]["healthcheck"]["test"]
        assert kind == "CMD"
        return self.start(service, words).wait(timeout=HANG_S) == 0

    def log(self, service: str) -> str:
        return (self.folder / f"{service}.log").read_text(errors="replace")[-4000:]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    corpus = Path(json.__file__).parent
    variables = {"ACTUARY_TRAIN_STEPS": "2", "ACTUARY_TRAIN_ARGS": f"{TINY} --corpus {corpus}"}
    return Host(tmp_path_factory.mktemp("compose"), variables)


@pytest.fixture(scope="module")
def bundles_volume(host: Host) -> Path:
    """The one-shots' result: the service may start when both completed successfully."""
    for service in ("train", "export"):
        assert host.start(service).wait(timeout=600) == 0, host.log(service)
    return host.folder / "bundles"


@pytest.fixture(scope="module")
def ops_volume(host: Host, fused: Library) -> Path:
    """The compiler's one-shot, which finds that what stands there was made of the very sources that its image has."""
    shutil.copytree(fused.path.parent, host.folder / "ops" / "library")
    assert host.start("ops").wait(timeout=600) == 0, host.log("ops")
    return host.folder / "ops"


@pytest.fixture(scope="module")
def running_service(host: Host, bundles_volume: Path, ops_volume: Path) -> Iterator[str]:
    process = host.start("service")
    try:
        _until(lambda: process.poll() is not None or host.healthy("service"), host)
        assert process.poll() is None, host.log("service")
        yield f"http://127.0.0.1:{host.ports['8000']}"
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=HANG_S) == 0, host.log("service")


def test_train_and_export_fills_the_volume(bundles_volume: Path) -> None:
    assert {path.parent.name for path in bundles_volume.glob("*/manifest.json")} == {"gelu", "swiglu"}


def test_what_is_exported_for_the_gpu_is_what_cuda_takes(host: Host, bundles_volume: Path, tmp_path: Path) -> None:
    gpu = Host(tmp_path, {})
    shutil.copytree(host.folder / "data", gpu.folder / "data", dirs_exist_ok=True)
    assert gpu.start("export-gpu").wait(timeout=600) == 0, gpu.log("export-gpu")
    for name in ("gelu", "swiglu"):
        manifest = read_manifest(gpu.folder / "bundles" / name)
        assert manifest.flavor == "portable"
        assert foreseen_on_cuda(onnx_file.read(gpu.folder / "bundles" / name / MODEL), manifest.precision) == ""
        assert read_manifest(bundles_volume / name).flavor == "ort"


def test_stopping_while_it_trains_ends_it_in_the_time_that_docker_gives(tmp_path: Path) -> None:
    corpus = Path(json.__file__).parent
    host = Host(tmp_path, {"ACTUARY_TRAIN_STEPS": "1000000", "ACTUARY_TRAIN_ARGS": f"{TINY} --corpus {corpus}"})
    process = host.start("train")
    try:
        _until(lambda: "gelu: step 1 of 1000000" in host.log("train") or process.poll() is not None, host)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 1, host.log("train")  # its own exit, not the signal's -15
    finally:
        process.kill()
    assert "gelu stopped after" in host.log("train"), host.log("train")


def test_the_health_check_fails_without_a_service(host: Host) -> None:
    lonely = copy.copy(host)
    lonely.ports = {**host.ports, "8000": str(free_port())}
    assert not lonely.healthy("service")


def test_the_service_answers(running_service: str) -> None:
    body = json.dumps({"model": "*", "prompt": "if x", "top_k": 2}).encode()
    request = urllib.request.Request(f"{running_service}/v1/next-token", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as response:
        results = json.load(response)["results"]
    assert {result["model"] for result in results} == {"gelu", "swiglu"}
    assert {result["provider"] for result in results} == {"CPUExecutionProvider"}


def test_the_images_hold_all_that_the_library_is_compiled_from(host: Host, ops_volume: Path) -> None:
    assert "nothing has changed since it was built" in " ".join(host.log("ops").split())


def test_the_service_runs_the_library(running_service: str) -> None:
    variants = _get(f"{running_service}/v1/models")["data"]
    assert {variant["id"] for variant in variants} == {"gelu", "swiglu"}
    for variant in variants:
        assert (variant["audit"]["activation"], variant["audit"]["attention"]) == ("fused", "fused"), variant["audit"]


def test_locust_master_and_workers_load_it(host: Host, running_service: str) -> None:
    master = host.start("locust-master")
    workers = [host.start("locust-workers") for _ in range(int(host.services["locust-workers"]["deploy"]["replicas"]))]
    page = f"http://127.0.0.1:{host.ports['8089']}"
    try:
        _until(lambda: len(_get(f"{page}/stats/requests").get("workers", [])) == len(workers), host)
        form = {"user_count": 4, "spawn_rate": 4, "host": running_service, "models": "gelu,swiglu"}
        form["prompts"] = str(_short_prompts(host))
        started = urllib.request.urlopen(f"{page}/swarm", urllib.parse.urlencode(form).encode(), timeout=10)
        assert json.load(started)["success"], host.log("locust-master")
        _until(lambda: _requests(page) > 100, host)
        urllib.request.urlopen(f"{page}/stop", b"", timeout=10).close()
        rows = {row["name"]: row for row in _get(f"{page}/stats/requests")["stats"]}
        for model in ("gelu", "swiglu"):
            assert rows[model]["num_requests"] > 20
            assert rows[model]["num_failures"] == 0, rows[model]
        # A second test on the page leaves the first one's samples alone.
        _until(lambda: _get(f"{page}/stats/requests")["state"] == "stopped", host)
        urllib.request.urlopen(f"{page}/swarm", urllib.parse.urlencode(form).encode(), timeout=10).close()
        # The page's count may still be the first test's: the second one's own file tells.
        second = host.folder / "data" / "samples-2.csv"
        _until(lambda: second.is_file() and len(second.read_text().splitlines()) > 101, host)
    finally:
        master.send_signal(signal.SIGTERM)
        codes = [process.wait(timeout=HANG_S) for process in (master, *workers)]
    assert codes[0] == 0, host.log("locust-master")
    samples, again = (read_samples(host.folder / "data" / name) for name in ("samples.csv", "samples-2.csv"))
    assert len(samples) > 100
    assert len(again) > 100
    assert {sample.model for sample in samples} == {"gelu", "swiglu"}
    assert len({sample.worker for sample in samples}) == len(workers)
    assert not [sample.failure for sample in samples if sample.failure]


def _short_prompts(host: Host) -> Path:
    path = host.folder / "prompts.txt"
    path.write_text("if x\nfor i in\n")  # the tiny variants' context is 32 tokens
    return path


def _get(url: str) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            answer: dict[str, Any] = json.load(response)
            return answer
    except OSError:
        return {}


def _requests(page: str) -> int:
    return sum(row["num_requests"] for row in _get(f"{page}/stats/requests").get("stats", []) if row["method"])


def _until(condition: Any, host: Host) -> None:
    deadline = time.monotonic() + HANG_S
    while not condition():
        logs = "".join(host.log(path.stem) for path in host.folder.glob("*.log"))
        assert time.monotonic() < deadline, logs
        time.sleep(0.1)
