"""The bundle: a folder with model.onnx, tokenizer.json and manifest.json, as export writes and service reads it.

This module is the contract between the two rooms. It imports neither torch nor onnx, so the
serving process can read what export wrote.
"""

from __future__ import annotations

import datetime
import hashlib
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, computed_field, model_validator

from actuary import BadInput

OPSET = 20  # the newest at which every operator that we emit still has its CUDA kernel registered
DOMAIN = "ai.actuary"  # of our own operators
# Those of them that are no activation: attention of a graph with a cache, and int8 products.
ATTENTION = ("CachedAttention", "CachedAttentionOfRows")
PRODUCTS = ("Int8Linear", "Int8LinearAdd", "RmsNormInt8Linear", "LayerNormInt8Linear")
STRUCTURAL = (*ATTENTION, *PRODUCTS)

MODEL, TOKENIZER, MANIFEST = "model.onnx", "tokenizer.json", "manifest.json"
CATALOGUE = "activations.json"  # beside the bundles: every activation of the registry that exported them

# The graph's inputs and outputs. B prompts, right-padded to T tokens; V the vocabulary; K = min(top_k, V).
INPUT_IDS = "input_ids"  # int64 [B, T], padding may be any id: a causal model never looks ahead
LENGTHS = "lengths"  # int64 [B], 1 <= length <= T
TOP_K = "top_k"  # int64 [1], 0 <= top_k <= V
LOGITS = "logits"  # float32 [B, V], at position length - 1
SOFTMAX = "softmax"  # float32 [B, V]
SIGMOID = "sigmoid"  # float32 [B, V]
TOP_IDS = "top_ids"  # int64 [B, K], by falling logit, ties by rising id
MASS = "mass"  # float32 [B, 2]: sum over V of softmax, of sigmoid
ENTROPY_BITS = "entropy_bits"  # float32 [B, 2]: of softmax; of sigmoid divided by its mass
# A graph with a cache has these besides, each with a default: no cache, no rows. L layers, W = 2 kv_heads head_dim,
# N = sum of the lengths: the prompts' tokens, one prompt after another. input_ids are then the tokens after the cached.
PAST = "past"  # float32 [L, S, W], S slots of a token each: keys, then values; all of it finite
PAST_SLOTS = "past_slots"  # int64 [B, P]: where each prompt's earlier tokens are, padded with any of the S slots
PAST_LENGTHS = "past_lengths"  # int64 [B], 0 <= past_length <= P
ROWS = "rows"  # int64 [E], 0 <= row < N: tokens whose next one is asked besides; the outputs have B + E rows then
PRESENT = "present"  # float32 [L, N, W]: what the cache may keep of these tokens
CACHE = (PAST, PAST_SLOTS, PAST_LENGTHS, ROWS)
INPUTS = (INPUT_IDS, LENGTHS, TOP_K)
OUTPUTS = (LOGITS, SOFTMAX, SIGMOID, TOP_IDS, MASS, ENTROPY_BITS)


NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"  # of a bundle: a folder, and a model's name in a URL


def checked_name(name: str) -> str:
    """`name` itself; BadInput where it cannot name a bundle."""
    if not re.fullmatch(NAME, name):
        raise BadInput(
            f"{name!r} cannot name a bundle; allowed: 1 to 128 letters, digits, '.', '_' and '-', "
            "the first a letter or digit"
        )
    return name


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True, allow_inf_nan=False)


Precision = Literal["fp32", "int8", "fp16", "bf16"]
Kind = Literal["pointwise", "learned", "gated", "hidden_axis"]
# Of gated forms: 8C/3, so that three matrices hold as much as two of 4C; 4C; what another family has.
GatedWidth = Literal["matched", "full", "other"]


class Curve(_Record):
    """f and its slope over x. A gated form is drawn with `up` = 1; one over the hidden axis for one
    unit among `units`, the others at 0."""

    x: list[float]
    y: list[float | None]  # None where it is not a finite number
    slope: list[float | None]
    units: int = 1


class ActivationInfo(_Record):
    """An activation as people who only serve it see it: derived from its registry record."""

    name: str
    formula: str
    kind: Kind
    paper: str
    learned: dict[str, float] = {}
    digest: str = ""  # of the formula; a library of fused operators is used where its digest is the same
    record_digest: str = ""  # of its values, which checkpoints and studies are known by; empty: written before that
    curve: Curve


class Quality(_Record):
    """Held-out quality of the model as it is served; of the tokens under `head`'s own probabilities.

    The text is the one that it was trained beside; of another family's checkpoint, the one named with --corpus.
    """

    bits_per_byte: float
    ece: float
    corpus_sha256: str
    # int8, fp16, bf16: the float32 model's; the difference was measured on the first `tokens` tokens of the same text.
    fp32_bits_per_byte: float | None = None
    tokens: int | None = None


