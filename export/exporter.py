"""Checkpoint folder -> bundle folder: read, write the graph, pass the gate, sign the manifest.

Called by `actuary export`. Needs neither the service nor a server.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import platform
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from actuary import BadInput, GateFailed
from export import bundle, onnx_file, parity, prompt_runs
from export.audit import check_file
from export.catalogue import describe, write_catalogue
from export.graph import build
from export.graph_parts import Flavor
from export.half import emulated, half
from export.precision import int8
from models import activations
from models.checkpoints import check_finite, read_pretrained
from models.corpus import Corpus, padded_tokenizer
from models.decoder import Decoder, decoder_of
from models.files import check_replaceable, check_writable, new_folder
from models.gpt import ActuaryConfig, ActuaryGPT
from models.quality import WINDOWS, quality_of
from models.swap import BATCH_OF_WINDOWS, Tuning, tokenized
from models.train import finished

MOST_LOSS = 0.005  # of int8, fp16, bf16, in bits per byte; int8's default shapes lose 0.0002 at most (docs/log.md)
MOST_TOKENS = 2**16  # of held-out text to measure it on; the default corpus has 184,408
# The same of another family's checkpoint, in windows of at most so many tokens: 124M parameters take 2e12 operations.
FOREIGN_TOKENS, FOREIGN_WINDOW = 2**13, 128
Precision = bundle.Precision


@dataclass(frozen=True)
class Checkpoint:
    """A model as read from disk, ours or one of transformers' families; `decoder` is what export makes of it."""

    name: str
    model: PreTrainedModel
    tokenizer_json: bytes
    quality: bundle.Quality | None
    context: int | None = None  # where it shall be shorter than the model's own

    @property
    def decoder(self) -> Decoder:
        return decoder_of(self.model, self.name, self.context)


def find_checkpoints(paths: list[Path]) -> list[Path]:
    """Each path that is a checkpoint, and the checkpoints inside each that is a folder of them, in order."""
    found: list[Path] = []
    for path in paths:
        inside = [path]
        if not (path / "config.json").is_file():  # a hidden folder is a write that never ended
            inside = sorted(p.parent for p in path.glob("*/config.json") if not p.parent.name.startswith("."))
        if not inside:
            raise BadInput(
                f"{path} is neither a checkpoint (it holds no config.json) nor a folder of checkpoints; "
                "train one with: actuary train"
            )
        found += [p for p in inside if p.resolve() not in {other.resolve() for other in found}]
    return found


def check_names(folders: list[Path]) -> None:
    """BadInput where two checkpoints would become one bundle."""
    names = [folder.resolve().name for folder in folders]
    twice = [str(folder) for folder, name in zip(folders, names, strict=True) if names.count(name) > 1]
    if twice:
        raise BadInput(f"{' and '.join(twice)} have one name; export them one at a time, with --name")


def check_target(out: Path, name: str, source: Path | None = None) -> None:
    """BadInput where OUT/NAME is no name for a bundle, or something else stands there, as the `source` itself."""
    try:
        target = out / bundle.checked_name(name)
    except BadInput as error:
        raise BadInput(f"{error}; choose one with --name") from error
    if source and target.resolve() in (source.resolve(), *source.resolve().parents):
        raise BadInput(f"{target} holds the checkpoint itself; choose another --out or --name")
    check_replaceable(target, bundle.MANIFEST, "a bundle", "choose another --out or --name")


def read_checkpoint(folder: Path) -> Checkpoint:
    """BadInput says which file is missing, damaged, or of a kind that we do not read."""
    try:
        _check_there(folder, "config.json")
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise BadInput(f"checkpoint {folder}: config.json must hold an object; train it again")
        if settings.get("model_type") != ActuaryConfig.model_type:
            raise BadInput(
                f"checkpoint {folder} is a {settings.get('model_type')!r}; `actuary export` reads "
                f"{ActuaryConfig.model_type!r}, as `actuary train` writes; another family's folder is read with: "
                f"actuary export --from {folder}"
            )
        _check_there(folder, "model.safetensors", bundle.TOKENIZER)
        transformers_logging.disable_progress_bar()  # two milliseconds of loading need no bar
        model, seen = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, use_safetensors=True, dtype=torch.float32
        )
        wrong = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in seen[kind]]
        if wrong:
            raise BadInput(f"checkpoint {folder}: its weights do not fit its config.json at {wrong[0]}; train it again")
        _check_tokenizer(folder, model.config.vocab_size)
        quality = _read_quality(folder, model.config.activation)
    except (SafetensorError, OSError, json.JSONDecodeError, ValidationError, RuntimeError, UnicodeDecodeError) as error:
        raise BadInput(f"checkpoint {folder} cannot be read: {error}; train it again with: actuary train") from error
    return Checkpoint(folder.resolve().name, model.eval(), (folder / bundle.TOKENIZER).read_bytes(), quality)


