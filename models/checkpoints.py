"""Reads a checkpoint of transformers from a folder or the hub: `actuary export --from`, `actuary swap --from`.

safetensors only, in one file or in shards, float32 in memory; no code that a checkpoint brings is ever run. What
cannot be used is refused before torch sees it where a look at the files tells, with the file or key by name.

    folder -> config.json fits a family that we read -> every shard is whole -> transformers loads it
           -> every key is there and finite -> its tokenizer fits
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from actuary import BadInput
from models.decoder import READERS, activation_of
from models.gpt import ActuaryConfig
from models.swap import OF_SWAP, SWAP, recorded_activation, replace_blocks

CONFIG, WEIGHTS, INDEX, TOKENIZER = "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"
FAMILIES = tuple(family for family in READERS if family != ActuaryConfig.model_type)
AS_SAFETENSORS = "save it again with save_pretrained(folder, safe_serialization=True)"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_FROM_HUB = ("*.json", "*.safetensors", "*.model", "merges.txt", "vocab.txt")  # *.model: of SentencePiece
_OLDER_TOKENIZERS = ("vocab.json", "tokenizer.model", "vocab.txt")
_SAVE_FAST = "save the model's fast tokenizer there with AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SHAPE = ("vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class Pretrained:
    """A checkpoint of transformers as read.

    Args:
        name: of its folder, or its last part on the hub.
        model: float32, in evaluation mode.
        tokenizer_json: the fast tokenizer's own file; its ids are all below the model's vocab_size.
    """

    name: str
    model: PreTrainedModel
    tokenizer_json: bytes


def read_pretrained(source: str) -> Pretrained:
    """The checkpoint in the folder `source`, or of that name on the hub; BadInput says what is wrong and what to do."""
    folder = _folder(source)
    config = _read_config(folder)
    shapes: dict[str, list[int]] = {}
    for path in _weight_files(folder):
        shapes |= _shapes(path)
    _check_shapes(folder, config, shapes)
    model = _load(folder, config)
    tokenizer_json = _read_tokenizer(folder, config.vocab_size)
    return Pretrained(Path(source).resolve().name, model, tokenizer_json)


def _folder(source: str) -> Path:
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists() or not _HUB_NAME.fullmatch(source):
        raise BadInput(f"{source} is not a folder; give one that save_pretrained wrote, or a name on the hub")
    try:
        return Path(snapshot_download(source, allow_patterns=list(_FROM_HUB)))
    except (OSError, ValueError) as error:
        raise BadInput(
            f"there is no folder {source} here, and the hub does not give a checkpoint of that name: "
            f"{str(error).splitlines()[0]}; give a folder that save_pretrained wrote"
        ) from error


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read: {error}; copy the checkpoint again") from error
    if not isinstance(value, dict):
        raise BadInput(f"{path} must hold a JSON object; copy the checkpoint again")
    return value


def _read_config(folder: Path) -> Any:
    if not (folder / CONFIG).is_file():
        raise BadInput(f"checkpoint {folder}: {CONFIG} is missing; give a folder that save_pretrained wrote")
    settings = _read_object(folder / CONFIG)
    family = settings.get("model_type")
    family = family.removeprefix(OF_SWAP) if isinstance(family, str) else None
    if family == ActuaryConfig.model_type:
        raise BadInput(f"checkpoint {folder} is our own; export it without --from: actuary export {folder}")
    if family not in FAMILIES:
        raise BadInput(f"checkpoint {folder} has the architecture {family!r}; we read: {', '.join(FAMILIES)}")
    if "quantization_config" in settings:
        raise BadInput(
            f"checkpoint {folder} holds quantised weights ({settings['quantization_config']}); export reads floating "
            "point: take the checkpoint that it was made from"
        )
    try:
        with _quiet():
            config = CONFIG_MAPPING[family].from_dict({**settings, "model_type": family})
    except Exception as error:  # a configuration class checks itself in many ways
        raise BadInput(_unfit(folder, error)) from error
    for key in _SHAPE:
        value = getattr(config, key)
        if type(value) is not int or value < 1:
            raise BadInput(f"checkpoint {folder}: {CONFIG} has {key} = {value!r}; it must be a whole number above 0")
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if groups is not None and (type(groups) is not int or groups < 1 or heads % groups):
        raise BadInput(
            f"checkpoint {folder}: {CONFIG} has num_key_value_heads = {groups!r}; it must divide "
            f"num_attention_heads = {heads}"
        )
    for key in ("intermediate_size", "n_inner"):
        value = getattr(config, key, None)
        if value is not None and (type(value) is not int or value < 1):
            raise BadInput(f"checkpoint {folder}: {CONFIG} has {key} = {value!r}; it must be a whole number above 0")
    activation_of(config, folder.name)
    return config


def _unfit(folder: Path, error: Exception) -> str:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return f"checkpoint {folder}: transformers cannot use its {CONFIG}: {reason}; correct it, or copy it again"


def _weight_files(folder: Path) -> list[Path]:
    """The file, or every shard that the index names."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
        if pickled:
            raise BadInput(
                f"checkpoint {folder} holds {pickled[0]}, a pickle, which can run any code while it is read; we read "
                f"safetensors alone: where you trust it, {AS_SAFETENSORS}"
            )
        raise BadInput(f"checkpoint {folder} holds neither {WEIGHTS} nor {INDEX}; {AS_SAFETENSORS}")
    shards = _read_object(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(_is_plain(name) for name in shards.values()):
        raise BadInput(f"{folder / INDEX} must map each weight to the name of a file beside it; copy it again")
    names = sorted(set(shards.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise BadInput(
            f"checkpoint {folder}: {len(missing)} of its {len(names)} shards are missing: {', '.join(missing)}; "
            "copy them into it"
        )
    return [folder / name for name in names]


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name


def _shapes(path: Path) -> dict[str, list[int]]:
    """Of each weight, from the header alone, which knows how long the file must be."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path} is cut short or damaged: {error}; copy it again") from error


def _check_shapes(folder: Path, config: Any, shapes: dict[str, list[int]]) -> None:
    """BadInput where a weight has another shape than the config's; before anything of that size is allocated."""
    if config.num_hidden_layers > len(shapes):  # building even their names would take minutes
        raise BadInput(
            f"checkpoint {folder}: {CONFIG} has num_hidden_layers = {config.num_hidden_layers}, and its files hold "
            f"{len(shapes)} weights; they belong to different models"
        )
    try:
        with _quiet(), torch.device("meta"):
            model = _built(config)
    except Exception as error:  # building a model can fail in any of its modules
        raise BadInput(_unfit(folder, error)) from error
    wanted = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    for key, shape in sorted(shapes.items()):
        known = key if key in wanted else f"{model.base_model_prefix}.{key}"  # the hub's GPT-2 leaves the prefix out
        if wanted.get(known, shape) != shape:
            raise BadInput(
                f"checkpoint {folder}: its weights do not fit its {CONFIG}: {key} has another shape, {shape} where the "
                f"config says {wanted[known]}; they belong to different models"
            )


def _built(config: Any) -> PreTrainedModel:
    """The family's own modules; of a checkpoint of `actuary swap`, with our feed-forward blocks in them."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.float32)
    activation = recorded_activation(config)
    if activation is not None:
        swap = getattr(config, SWAP)
        replace_blocks(model, activation, swap["hidden"], bool(swap.get("bias")))
    return model


def _load(folder: Path, config: Any) -> PreTrainedModel:
    try:
        with _quiet():
            if recorded_activation(config) is not None:
                model, seen = _load_swapped(folder, config)
            else:
                model, seen = AutoModelForCausalLM.from_pretrained(
                    folder,
                    config=config,
                    dtype=torch.float32,
                    use_safetensors=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                )
    except Exception as error:  # building a model can fail in any of its modules
        raise BadInput(_unfit(folder, error)) from error
    for kind, what in (
        ("missing_keys", "the model needs {} and the file lacks it"),
        ("unexpected_keys", "the file holds {}, which the model does not have"),
    ):
        if seen[kind]:
            first = min(map(str, seen[kind]))
            raise BadInput(
                f"checkpoint {folder}: its weights do not fit its {CONFIG}: {what.format(first)} "
                f"({len(seen[kind])} such); they belong to different models"
            )
    check_finite(model, str(folder), "the file is damaged, or the training had diverged: take another copy")
    return model.eval()


def _load_swapped(folder: Path, config: Any) -> tuple[PreTrainedModel, dict[str, list[str]]]:
    """A checkpoint of `actuary swap`."""
    model = _built(config)
    tensors = {key: value for path in _weight_files(folder) for key, value in load_file(path).items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    tied = set(model.all_tied_weights_keys)
    return model, {"missing_keys": [key for key in missing if key not in tied], "unexpected_keys": unexpected}


def check_finite(model: PreTrainedModel, name: str, remedy: str) -> None:
    """BadInput names the first weight that holds NaN or infinity."""
    for key, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise BadInput(f"checkpoint {name!r}: {key} holds NaN or infinity: {remedy}")


def _read_tokenizer(folder: Path, vocab_size: int) -> bytes:
    """tokenizer.json as it stands, or what transformers makes of an older form."""
    path = folder / TOKENIZER
    if not any(
        (folder / name).is_file() for name in (TOKENIZER, *_OLDER_TOKENIZERS)
    ):  # transformers makes an empty one
        raise BadInput(
            f"checkpoint {folder} holds no {TOKENIZER}, nor {', '.join(_OLDER_TOKENIZERS)} to make it of; {_SAVE_FAST}"
        )
    try:
        if path.is_file():
            data = path.read_bytes()
        else:
            with _quiet():
                fast = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
            data = fast.backend_tokenizer.to_str().encode()
        tokenizer = Tokenizer.from_str(data.decode())
    except Exception as error:  # tokenizers raises Exception itself
        reason = " ".join(str(error).split())
        raise BadInput(
            f"checkpoint {folder}: {TOKENIZER} cannot be read, nor made of the folder's other files: {reason}; "
            f"{_SAVE_FAST}"
        ) from error
    entries = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if not 0 < entries <= vocab_size:
        raise BadInput(
            f"checkpoint {folder}: its tokenizer has {entries} entries, the model {vocab_size}; "
            "they belong to different models"
        )
    return data


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers reports to the log what we raise; and loading needs no bar."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
