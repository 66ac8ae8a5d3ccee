"""Everything that must lie ready before a server is started, each made once and again when what it is made of changed.

environments/NAME                     a virtual environment per engine
gpt2                                  random weights in transformers' format
onnx, openvino, ctranslate2, bundles  the same in each engine's own format; bundles/six are variants of ours
reference.json                        what transformers says of gpt2, in float64
made/                                 what each was made of, and the log of making it
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from actuary import ActuaryError
from loadtest.bench.contenders import ENVIRONMENTS, RIVALS, SIX, Contender, python_of

ROOT = Path(__file__).parent.parent.parent
SHAPE = ("--layers", "6", "--dim", "384", "--heads", "6", "--context", "512", "--vocab", "8192")  # that of the GPT-2
VOCAB_SIZE = 8192

Say = Callable[[str], None]


def make(folder: Path, contenders: Sequence[Contender], say: Say) -> None:
    """Fills `folder` with what these contenders need; ActuaryError where a step fails, with the end of its log."""
    engines = {contender.engine for contender in contenders}
    folder.mkdir(parents=True, exist_ok=True)
    for name in sorted(engines & ENVIRONMENTS.keys()):
        _environment(folder, name, say)
    ours = digest("models", "export")
    gpt2, reference, onnx = folder / "gpt2", folder / "reference.json", folder / "onnx"
    weights = digest("models/random_gpt2.py", "models/corpus.py")
    write = [sys.executable, "-m", "models.random_gpt2", "--out", str(gpt2), "--cache", str(folder / "corpus")]
    _step(folder, gpt2, weights, [write], say)
    _step(folder, reference, weights + digest("loadtest/rivals/reference.py"),
          [[sys.executable, str(RIVALS / "reference.py"), str(gpt2), str(reference)]], say)  # fmt: skip
    if engines & {"onnxruntime", "litserve", "openvino"}:
        made_of = weights + digest("loadtest/rivals/to_onnx.py")
        _step(folder, onnx, made_of, [[sys.executable, str(RIVALS / "to_onnx.py"), str(gpt2), str(onnx)]], say)
    if "openvino" in engines:
        target = folder / "openvino"
        convert = [str(python_of(folder, "openvino")), str(RIVALS / "to_openvino.py"), str(onnx / "fp32.onnx")]
        made_of = weights + digest("loadtest/rivals/to_onnx.py", "loadtest/rivals/to_openvino.py")
        _step(folder, target, made_of, [[*convert, str(target / "int8.xml"), str(VOCAB_SIZE)]], say)
    if "ctranslate2" in engines:
        target = folder / "ctranslate2"
        convert = [str(python_of(folder, "ctranslate2")), str(RIVALS / "to_ctranslate2.py"), str(gpt2)]
        commands = [[*convert, str(target / p), kind] for p, kind in (("fp32", "float32"), ("int8", "int8"))]
        _step(folder, target, weights + digest("loadtest/rivals/to_ctranslate2.py"), commands, say)
    export = [sys.executable, "-m", "actuary", "export"]
    for model in sorted({Path(contender.model) for contender in contenders if contender.ours}):
        target = folder / model
        into = ["--out", str(target)]
        if model.name != "six":
            of_gpt2 = ["--from", str(gpt2), "--precision", model.name, "--name", model.name]
            _step(folder, target, weights + ours, [[*export, *of_gpt2, *into]], say)
            continue
        for name in SIX:
            random = ["--random", "--activation", name, "--name", name, *SHAPE]
            _step(folder, target / name, ours, [[*export, *random, *into]], say)


def digest(*parts: str) -> str:
    """Of the files named, and of the Python, C++ and CUDA files in the folders named, below the repository's root."""
    found = hashlib.sha256()
    for part in parts:
        path = ROOT / part
        files = sorted(f for f in path.rglob("*") if f.suffix in (".py", ".h", ".cc", ".cu", ".hpp", ".cpp"))
        for file in files if path.is_dir() else [path]:
            found.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return found.hexdigest()[:16]


def _environment(folder: Path, name: str, say: Say) -> None:
    packages, sees_torch = ENVIRONMENTS[name]
    made_of = " ".join([sys.version.split()[0], *packages, str(sees_torch)])
    target = folder / "environments" / name
    python = python_of(folder, name)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
    _step(folder, target, made_of, [[sys.executable, "-m", "venv", str(target)], pip], say)
    if sees_torch:
        torch = importlib.util.find_spec("torch")
        if torch is None or torch.origin is None:
            raise ActuaryError("torch is not installed here; run: make install")
        (site,) = (target / "lib").glob("python*/site-packages")
        (site / "project.pth").write_text(f"{Path(torch.origin).parent.parent}\n", encoding="utf-8")


def _step(folder: Path, target: Path, made_of: str, commands: Sequence[list[str]], say: Say) -> None:
    """Runs `commands` to make `target`, unless it is there and was made of the same."""
    about = folder / "made" / "-".join(target.relative_to(folder).parts)
    stamp, log = about.with_suffix(".of"), about.with_suffix(".log")
    if target.exists() and stamp.is_file() and stamp.read_text(encoding="utf-8") == made_of:
        return
    say(f"making {target}")
    stamp.unlink(missing_ok=True)
    about.parent.mkdir(exist_ok=True)
    if target.is_dir():
        shutil.rmtree(target)
    (target.parent if target.suffix else target).mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        for command in commands:
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
            done = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
            )
            if done.returncode:
                tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:])
                raise ActuaryError(f"{target} could not be made; {log} ends with:\n{tail}")
    stamp.write_text(made_of, encoding="utf-8")
