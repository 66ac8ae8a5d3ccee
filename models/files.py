"""Writing that cannot be seen half done: a file or folder appears whole under its name, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from actuary import BadInput


def write_atomically(path: Path, text: str) -> None:
    """Replaces `path` by `text` in one step."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


@contextlib.contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A folder to fill, which takes `destination`'s place when the block ends well; else what stood there stays."""
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    except OSError as error:
        raise BadInput(
            f"cannot write to {destination.parent}: {error.strerror}; choose another folder with --out"
        ) from error
    try:
        yield partial
        partial.chmod(0o755)
        old = destination.with_name(f".{destination.name}.{os.getpid()}.old")
        if destination.exists():
            destination.rename(old)
        partial.rename(destination)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
