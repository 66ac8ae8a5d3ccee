"""Writing that cannot be seen half done: a file or folder appears whole under its name, or not at all."""

from __future__ import annotations

import contextlib
import errno
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


def check_replaceable(destination: Path, record: str, called: str, remedy: str = "choose another --out") -> None:
    """BadInput where something stands at `destination` that is not ours, since `new_folder` would delete it.

    Args:
        record: a file that every folder of this kind holds.
        called: the kind, for the message.
    """
    if not os.path.lexists(destination) or ((destination / record).is_file() and not destination.is_symlink()):
        return
    if destination.is_symlink() or not destination.is_dir() or any(destination.iterdir()):
        raise BadInput(f"{destination} is not {called}, and would be deleted; {remedy}")


@contextlib.contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A folder to fill, which takes `destination`'s place when the block ends well; else what stood there stays.

    Of several at once, the last to end stays.
    """
    check_writable(destination.parent)
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}.", dir=destination.parent) as scratch:
        partial = Path(scratch, "new")
        partial.mkdir()
        yield partial
        while partial.exists():
            old = Path(tempfile.mkdtemp(prefix="old.", dir=scratch), destination.name)
            try:
                with contextlib.suppress(FileNotFoundError):
                    destination.rename(old)
                partial.rename(destination)
            except BaseException as error:  # Ctrl-C too may come between the two
                if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    continue  # another's took the free place meanwhile
                if old.exists() and not destination.exists():
                    old.rename(destination)
                raise
