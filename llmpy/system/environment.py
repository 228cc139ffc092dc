"""Environment variables of the libraries: a value that breaks one is an error that names it."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator

from ..errors import LlmpyError


@contextlib.contextmanager
def settings_named(prefix: str, whose: str) -> Iterator[None]:
    """Raise LlmpyError that names the variables PREFIX… which are set if the body, an import, fails."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Environment variable")  # Numba's, with a traceback
            yield
    except Exception as error:  # whatever the library's parser of the value raises
        found = " ".join(f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(prefix))
        if not found or isinstance(error, (LlmpyError, OSError, MemoryError)):
            raise
        what = f"{whose} cannot be used with {found}"
        raise LlmpyError("environment.invalid", what, f"Unset {'it' if ' ' not in found else 'them'}") from error
