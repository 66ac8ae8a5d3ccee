"""All that a folder of bundles offers: the variants that serve, the bundles that were refused and why."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from actuary import BadInput
from export.bundle import CATALOGUE, MANIFEST, MODEL, ActivationInfo, read_catalogue
from service.errors import ApiError, nearest, shown, utf8
from service.runtime import ProviderMissing, Runtime
from service.variant import Variant, open_variant
from service.vocabulary import Vocabulary


@dataclass(frozen=True)
class Refused:
    """A bundle that does not serve: its folder's name and the reason."""

    name: str
    reason: str


@dataclass(frozen=True)
class Library:
    """What is served, by name, in the folders' alphabetical order."""

    variants: dict[str, Variant]
    refused: tuple[Refused, ...]
    activations: tuple[ActivationInfo, ...]

    def choose(self, names: Sequence[str]) -> list[Variant]:
        """The variants called `names`, or all for ["*"]; 404 with the known ones for any other."""
        if names == ["*"]:
            return list(self.variants.values())
        return [self.one(name) for name in names]

    def one(self, name: str) -> Variant:
        """The variant called `name`; 404 with the known ones where there is none."""
        return self.variants[name] if name in self.variants else self.unknown(name)

    def unknown(self, name: str, others: Collection[str] = ()) -> NoReturn:
        """Raise the 404 of a name that does not serve; `others` are known besides."""
        why = next((f"; its bundle was refused: {r.reason}" for r in self.refused if r.name == name), "")
        hint = nearest(name, [*self.variants, *others])
        raise ApiError(
            "model_not_found",
            f"unknown variant {shown(name)}; known: {', '.join([*self.variants, *others])}{why}{hint}",
            "model",
        )


def open_library(folder: Path, runtime: Runtime) -> Library:
    """Open every bundle of `folder`; BadInput where there is none that can serve."""
    if not folder.is_dir():
        raise BadInput(
            f"there is no folder {folder}; make bundles with `actuary export CHECKPOINT --out {folder}`, "
            "or name their folder with --bundles"
        )
    variants: dict[str, Variant] = {}
    refused: list[Refused] = []
    tokenizers: dict[str, Vocabulary] = {}

    def vocabulary(path: Path, sha256: str) -> Vocabulary:
        if sha256 not in tokenizers:
            tokenizers[sha256] = Vocabulary(path)
        return tokenizers[sha256]

    for path in _bundles(folder):
        try:
            variant = open_variant(path, runtime, vocabulary)
            if variant.name in variants:
                raise BadInput(f"another bundle is called {variant.name!r} too; export one with --name")
            variants[variant.name] = variant
        except ProviderMissing:
            raise
        except Exception as error:  # whatever a damaged file provokes in a parser, the others serve
            refused.append(Refused(utf8(path.name), _one_line(error)))
    if not variants:
        raise BadInput(_nothing_serves(folder, refused))
    try:
        catalogue = read_catalogue(folder)
    except BadInput as error:
        catalogue = []
        refused.append(Refused(CATALOGUE, _one_line(error)))
    activations = {info.name: info for info in catalogue}
    for variant in variants.values():
        activations.setdefault(variant.manifest.activation, variant.manifest.activation_info)
    return Library(variants, tuple(refused), tuple(activations.values()))


def _bundles(folder: Path) -> list[Path]:
    """The folders in `folder` that are, or should be, bundles; `folder` itself where it is one."""

    def like_a_bundle(path: Path) -> bool:
        return (path / MANIFEST).is_file() or (path / MODEL).is_file()

    if like_a_bundle(folder):
        return [folder]
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and like_a_bundle(path))


def _one_line(error: Exception) -> str:
    return utf8(" ".join(str(error).split())[:500]) or type(error).__name__


def _nothing_serves(folder: Path, refused: Sequence[Refused]) -> str:
    if not refused:
        return (
            f"{folder} holds no bundle (a folder with {MANIFEST}); make one with "
            f"`actuary export CHECKPOINT --out {folder}`, or name another folder with --bundles"
        )
    reasons = "".join(f"\n  {bundle.name}: {bundle.reason}" for bundle in refused)
    return f"none of the bundles in {folder} can serve; export them again:{reasons}"
