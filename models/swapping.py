"""The whole of `actuary swap`: read, measure, swap, measure, tune, measure, write. The steps are in models/swap.py."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from actuary import BadInput
from models import activations
from models.checkpoints import CONFIG, TOKENIZER, read_pretrained
from models.corpus import Corpus
from models.files import check_replaceable, check_writable, new_folder, write_atomically
from models.swap import OF_SWAP, Tuning, bits_per_byte, swap_activation, tokenized, tune
from models.train import UNFINISHED

REPORT = "swap.json"  # what was measured, beside the weights
WINDOW = 128  # tokens, where nobody chose


def _save(model: PreTrainedModel, folder: Path) -> None:
    try:
        model.save_pretrained(folder)
        config = folder / CONFIG
        settings = json.loads(config.read_text(encoding="utf-8"))
        settings["model_type"] = OF_SWAP + settings["model_type"]
        config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    except SafetensorError as error:  # its own class also where the disk is full
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder.parent.parent)) from error


def _finished(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """The report of a swap that was done before; BadInput where it was another one."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        differ = [key for key in asked if report[key] != asked[key]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{folder / REPORT} cannot be read ({error}); delete {folder}, and swap again") from error
    if differ:
        raise BadInput(
            f"{folder} was swapped with other {differ[0]} ({report[differ[0]]}, now {asked[differ[0]]}); choose "
            "another --out or --name, or delete it"
        )
    return dict(report)


@contextlib.contextmanager
def _interruptible() -> Iterator[list[int]]:
    """A list that holds a signal once Ctrl-C or SIGTERM came."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda n, _: came.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def swap_checkpoint(
    source: str,
    activation: str,
    out: Path,
    name: str | None,
    gated_width: Literal["matched", "full"],
    paths: tuple[Path, ...],
    console: Console,
    *,
    window: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Writes OUT/NAME and returns its report: name, folder, activation, bits_per_byte {before, swapped, tuned}.

    Args:
        settings: of Tuning. `window` is at most the checkpoint's context.
    """
    record = activations.get(activation)
    name = f"{Path(source).resolve().name}-{record.name}" if name is None else name
    if Path(name).name != name or name in ("", ".", ".."):
        raise BadInput(f"--name {name!r} must be the plain name of a folder")
    if (out / name).resolve() in (Path(source).resolve(), *Path(source).resolve().parents):
        raise BadInput(f"{out / name} holds the checkpoint itself; choose another --out or --name")
    check_replaceable(out / name, REPORT, "a swapped checkpoint", "choose another --out or --name")
    check_writable(out)
    asked = {
        "source": source,
        "activation": record.name,
        "corpus": [str(path) for path in paths],
        "settings": {**settings, "window": window, "gated_width": gated_width},
    }
    if (out / name / REPORT).is_file():
        report = _finished(out / name, asked)
        console.print(f"{out / name} is finished; delete it to swap anew", markup=False, soft_wrap=True)
        return report
    with console.status(f"reading {source}"):
        read = read_pretrained(source)
    model, context = read.model, read.model.config.max_position_embeddings
    if window is not None and window > context:
        raise BadInput(f"--window {window} is longer than the checkpoint's context of {context}")
    tuning = Tuning(window=min(window or WINDOW, context), **settings)
    with console.status("reading the corpus"):
        corpus = Corpus.read(paths)
        text = tokenized(corpus, Tokenizer.from_str(read.tokenizer_json.decode()), tuning)
    with console.status("measuring the original"):
        figures = {"before": bits_per_byte(model, text, tuning.window)}
    original = copy.deepcopy(model).eval().requires_grad_(False) if tuning.distil else None
    was = model.num_parameters()
    swap_activation(model, record, gated_width, tuning.seed)
    with console.status("measuring the swap"):
        figures["swapped"] = bits_per_byte(model, text, tuning.window)
    mark = {"source": read.name, "before": round(figures["before"], 6), "activation": record.name,
            "formula": record.digest, "width": gated_width, "corpus_sha256": corpus.sha256}  # fmt: skip
    if tuning.steps:
        loss = TextColumn("{task.fields[loss]}")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), loss, TimeRemainingColumn())
        with _interruptible() as came, Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task(f"tuning {name}", total=tuning.steps, loss="")

            said = 0

            def at(step: int, loss: float) -> None:
                nonlocal said
                bar.update(task, completed=step, loss=f"loss {loss:.3f}")
                if not console.is_terminal and step >= said + tuning.steps // 10:
                    said = step
                    console.print(f"step {step} of {tuning.steps}, loss {loss:.3f}", highlight=False)

            tune(
                model, original, text, tuning, out / UNFINISHED / f"{name}.safetensors", mark,
                at, lambda: bool(came),
            )  # fmt: skip
    with console.status("measuring the result"):
        figures["tuned"] = bits_per_byte(model, text, tuning.window) if tuning.steps else figures["swapped"]
    report = {
        "name": name,
        "folder": str(out / name),
        **asked,
        "bits_per_byte": figures,
        "held_out_tokens": len(text.held_out) - 1,
        "parameters": {"before": was, "after": model.num_parameters()},
        "corpus_sha256": corpus.sha256,
    }
    with new_folder(out / name) as folder:
        _save(model, folder)
        (folder / TOKENIZER).write_bytes(read.tokenizer_json)
        write_atomically(folder / REPORT, json.dumps(report, indent=2))
    return report
