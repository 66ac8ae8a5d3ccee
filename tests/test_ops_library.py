"""The library of fused operators where it is found: what must not load, what it runs, what the service says of it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import onnxruntime
import pytest
from conftest import ACTUARY, HANG_S, serving
from native_ops import copied

from actuary import BadInput
from export.bundle import ActivationInfo
from export.catalogue import describe
from export.ops import library
from export.ops.trace import trace
from models.activations import get
from service.runtime import Runtime


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ops_version": 99}, f"of version 99, where this is {library.OPS_VERSION}"),
        ({"ort_api": 17}, "for ONNX Runtime's interface 17, where this is 24"),
        ({"machine": "sparc"}, "for the processor 'sparc', where this is"),
        ({"system": "darwin"}, "for the system 'darwin', where this is 'linux'"),
        ({"sha256": "0" * 64}, "with the sha256"),
        ({"activations": 3}, "are damaged"),
    ],
)
def test_a_library_that_does_not_fit_is_refused_with_the_remedy(fused, tmp_path, changes: dict, says: str):
    with pytest.raises(BadInput, match=f"{says}.*build it with: actuary ops build"):
        library.find(copied(fused, tmp_path / "ops", **changes))


def test_a_damaged_library_is_refused_and_one_never_built_is_not(fused, tmp_path):
    folder = copied(fused, tmp_path / "ops")
    assert library.find(folder).sha256 == fused.sha256
    binary = folder / library.BINARY
    binary.write_bytes(binary.read_bytes()[:1000])
    with pytest.raises(BadInput, match="with the sha256"):
        library.find(folder)
    binary.unlink()
    with pytest.raises(BadInput, match=r"damaged \(No such file"):
        library.find(folder)
    for text, says in (
        ("{", "Expecting property name"),
        ("{}", "library.json: ops_version: Field required"),
        ("[]", "library.json: Input should be a valid dictionary"),
    ):
        (folder / library.RECORD).write_text(text)
        with pytest.raises(BadInput, match=rf"damaged \({says}.*build it with: actuary ops build"):
            library.find(folder)
    assert library.find(tmp_path / "nothing") is None


def test_a_folder_that_one_may_not_enter_is_refused_in_words(tmp_path, monkeypatch):
    def denied(path: Path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", denied)  # root, who may run this, may enter all
    with pytest.raises(BadInput, match=r"cannot read the fused operators in .*: Permission denied; make it readable"):
        library.find(tmp_path)


def test_a_binary_that_is_no_library_is_refused_in_words(fused, tmp_path):
    (tmp_path / library.BINARY).write_bytes(b"not a library")
    foreign = fused.model_copy(update={"path": tmp_path / library.BINARY})
    with pytest.raises(BadInput, match=r"ONNX Runtime does not load .*actuary ops build"):
        library.register(onnxruntime.SessionOptions(), foreign)


def test_each_failed_registration_hands_out_a_status_of_its_own(fused, tmp_path):
    """ONNX Runtime frees what it is handed: the same status at the second failure would be freed twice."""
    statuses = iter([0x1000, 0x2000])
    create_domain = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: next(statuses))
    api = (ctypes.c_void_p * 415)()
    api[26] = ctypes.cast(create_domain, ctypes.c_void_p)
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(lambda _: ctypes.addressof(api))
    base = (ctypes.c_void_p * 2)(ctypes.cast(get_api, ctypes.c_void_p))
    another = ctypes.CDLL(shutil.copy(fused.path, tmp_path))  # not the copy whose operators are registered
    another.RegisterCustomOps.restype = ctypes.c_void_p
    assert [another.RegisterCustomOps(None, base) for _ in range(2)] == [0x1000, 0x2000]


def info(name: str, **changes) -> ActivationInfo:
    return describe(get(name)).model_copy(update=changes)


def test_the_library_is_used_for_its_own_formulas_only(fused):
    runtime = Runtime("cpu", 1, fused.path.parent)
    assert runtime.ops is not None
    assert runtime.unfused(info("gelu")) == ""
    assert "formula of 'gelu' is not the bundle's" in runtime.unfused(info("gelu", digest="0" * 12))
    assert "export it again" in runtime.unfused(info("gelu", digest=""))
    assert "has no 'softmax'" in runtime.unfused(info("softmax"))
    assert "has no CUDA kernels" in fused.why_not("gelu", trace(get("gelu")).digest, cuda=True)
    assert fused.model_copy(update={"cuda": ["90"]}).why_not("gelu", trace(get("gelu")).digest, cuda=True) == ""


def test_a_service_without_a_library_says_so_and_one_with_a_damaged_one_does_not_start(fused, bundles, tmp_path):
    runtime = Runtime("cpu", 1, tmp_path / "nothing")
    assert runtime.ops is None
    assert "actuary ops build" in runtime.unfused(info("gelu"))
    folder = copied(fused, tmp_path / "ops", ops_version=99)
    serve = [*ACTUARY, "serve", "--bundles", str(bundles), "--port", "0", "--ops", str(folder)]
    done = subprocess.run(serve, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 2, done.stderr
    assert "of version 99" in done.stderr
    assert "actuary ops build" in done.stderr


def test_a_served_bundle_runs_fused_and_answers_the_same(fused, bundles):
    import httpx2 as httpx

    def answers(*arguments: str) -> tuple[list[str], list[dict]]:
        with serving(bundles, *arguments) as (url, _):
            body = {"model": "*", "prompt": ["if x is not", "def "], "top_k": 5}
            models = httpx.get(f"{url}/v1/models").json()["data"]
            return [m["unfused"] for m in models], httpx.post(f"{url}/v1/next-token", json=body).json()["results"]

    why, with_ops = answers("--ops", str(fused.path.parent))
    why_not, without = answers("--ops", "/nowhere")
    assert set(why) == {""}
    assert all("never built" in reason for reason in why_not)
    for ours, theirs in zip(with_ops, without, strict=True):
        assert [token["id"] for token in ours["top"]] == [token["id"] for token in theirs["top"]]
        assert [t["logit"] for t in ours["top"]] == pytest.approx([t["logit"] for t in theirs["top"]], abs=1e-4)
