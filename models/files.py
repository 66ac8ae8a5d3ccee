"""Writing that cannot be seen half done: a file or folder appears whole under its name, or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from actuary import BadInput


def write_atomically(path: Path, text: str) -> None:
    """Replaces `path` by `text` in one step."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def check_writable(folder: Path) -> None:
    """Makes the folder where it is not there; BadInput where nothing can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise BadInput(f"cannot write to {folder}: {error.strerror}; choose a folder that you may write to") from error


@contextlib.contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A folder to fill, which takes `destination`'s place when the block ends well; else what stood there stays."""
    check_writable(destination.parent)
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}.", dir=destination.parent) as scratch:
        partial, old = Path(scratch, "new"), Path(scratch, "old")
        partial.mkdir()
        yield partial
        if destination.exists():
            destination.rename(old)
        try:
            partial.rename(destination)
        except OSError:
            if old.exists():
                old.rename(destination)
            raise