# How a file ran at the gate: as written on the CPU or on CUDA; in float32 with every value rounded to its half type.
Verified = Literal["cpu", "cuda", "emulated"]


class Parity(_Record):
    """ONNX Runtime against torch in float64, over fresh probes; how each bound is derived: export/parity_*.py."""

    max_abs: float  # of the logits
    max_rel: float  # of the logits, over the largest |logit| of their row
    bound: float  # of max_rel
    noise: float | None = None  # int8, fp16, bf16: error of the middle prompt over rounding's own noise
    verified: list[Verified] = ["cpu"]
    activation: float  # the activation alone, random and extreme inputs: worst |error| over its own bound, at most 1
    probes: int
    longest_prompt: int | None = None  # of the probes, in tokens; None: written before that was counted
    probes_left_out: int = 0  # where torch's own float32 misses float64 by more than the bound


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(_Record):
    """What a bundle says of itself; `schema` is 1."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    name: Annotated[str, Field(pattern=f"^{NAME}$")]
    family: str = "actuary_gpt"  # or transformers' model_type
    activation: str
    formula: str
    kind: Kind
    head: Literal["softmax", "sigmoid"]
    precision: Precision
    flavor: Literal["ort", "portable"]
    opset: int
    vocab_size: Annotated[int, Field(gt=0)]
    context: Annotated[int, Field(gt=0)]
    layers: Annotated[int, Field(gt=0)]
    dim: Annotated[int, Field(gt=0)]
    heads: Annotated[int, Field(gt=0)]
    hidden: Annotated[int, Field(gt=0)]
    parameters: Annotated[int, Field(gt=0)]
    quality: Quality | None = None  # None: not measured, as of random weights
    parity: Parity
    activation_info: ActivationInfo
    files: dict[str, Sha256]
    created: datetime.datetime
    versions: dict[str, str]

    @model_validator(mode="after")
    def _names_its_files(self) -> Manifest:
        for name in (MODEL, TOKENIZER):
            if name not in self.files:
                raise ValueError(f"files must hold the sha256 of {name}")
        for name in self.files:
            if Path(name).name != name or name in ("", ".", ".."):
                raise ValueError(f"file {name!r} must be a plain name inside the bundle")
        return self

    @computed_field  # type: ignore[prop-decorator]
    @property
    def gated_width(self) -> GatedWidth | None:
        """Which hidden width of a gated form it has; None where it is not gated."""
        if self.kind != "gated":
            return None
        if self.hidden == 4 * self.dim:
            return "full"
        # To the nearest whole vector of 8 floats, as models/gpt.py rounds.
        return "matched" if abs(self.hidden - 8 * self.dim / 3) <= 4 else "other"

    def to_json(self) -> str:
        return self.model_dump_json(by_alias=True, indent=2) + "\n"


class Catalogue(_Record):
    """Every activation of the registry, written beside the bundles."""

    activations: list[ActivationInfo]


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _describe(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, e['loc'])) or 'manifest'}: {e['msg']}" for e in error.errors()[:5])


def read_manifest(folder: Path) -> Manifest:
    """The manifest of `folder`, checked against its schema only; BadInput says what is wrong."""
    path = folder / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BadInput(f"{folder} is not a bundle: {MANIFEST} cannot be read ({error.strerror})") from error
    except ValidationError as error:
        raise BadInput(f"{path} does not fit schema 1: {_describe(error)}; export it again") from error


def read_bundle(folder: Path) -> Manifest:
    """The manifest of `folder` after every file it names was found with the sha256 it names."""
    manifest = read_manifest(folder)
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise BadInput(f"bundle {folder}: {name} is missing; export it again")
        try:
            found = sha256_of(path)
        except OSError as error:
            raise BadInput(f"bundle {folder}: {name} cannot be read ({error.strerror})") from error
        if found != expected:
            raise BadInput(
                f"bundle {folder}: {name} has sha256 {found[:12]}..., its manifest says {expected[:12]}...; "
                "it is damaged or was changed: export it again"
            )
    return manifest


def read_catalogue(folder: Path) -> list[ActivationInfo]:
    """The activations written beside the bundles of `folder`; none where no exporter wrote them."""
    path = folder / CATALOGUE
    if not path.is_file():
        return []
    try:
        return Catalogue.model_validate_json(path.read_bytes()).activations
    except (ValidationError, OSError) as error:
        raise BadInput(f"{path} cannot be read: {error}; delete it or export again") from error
