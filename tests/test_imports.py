"""The arrows of the house: what each room may import, file by file.

models -> export -> service -> loadtest
              `---> studies
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("models", "export", "service", "loadtest", "studies")
# A room may import itself, the program's exceptions, and what is named here: of export the service sees the
# bundle format, its audit and the built library alone, and the load test sees nothing but HTTP.
ALLOWED = {
    "models": set(),
    "export": {"models"},
    "service": {"export.audit", "export.bundle", "export.onnx_file", "export.ops.library"},
    "loadtest": set(),
    "studies": {"models", "export"},
}
# Engines that ours is measured against: programs of other environments, which nothing of ours imports.
RIVALS = ROOT / "loadtest" / "rivals"
HEAVY = {"torch", "transformers", "accelerate", "onnx", "safetensors"}
SERVER = {"fastapi", "starlette", "uvicorn"}
FORBIDDEN = {
    "models": SERVER | {"locust"},
    "export": SERVER | {"locust"},
    "service": HEAVY | {"locust"},
    "loadtest": HEAVY | {"onnxruntime"},
    "studies": SERVER | {"locust"},
}


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, lazily or not."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def inside(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_follow_the_arrows(room: str):
    files = [path for path in sorted((ROOT / room).rglob("*.py")) if path.parent != RIVALS]
    assert files
    for path in files:
        for name in imported(path):
            if name.partition(".")[0] in ROOMS and name not in (
                "export",
                "export.ops",
            ):  # `from export import bundle` reads as export.bundle too
                assert inside(name, ALLOWED[room] | {room}), f"{path.relative_to(ROOT)} imports {name}"
            assert not inside(name, FORBIDDEN[room]), f"{path.relative_to(ROOT)} imports {name}"
            assert not inside(name, {"loadtest.rivals"}), f"{path.relative_to(ROOT)} imports {name}"


def test_rivals_import_nothing_of_ours():
    for path in RIVALS.glob("*.py"):
        assert not any(inside(name, {*ROOMS, "actuary"}) for name in imported(path)), path


def test_what_the_service_sees_of_export_needs_no_heavy_library():
    seen = {f"{name.replace('.', '/')}.py" for name in ALLOWED["service"]}
    for path in map(ROOT.joinpath, seen | {"export/__init__.py", "export/ops/__init__.py", "actuary.py"}):
        assert not any(inside(name, HEAVY | set(ROOMS) - {"export"}) for name in imported(path)), path


def test_the_reader_of_imports_sees_through_functions(tmp_path):
    (tmp_path / "x.py").write_text("def f():\n    from torch import nn\n    import onnx.helper\n")
    assert {"torch", "torch.nn", "onnx.helper"} <= imported(tmp_path / "x.py")


def test_no_pickle_anywhere():
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            names = imported(path)
            assert not names & {"pickle", "cloudpickle", "dill"}, path
            calls = {
                ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
            }
            assert not calls & {"torch.load", "torch.save"}, path
            assert not names & {"torch.load", "torch.save"}, path
            assert "allow_pickle=True" not in path.read_text(), path