def _check_there(folder: Path, *names: str) -> None:
    for name in names:
        if not (folder / name).is_file():
            raise BadInput(f"checkpoint {folder}: {name} is missing; train it again with: actuary train")


def read_foreign(source: str, context: int | None = None) -> Checkpoint:
    """A checkpoint of transformers, from a folder or the hub; its quality is not measured."""
    read = read_pretrained(source)
    return Checkpoint(read.name, read.model, read.tokenizer_json, quality=None, context=context)


def _read_quality(folder: Path, activation: str) -> bundle.Quality | None:
    """What training measured; None for a checkpoint that `actuary train` did not finish itself."""
    measured = finished(folder)
    if measured is None:
        return None
    if measured["recipe"].get("formula") != activations.get(activation).digest:
        raise BadInput(
            f"checkpoint {folder} was trained when {activation!r} had another formula; delete it and train it again"
        )
    return bundle.Quality.model_validate(measured)


def _check_tokenizer(folder: Path, vocab_size: int) -> None:
    try:
        found = Tokenizer.from_file(str(folder / bundle.TOKENIZER)).get_vocab_size()
    except Exception as error:  # tokenizers raises Exception itself
        raise BadInput(f"checkpoint {folder}: {bundle.TOKENIZER} cannot be read: {error}; train it again") from error
    if found != vocab_size:
        raise BadInput(
            f"checkpoint {folder}: {bundle.TOKENIZER} has {found} entries, the model {vocab_size}; "
            "they belong to different models"
        )


def random_checkpoint(name: str, config: ActuaryConfig, corpus: Corpus, seed: int = 0) -> Checkpoint:
    """A model of any shape with random weights, none of them zero: latency does not depend on what they say."""
    torch.manual_seed(seed)
    model = ActuaryGPT(config).eval()
    for block in model.blocks:
        for linear in (block.attention.out, block.ffn.down):
            torch.nn.init.normal_(linear.weight, std=(2 * config.layers * linear.in_features) ** -0.5)
    tokenizer = padded_tokenizer(corpus.tokenizer(config.vocab_size), config.vocab_size)
    return Checkpoint(name, model, tokenizer.to_str().encode(), quality=None)


