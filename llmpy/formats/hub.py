"""Download GPT-2 from the Hugging Face hub into the hub's own cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..system.cache import user_cache
from ..system.download import from_hub
from .huggingface import CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE

NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
FILES = (CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE)


def download(name: str, log: Callable[[str], None]) -> Path:
    """Return the folder of a model of NAMES, downloaded if missing. Raises LlmpyError as `from_hub` does."""
    folder = user_cache() / "models" / name  # llmpy 0.1.0's cache
    if all((folder / file).is_file() for file in FILES):
        return folder
    return [from_hub(f"openai-community/{name}", file, log).parent for file in FILES][0]
