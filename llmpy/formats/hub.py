"""GPT-2's weights from the Hugging Face hub, kept in the user's cache.

The hub answers for a large file with X-Linked-Size and X-Linked-ETag, its SHA-256, before it redirects to where the
bytes are: both are checked. `$HF_ENDPOINT` names a mirror.
"""

from __future__ import annotations

import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..cache import user_cache
from ..errors import LlmpyError
from .huggingface import CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE

NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
FILES = (CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE)
ENDPOINT = "https://huggingface.co"
TIMEOUT = 30.0  # seconds without an answer


def download(name: str, say: Callable[[str], None]) -> Path:
    """The folder of one of NAMES, with what is not there yet downloaded into it.

    Raises LlmpyError if the network or the disk fails; what has arrived is kept, and continued from next time.
    """
    from ..download import fetch

    folder = user_cache() / "models" / name
    endpoint = os.environ.get("HF_ENDPOINT", ENDPOINT).rstrip("/")
    for file in FILES:
        path = folder / file
        if path.is_file():
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as fault:
            raise LlmpyError(
                f"cannot make {folder}: {fault.strerror}", "set LLMPY_CACHE_DIR to a folder that can be written"
            ) from fault
        url = f"{endpoint}/openai-community/{name}/resolve/main/{file}"
        size, sha256 = linked(url)
        fetch(url, path, size=size, sha256=sha256, say=say)
    return folder


def linked(url: str) -> tuple[int | None, str | None]:
    """Size and SHA-256 that the hub promises for a large file; None for what it does not say."""
    try:
        request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "llmpy"})
        with urllib.request.build_opener(_Stay).open(request, timeout=TIMEOUT) as answer:
            headers = answer.headers
    except urllib.error.HTTPError as fault:
        if fault.code not in _Stay.REDIRECTS:
            raise LlmpyError(f"{url}: the server answers {fault.code} {fault.reason}", _OTHERWISE) from fault
        headers = fault.headers
    except (OSError, ValueError) as fault:  # URLError is an OSError; ValueError: an endpoint that is no URL
        reason = getattr(fault, "reason", fault)
        raise LlmpyError(f"cannot reach {url}: {reason}", _OTHERWISE) from fault
    size, tag = headers.get("X-Linked-Size", ""), headers.get("X-Linked-ETag", "").strip('"')
    promised = int(size) if re.fullmatch(r"\d{1,18}", size) else None
    return promised, tag if re.fullmatch(r"[0-9a-f]{64}", tag) else None


_OTHERWISE = "check the network, or download the folder elsewhere and give its path to --init"


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: the promise comes with it."""

    REDIRECTS = (301, 302, 303, 307, 308)

    def redirect_request(self, *_: Any) -> None:
        return None
