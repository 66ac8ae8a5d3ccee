"""Who is measured: each engine, its packages, its server, and the settings that it is given.

An engine that can compute several prompts at once is there twice where neither way wins everywhere: `wide`, one prompt
at a time on every core, and `narrow`, a prompt a core. The better of the two counts, cell by cell.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

RIVALS = Path(__file__).parent.parent / "rivals"
WEB = ("fastapi==0.165.0", "httptools==0.9.0", "numpy==2.4.6", "uvicorn==0.54.0", "uvloop==0.23.0")
ONNXRUNTIME = "onnxruntime==1.31.1"

# environment: its packages. torch and transformers are the project's own, seen through a .pth file where True stands:
# they are never installed twice.
ENVIRONMENTS: dict[str, tuple[tuple[str, ...], bool]] = {
    "transformers": (WEB, True),
    "onnxruntime": ((*WEB, ONNXRUNTIME), False),
    "litserve": (("httptools==0.9.0", "litserve==0.2.19", "numpy==2.4.6", ONNXRUNTIME, "uvloop==0.23.0"), False),
    "openvino": ((*WEB, "nncf==3.4.0", "openvino==2026.4.1"), False),
    "ctranslate2": ((*WEB, "ctranslate2==4.8.5"), True),
}
VERSIONED = ("litserve", "onnxruntime", "openvino", "ctranslate2")  # what the report names of them

OURS = "actuary"
SIX = ("gelu", "silu", "swiglu", "relu", "sigmoid", "geglu")  # variants of one shape in one server


@dataclass(frozen=True)
class Contender:
    """A server with one engine, one precision and one setting."""

    engine: str
    precision: str
    setting: str = ""  # wide or narrow where there are both
    model: str = ""  # in the folder of converted models; of ours, a folder of bundles
    streams: int = 1
    threads: int = 1
    generates: bool = False

    @property
    def name(self) -> str:
        return "-".join(part for part in (self.engine, self.precision, self.setting) if part)

    @property
    def ours(self) -> bool:
        return self.engine == OURS

    @property
    def models(self) -> tuple[str, ...]:
        """Names that our server knows its bundles by."""
        return (SIX if self.setting == "six" else (self.precision,)) if self.ours else ()

    @property
    def described(self) -> str:
        """How it is set, for the report."""
        if self.ours:
            return f"actuary serve --threads {self.threads}"
        once = "batches" if self.engine == "litserve" else "prompts"
        return f"{once} at once: {self.streams}, threads of each: {self.threads}"

    def command(self, folder: Path, port: int, ops: Path) -> list[str]:
        """Args: folder: artifacts/bench-serve; ops: our fused operators."""
        if self.ours:
            python = [sys.executable, "-m", "actuary", "serve", "--provider", "cpu", "--ops", str(ops)]
            python += ["--database", str(folder / "experiments.db")]  # there are none; elsewhere some may run
            return [*python, "--bundles", str(folder / self.model), "--port", str(port), "--threads", str(self.threads)]
        python = [str(python_of(folder, self.engine)), str(RIVALS / f"serve_{self.engine}.py")]
        sizes = ["--streams", str(self.streams), "--threads", str(self.threads)]
        return [*python, "--model", str(folder / self.model), "--port", str(port), *sizes]


def python_of(folder: Path, environment: str) -> Path:
    return folder / "environments" / environment / "bin" / "python"


def contenders(cores: int) -> list[Contender]:
    """All of them on a machine of so many cores; the six variants, which are ours alone, come last."""
    wide, narrow = ("wide", 1, cores), ("narrow", cores, 1)
    found = [Contender(OURS, p, model=f"bundles/{p}", threads=cores, generates=True) for p in ("fp32", "int8")]
    found.append(Contender("transformers", "fp32", model="gpt2", threads=cores, generates=True))
    for precision in ("fp32", "int8"):
        found.append(Contender("litserve", precision, model=f"onnx/{precision}.onnx", threads=cores))
        for setting, streams, threads in (wide, narrow) if cores > 1 else (wide,):
            sizes = (setting, streams, threads)
            openvino = "onnx/fp32.onnx" if precision == "fp32" else "openvino/int8.xml"
            found += [
                Contender("onnxruntime", precision, sizes[0], f"onnx/{precision}.onnx", *sizes[1:]),
                Contender("openvino", precision, sizes[0], openvino, *sizes[1:]),
                Contender("ctranslate2", precision, sizes[0], f"ctranslate2/{precision}", *sizes[1:], generates=True),
            ]
    return [*found, Contender(OURS, "fp32", "six", "bundles/six", threads=cores)]
