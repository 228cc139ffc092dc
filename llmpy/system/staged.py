"""Several files that appear together or not at all, written in a folder with a lock; for one file see `durable`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ..errors import LlmpyError
from . import durable
from .lock import Lock


def staging(target: Path) -> Path:
    """Return the hidden folder of `staged`: next to `target`, or in it if it is a folder (which may be a mount)."""
    return (target if target.is_dir() else target.absolute().parent) / f".{target.absolute().name}.tmp"


@contextlib.contextmanager
def staged(target: Path, folder: bool) -> Iterator[Path]:
    """Yield a path to write instead of `target`, a `folder` or a file with others next to it; rename all at the end.

    On an error nothing is left. What a killed process left is removed by the next one. Raises LlmpyError.
    """
    work = staging(target)
    whole = folder and not target.is_dir()
    lock = Lock(work.with_name(f"{work.name}.lock"))
    try:
        with durable.made(work.parent):
            if not lock.take():
                raise LlmpyError("file.in-use", f"{lock.holder()} is writing {target}", "Wait for it to end")
            try:
                durable.remove(work)
                work.mkdir()
                yield work if folder else work / target.name
                for path in [work] if whole else sorted(work.iterdir()):
                    durable.replace(path, target if whole else work.parent / path.name)
                durable.sync_folder(work.parent)
            finally:
                with contextlib.suppress(OSError):
                    durable.remove(work)
                lock.drop()
    except OSError as error:
        raise durable.unwritable(target, error) from error
    except LlmpyError as error:
        error.args = (str(error).replace(str(work), str(target if folder else work.parent)),)
        raise
