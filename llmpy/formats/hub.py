"""Models on the Hugging Face hub: downloaded into the hub's own cache."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from ..data import pretrained
from ..errors import LlmpyError
from ..system.cache import user_cache
from ..system.download import from_hub, model_files
from .huggingface import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, weight_files

NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
REPOSITORY = re.compile(r"(?!runs/)[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
CACHED = re.compile(r"models--([^/\\]+?)--([^/\\]+)")  # a folder of the hub's cache


def is_name(text: object) -> bool:
    """Return whether `text` names a model on the hub: no local file has this name, and no folder that of its owner."""
    text = str(text)
    known = text in NAMES or REPOSITORY.fullmatch(text) is not None and not os.path.exists(text.partition("/")[0])
    return known and not os.path.exists(text)


def repository(model: object) -> str | None:
    """Return owner/name of a model's name, or of a path in the hub's cache; else None."""
    text = str(model)
    if match := CACHED.search(text):
        return "/".join(match.groups())
    if text in NAMES:
        return f"openai-community/{text}"
    return text if REPOSITORY.fullmatch(text) and not os.path.exists(text) else None


def download(name: str, log: Callable[[str], None]) -> Path:
    """Return the folder of a model, its missing files downloaded. Raises LlmpyError as `from_hub` does."""
    folder = user_cache() / "models" / name  # llmpy 0.1.0's cache
    if name in NAMES and all((folder / file).is_file() for file in (CONFIG_FILE, pretrained.WHOLE, WEIGHTS_FILE)):
        return folder
    owned = str(repository(name))
    folder = config_file(name, log).parent
    if _complete(folder) and pretrained.find(folder) is not None:  # no network needed
        return folder
    try:
        names = model_files(owned, folder.name)
    except LlmpyError:
        if _complete(folder):
            return folder
        raise
    weights = WEIGHTS_FILE if WEIGHTS_FILE in names else INDEX_FILE
    if weights not in names:
        what = f"{owned} on the hub has no {WEIGHTS_FILE}"
        raise LlmpyError("model.missing", what, "Use a model in safetensors; pickles can run code")
    words = (pretrained.WHOLE,) if pretrained.WHOLE in names else ("vocab.json", "merges.txt")
    files = [*dict.fromkeys([*words, *pretrained.SETTINGS, weights])]
    for file in files:  # the weights last
        if file in names:
            from_hub(owned, file, log, revision=folder.name)
            files += [path.name for path in weight_files(folder)] if file == INDEX_FILE else []
    return folder


def config_file(name: str, log: Callable[[str], None]) -> Path:
    """Return the config.json of a model, downloaded if missing. Raises LlmpyError."""
    return from_hub(str(repository(name)), CONFIG_FILE, log)


def _complete(folder: Path) -> bool:
    """Return whether a folder of the cache holds all weights."""
    try:
        return all(path.is_file() for path in weight_files(folder))
    except LlmpyError:
        return False
