"""Files from the network: of the Hugging Face hub by its library, into its cache; others by their sha256."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import LlmpyError
from .durable import made, write_whole

TIMEOUT = 30.0  # seconds without a byte
Log = Callable[[str], None]


def from_hub(repository: str, name: str, log: Log, *, dataset: bool = False, sha256: str | None = None) -> Path:
    """Return a file in the hub's cache, downloaded if missing. Raises LlmpyError, also if its `sha256` then differs."""
    from huggingface_hub import errors, hf_hub_download

    kind = "dataset" if dataset else "model"
    with _explained(f"{name} of {repository}"):
        try:
            return Path(hf_hub_download(repository, name, repo_type=kind, local_files_only=True))
        except errors.LocalEntryNotFoundError:
            log(f"downloading {name} of {repository}")
            path = Path(hf_hub_download(repository, name, repo_type=kind))
    if sha256 is not None and _sha256(path) != sha256:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise _wrong(f"{name} of {repository}")
    return path


def hub_files(repository: str, folder: str) -> list[str]:
    """Return the names of the parquet files in a folder of a data set, sorted. Raises LlmpyError if that fails."""
    from huggingface_hub import HfApi

    with _explained(f"the list of {repository}/{folder}"):
        names = [entry.path for entry in HfApi().list_repo_tree(repository, folder, repo_type="dataset")]
    if files := sorted(name for name in names if name.endswith(".parquet")):
        return files
    raise LlmpyError(
        "system.x", f"the hub lists no parquet files in {repository}/{folder}", "Download it elsewhere: --source"
    )


def fetch(url: str, path: Path, sha256: str, log: Log) -> Path:
    """Return `path`, downloaded through memory if missing. Raises LlmpyError, also for another `sha256` (hex)."""
    if path.is_file() and _sha256(path) == sha256:
        return path
    log(f"downloading {url}")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as reply:
            content = reply.read()
    except (OSError, http.client.HTTPException) as error:  # the latter: cut off
        what = f"cannot download {url}: {getattr(error, 'reason', error)}"
        raise LlmpyError("system.x", what, "Check the network, or download it elsewhere: --source") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise _wrong(url)
    with made(path.parent):
        write_whole(path, lambda temporary: temporary.write_bytes(content))
    return path


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn what the hub's library raises into one LlmpyError."""
    from huggingface_hub import errors

    try:
        yield
    except Exception as error:  # also those of its HTTP client, whichever that is
        cause = error.__cause__ or error if isinstance(error, errors.LocalEntryNotFoundError) else error
        why = next(filter(str.strip, str(cause).splitlines()), type(cause).__name__)
        status = getattr(getattr(error, "response", None), "status_code", None)
        hint = "check the network (HF_HUB_OFFLINE, HF_ENDPOINT, HTTPS_PROXY) and the disk (HF_HOME)"
        if status in (401, 403):
            hint = "accept its terms on its page, then log in: hf auth login, or set HF_TOKEN"
        elif status == 404:
            hint = "check the name, and HF_ENDPOINT if it is set"
        raise LlmpyError("system.x", f"cannot download {what}: {why}", f"{hint}, or give the path of a copy") from error


def _wrong(what: str) -> LlmpyError:
    return LlmpyError(
        "system.x", f"{what} is not the file expected: its sha256 differs", "Try again later, or get it elsewhere"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
