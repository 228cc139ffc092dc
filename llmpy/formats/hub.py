"""GPT-2's weights from the Hugging Face hub, kept in the user's cache. `$HF_ENDPOINT` names a mirror."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import LlmpyError
from ..system.cache import user_cache
from ..system.download import fetch, hub
from .huggingface import CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE

NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
FILES = (CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE)


def download(name: str, say: Callable[[str], None]) -> Path:
    """The folder of one of NAMES, with what is not there yet downloaded into it.

    Raises LlmpyError if the network or the disk fails; what has arrived is kept, and continued from next time.
    """
    folder = user_cache() / "models" / name
    try:
        for file in FILES:
            if not (folder / file).is_file():
                fetch(f"{hub()}/openai-community/{name}/resolve/main/{file}", folder / file, say=say)
    except LlmpyError as fault:
        why = str(fault).partition(" — ")[0]
        raise LlmpyError(
            f"no {name}: {why}", "check the network, or download the folder elsewhere and give its path"
        ) from fault
    return folder