def export_bundle(
    checkpoint: Checkpoint,
    out: Path,
    name: str | None = None,
    seed: int | None = None,
    flavor: Flavor = "ort",
    precision: Precision = "fp32",
    corpus: Callable[[], Corpus] | None = None,
) -> tuple[Path, bundle.Manifest]:
    """Writes the bundle OUT/NAME; where it does not compute what torch computes, GateFailed, and nothing is written.

    Args:
        name: of the bundle; by default the checkpoint's.
        seed: of the gate's probes; by default a fresh one.
        flavor: of the graph (export/graph.py).
        precision: `int8` quantises the products (export/precision.py); `fp16` and `bf16` narrow the whole graph
            (export/half.py).
        corpus: what the loss of these is measured on; where None, a checkpoint with a quality is measured on the
            default corpus, and one without is not.
    """
    seed = secrets.randbelow(2**32) if seed is None else seed
    name = checkpoint.name if name is None else name
    check_target(out, name)
    check_writable(out)
    check_finite(checkpoint.model, checkpoint.name, "its training diverged; train it again")
    decoder = checkpoint.decoder
    info = describe(decoder.activation)
    # What serves on the CPU: the half types have no kernel for the cache's attention.
    cache = flavor == "ort" and precision in ("fp32", "int8")
    model, quality, float_model = build(decoder, flavor, cache=cache), checkpoint.quality, None
    if precision == "int8":
        if model.ByteSize() > prompt_runs.IN_MEMORY_BYTES:
            raise BadInput(
                f"{name!r} holds {model.ByteSize() / 1e9:.1f} GB in float32; int8 is written for models of up to "
                f"{prompt_runs.IN_MEMORY_BYTES / 1e9:.1f} GB, so export it with --precision fp32"
            )
        quality = _rounded_quality(checkpoint, decoder, flavor, corpus, int8, precision)
        model, float_model = int8(model), model
    elif precision != "fp32":
        model, float_model = half(model, precision), model
        # The CPU has no bfloat16 and is slow in float16: the graph that rounds as a device would.
        rounded = functools.partial(half, name=precision)
        quality = _rounded_quality(
            checkpoint, decoder, flavor, corpus, lambda every: emulated(rounded(every)), precision
        )
    with new_folder(out / name) as folder:
        _save_model(model, folder / bundle.MODEL)
        # Each is the size of the model, and views of its memory, which the gate's float64 would else stand beside.
        del model
        decoder = dataclasses.replace(decoder, weights={})
        (folder / bundle.TOKENIZER).write_bytes(checkpoint.tokenizer_json)
        found = parity.check(decoder, checkpoint.model, str(folder / bundle.MODEL), seed, float_model, precision)
        check_file(onnx_file.read(folder / bundle.MODEL), bundle.OPSET)
        manifest = _manifest(
            name=name,
            family=decoder.family,
            activation=decoder.activation.name,
            formula=info.formula,
            kind=decoder.activation.kind,
            head=decoder.head,
            precision=precision,
            flavor=flavor,
            opset=bundle.OPSET,
            vocab_size=decoder.vocab_size,
            context=decoder.context,
            layers=decoder.layers,
            dim=decoder.dim,
            heads=decoder.heads,
            hidden=decoder.hidden,
            parameters=decoder.parameters,
            quality=quality,
            parity=found,
            activation_info=info,
            files={path.name: bundle.sha256_of(path) for path in sorted(folder.iterdir())},
            created=datetime.datetime.now(datetime.UTC).replace(microsecond=0),
            versions=_versions(),
        )
        (folder / bundle.MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    write_catalogue(out)
    return out / name, manifest


def _rounded_quality(
    checkpoint: Checkpoint,
    decoder: Decoder,
    flavor: Flavor,
    named: Callable[[], Corpus] | None,
    rounded: Callable[[onnx.ModelProto], onnx.ModelProto],
    precision: Precision,
) -> bundle.Quality | None:
    """What the model as `rounded` makes it is worth on held-out text, beside the float32 one; None where no text is
    known for it; GateFailed where it loses too much."""
    trained = checkpoint.quality
    if trained is None and named is None:
        return None
    corpus = (named or Corpus.read)()
    if trained is None:
        window = min(decoder.context, FOREIGN_WINDOW)
        tokenizer = Tokenizer.from_str(checkpoint.tokenizer_json.decode())
        text = tokenized(corpus, tokenizer, Tuning(window=window, held_out_tokens=FOREIGN_TOKENS))
        held_out, held_out_bytes, at_once = text.held_out, text.held_out_bytes, BATCH_OF_WINDOWS
    else:
        if corpus.sha256 != trained.corpus_sha256:
            raise BadInput(
                f"{decoder.name!r} was trained on the corpus {trained.corpus_sha256[:12]}..., this one is "
                f"{corpus.sha256[:12]}...; {precision}'s loss is measured on held-out text, so name the same with "
                "--corpus, or use --precision fp32"
            )
        ids = corpus.ids(decoder.vocab_size)
        window, at_once, held_out, held_out_bytes = decoder.context, WINDOWS, ids.held_out, ids.held_out_bytes
        if len(held_out) > MOST_TOKENS:
            held_out = held_out[:MOST_TOKENS]
            held_out_bytes = len(corpus.tokenizer(decoder.vocab_size).decode(held_out.tolist()).encode())
    every = build(decoder, flavor, positions="all")

    def measured(model: onnx.ModelProto) -> tuple[float, float, float]:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

        def logits_of(batch: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(session.run(None, {bundle.INPUT_IDS: batch.numpy()})[0])

        return quality_of(logits_of, decoder.head, window, held_out, held_out_bytes, at_once)

    (before, ece_before, _), (after, ece, _) = measured(every), measured(rounded(every))
    if not after <= before * (1 + MOST_LOSS):
        raise GateFailed(
            f"{decoder.name!r} in {precision} takes {after:.4f} bits per byte of held-out text, in float32 {before:.4f}"
            f": {after / before - 1:.2%} more, allowed {MOST_LOSS:.1%}; use --precision fp32"
        )
    # What was lost here, added to the checkpoint's own figures, so that all variants stand on the same text.
    whole = trained or bundle.Quality(bits_per_byte=before, ece=ece_before, corpus_sha256=corpus.sha256)
    return bundle.Quality(
        bits_per_byte=whole.bits_per_byte + after - before,
        ece=max(0.0, whole.ece + ece - ece_before),
        corpus_sha256=corpus.sha256,
        fp32_bits_per_byte=whole.bits_per_byte,
        tokens=len(held_out) - 1,
    )


def _manifest(**fields: Any) -> bundle.Manifest:
    try:
        return bundle.Manifest(**fields)
    except ValidationError as error:
        raise BadInput(
            f"this bundle cannot be described: {error.errors()[0]['msg']} ({error.errors()[0]['loc'][0]})"
        ) from error


def _save_model(model: onnx.ModelProto, path: Path) -> None:
    large = model.ByteSize() > prompt_runs.IN_MEMORY_BYTES
    onnx.save_model(model, path, save_as_external_data=large, location=f"{path.name}.data" if large else None)
    onnx.checker.check_model(str(path))  # by path: a model over 2 GiB cannot be checked in memory


def _versions() -> dict[str, str]:
    return {
        "actuary": importlib.metadata.version("actuary"),
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
