"""Downloads from the Hugging Face hub into its cache, and from other servers, checked by sha256; uploads to the hub."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import LlmpyError
from .cache import possible, user_cache
from .durable import made, write_whole

TIMEOUT = 30.0  # seconds without a byte
Log = Callable[[str], None]


def from_hub(
    repository: str, name: str, log: Log, *, dataset: bool = False, sha256: str | None = None,
    revision: str | None = None,
) -> Path:  # fmt: skip
    """Return a file in the hub's cache, downloaded if missing. Raises LlmpyError, also if `sha256` (hex) differs."""
    _place_library()
    from huggingface_hub import errors, hf_hub_download

    kind = "dataset" if dataset else "model"
    with _explained(f"download {name} of {repository}", repository):
        try:
            return Path(hf_hub_download(repository, name, repo_type=kind, revision=revision, local_files_only=True))
        except errors.LocalEntryNotFoundError:
            log(f"downloading {name} of {repository}")
            path = Path(hf_hub_download(repository, name, repo_type=kind, revision=revision))
    if sha256 is not None and _sha256(path) != sha256:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise _mismatch(f"{name} of {repository}")
    return path


def hub_files(repository: str, folder: str) -> list[str]:
    """Return the sorted names of the parquet files in a folder of a dataset. Raises LlmpyError."""
    _place_library()
    from huggingface_hub import HfApi

    with _explained(f"download the file list of {repository}/{folder}", repository):
        names = [entry.path for entry in HfApi().list_repo_tree(repository, folder, repo_type="dataset")]
    if files := sorted(name for name in names if name.endswith(".parquet")):
        return files
    what = f"{repository}/{folder} on the hub has no parquet files"
    raise LlmpyError("download.no-parquet", what, "Use another source: --source")


def model_files(repository: str, revision: str) -> list[str]:
    """Return the names of the files in a model's main folder. Raises LlmpyError."""
    _place_library()
    from huggingface_hub import HfApi

    with _explained(f"download the file list of {repository}", repository):
        return [entry.path for entry in HfApi().list_repo_tree(repository, revision=revision)]


def upload(folder: Path, repository: str) -> str:
    """Upload a folder to a model on the hub, created if missing; return its address. Raises LlmpyError."""
    _place_library()
    from huggingface_hub import HfApi

    with _explained(f"push {folder} to {repository}", repository, push=True):
        address = HfApi().create_repo(repository, exist_ok=True)
        HfApi().upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload with llmpy")
    return str(address)


def fetch(url: str, path: Path, sha256: str, log: Log) -> Path:
    """Return `path`, downloaded through memory if missing. Raises LlmpyError, also if `sha256` (hex) differs."""
    if path.is_file() and _sha256(path) == sha256:
        return path
    log(f"downloading {url}")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as reply:
            content = reply.read()
    except (OSError, http.client.HTTPException) as error:  # HTTPException: truncated
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # a reply
        what = f"cannot download {url}: {getattr(error, 'reason', error)}"
        raise LlmpyError("download.failed", what, "Check the network or use another source: --source") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise _mismatch(url)
    with made(path.parent):
        write_whole(path, lambda temporary: temporary.write_bytes(content))
    return path


def _place_library() -> None:
    """Let the hub's library use our cache if it has no home folder: it would create a folder named ~."""
    base = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
    if not {"HF_HOME", "HF_HUB_CACHE"} & os.environ.keys() and not possible(base / "huggingface"):
        os.environ["HF_HOME"] = str(user_cache() / "huggingface")


@contextlib.contextmanager
def _explained(what: str, repository: str, push: bool = False) -> Iterator[None]:
    """Turn exceptions of the hub's library into an LlmpyError."""
    from huggingface_hub import errors

    try:
        yield
    except Exception as error:  # includes those of its HTTP client, which varies
        cause = error.__cause__ or error if isinstance(error, errors.LocalEntryNotFoundError) else error
        why = getattr(cause, "strerror", None) or next(filter(str.strip, str(cause).splitlines()), "no reason given")
        status = getattr(getattr(error, "response", None), "status_code", None)
        hint = "Check the network (HF_HUB_OFFLINE, HF_ENDPOINT, HTTPS_PROXY) and the disk (HF_HOME)"
        login = "log in (hf auth login, or set HF_TOKEN)"
        if isinstance(error, errors.GatedRepoError):
            page = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')}/{repository}"
            why, hint = "access is restricted", f"Accept its license at {page}, then {login}"
        elif isinstance(error, errors.RepositoryNotFoundError):  # status 401 without a login
            why, hint = f"the hub has no {repository}", f"Check the name; if it is private, {login}"
        elif status in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError):
            hint = f"You need a token with this permission: {login}"
        elif status == 404:
            hint = "Check the name, and HF_ENDPOINT if it is set"
        if push:
            raise LlmpyError("upload.failed", f"cannot {what}: {why}", hint) from error
        hint += ", or pass the path of a local copy"
        raise LlmpyError("download.failed", f"cannot {what}: {why}", hint) from error


def _mismatch(what: str) -> LlmpyError:
    return LlmpyError("download.mismatch", f"{what} has an unexpected sha256", "Try again later or use another source")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
