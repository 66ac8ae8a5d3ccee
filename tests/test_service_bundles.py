"""Damaged bundles are refused by name and reason, and the others serve."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from fastapi.testclient import TestClient

from actuary import BadInput
from export.bundle import OUTPUTS
from service.app import create_app
from service.settings import Settings


def manifest_of(bundle: Path) -> dict:
    return json.loads((bundle / "manifest.json").read_text())


def write_manifest(bundle: Path, **changes: object) -> None:
    (bundle / "manifest.json").write_text(json.dumps({**manifest_of(bundle), **changes}))


def sign_again(bundle: Path) -> None:
    """As somebody would who knows about the hashes: what is inside is still wrong."""
    names = ("model.onnx", "tokenizer.json")
    write_manifest(bundle, files={n: hashlib.sha256((bundle / n).read_bytes()).hexdigest() for n in names})


def truncate(bundle: Path) -> None:
    content = (bundle / "model.onnx").read_bytes()
    (bundle / "model.onnx").write_bytes(content[: len(content) // 2])


def truncate_and_sign(bundle: Path) -> None:
    truncate(bundle)
    sign_again(bundle)


def another_hash(bundle: Path) -> None:
    write_manifest(bundle, files={**manifest_of(bundle)["files"], "tokenizer.json": "0" * 64})


def no_tokenizer(bundle: Path) -> None:
    (bundle / "tokenizer.json").unlink()


def broken_tokenizer(bundle: Path) -> None:
    (bundle / "tokenizer.json").write_text("{}")
    sign_again(bundle)


def no_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()


def manifest_is_a_list(bundle: Path) -> None:
    (bundle / "manifest.json").write_text("[1, 2]")


def manifest_is_no_json(bundle: Path) -> None:
    (bundle / "manifest.json").write_bytes(b"\xff\xfe{")


def renamed_output(bundle: Path) -> None:
    model = onnx.load(bundle / "model.onnx")
    for value in model.graph.output:
        if value.name == "mass":
            value.name = "weight"
    for node in model.graph.node:
        node.output[:] = ["weight" if name == "mass" else name for name in node.output]
    onnx.save(model, bundle / "model.onnx")
    sign_again(bundle)


def one_row_only(bundle: Path) -> None:
    model = onnx.load(bundle / "model.onnx")
    for node in model.graph.node:
        node.output[:] = [f"{name}_rows" if name in OUTPUTS else name for name in node.output]
        node.input[:] = [f"{name}_rows" if name in OUTPUTS else name for name in node.input]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0]), "first"))
    for name in OUTPUTS:
        model.graph.node.append(onnx.helper.make_node("Gather", [f"{name}_rows", "first"], [name], axis=0))
    onnx.save(model, bundle / "model.onnx")
    sign_again(bundle)


def smaller_vocabulary(bundle: Path) -> None:
    write_manifest(bundle, vocab_size=200)


def larger_vocabulary(bundle: Path) -> None:
    write_manifest(bundle, vocab_size=400)


def longer_context(bundle: Path) -> None:
    write_manifest(bundle, context=64)


def same_name(bundle: Path) -> None:
    write_manifest(bundle, name="gelu")


DAMAGE: dict[Callable[[Path], None], str] = {
    truncate: "model.onnx has sha256",
    truncate_and_sign: "",  # whatever ONNX Runtime says
    another_hash: "its manifest says 000000000000",
    no_tokenizer: "tokenizer.json is missing",
    broken_tokenizer: "",  # whatever tokenizers says
    no_manifest: "manifest.json cannot be read",
    manifest_is_a_list: "does not fit schema 1",
    manifest_is_no_json: "does not fit schema 1",
    renamed_output: "no output 'mass'",
    one_row_only: "1 rows for 2 prompts",
    smaller_vocabulary: "vocabulary has 200",
    larger_vocabulary: "",
    longer_context: "",
    same_name: "another bundle is called 'gelu'",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_bad_bundle_is_refused_and_the_others_serve(
    bundles: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    shutil.copytree(bundles / "gelu", tmp_path / "gelu")
    shutil.copytree(bundles / "swiglu", tmp_path / "swiglu")
    damage(tmp_path / "swiglu")
    with TestClient(create_app(Settings(bundles=tmp_path, provider="cpu", threads=1))) as client:
        ready = client.get("/health/ready")
        assert ready.status_code == 200
        assert ready.json()["variants"] == ["gelu"]
        (refused,) = ready.json()["refused"]
        assert refused["name"] == "swiglu"
        assert refused["reason"]
        assert DAMAGE[damage] in refused["reason"]
        assert client.get("/v1/models").json()["refused"] == [refused]
        assert client.post("/v1/next-token", json={"model": "gelu", "prompt": "a"}).status_code == 200
        gone = client.post("/v1/next-token", json={"model": "swiglu", "prompt": "a"})
        assert gone.status_code == 404
        assert refused["reason"] in gone.json()["error"]["message"]


def test_a_folder_whose_name_is_no_text_is_refused_by_its_code(bundles: Path, tmp_path: Path) -> None:
    shutil.copytree(bundles / "gelu", tmp_path / "gelu")
    shutil.copytree(bundles / "swiglu", tmp_path / os.fsdecode(b"bad\xff"))
    truncate(tmp_path / os.fsdecode(b"bad\xff"))
    with TestClient(create_app(Settings(bundles=tmp_path, provider="cpu", threads=1))) as client:
        ready = client.get("/health/ready")
        assert ready.status_code == 200
        assert [refused["name"] for refused in ready.json()["refused"]] == ["bad\\udcff"]
        assert client.get("/v1/models").json()["refused"] == ready.json()["refused"]


def test_a_folder_without_one_good_bundle_is_refused_with_every_reason(bundles: Path, tmp_path: Path) -> None:
    for name in ("gelu", "swiglu"):
        shutil.copytree(bundles / name, tmp_path / name)
        truncate(tmp_path / name)
    with pytest.raises(BadInput, match=r"(?s)gelu: .*sha256.*swiglu: .*sha256"):
        create_app(Settings(bundles=tmp_path, provider="cpu", threads=1))


def test_an_empty_or_missing_folder_says_how_to_make_bundles(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(BadInput, match="actuary export"):
            create_app(Settings(bundles=folder, provider="cpu", threads=1))


def test_one_bundle_alone_is_served(bundles: Path) -> None:
    with TestClient(create_app(Settings(bundles=bundles / "gelu", provider="cpu", threads=1))) as client:
        assert client.get("/health/ready").json()["variants"] == ["gelu"]


def test_a_damaged_catalogue_is_named_and_the_bundles_bring_their_own(bundles: Path, tmp_path: Path) -> None:
    shutil.copytree(bundles / "gelu", tmp_path / "gelu")
    (tmp_path / "activations.json").write_text("{")
    with TestClient(create_app(Settings(bundles=tmp_path, provider="cpu", threads=1))) as client:
        assert client.get("/health/ready").json()["refused"][0]["name"] == "activations.json"
        assert [record["name"] for record in client.get("/v1/activations").json()["data"]] == ["gelu"]


def test_variants_with_the_same_tokenizer_share_it(bundles: Path) -> None:
    library = create_app(Settings(bundles=bundles, provider="cpu", threads=1)).state.service.library
    assert len({id(variant.vocabulary) for variant in library.variants.values()}) == 1
